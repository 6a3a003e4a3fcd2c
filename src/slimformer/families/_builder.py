"""Builds the anatomy of a model from its family's `Skeleton`, also of a model that is cut or has factored matrices.

Sizes are read from the tensors, not from the config, which knows nothing of cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from slimformer.core.anatomy import (
    VOCABULARY_SITE,
    Anatomy,
    Counter,
    Kind,
    Matrix,
    Point,
    PointRole,
    Role,
    Site,
    Slice,
    Stack,
    Tap,
    Tokens,
    is_shared,
    separate_points,
    sliced,
)
from slimformer.core.deciding import exit_of
from slimformer.core.dividing import apart_of
from slimformer.core.pattern import Patterns
from slimformer.core.patterning import patterns_of
from slimformer.core.sieving import sieve_of
from slimformer.core.standing import is_skipped
from slimformer.families._skeleton import Attention, Block, Bottleneck, FeedForward, Skeleton, StackTable
from slimformer.forms.base import form_of, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(model: PreTrainedModel, skeleton: Skeleton) -> Anatomy:
    """The anatomy of `model`, whose modules have the names that `skeleton` says."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    built = _Built(model, skeleton, prefix, dict(model.named_modules()))
    built.add_stack("encoder", skeleton, Tokens.SOURCE)
    if skeleton.decoder is not None:
        built.add_stack("decoder", skeleton.decoder, Tokens.TARGET)
    built.add_hidden()
    junctions = {
        f"{stack.name}.{place}": exit_of(built.modules[name]) or sieve_of(built.modules[name]) or apart_of(built.modules[name])
        for stack in built.stacks
        for place, name in enumerate(stack.layers)
    }
    return Anatomy(
        sites={site.id: site for site in built.sites},
        matrices={matrix.id: matrix for matrix in built.matrices},
        stacks=tuple(built.stacks),
        attentions=built.attentions,
        hidden_size=built.width,
        points=separate_points(built.points, built.matrices),
        vocabulary=built.vocabulary(),
        junctions={layer: junction for layer, junction in junctions.items() if junction is not None},
        patterns=built.patterns,
    )


Side = Literal["input", "output", "numerator", "denominator", "quotient"]
NORM_PARTS: tuple[Side, ...] = ("numerator", "denominator", "quotient", "output")  # in the order in which they are computed
INPUT_ROLES = (Role.QUERY, Role.KEY, Role.VALUE)
SOFTMAX_PARTS: tuple[tuple[str, Side], ...] = (("numerator",) * 2, ("denominator",) * 2, ("output", "quotient"))


@dataclass
class _Built:
    """What is known of a model so far."""

    model: PreTrainedModel
    skeleton: Skeleton
    prefix: str
    modules: Mapping[str, nn.Module]
    sites: list[Site] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    attentions: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, Patterns] = field(default_factory=dict)
    layer: int = 0  # the place of the next layer among those of all stacks
    stream: list[Slice] = field(default_factory=list)  # what follows the width of the hidden states
    stream_taps: list[Tap] = field(default_factory=list)

    @property
    def full_width(self) -> int:
        """The width of the hidden states before any cut."""
        return int(getattr(self.model.config, self.skeleton.hidden_size))

    @property
    def width(self) -> int:
        """The width of the hidden states, as it stands."""
        project = self.modules.get(f"{self.prefix}{self.skeleton.project}")
        return self.matrices[0].shape[1] if project is None else shape_of(project)[0]

    @property
    def vector_layers(self) -> tuple[str, ...] | None:
        """The Linears behind the pooling of a model that gives vectors, in order; None for any other model."""
        if not type(self.model).__name__.endswith("ForSentenceEmbedding"):
            return None
        return tuple(f"dense.{place}" for place in range(len(cast(Any, self.model).dense)))

    def add_stack(self, name: str, part: StackTable, tokens: Tokens) -> None:
        """Everything in one stack, in the order in which it computes."""
        top = self.prefix + part.layers
        layers = [f"{top}.{layer}" for layer, _ in self.modules[top].named_children()]
        self.add_words("embeddings.word" if tokens is Tokens.SOURCE else f"{name}.embeddings.word", part, tokens)
        self.add_outer_points(f"{name}." if self.stacks else "", part, layers, tokens)
        self.add_start(part, layers)
        embedding = next((self.prefix + item for item in part.embedding if self.prefix + item in self.modules), None)
        norm = None if part.norm is None else self.prefix + part.norm
        beside = tuple(self.prefix + item for item in part.beside if self.prefix + item in self.modules)
        self.stacks.append(Stack(name, tuple(layers), embedding, tokens, norm, beside))
        for index, path in enumerate(layers):
            self.add_bottleneck(f"{name}.{index}.bottleneck_in", part.narrow and part.narrow.under(path), tokens)
            self.add_attention(f"{name}.{index}", "", part.attention.under(path), part, tokens)
            if part.cross is not None:
                self.add_attention(f"{name}.{index}", "cross_", part.cross.under(path), part, tokens)
            for place, block in enumerate(part.stacked):
                self.add_ffn(f"{name}.{index}.stacked{place}", block.under(path), tokens)
            self.add_ffn(f"{name}.{index}", part.ffn.under(path), tokens)
            self.add_bottleneck(f"{name}.{index}.bottleneck_out", part.widen and part.widen.under(path), tokens)
            self.layer += 1
        if norm is not None:
            self.points += self.norm_points(name, norm, tokens)
            self.add_norm(norm)

    def add_words(self, name: str, part: StackTable, tokens: Tokens) -> None:
        """The word table of a stack, if it is not one that is there already."""
        path = next(self.prefix + item for item in part.words if self.prefix + item in self.modules)
        matrix = self.matrix(name, path, Role.EMBEDDING, None, tokens)
        known = [f"{item.module}.weight" for item in self.matrices]
        if matrix.tied not in known:
            self.matrices.append(matrix)

    def add_attention(self, layer: str, kind: str, block: Attention, part: StackTable, tokens: Tokens) -> None:
        """An attention; `kind` is "" for one among the layer's own tokens, "cross_" for one that asks the encoder."""
        if not self.is_there(block):
            return
        where, asked = f"{layer}.{kind}attention", Tokens.SOURCE if kind else tokens
        heads = self.heads(f"{layer}.{kind}heads", where, block, part)
        rules = patterns_of(self.modules[block.module])
        if rules:
            self.patterns[heads.id] = rules
            asking = {f"{module}.{name}" for module in (block.query, block.key) for name in ("weight", "bias")}
            heads = replace(heads, slices=sliced(heads, asking, rules))
        self.sites += [self.sublayer(where, block, block.out), heads]
        self.add_bottleneck(f"{layer}.{kind}bottleneck_asking", block.asking, tokens, where)
        self.points += [*_attention_points(layer, kind, block, tokens), *self.norm_points(where, block.norm, tokens, where)]
        roles = INPUT_ROLES if block.parts == 1 else (Role.QUERY_KEY_VALUE,)
        for role, module in zip((*roles, Role.ATTENTION_OUT), (*block.inputs, block.out), strict=True):
            read = asked if role in (Role.KEY, Role.VALUE) else tokens
            self.matrices.append(self.matrix(f"{layer}.{kind}{role}", module, role, where, read))
        self.attentions[heads.id] = block.module
        self.add_block(block)

    def add_ffn(self, layer: str, block: FeedForward, tokens: Tokens) -> None:
        if not self.is_there(block):
            return
        where = f"{layer}.ffn"
        self.sites += [self.sublayer(where, block, block.out), self.neurons(f"{layer}.neurons", where, block)]
        self.points += [*_ffn_points(layer, block, tokens), *self.norm_points(where, block.norm, tokens, where)]
        for name, module in zip(("ffn_in", "ffn_gate"), block.inputs, strict=False):
            self.matrices.append(self.matrix(f"{layer}.{name}", module, Role.FFN_IN, where, tokens))
        self.matrices.append(self.matrix(f"{layer}.ffn_out", block.out, Role.FFN_OUT, where, tokens))
        self.add_block(block)

    def add_bottleneck(self, name: str, block: Bottleneck | None, tokens: Tokens, sublayer: str | None = None) -> None:
        if block is None:
            return
        if sublayer is None:  # another one reads what the values of its attention do
            self.points.append(Point(f"{name}.input", (block.dense,), "input", PointRole.MATRIX, None, tokens))
        self.points += self.norm_points(name, block.norm, tokens, sublayer)
        self.matrices.append(self.matrix(name, block.dense, Role.BOTTLENECK, sublayer, tokens))

    def is_there(self, block: Block) -> bool:
        return not any(is_skipped(self.modules.get(skip.module)) for skip in block.skips)

    def matrix(self, name: str, path: str, role: Role, sublayer: str | None, tokens: Tokens) -> Matrix:
        """The matrix of the Linear or Embedding at `path`, in whatever form it is stored."""
        module, weight = self.model.get_submodule(path), f"{path}.weight"
        ties = dict(self.model.all_tied_weights_keys or {})  # name -> the name whose tensor it shares
        others = [ties[weight]] if weight in ties else [name for name, source in ties.items() if source == weight]
        tied, decoder = next(iter(others), None), None
        if role is Role.EMBEDDING and len(others) == 1 and isinstance(self.modules[others[0].rpartition(".")[0]], nn.Linear):
            tied, decoder = None, others[0]
        return Matrix(name, path, shape_of(module), role, sublayer, form_of(module), tied, decoder, tokens)

    # -- Sites ---------------------------------------------------------------------------------------------------------

    def vocabulary(self) -> Site | None:
        """The pieces: rows of the one word table, of the Linear that gives words, and of all that is tied to either."""
        tables = [matrix for matrix in self.matrices if matrix.table]
        if len(tables) != 1 or not tables[0].dense:
            return None
        size, state = tables[0].shape[0], self.model.state_dict()
        last = self.model.get_output_embeddings()
        owners = [tables[0].module, *(name for name, module in self.modules.items() if module is last)]
        names = [f"{owner}.{part}" for owner in owners for part in ("weight", "bias")] + list(self.skeleton.pieces)
        ties = self.model.all_tied_weights_keys or {}
        names += [name for pair in ties.items() if set(pair) & set(names) for name in pair]
        own = self.skeleton.pieces  # their last axis counts, of all others the first
        slices = [Slice(name, state[name].ndim - 1 if name in own else 0) for name in dict.fromkeys(names) if name in state]
        if any(state[piece.param].shape[piece.dim] != size for piece in slices):
            return None
        return Site(VOCABULARY_SITE, Kind.PIECES, size, layer=-1, slices=tuple(slices))

    def sublayer(self, name: str, block: Block, out: str) -> Site:
        """A whole block: one unit; gate 0 leaves what enters its `start`."""
        end = Tap(block.end or out, "output", residual=block.start, branch=block.end is None, place=block.residual)
        return Site(name, Kind.SUBLAYER, size=1, layer=self.layer, taps=(end,), skips=block.skips)

    def heads(self, name: str, sublayer: str, block: Attention, part: StackTable) -> Site:
        """The heads of an attention: rows of each input projection, columns of the output projection."""
        config, per_head = self.model.config, self.skeleton.head_dim
        shared = int(getattr(config, part.inner_width)) if part.inner_width else self.full_width
        head_dim = int(getattr(config, per_head) if per_head else shared // getattr(config, part.attention_heads))
        return Site(
            id=name,
            kind=Kind.HEADS,
            size=shape_of(self.modules[block.value])[0] // (head_dim * block.parts),
            layer=self.layer,
            slices=(
                *self.rows(block.inputs, head_dim, block.parts),
                *self.rows(block.places, head_dim),
                Slice(f"{block.out}.weight", 1, head_dim),
            ),
            taps=(Tap(block.out, "input", head_dim),),
            counters=tuple(
                Counter(block.module, attribute, per_unit)
                for attribute, per_unit in zip(block.counters, (1, head_dim), strict=False)
            ),
            sublayer=sublayer,
            bias=block.module if block.shares_bias else None,
            terms=block.terms,
        )

    def neurons(self, name: str, sublayer: str, block: FeedForward) -> Site:
        """The neurons of a feed-forward block: rows of the first matrices, columns of the last."""
        return Site(
            id=name,
            kind=Kind.NEURONS,
            size=shape_of(self.modules[block.into])[0] // block.parts,
            layer=self.layer,
            slices=(*self.rows(block.inputs, 1, block.parts), Slice(f"{block.out}.weight", 1, 1)),
            taps=(Tap(block.out, "input"),),
            sublayer=sublayer,
        )

    def rows(self, modules: Sequence[str], unit: int, parts: int = 1) -> Iterator[Slice]:
        """Rows of Linears, with their bias entries."""
        for module in modules:
            yield Slice(f"{module}.weight", 0, unit, parts)
            if self.modules[module].bias is not None:
                yield Slice(f"{module}.bias", 0, unit, parts)

    # -- Hidden states -------------------------------------------------------------------------------------------------

    def add_start(self, part: StackTable, layers: Sequence[str]) -> None:
        """Where a stack's hidden states begin: behind a projection or a norm, else at the first layer."""
        project = f"{self.prefix}{self.skeleton.project}"
        if project in self.modules:
            self.stream += self.rows((project,), 1)
            self.stream_taps.append(Tap(project, "output"))
        elif part.embedding_norm is not None:
            self.add_norm(self.prefix + part.embedding_norm)
        elif part.attention.end is not None:  # a norm that a sublayer begins with counts only what stays
            self.stream_taps.append(Tap(layers[0], "input"))

    def add_block(self, block: Attention | FeedForward) -> None:
        """A sublayer: its first matrices read the hidden states, its last one writes to them."""
        self.stream += [Slice(f"{module}.weight", 1) for module in block.inputs]
        self.stream += self.rows((block.out,), 1)
        self.add_norm(block.norm)

    def is_norm(self, module: str) -> bool:
        """Whether there is a norm, and not something that stands for none, or only scales and shifts."""
        norm = self.modules[module]
        return getattr(norm, "weight", None) is not None and (hasattr(norm, "eps") or hasattr(norm, "variance_epsilon"))

    def norm_points(self, where: str, module: str, tokens: Tokens, sublayer: str | None = None) -> Iterator[Point]:
        for part in NORM_PARTS if self.is_norm(module) else ():
            yield Point(f"{where}.norm.{part}", (module,), part, PointRole.NORM, sublayer, tokens)

    def add_norm(self, module: str) -> None:
        if not self.is_norm(module):
            return
        parts = ("weight", "bias") if getattr(self.modules[module], "bias", None) is not None else ("weight",)
        self.stream += [Slice(f"{module}.{part}", 0) for part in parts]
        self.stream_taps.append(Tap(module, "norm"))

    def add_hidden(self) -> None:
        """The units of the hidden states, if all that reads them is known: heads of language models are not."""
        inside = tuple(f"{path}." for stack in self.stacks for path in stack.layers)
        outside = {name: module for name, module in self.modules.items() if not name.startswith(inside)}
        if self.skeleton.narrow is not None or self.skeleton.beside:
            return  # each layer has a width of its own inside, or the vectors of distances are as wide
        skeleton, there = self.skeleton, {name for name, _ in self.model.named_parameters()}
        vectors = self.vector_layers
        if vectors is not None and (not vectors or len(cast(Any, self.model).head.pooling) > 1):
            return  # the places of a vector are the answer: without a layer that gives them all, none can go
        project = f"{self.prefix}{skeleton.project}"
        inner = [self.prefix + name for name in skeleton.inner if self.prefix + name != project]
        behind = [name for name in (*inner, *skeleton.head, *skeleton.last, *(vectors or ())) if name in outside]
        words = self.model.get_output_embeddings()  # no Linear once its table is factored
        reads = (name for name, module in outside.items() if isinstance(module, nn.Linear) or module is words)
        if any(name not in (*behind, project) for name in reads):
            return
        tables = [matrix.module for matrix in self.matrices if matrix.role is Role.EMBEDDING]
        tables += [
            name
            for name, module in outside.items()
            if isinstance(module, nn.Embedding) and f"{name}.weight" in there and not is_shared(f"{name}.weight")
        ]
        if project not in self.modules:
            self.stream += [Slice(f"{name}.weight", 1) for name in dict.fromkeys(tables)]
        if behind and (f"{behind[0]}.weight" in there or not isinstance(self.modules[behind[0]], nn.Linear)):
            self.stream.append(Slice(f"{behind[0]}.weight", 1))
        self.sites.append(
            Site("hidden", Kind.HIDDEN, self.width, -1, tuple(self.stream), tuple(self.stream_taps)),
        )

    def add_outer_points(self, kind: str, part: StackTable, layers: Sequence[str], tokens: Tokens) -> None:
        """The embeddings' sum and norm, and what the Linears outside the layers read; these differ from head to head."""
        norm = None if part.embedding_norm is None else self.prefix + part.embedding_norm
        self.points.append(Point(f"{kind}embeddings.sum", (norm or layers[0],), "input", PointRole.EMBEDDING, None, tokens))
        if norm is not None:
            self.points += self.norm_points(f"{kind}embeddings", norm, tokens)
        if not isinstance(part, Skeleton):
            return
        vectors = self.vector_layers or ()
        inner = (*(self.prefix + name for name in part.inner), *part.head, *vectors[:-1])
        reads = Tokens.SOURCE if part.decoder is None else Tokens.TARGET
        for names, role in ((inner, PointRole.MATRIX), ((*part.last, *vectors[-1:]), PointRole.HEAD)):
            for name in names:
                if isinstance(self.modules.get(name), nn.Linear):
                    self.points.append(Point(f"{name}.input", (name,), "input", role, None, reads))


# -- Points ------------------------------------------------------------------------------------------------------------


def _attention_points(layer: str, kind: str, block: Attention, tokens: Tokens) -> Iterator[Point]:
    """What the projections read and give, the softmax, what the output projection reads."""
    where, inputs = f"{layer}.{kind}attention", block.inputs
    asked = Tokens.SOURCE if kind else tokens
    if kind:
        yield Point(f"{where}.input", inputs[:1], "input", PointRole.MATRIX, where, tokens)
        yield Point(f"{where}.memory", inputs[1:], "input", PointRole.MATRIX, where, asked)
    elif block.asking is not None:
        yield Point(f"{where}.memory", (block.asking.dense, *inputs[2:]), "input", PointRole.MATRIX, where, tokens)
        yield Point(f"{where}.input", inputs[:2], "input", PointRole.MATRIX, where, tokens)
    else:
        yield Point(f"{where}.input", inputs, "input", PointRole.MATRIX, where, tokens)
    roles = INPUT_ROLES if block.parts == 1 else (Role.QUERY_KEY_VALUE,)
    for role, module, of in zip(roles, inputs, (tokens, asked, asked), strict=False):
        yield Point(f"{layer}.{kind}{role}.output", (module,), "output", PointRole.ATTENTION, where, of)
    for name, part in SOFTMAX_PARTS:
        yield Point(f"{layer}.{kind}softmax.{name}", (block.module,), part, PointRole.SOFTMAX, where, tokens)
    yield Point(f"{layer}.{kind}attention_out.input", (block.out,), "input", PointRole.MATRIX, where, tokens)


def _ffn_points(layer: str, block: FeedForward, tokens: Tokens) -> Iterator[Point]:
    """What the matrices read, and what the block gives."""
    where = f"{layer}.ffn"
    yield Point(f"{layer}.ffn_in.input", block.inputs[::-1], "input", PointRole.MATRIX, where, tokens)
    yield Point(f"{layer}.ffn_out.input", (block.out,), "input", PointRole.MATRIX, where, tokens)
    yield Point(f"{layer}.ffn_out.output", (block.out,), "output", PointRole.BRANCH, where, tokens)
