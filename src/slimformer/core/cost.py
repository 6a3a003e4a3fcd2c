"""The cost of a plan: parameters, MACs and units by arithmetic, milliseconds from a measured table.

An encoder-decoder that generates reads a text once, and then says one token after the other, on each beam: so its encoder's
MACs count once for each text, those of its decoder once for each token and beam, and the keys and values that the decoder takes
from the encoder once for each text. The tokens are those of the task's own texts, the beams those of the model's
generation_config.

Every cost here is a fixed part plus one curve per unit site, its sublayer's cost at 0, 1, ... units; a search needs no
more. The savings of another form of a matrix are counted on top; in milliseconds of an encoder by the line that the table has for
its feed-forwards. Nothing is measured in this file: `latency` gets its table from its caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slimformer.core.anatomy import VOCABULARY_SITE, Anatomy, Kind, Matrix, Role, Site, Tokens, is_shared
from slimformer.core.junction import Junction, Sieve
from slimformer.core.pattern import asking
from slimformer.core.plan import Plan
from slimformer.errors import TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cost:
    """`curves[site][n]`: cost of the site's sublayer with n units; at 0 the sublayer is gone. `fixed`: all the rest.

    `matrix` gives the cost of one matrix in its form; it is None if only a measurement could. `piece`: what a piece of the vocabulary
    costs, within the fixed part. `narrow`: the cost of a plan that cuts hidden units or takes words out, without its forms: every curve
    changes with their number. `junction`: what an exit adds at a width of the hidden states; None if it counts for nothing, as heads do.
    """

    unit: str  # "parameters", "MACs", "ms", "heads", "neurons"
    fixed: float
    curves: Mapping[str, np.ndarray]  # site -> (size + 1,)
    matrix: Callable[[Matrix], float] | None = None
    piece: float = 0.0
    narrow: Callable[[Plan], float] | None = None
    junction: Callable[[Junction, int], float] | None = None

    def of(self, plan: Plan, anatomy: Anatomy) -> float:
        """The cost of the model that `plan` leaves; the plan speaks in the numbering that the curves were made for."""
        narrower = any(site.id in plan.keep for site in anatomy.of_kind(Kind.HIDDEN))
        narrower |= self.narrow is not None and any(isinstance(junction, Sieve) for junction in plan.junctions.values())
        narrower |= bool(plan.patterns) or any(site in plan.keep for site in anatomy.patterns)
        total = self._narrowed(plan) if narrower else self._added_up(plan, anatomy)
        total -= self._saved(plan, anatomy) if plan.forms else 0.0
        if self.junction is not None and plan.junctions:
            width = anatomy.after(Plan(plan.keep)).hidden_size
            total += sum(self.junction(junction, width) for junction in plan.junctions.values())
        return total

    def _added_up(self, plan: Plan, anatomy: Anatomy) -> float:
        total = self.fixed
        for name, curve in self.curves.items():
            sublayer = anatomy.sites[name].sublayer
            gone = sublayer is not None and plan.keep.get(sublayer) == ()
            units = 0 if gone else len(plan.keep[name]) if name in plan.keep else len(curve) - 1
            total += float(curve[units])
        if anatomy.vocabulary is not None and VOCABULARY_SITE in plan.keep:
            total -= self.piece * (anatomy.vocabulary.size - len(plan.keep[VOCABULARY_SITE]))
        return total

    def _narrowed(self, plan: Plan) -> float:
        if self.narrow is None:
            raise TargetError(
                f"the cost of narrower hidden states, or of heads without queries, in {self.unit} is not known before it is measured.",
                help="count macs or parameters.",
            )
        return self.narrow(plan)

    def _saved(self, plan: Plan, anatomy: Anatomy) -> float:
        """The savings of the plan's forms, in the shapes that its cuts leave."""
        if self.matrix is None:
            raise TargetError(
                f"the cost of a form in {self.unit} is not known before it is measured.", help="count macs or parameters."
            )
        cut, formed = anatomy.after(Plan(plan.keep, patterns=plan.patterns)).matrices, anatomy.after(plan).matrices
        there = [name for name in plan.forms if name in formed]
        return float(sum(self.matrix(cut[name]) - self.matrix(formed[name]) for name in there))

    @property
    def dense(self) -> float:
        """Cost with nothing cut."""
        return self.fixed + float(sum(curve[-1] for curve in self.curves.values()))


def parameters(model: PreTrainedModel, anatomy: Anatomy) -> Cost:
    """Parameters of the whole model; times four, the bytes of its float32 weights."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def narrow(plan: Plan) -> float:
        sizes, gone = {name: list(shape) for name, shape in shapes.items()}, anatomy.gone(plan)
        for site in anatomy.every_site.values():
            for piece in site.slices if site.id in plan.keep and site.sublayer not in gone else ():
                if piece.param in sizes:
                    sizes[piece.param][piece.dim] = piece.left(plan.keep[site.id])
        for name in plan.patterns:
            site = anatomy.sites[name]
            heads = len(asking(anatomy.patterns_after(site, plan)))
            for piece in site.slices:
                if piece.param in sizes and piece.param in anatomy.asking_parameters(site):
                    sizes[piece.param][piece.dim] = heads * piece.unit * piece.parts
        left = anatomy.inside(gone)
        stay = (name for name in sizes if is_shared(name) or not name.startswith(left))
        return float(sum(math.prod(sizes[name]) for name in stay))

    curves = {}
    inside = 0
    for site in anatomy.units:
        per_unit = sum(shapes[piece.param].numel() // site.size for piece in site.slices if piece.param in shapes)
        owners = anatomy.inside([site.sublayer] if site.sublayer else [])
        total = sum(shape.numel() for name, shape in shapes.items() if name.startswith(owners) and not is_shared(name))
        curve = total + per_unit * (np.arange(site.size + 1) - site.size)  # (size + 1,)
        curve[0] = 0
        curves[site.id] = curve.astype(np.float64)
        inside += total
    fixed = float(sum(shape.numel() for shape in shapes.values()) - inside)
    words = anatomy.vocabulary
    piece = (
        0.0 if words is None else sum(shapes[item.param].numel() for item in words.slices if item.param in shapes) / words.size
    )
    return Cost(
        "parameters", fixed, curves, lambda matrix: matrix.parameters, piece, narrow, lambda item, width: item.parameters(width)
    )


def macs(anatomy: Anatomy, lengths: np.ndarray, targets: np.ndarray | None = None, beams: int | None = None) -> Cost:
    """Multiply-accumulates of the layers for an average example of these `lengths` (tokens); embeddings and head left out.

    Args:
        anatomy: The anatomy of the model.
        lengths: Tokens of each text that is read: (examples,).
        targets: Tokens of each text that is written; by default as many as are read.
        beams: How many texts are written at once for each that is read. None: the decoder reads all tokens in one pass, as in
            training. Otherwise it generates: each beam passes it once for each token, and looks back at those before it.

    Returns:
        The cost, whose curves are the sublayers'.

    Example:
        >>> from slimformer import anatomy_of
        >>> from slimformer.testing.tiny import tiny
        >>> one, five = (macs(anatomy_of(tiny("bart")), np.array([16]), np.array([16]), beams) for beams in (1, 5))
        >>> [five.curves[name][-1] / one.curves[name][-1] for name in ("encoder.0.neurons", "decoder.0.neurons")]
        [1.0, 5.0]
    """
    counts = {Tokens.SOURCE: lengths, Tokens.TARGET: lengths if targets is None else targets}
    reaching = anatomy.words_left
    times = {Tokens.SOURCE: 1, Tokens.TARGET: beams or 1}
    means = {tokens: times[tokens] * float(np.mean(count)) for tokens, count in counts.items()}
    matrices = {f"{matrix.module}.weight": matrix for matrix in anatomy.matrices.values()}

    def work(matrix: Matrix) -> float:
        return 0.0 if matrix.role is Role.EMBEDDING else means[matrix.tokens] * matrix.form.macs(matrix.shape)

    curves = {}
    for site in anatomy.units:
        inside = [matrices[piece.param] for piece in site.slices if piece.param in matrices]
        left = reaching[site.layer][site.kind is not Kind.HEADS]
        per_unit = left * sum(work(matrix) for matrix in inside if matrix.dense) / site.size
        if site.kind is Kind.HEADS:
            asker, asked = (
                next(item.tokens for item in inside if item.role in (role, Role.QUERY_KEY_VALUE))
                for role in (Role.QUERY, Role.KEY)
            )
            if beams is not None and asker is asked is Tokens.TARGET:
                pairs = np.multiply(counts[asker], counts[asked] + 1, dtype=np.float64) / 2  # the n-th token asks n
            else:
                pairs = np.multiply(counts[asker], counts[asked], dtype=np.float64)
            # scores, and their product with the values; of the heads that have any, on average over all
            learned = len(anatomy.asking_heads(site)) / site.size
            per_unit += learned * left**2 * site.products * site.taps[0].unit * times[asker] * float(np.mean(pairs))
        curve = per_unit * np.arange(site.size + 1)
        beside = [item for item in anatomy.matrices.values() if item.sublayer == site.sublayer and item not in inside]
        curve[1:] += left * sum(work(matrix) for matrix in (*(item for item in inside if not item.dense), *beside))
        curves[site.id] = curve
    loose = (matrix for matrix in anatomy.matrices.values() if matrix.sublayer is None)
    fixed = means[Tokens.SOURCE] * anatomy.recurrent + sum(work(matrix) for matrix in loose)
    return Cost(
        "MACs",
        fixed,
        curves,
        work,
        narrow=lambda plan: (
            macs(anatomy.after(Plan(plan.keep, {}, plan.junctions, plan.patterns)), lengths, targets, beams).dense
        ),
    )


def unit_count(anatomy: Anatomy, kind: Kind) -> Cost:
    """The number of units of one kind."""
    curves = {site.id: np.arange(site.size + 1, dtype=np.float64) for site in anatomy.of_kind(kind)}
    return Cost(str(kind), 0.0, curves)


def latency(anatomy: Anatomy, fixed_ms: float, table: Mapping[str, Mapping[int, float]]) -> Cost:
    """Milliseconds per example from measured levels: group -> {units: ms of one sublayer}, linear in between.

    0 units cost nothing, and a level never costs less than a smaller one: timings that say so are noise. The curves are those of one
    sublayer at a time: if the last attention goes, the feed-forward before it costs less too, which a model cut so shows by its own
    anatomy.
    """
    curves = {}
    for site in anatomy.units:
        levels = {0: 0.0, **_times(anatomy, site, table)}
        units = np.array(sorted(levels))
        ms = np.maximum.accumulate(np.array([levels[count] for count in units]))
        curves[site.id] = np.interp(np.arange(site.size + 1), units, ms)
    return Cost("ms", fixed_ms, curves, product_ms(anatomy, table))


def product_ms(anatomy: Anatomy, table: Mapping[str, Mapping[int, float]]) -> Callable[[Matrix], float] | None:
    """The milliseconds of a matrix in its form, from two levels of a feed-forward: so much for each product, so much for each number.

    A feed-forward of few neurons is two products with thin matrices: what it takes for none is shared out to its products, and what
    each further neuron takes to the numbers of its row and column. None if the table tells fewer levels, if each feed-forward has another
    form, or if there is a decoder, whose products are computed at other times.
    """
    if len(anatomy.stacks) > 1:
        return None
    for site in anatomy.of_kind(Kind.NEURONS):
        inside = [matrix for matrix in anatomy.matrices.values() if matrix.sublayer == site.sublayer]
        times = _times(anatomy, site, table)
        levels = sorted(units for units in times if units)
        if len(levels) < 2 or not all(matrix.dense for matrix in inside):
            continue
        few, many = times[levels[0]], times[levels[-1]]
        each = max(0.0, many - few) / (levels[-1] - levels[0])
        call = max(0.0, few - each * levels[0]) / len(inside)
        number = each * site.size / sum(math.prod(matrix.shape) for matrix in inside)

        def work(matrix: Matrix, call: float = call, number: float = number) -> float:
            if matrix.role is Role.EMBEDDING:
                return 0.0
            return sum(call + number * math.prod(product) for product in matrix.form.products(matrix.shape))

        return work
    return None


def _times(anatomy: Anatomy, site: Site, table: Mapping[str, Mapping[int, float]]) -> Mapping[int, float]:
    """The levels of a site; a table without those of the last layer counts it as the others."""
    return table.get(group(anatomy, site)) or table[str(site.kind)]


def group(anatomy: Anatomy, site: Site) -> str:
    """What sites that cost alike have in common: their kind, with "last_", "decoder_" or "cross_" before it.

    The last attention of an encoder alone, and what comes after it, are "last_heads" and "last_neurons": a classifier reads one token,
    and so these compute one. A decoder has "decoder_heads", "cross_heads" and "decoder_neurons".
    """
    stack = anatomy.stack_of(site.layer)
    if stack is not anatomy.stacks[0]:
        own = site.id.rpartition(".")[2]
        return own if own == "cross_heads" else f"decoder_{site.kind}"
    if len(anatomy.stacks) > 1:
        return str(site.kind)
    attending = max((other.layer for other in anatomy.of_kind(Kind.HEADS)), default=0)
    return f"last_{site.kind}" if site.layer >= attending else str(site.kind)
