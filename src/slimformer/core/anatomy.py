"""An anatomy: the parts of a model that can be cut, by their names and sizes alone.

A family writes it: the *sites* whose units can go, each as a list of coupled tensor slices; the *matrices* and the form
of each; the *points* where activations can be seen or quantized; the *stacks* of layers, one of an encoder, two of an
encoder-decoder; the modules that compute attentions; the *vocabulary*, whose pieces have a row each in the word table.
Nothing here touches a tensor: `shrink.py` cuts, `gating.py` masks, `points.py` reaches activations and `cost.py`
counts, all from these tables.

A site keeps its slices and taps whatever form its matrices have, so it can still be gated. It can no longer be cut once
one of its matrices is factored, and `Plan.check` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, Protocol

from slimformer.core.apart import Apart
from slimformer.core.form import DENSE, Form, Shape
from slimformer.core.junction import Exit, Junction, Sieve
from slimformer.core.pattern import Patterns, asking, over


class Kind(StrEnum):
    """The kind of unit that a site has."""

    HEADS = "heads"
    NEURONS = "neurons"
    SUBLAYER = "sublayer"
    HIDDEN = "hidden units"  # of the residual stream: all layers share them
    PIECES = "pieces"  # of words: the rows of the word table


VOCABULARY_SITE = "vocabulary"  # the site of the pieces


class Role(StrEnum):
    """The part that a matrix plays in its model."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    QUERY_KEY_VALUE = "query_key_value"  # all three in one matrix, one below the other
    ATTENTION_OUT = "attention_out"
    FFN_IN = "ffn_in"
    FFN_OUT = "ffn_out"
    FILTERS = "filters"  # of a convolution over words
    BOTTLENECK = "bottleneck"  # between the hidden states and what a layer computes in, of another width
    EMBEDDING = "embedding"
    CLASSIFIER = "classifier"


ATTENTION_ROLES = (Role.QUERY, Role.KEY, Role.VALUE, Role.QUERY_KEY_VALUE, Role.ATTENTION_OUT)
FFN_ROLES = (Role.FFN_IN, Role.FFN_OUT)


class Tokens(StrEnum):
    """The tokens that an activation has a row for."""

    SOURCE = "source"  # what the encoder reads
    TARGET = "target"  # what the decoder has said so far

    @property
    def ids(self) -> str:
        """The input of the model that holds them."""
        return "input_ids" if self is Tokens.SOURCE else "decoder_input_ids"

    @property
    def mask(self) -> str:
        """The input of the model that is 1 where they are no padding."""
        return "attention_mask" if self is Tokens.SOURCE else "decoder_attention_mask"


class PointRole(StrEnum):
    """The kind of activation that passes at a point."""

    MATRIX = "matrix"  # the input of a Linear; int8 files compute these products in integers
    HEAD = "head"  # the input of the last Linear, which gives the outputs
    ATTENTION = "attention"  # the inputs of attention's own two products: queries, keys, values
    SOFTMAX = "softmax"  # its numerator, denominator and output
    NORM = "norm"  # a LayerNorm's numerator, denominator, their quotient, and its output
    BRANCH = "branch"  # the output of a feed-forward block, before the residual is added
    EMBEDDING = "embedding"  # the sum of the embeddings, before its norm


@dataclass(frozen=True)
class Slice:
    """One axis of one tensor that follows a site: unit u of part p owns rows `p * size * unit + u * unit + [0, unit)`.

    `of`: the units that have rows here, rising; None: all. Heads that attend by position have no queries and keys: u is then the place
    among these, and `size` their number.
    """

    param: str
    dim: int
    unit: int = 1  # rows per unit: head_dim for heads
    parts: int = 1  # stacked blocks: 3 in a fused qkv, 2 in a gated FFN
    of: tuple[int, ...] | None = None

    def count(self, size: int) -> int:
        """How many of a site's `size` units have rows here."""
        return size if self.of is None else len(self.of)

    def rows(self, size: int, keep: Sequence[int]) -> list[int]:
        """Rows that stay when the units `keep` of `size` stay, part after part."""
        places = {unit: place for place, unit in enumerate(range(size) if self.of is None else self.of)}
        kept, count = [places[unit] for unit in keep if unit in places], len(places)
        return [
            (part * count + place) * self.unit + row for part in range(self.parts) for place in kept for row in range(self.unit)
        ]

    def left(self, keep: Sequence[int]) -> int:
        """The length of the axis when the units `keep` stay."""
        return sum(self.of is None or unit in self.of for unit in keep) * self.unit * self.parts


@dataclass(frozen=True)
class Tap:
    """Where a site's units can be multiplied by a gate: the last axis of a module's input or output.

    `residual` is for sublayers: the tap is then the module that ends the sublayer, `residual` the module whose first input, or that at
    `place`, flows past it, and a gate g gives residual + g * (output - residual). With `branch` the output is what the sublayer adds,
    without the residual, as in layers that begin with their norm: the gate multiplies it. A "norm" weighs each unit by its gate
    in its mean and variance, and multiplies its output.
    """

    module: str
    side: Literal["input", "output", "norm"]
    unit: int = 1
    residual: str | None = None
    branch: bool = False
    place: int = 0


@dataclass(frozen=True)
class Counter:
    """A number stored on a module that must follow a site: `attribute` = units kept * `per_unit`."""

    module: str
    attribute: str
    per_unit: int = 1


@dataclass(frozen=True)
class Skip:
    """A module that goes with its sublayer; its stand-in gives its input, the residual that is its second input, or zero.

    `pair`: the module returns a tuple of that and None, as transformers' attention modules do. `counts`: it is a decoder's
    self-attention, and the stand-in goes on counting tokens in the cache of keys: transformers asks the first one how many were
    said. `shares_bias`: it hands on the bias that the attentions of its stack share, whose table stays.
    """

    module: str
    gives: Literal["input", "residual", "zero"]
    pair: bool = False
    counts: bool = False
    shares_bias: bool = False


SHARED_BIAS = "relative_attention_bias"  # the table of a bias that the attentions of a stack share, in its first one


def is_shared(parameter: str) -> bool:
    """Whether a parameter stays when its sublayer goes, because others need it."""
    return f".{SHARED_BIAS}." in parameter


@dataclass(frozen=True)
class Site:
    """A set of `size` interchangeable units. A SUBLAYER site has one unit and no slices: it is cut by its `skips`.

    The one HIDDEN site of a model belongs to no layer; its slices and taps in a sublayer vanish with that sublayer.
    """

    id: str  # "encoder.3.heads"
    kind: Kind
    size: int
    layer: int  # its place among the layers of all stacks; -1 if it belongs to no layer
    slices: tuple[Slice, ...] = ()
    taps: tuple[Tap, ...] = ()
    counters: tuple[Counter, ...] = ()
    sublayer: str | None = None  # the SUBLAYER site this one lives in and vanishes with
    skips: tuple[Skip, ...] = ()  # of a SUBLAYER: the modules that go with it
    bias: str | None = None  # of HEADS: the attention, if it takes its heads' part of a bias that its whole stack shares
    terms: int = 0  # of HEADS: products of queries or keys with relative positions that are added to the scores

    @property
    def products(self) -> int:
        """Of HEADS: multiply-accumulates of a pair of words for each number of a head: two, and two for each term, whose
        distances are twice as many as words."""
        return 2 + 2 * self.terms


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
    decoder: str | None = None  # the same of a word table, if a Linear reads it: the last one of a language model
    tokens: Tokens = Tokens.SOURCE  # that it is multiplied with

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
    def points(self) -> Mapping[str, Point]:
        """The points where a factored matrix reads the inputs of its integer products, by its form's `reads`; none if it is dense."""
        readers = () if self.dense else self.form.reads
        names = {reader: "factor" if len(readers) == 1 else reader for reader in readers}
        return {
            reader: Point(
                f"{self.id}.{name}.input",
                (f"{self.module}.{reader}",),
                "input",
                PointRole.MATRIX,
                self.sublayer,
                self.tokens,
            )
            for reader, name in names.items()
        }


@dataclass(frozen=True)
class Point:
    """A place where an activation passes: the input or output of a module, or a part that is computed within it.

    Several modules share a point if they read one and the same tensor. Parts are those of a LayerNorm, or of the softmax in an
    attention.
    """

    id: str  # "encoder.3.ffn_out.input"
    modules: tuple[str, ...]
    side: Literal["input", "output", "numerator", "denominator", "quotient"]
    role: PointRole
    sublayer: str | None = None  # the SUBLAYER site it vanishes with
    tokens: Tokens = Tokens.SOURCE  # of its second last axis; in a softmax, those that ask


@dataclass(frozen=True)
class Stack:
    """Layers on top of one another, each reading the hidden state that the one below it gives; perhaps a norm on top of them."""

    name: str  # "encoder"
    layers: tuple[str, ...]  # the module whose output is the hidden state after each; a skipped layer keeps its name
    embedding: str | None  # the module whose output is the hidden state before the first; None: no module gives just that
    tokens: Tokens = Tokens.SOURCE
    norm: str | None = None
    beside: tuple[str, ...] = ()  # modules beside the layers that all attentions read


def separate_points(points: Iterable[Point], matrices: Iterable[Matrix]) -> dict[str, Point]:
    """Points by id; a factored matrix leaves the point that it shares with other readers of a tensor and has its own."""
    factored = {matrix.module: matrix for matrix in matrices if not matrix.dense}
    separate: dict[str, Point] = {}
    for point in points:
        if point.role is not PointRole.MATRIX:
            separate[point.id] = point
            continue
        dense = tuple(module for module in point.modules if module not in factored)
        if dense:
            separate[point.id] = replace(point, modules=dense)
        inner = (item for module in point.modules if module in factored for item in factored[module].points.values())
        separate |= {item.id: item for item in inner}
    return separate


def heads_of(layer: str) -> str:
    """The site of the heads in the self-attention of a layer.

    >>> heads_of("encoder.1")
    'encoder.1.heads'
    """
    return f"{layer}.{Kind.HEADS}"


def sliced(site: Site, parameters: Iterable[str], patterns: Patterns) -> tuple[Slice, ...]:
    """The slices of a site of heads, of which those in `parameters` have rows for heads with queries and keys alone."""
    asks, names = asking(patterns), set(parameters)
    of = asks if len(asks) < len(patterns) else None
    return tuple(replace(piece, of=of) if piece.param in names else piece for piece in site.slices)


class PlanLike(Protocol):
    """The part of a `core.plan.Plan` that an anatomy reads; a plan in turn is checked against an anatomy."""

    @property
    def keep(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def forms(self) -> Mapping[str, Form]: ...

    @property
    def junctions(self) -> Mapping[str, Junction]: ...

    @property
    def patterns(self) -> Mapping[str, Patterns]: ...

    def check(self, anatomy: Anatomy) -> None: ...


@dataclass(frozen=True)
class Anatomy:
    """All sites, matrices and points of one model, by id, and its stacks of layers.

    `anatomy_of(model)` makes it.

    Attributes:
        sites: What can be cut, by id.
        matrices: The weights that may change their form, by id.
        stacks: The encoder's layers, and those of the decoder if there is one.
        attentions: The module that computes each attention, by the id of its heads.
        hidden_size: The width of the hidden states.
        points: The places where an activation passes, by id.
        vocabulary: The site of the word pieces. No gate masks them and no budget chooses among them, so it is not one of `sites`;
            None if there are several vocabularies, or if the table is factored and so has no rows.
        junctions: What stands at layers, by the ids of these, in their order: exits, sieves, or the place where segments meet.
        recurrent: How many weights of an LSTM each token meets; they are in no matrix here.
        patterns: The patterns of heads, by the ids of their sites, if some of these have one.

    Example:
        >>> from slimformer import Plan, anatomy_of
        >>> from slimformer.testing.tiny import tiny
        >>> anatomy = anatomy_of(tiny("bert"))  # three layers, each with four heads and 24 neurons
        >>> [site.id for site in anatomy.sites.values() if site.layer == 0]
        ['encoder.0.attention', 'encoder.0.heads', 'encoder.0.ffn', 'encoder.0.neurons']
        >>> anatomy.after(Plan({"encoder.0.heads": (1, 3)})).matrices["encoder.0.query"].shape  # of (32, 32)
        (16, 32)
    """

    sites: Mapping[str, Site]
    matrices: Mapping[str, Matrix]
    stacks: tuple[Stack, ...]
    attentions: Mapping[str, str]
    hidden_size: int
    points: Mapping[str, Point] = field(default_factory=dict)
    vocabulary: Site | None = None
    junctions: Mapping[str, Junction] = field(default_factory=dict)
    recurrent: int = 0
    patterns: Mapping[str, Patterns] = field(default_factory=dict)

    @property
    def exits(self) -> Mapping[str, Exit]:
        """The exits among the junctions."""
        return {layer: junction for layer, junction in self.junctions.items() if isinstance(junction, Exit)}

    @property
    def meeting(self) -> Mapping[str, Apart]:
        """The junction at which segments meet that attended apart in all layers up to it; empty if they attend to each other in all."""
        return {layer: junction for layer, junction in self.junctions.items() if isinstance(junction, Apart)}

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values come from one matrix in some attention."""
        return any(matrix.role is Role.QUERY_KEY_VALUE for matrix in self.matrices.values())

    @property
    def has_bottlenecks(self) -> bool:
        """Whether layers compute in another width than that of the hidden states."""
        return any(matrix.role is Role.BOTTLENECK for matrix in self.matrices.values())

    @property
    def shares_bias(self) -> bool:
        """Whether its attentions add a bias for positions to their scores that a whole stack shares."""
        return any(site.bias is not None for site in self.sites.values())

    @property
    def distance_matrices(self) -> tuple[str, ...]:
        """The Linears that read the vectors of distances and nothing else: what they give follows from the weights alone."""
        known = {matrix.module for matrix in self.matrices.values()}
        named = (piece.param.rpartition(".")[0] for site in self.sites.values() if site.terms for piece in site.slices)
        return tuple(dict.fromkeys(name for name in named if name not in known))

    @property
    def attends_otherwise(self) -> str | None:
        """Why queries and keys do not give the scores from what the values read, as in a BERT; None if they do."""
        if self.fused:
            return "its queries, keys and values are one matrix"
        if self.shares_bias:
            return "its scores hold a bias for positions"
        if any(site.terms for site in self.sites.values()):
            return "its scores hold terms for positions"
        return "its layers have bottlenecks" if self.has_bottlenecks else None

    @property
    def every_site(self) -> Mapping[str, Site]:
        """All that a plan may name: the sites, and the vocabulary."""
        return self.sites if self.vocabulary is None else {**self.sites, self.vocabulary.id: self.vocabulary}

    @property
    def sieves(self) -> Mapping[str, Sieve]:
        """Where words leave, by the ids of layers, in their order."""
        return {layer: junction for layer, junction in self.junctions.items() if isinstance(junction, Sieve)}

    @property
    def words_left(self) -> tuple[tuple[float, float], ...]:
        """For each layer the share of the words that its attention reads, and of those that its feed-forward does."""
        left, found = 1.0, []
        for layer in self.layer_modules:
            before = left
            if layer in self.sieves:
                left *= self.sieves[layer].share
            found.append((before, left))
        return tuple(found)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of all stacks, the encoder's first: the module whose output is the hidden state after each."""
        return tuple(name for stack in self.stacks for name in stack.layers)

    @property
    def layer_modules(self) -> Mapping[str, str]:
        """The module of each layer, by the layer's id, such as "encoder.2"."""
        return {f"{stack.name}.{place}": name for stack in self.stacks for place, name in enumerate(stack.layers)}

    def passed(self, layers: Iterable[str]) -> list[int]:
        """How many layers are computed up to each of some layers, and in all; those that are gone do not count.

        Args:
            layers: Their ids, such as "encoder.1".

        Returns:
            A number for each of them, and one for all.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy_of(tiny("bert")).passed(["encoder.1"])
            [2, 3]
        """
        alive, names = {site.layer for site in self.of_kind(Kind.SUBLAYER)}, list(self.layer_modules)
        return [sum(layer <= names.index(name) for layer in alive) for name in layers] + [len(alive)]

    def stack_of(self, layer: int) -> Stack:
        """The stack that a layer stands in.

        Args:
            layer: Its place among the layers of all stacks, as `Site.layer` says it.

        Returns:
            The stack.

        Raises:
            IndexError: There is no such layer.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy_of(tiny("bert")).stack_of(2).name
            'encoder'
        """
        for stack in self.stacks:
            if layer < len(stack.layers):
                return stack
            layer -= len(stack.layers)
        raise IndexError("there is no such layer")

    @property
    def units(self) -> tuple[Site, ...]:
        """The heads and neurons of the sublayers, in order of their layers: what a budget is shared out to."""
        return tuple(site for site in self.sites.values() if site.kind in (Kind.HEADS, Kind.NEURONS))

    def of_kind(self, kind: Kind) -> tuple[Site, ...]:
        """Sites of one kind, in order of their layers.

        Args:
            kind: HEADS, NEURONS, SUBLAYER or HIDDEN.

        Returns:
            The sites; none if the model has none of that kind.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> from slimformer.core.anatomy import Kind
            >>> [site.size for site in anatomy_of(tiny("bert")).of_kind(Kind.HEADS)]
            [4, 4, 4]
        """
        return tuple(site for site in self.sites.values() if site.kind is kind)

    def encoder_matrices(self) -> tuple[Matrix, ...]:
        """The matrices inside the layers: all but embedding tables and classifiers.

        Returns:
            Six for each layer of a BERT.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> len(anatomy_of(tiny("bert")).encoder_matrices())
            18
        """
        return tuple(item for item in self.matrices.values() if item.role not in (Role.EMBEDDING, Role.CLASSIFIER))

    def after(self, plan: PlanLike) -> Anatomy:
        """The anatomy of the model that `shrink` makes with `plan`, without making it (law 3).

        Args:
            plan: What is kept, in the numbering of this anatomy.

        Returns:
            The smaller anatomy.

        Raises:
            PlanError: The plan does not fit.

        Example:
            >>> from slimformer import Plan, anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy_of(tiny("bert")).after(Plan({"encoder.0.heads": (1, 3)})).sites["encoder.0.heads"].size
            2
        """
        plan.check(self)
        gone = self.gone(plan)
        left = self.inside(gone)
        sites: dict[str, Site] = {}
        patterns: dict[str, Patterns] = {}
        for site in self.sites.values():
            if site.id in gone or site.sublayer in gone:
                continue
            keep = plan.keep.get(site.id)
            sites[site.id] = site if keep is None else replace(site, size=len(keep))
            if site.id in self.patterns or site.id in plan.patterns:
                rules = self.patterns_after(site, plan)
                sites[site.id] = replace(sites[site.id], slices=sliced(site, self.asking_parameters(site), rules))
                patterns |= {site.id: rules} if any(rules) else {}
            if site.kind is Kind.HIDDEN and left:
                slices = tuple(piece for piece in site.slices if not piece.param.startswith(left))
                taps = tuple(tap for tap in site.taps if not f"{tap.module}.".startswith(left))
                sites[site.id] = replace(sites[site.id], slices=slices, taps=taps)
        matrices = {
            matrix.id: self._formed(self.cut(matrix, plan), plan)
            for matrix in self.matrices.values()
            if matrix.sublayer not in gone
        }
        attentions = {name: module for name, module in self.attentions.items() if name in sites}
        points = separate_points((point for point in self.points.values() if point.sublayer not in gone), matrices.values())
        words, pieces = self.vocabulary, plan.keep.get(VOCABULARY_SITE)
        if any(matrix.table and not matrix.dense for matrix in matrices.values()):
            words = None  # a factored table has no rows
        elif words is not None and pieces is not None:
            words = replace(words, size=len(pieces))
        width = next((site.size for site in sites.values() if site.kind is Kind.HIDDEN), self.hidden_size)
        junctions = {**self.junctions, **plan.junctions}
        return replace(
            self,
            sites=sites,
            matrices=matrices,
            attentions=attentions,
            hidden_size=width,
            points=points,
            vocabulary=words,
            junctions={layer: junctions[layer] for layer in self.layer_modules if layer in junctions},
            patterns=patterns,
        )

    def patterns_after(self, site: Site, plan: PlanLike) -> Patterns:
        """The pattern of each head that `plan` leaves of a site of heads, None for those that have none.

        Args:
            site: One of the sites here.
            plan: What is kept.

        Returns:
            As many entries as heads are left.

        Example:
            >>> from slimformer import Plan, anatomy_of
            >>> from slimformer.core.pattern import Fixed
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy = anatomy_of(tiny("bert"))
            >>> plan = Plan({"encoder.0.heads": (1, 3)}, patterns={"encoder.0.heads": (None, Fixed("next"))})
            >>> anatomy.patterns_after(anatomy.sites["encoder.0.heads"], plan)
            (None, Fixed(attends='next'))
        """
        keep = plan.keep.get(site.id, range(site.size))
        own = self.patterns.get(site.id, (None,) * site.size)
        before = tuple(own[unit] for unit in keep)
        return over(before, plan.patterns.get(site.id, (None,) * len(before)))

    def asking_heads(self, site: Site) -> tuple[int, ...]:
        """The heads of a site that have queries and keys, and so scores.

        Args:
            site: One of the sites here, of heads.

        Returns:
            All of them, if none attends by position.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy = anatomy_of(tiny("bert"))
            >>> anatomy.asking_heads(anatomy.sites["encoder.0.heads"])
            (0, 1, 2, 3)
        """
        return asking(self.patterns.get(site.id, (None,) * site.size))

    def asking_matrices(self, site: Site) -> tuple[Matrix, ...]:
        """The matrices of queries and keys in the sublayer of a site.

        Args:
            site: One of the sites here.

        Returns:
            Two of them if it is a site of heads.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy = anatomy_of(tiny("bert"))
            >>> [matrix.id for matrix in anatomy.asking_matrices(anatomy.sites["encoder.0.heads"])]
            ['encoder.0.query', 'encoder.0.key']
        """
        inside = (matrix for matrix in self.matrices.values() if matrix.sublayer == site.sublayer)
        return tuple(matrix for matrix in inside if matrix.role in (Role.QUERY, Role.KEY))

    def asking_parameters(self, site: Site) -> set[str]:
        """The parameters in which a head without queries and keys has no rows.

        Args:
            site: One of the sites here.

        Returns:
            Their names.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy = anatomy_of(tiny("distilbert"))
            >>> sorted(anatomy.asking_parameters(anatomy.sites["encoder.0.heads"]))[0]
            'distilbert.transformer.layer.0.attention.k_lin.bias'
        """
        return {f"{matrix.module}.{part}" for matrix in self.asking_matrices(site) for part in ("weight", "bias")}

    def gone(self, plan: PlanLike) -> set[str]:
        """SUBLAYER sites that `plan` takes out whole.

        Args:
            plan: What is kept.

        Returns:
            Their ids.

        Example:
            >>> from slimformer import Plan, anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy_of(tiny("bert")).gone(Plan({"encoder.1.ffn": ()}))
            {'encoder.1.ffn'}
        """
        return {site.id for site in self.of_kind(Kind.SUBLAYER) if plan.keep.get(site.id) == ()}

    def inside(self, sublayers: Iterable[str]) -> tuple[str, ...]:
        """What the names of all parameters in some sublayers begin with.

        Args:
            sublayers: Ids of SUBLAYER sites.

        Returns:
            The modules that go with them, each with a dot behind it.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy_of(tiny("bert")).inside(["encoder.0.attention"])
            ('bert.encoder.layer.0.attention.',)
        """
        return tuple(f"{skip.module}." for name in sublayers for skip in self.sites[name].skips)

    def factored(self, site: Site) -> tuple[Matrix, ...]:
        """Matrices of a site that are no longer dense: no row or column can be taken out of them.

        Args:
            site: One of the sites here.

        Returns:
            None of a model whose matrices are all dense.

        Example:
            >>> from slimformer import anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy = anatomy_of(tiny("bert"))
            >>> anatomy.factored(anatomy.sites["encoder.0.heads"])
            ()
        """
        params = {piece.param for piece in site.slices}
        return tuple(m for m in self.matrices.values() if not m.dense and f"{m.module}.weight" in params)

    def _formed(self, matrix: Matrix, plan: PlanLike) -> Matrix:
        """The matrix in the form that `plan` gives it; in another form than it had, it is no Linear's weight any more."""
        form = plan.forms.get(matrix.id, matrix.form)
        return matrix if form == matrix.form else replace(matrix, form=form, decoder=None)

    def cut(self, matrix: Matrix, plan: PlanLike) -> Matrix:
        """The matrix with the shape that the units kept by `plan` leave it.

        Args:
            matrix: One of the matrices here.
            plan: What is kept.

        Returns:
            The matrix with another shape; its form stays.

        Example:
            >>> from slimformer import Plan, anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> anatomy = anatomy_of(tiny("bert"))
            >>> anatomy.cut(anatomy.matrices["encoder.0.query"], Plan({"encoder.0.heads": (0,)})).shape
            (8, 32)
        """
        shape = list(matrix.shape)
        for site in self.every_site.values():
            if site.id not in plan.keep and site.id not in plan.patterns:
                continue
            keep, asks = plan.keep.get(site.id, range(site.size)), matrix.role in (Role.QUERY, Role.KEY)
            for piece in site.slices:
                if piece.param == f"{matrix.module}.weight":
                    shape[piece.dim] = piece.left(keep)
                    if asks and site.id in plan.patterns:
                        shape[piece.dim] = len(asking(self.patterns_after(site, plan))) * piece.unit * piece.parts
        return replace(matrix, shape=(shape[0], shape[1]))
