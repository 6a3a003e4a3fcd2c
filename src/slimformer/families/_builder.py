"""Builds the anatomy of a model from its family's `Skeleton`, also of a model that is cut or has factored matrices.

Sizes are read from the tensors, not from the config, which knows nothing of cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from slimformer.core.anatomy import (
    ATTENTION_ROLES,
    FFN_ROLES,
    Anatomy,
    Counter,
    Kind,
    Matrix,
    Point,
    PointRole,
    Role,
    Site,
    Slice,
    Tap,
    separate_points,
)
from slimformer.core.shrink import Skipped
from slimformer.families._skeleton import Attention, Block, FeedForward, Skeleton
from slimformer.forms.base import form_of, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(model: PreTrainedModel, skeleton: Skeleton) -> Anatomy:
    """The anatomy of `model`, whose modules have the names that `skeleton` says."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    hidden_size = int(getattr(model.config, skeleton.hidden_size))
    head_dim = hidden_size // int(getattr(model.config, skeleton.attention_heads))
    modules = dict(model.named_modules())
    layers = [f"{prefix}{skeleton.layers}.{name}" for name, _ in modules[prefix + skeleton.layers].named_children()]
    sites: list[Site] = []
    matrices = [_matrix(model, "embeddings.word", prefix + skeleton.words, Role.EMBEDDING)]
    points = [*_outer_points(modules, prefix, skeleton)]
    attentions: list[str | None] = []
    for index, path in enumerate(layers):
        layer = f"encoder.{index}"
        attention, ffn = skeleton.attention.under(path), skeleton.ffn.under(path)
        if _is_there(modules, attention):
            inputs = (attention.query, attention.key, attention.value)
            heads = shape_of(modules[attention.query])[0] // head_dim
            sites += [_sublayer(index, f"{layer}.attention", attention), _heads(index, layer, attention, heads, head_dim)]
            points += _attention_points(layer, attention)
            for role, name in zip(ATTENTION_ROLES, (*inputs, attention.out), strict=True):
                matrices.append(_matrix(model, f"{layer}.{role}", name, role, f"{layer}.attention"))
            attentions.append(attention.module)
        else:
            attentions.append(None)
        if _is_there(modules, ffn):
            sites += [_sublayer(index, f"{layer}.ffn", ffn), _neurons(index, layer, ffn, shape_of(modules[ffn.into])[0])]
            points += _ffn_points(layer, ffn)
            for role, name in zip(FFN_ROLES, (ffn.into, ffn.out), strict=True):
                matrices.append(_matrix(model, f"{layer}.{role}", name, role, f"{layer}.ffn"))
    return Anatomy(
        sites={site.id: site for site in sites},
        matrices={matrix.id: matrix for matrix in matrices},
        layers=tuple(layers),
        embedding=next(prefix + name for name in skeleton.embedding if prefix + name in modules),
        attentions=tuple(attentions),
        hidden_size=hidden_size,
        head_dim=head_dim,
        points=separate_points(points, matrices),
    )


Side = Literal["input", "output", "numerator", "denominator", "quotient"]
NORM_PARTS: tuple[Side, ...] = ("numerator", "denominator", "quotient", "output")  # in the order in which they are computed
SOFTMAX_PARTS: tuple[tuple[str, Side], ...] = (("numerator",) * 2, ("denominator",) * 2, ("output", "quotient"))


def _is_there(modules: Mapping[str, nn.Module], block: Block) -> bool:
    return not any(isinstance(modules.get(skip.module), Skipped) for skip in block.skips)


def _matrix(model: PreTrainedModel, name: str, path: str, role: Role, sublayer: str | None = None) -> Matrix:
    """The matrix of the Linear or Embedding at `path`, in whatever form it is stored."""
    module, weight = model.get_submodule(path), f"{path}.weight"
    ties = dict(model.all_tied_weights_keys or {})  # name -> the name whose tensor it shares
    tied = ties.get(weight) or next((name for name, source in ties.items() if source == weight), None)
    reads = tied is not None and isinstance(model.get_submodule(tied.rpartition(".")[0]), nn.Linear)
    decoder, other = (tied, None) if reads and role is Role.EMBEDDING else (None, tied)
    return Matrix(name, path, shape_of(module), role, sublayer, form_of(module), other, decoder)


# -- Sites -------------------------------------------------------------------------------------------------------------


def _sublayer(index: int, name: str, block: Block) -> Site:
    """A whole block: one unit; gate 0 leaves what enters its `start`."""
    return Site(
        name, Kind.SUBLAYER, size=1, layer=index, taps=(Tap(block.end, "output", residual=block.start),), skips=block.skips
    )


def _heads(index: int, layer: str, block: Attention, heads: int, head_dim: int) -> Site:
    """The heads of an attention: rows of each input projection, columns of the output projection."""
    count, width = block.counters
    return Site(
        id=f"{layer}.heads",
        kind=Kind.HEADS,
        size=heads,
        layer=index,
        slices=(*_rows((block.query, block.key, block.value), head_dim), Slice(f"{block.out}.weight", 1, head_dim)),
        taps=(Tap(block.out, "input", head_dim),),
        counters=(Counter(block.module, count), Counter(block.module, width, head_dim)),
        sublayer=f"{layer}.attention",
    )


def _neurons(index: int, layer: str, block: FeedForward, width: int) -> Site:
    """The neurons of a feed-forward block: rows of the first matrix, columns of the second."""
    return Site(
        id=f"{layer}.neurons",
        kind=Kind.NEURONS,
        size=width,
        layer=index,
        slices=(*_rows((block.into,), 1), Slice(f"{block.out}.weight", 1, 1)),
        taps=(Tap(block.out, "input"),),
        sublayer=f"{layer}.ffn",
    )


def _rows(modules: Sequence[str], unit: int) -> Iterator[Slice]:
    """Rows of Linears, with their bias entries."""
    for module in modules:
        yield from (Slice(f"{module}.weight", 0, unit), Slice(f"{module}.bias", 0, unit))


# -- Points ------------------------------------------------------------------------------------------------------------


def _attention_points(layer: str, block: Attention) -> Iterator[Point]:
    """What the projections read and give, the softmax, what the output projection reads, the norm."""
    where, inputs = f"{layer}.attention", (block.query, block.key, block.value)
    yield Point(f"{where}.input", inputs, "input", PointRole.MATRIX, where)
    for name, module in zip(("query", "key", "value"), inputs, strict=True):
        yield Point(f"{layer}.{name}.output", (module,), "output", PointRole.ATTENTION, where)
    for name, part in SOFTMAX_PARTS:
        yield Point(f"{layer}.softmax.{name}", (block.module,), part, PointRole.SOFTMAX, where)
    yield Point(f"{layer}.attention_out.input", (block.out,), "input", PointRole.MATRIX, where)
    yield from _norm_points(where, block.norm, where)


def _ffn_points(layer: str, block: FeedForward) -> Iterator[Point]:
    """What the two matrices read, what the block gives, its norm."""
    where = f"{layer}.ffn"
    yield Point(f"{layer}.ffn_in.input", (block.into,), "input", PointRole.MATRIX, where)
    yield Point(f"{layer}.ffn_out.input", (block.out,), "input", PointRole.MATRIX, where)
    yield Point(f"{layer}.ffn_out.output", (block.out,), "output", PointRole.BRANCH, where)
    yield from _norm_points(where, block.norm, where)


def _norm_points(where: str, module: str, sublayer: str | None = None) -> Iterator[Point]:
    for part in NORM_PARTS:
        yield Point(f"{where}.norm.{part}", (module,), part, PointRole.NORM, sublayer)


def _outer_points(modules: Mapping[str, nn.Module], prefix: str, skeleton: Skeleton) -> Iterator[Point]:
    """The embeddings' sum and norm, and what the Linears outside the layers read; these differ from head to head."""
    norm = prefix + skeleton.embedding_norm
    yield Point("embeddings.sum", (norm,), "input", PointRole.EMBEDDING)
    yield from _norm_points("embeddings", norm)
    inner = (*(prefix + name for name in skeleton.inner), *skeleton.head)
    for names, role in ((inner, PointRole.MATRIX), (skeleton.last, PointRole.HEAD)):
        for name in names:
            if isinstance(modules.get(name), nn.Linear):
                yield Point(f"{name}.input", (name,), "input", role)
