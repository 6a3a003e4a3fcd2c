"""What can be cut in a model, told by names and sizes alone.

A family (`families/`) writes an `Anatomy`: *sites* where units can go, each as a list of coupled tensor slices; the
*matrices* and the form each is stored in; the *points* where activations can be seen or quantized; the modules where hidden states and
attentions can be watched. Nothing here touches a tensor: `shrink.py` cuts, `gating.py` masks, `points.py` reaches activations,
`cost.py` counts, all from these tables.

A site keeps its slices and taps whatever form its matrices have: it can still be gated. It can no longer be cut once one of
them is factored, and `Plan.check` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, Protocol

from slimformer.core.form import DENSE, Form, Shape


class Kind(StrEnum):
    HEADS = "heads"
    NEURONS = "neurons"
    SUBLAYER = "sublayer"


class Role(StrEnum):
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUT = "attention_out"
    FFN_IN = "ffn_in"
    FFN_OUT = "ffn_out"
    EMBEDDING = "embedding"
    CLASSIFIER = "classifier"


ATTENTION_ROLES = (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)
FFN_ROLES = (Role.FFN_IN, Role.FFN_OUT)


class PointRole(StrEnum):
    MATRIX = "matrix"  # what a Linear reads; these are the products that int8 files compute in integers
    HEAD = "head"  # what the last Linear reads, the one that gives the outputs
    ATTENTION = "attention"  # what attention's own two products read: queries, keys, values
    SOFTMAX = "softmax"  # its numerator, denominator and output
    NORM = "norm"  # a LayerNorm's numerator, denominator, their quotient, and its output
    BRANCH = "branch"  # what a feed-forward block gives, before the residual is added
    EMBEDDING = "embedding"  # the sum of the embeddings, before its norm


@dataclass(frozen=True)
class Slice:
    """One axis of one tensor that follows a site: unit u of part p owns rows p*size*unit + u*unit + [0, unit)."""

    param: str
    dim: int
    unit: int = 1  # rows per unit: head_dim for heads
    parts: int = 1  # stacked blocks: 3 in a fused qkv, 2 in a gated FFN

    def rows(self, size: int, keep: Sequence[int]) -> list[int]:
        """Rows that stay when the units `keep` of `size` stay, part after part."""
        return [
            (part * size + unit) * self.unit + row for part in range(self.parts) for unit in keep for row in range(self.unit)
        ]


@dataclass(frozen=True)
class Tap:
    """Where a site's units can be multiplied by a gate: the last axis of a module's input or output.

    `residual` is for sublayers: the tap is then the module that ends the sublayer, `residual` the module whose first input
    is what flows past it, and a gate g gives residual + g * (output - residual).
    """

    module: str
    side: Literal["input", "output"]
    unit: int = 1
    residual: str | None = None


@dataclass(frozen=True)
class Counter:
    """A number stored on a module that must follow a site: `attribute` = units kept * `per_unit`."""

    module: str
    attribute: str
    per_unit: int = 1


@dataclass(frozen=True)
class Skip:
    """What a module of a sublayer gives once the sublayer is gone: its input, the residual that is its second input, or zero.

    `pair`: the module returns a tuple of that and None, as transformers' attention modules do.
    """

    module: str
    gives: Literal["input", "residual", "zero"]
    pair: bool = False


@dataclass(frozen=True)
class Site:
    """A set of `size` interchangeable units. A SUBLAYER site has one unit and no slices: it is cut by its `skips`."""

    id: str  # "encoder.3.heads"
    kind: Kind
    size: int
    layer: int
    slices: tuple[Slice, ...] = ()
    taps: tuple[Tap, ...] = ()
    counters: tuple[Counter, ...] = ()
    sublayer: str | None = None  # the SUBLAYER site this one lives in and vanishes with
    skips: tuple[Skip, ...] = ()  # of a SUBLAYER: the modules that go with it, and what stands in for each


@dataclass(frozen=True)
class Matrix:
    """A weight that may change form: a Linear (out, in) or an Embedding (rows, width)."""

    id: str
    module: str
    shape: Shape
    role: Role
    sublayer: str | None = None
    form: Form = DENSE
    tied: str | None = None  # the parameter that is this very weight too

    @property
    def table(self) -> bool:
        """Whether it is an Embedding's, not a Linear's."""
        return self.role is Role.EMBEDDING

    @property
    def dense(self) -> bool:
        """Whether it is stored as a plain matrix."""
        return self.form == DENSE

    @property
    def parameters(self) -> int:
        """Numbers stored, the bias left out."""
        return self.form.parameters(self.shape)

    @property
    def point(self) -> Point | None:
        """The point of its own that a factored matrix has: what its integer product reads is its own affair. None without any."""
        if self.dense or self.form.reads is None:
            return None
        module = f"{self.module}.{self.form.reads}"
        return Point(f"{self.id}.factor.input", (module,), "input", PointRole.MATRIX, self.sublayer)


@dataclass(frozen=True)
class Point:
    """Where an activation passes: the input or output of a module, or a part that is computed within it.

    Several modules are those that read one and the same tensor. Parts are a LayerNorm's, or those of the softmax in an attention.
    """

    id: str  # "encoder.3.ffn_out.input"
    modules: tuple[str, ...]
    side: Literal["input", "output", "numerator", "denominator", "quotient"]
    role: PointRole
    sublayer: str | None = None  # the SUBLAYER site it vanishes with


def told_apart(points: Iterable[Point], matrices: Iterable[Matrix]) -> dict[str, Point]:
    """Points by id, where a factored matrix no longer counts among those that read one tensor: it has a point of its own."""
    factored = {matrix.module: matrix for matrix in matrices if not matrix.dense}
    found: dict[str, Point] = {}
    for point in points:
        if point.role is not PointRole.MATRIX:
            found[point.id] = point
            continue
        dense = tuple(module for module in point.modules if module not in factored)
        if dense:
            found[point.id] = replace(point, modules=dense)
        own = (factored[module].point for module in point.modules if module in factored)
        found |= {item.id: item for item in own if item is not None}
    return found


class PlanLike(Protocol):
    """What an anatomy reads of a `core.plan.Plan`, which in turn is checked against an anatomy."""

    @property
    def keep(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def forms(self) -> Mapping[str, Form]: ...

    def check(self, anatomy: Anatomy) -> None: ...


@dataclass(frozen=True)
class Anatomy:
    """All sites, matrices and points of one model, by id, and the modules that hold each layer's hidden state."""

    sites: Mapping[str, Site]
    matrices: Mapping[str, Matrix]
    layers: tuple[str, ...]  # module whose output is the hidden state after layer i; a skipped layer keeps its name
    embedding: str  # module whose output is the hidden state before layer 0
    attentions: tuple[str | None, ...]  # module that computes the attention of layer i, None where it was cut
    hidden_size: int
    head_dim: int
    points: Mapping[str, Point] = field(default_factory=dict)

    def of_kind(self, kind: Kind) -> tuple[Site, ...]:
        """Sites of one kind, in order of their layers."""
        return tuple(site for site in self.sites.values() if site.kind is kind)

    def heads_of(self, layer: int) -> Site | None:
        """The heads of a layer's attention; None if it was cut."""
        return next((site for site in self.of_kind(Kind.HEADS) if site.layer == layer), None)

    def encoder_matrices(self) -> tuple[Matrix, ...]:
        """The matrices inside the layers: all but embedding tables and classifiers."""
        return tuple(item for item in self.matrices.values() if item.role not in (Role.EMBEDDING, Role.CLASSIFIER))

    def after(self, plan: PlanLike) -> Anatomy:
        """The anatomy of the model that `shrink` makes with `plan`, told without making it (law 3)."""
        plan.check(self)
        gone = self.gone(plan)
        sites = {}
        for site in self.sites.values():
            if site.id in gone or site.sublayer in gone:
                continue
            keep = plan.keep.get(site.id)
            sites[site.id] = site if keep is None else replace(site, size=len(keep))
        matrices = {
            matrix.id: replace(self.cut(matrix, plan), form=plan.forms.get(matrix.id, matrix.form))
            for matrix in self.matrices.values()
            if matrix.sublayer not in gone
        }
        lost = {site.layer for site in self.of_kind(Kind.HEADS) if site.sublayer in gone}
        attentions = tuple(None if layer in lost else name for layer, name in enumerate(self.attentions))
        points = told_apart((point for point in self.points.values() if point.sublayer not in gone), matrices.values())
        return replace(self, sites=sites, matrices=matrices, attentions=attentions, points=points)

    def gone(self, plan: PlanLike) -> set[str]:
        """SUBLAYER sites that `plan` takes out whole."""
        return {site.id for site in self.of_kind(Kind.SUBLAYER) if plan.keep.get(site.id) == ()}

    def factored(self, site: Site) -> tuple[Matrix, ...]:
        """Matrices of a site that are no longer dense: no row or column can be taken out of them."""
        params = {piece.param for piece in site.slices}
        return tuple(m for m in self.matrices.values() if not m.dense and f"{m.module}.weight" in params)

    def cut(self, matrix: Matrix, plan: PlanLike) -> Matrix:
        """The matrix with the shape that the units kept by `plan` leave it."""
        shape = list(matrix.shape)
        for site in self.sites.values():
            keep = plan.keep.get(site.id)
            if keep is None:
                continue
            for piece in site.slices:
                if piece.param == f"{matrix.module}.weight":
                    shape[piece.dim] = len(keep) * piece.unit * piece.parts
        return replace(matrix, shape=(shape[0], shape[1]))
