"""Block movement pruning: blocks of weights go that training moves towards zero, heads and neurons go with their last block.

Paper: Lagunas, Charlaix, Sanh, Rush: Block Pruning For Faster Transformers (EMNLP 2021), sections 3 and 4; constants and
schedule as in their code. Sanh, Wolf, Rush: Movement Pruning (NeurIPS 2020): the same with single weights as blocks.

Idea: Each block has a score, started at 0. Its mask is 1 if sigmoid(score) is above a threshold, and gradients pass the mask
straight through; the threshold and the penalty on mean sigmoid(score) rise by a cubic ramp.

Differs: Warm-up and cool-down are *shares* of the steps. A head goes only if its output is exactly zero (the paper also cuts
heads with zero queries or keys, which still average). A site keeps one unit at least (theirs: half a percent of each mask).
With `keep` or `keep_weights` no threshold is fixed: it is the one that leaves so much, found anew every eight steps (`EVERY`).
Gradients of scores are not clipped (theirs are, with those of the weights). Rewinding, NoNorm and ReLU are left out:
docs/methods.md says why. `Movement` says how our recipes differ from the paper's runs.

Choose when: there is time for several epochs; over `gates` if quality at high compression counts most.

Cost: a training run with a mask over each matrix in each step; with a budget all scores are sorted every eight steps, in
milliseconds. With `block: 1` there is a score for each weight: twice the memory of the weights' own training, and a second or
more for each sort of ten million.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import ATTENTION_ROLES, FFN_ROLES, Anatomy, Kind, Matrix, Role
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.weights import expand, grid_of, liveliness, masked, masked_weights
from slimformer.methods._schedules import cubic_ramp
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step, Zeros
from slimformer.rules import Count, CountOrPair, Fraction, NotNegative, Positive, Probability, Share

READERS = (Role.ATTENTION_OUT, Role.FFN_OUT)  # their blocks are transposed: a head's or a neuron's own weights are columns
EVERY = 8  # steps between two searches for the threshold: each sorts all scores, which takes milliseconds
SPREAD = 0.01  # of the filled weights, in standard deviations of their matrix; from the authors' code

Cover = tuple[str, Callable[[Tensor], Tensor]]  # a parameter, and how its mask is made of scores


@final
@dataclass(frozen=True)
class Movement(Method):
    """`keep`: share of the dense `cost`, reached whatever the scores are; None: lambda and `threshold` decide, as published.

    With a share all scores form one ranking, and the lowest are closed up to a place. Cost falls when units vanish, in every
    variant: heads without an open value or output block, neurons without an open row or column. The final place is the first at
    which the cost of what is left meets the share; while training, the ramp leads from 0 to that place, which is found anew as
    scores move. (A ramp of the cost itself would close most blocks at once: the first unit only goes when all its blocks are
    among the lowest.) Each attention keeps one head and each FFN one neuron, a masked one if need be.

    - `keep_weights`: instead of `keep` (set that to null), the share of the encoder's matrix weights that are not zero in the
      end, those of units that vanish not counted: met from below, as exactly as blocks and units allow. The zeros are the
      result: train on with `keep_zeros`.
    - `variant`: "block": blocks on all matrices; "hybrid": blocks on attention, whole neurons of the FFN; "struct": whole rows
      of a head in each attention matrix, whole neurons.
    - `block`: rows and columns of a block (of Q, K, V; transposed for output matrices), not used by "struct". One that does not
      divide every matrix it is laid on is refused: nothing is padded.
    - `fill`: zeros left in surviving units become small noise, so that a dense stage can use them.

    As recipes: a teacher is `distillation` beside it with `task_weight: 0.1`; no teacher (NT): leave `distillation` out; large
    teacher (LT): name the larger tuned model as the recipe's `teacher`. Block and Hybrid keep zeros inside surviving heads:
    train on with `keep_zeros`. Hybrid Filled: `fill: true`, then a dense stage with `distillation`. Sanh et al. at 3 % of the
    weights: `variant: block`, `block: 1`, `keep: null`, `keep_weights: 0.03`, `lambda_final: 0`; they rank each matrix by
    itself, here all weights form one ranking. Their soft variant: `keep: null` alone, `lambda_final: 400` in their example.

    Our recipes differ from the paper's runs. They prune the tuned model, which is its own teacher; the paper prunes the
    pre-trained weights and has a tuned model beside them. Our `distillation` learns hidden states (weight 1) and logits (1);
    the paper's loss is 0.9 of the logits' divergence and 0.1 of the cross entropy, at temperature 2. `train` decays weights by
    0.01, the paper by 0. docs/methods.md shows the paper's own form.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=5, methods=(Movement(keep=0.4, variant="struct"),)).cuts
        True
    """

    variant: Literal["block", "hybrid", "struct"] = "hybrid"
    block: CountOrPair = 32
    keep: Share | None = 0.5
    keep_weights: Share | None = None
    cost: Literal["macs", "parameters", "latency"] = "macs"
    lambda_final: NotNegative = 10.0  # weight of the penalty at the end, the paper's 5 to 30: more closes more blocks
    lambda_attention: NotNegative = 1.0  # factor of the penalty on attention; the paper's Struct has 1/32
    lambda_ffn: NotNegative = 1.0  # factor of the penalty on the FFN
    lambda_decoder: NotNegative = 1.0  # factor of both in a decoder; the paper's BART has 2; with `keep` it moves scores alone
    threshold: Probability = 0.1  # of sigmoid(score) at the end, below which a block goes; not used with a budget
    score_lr: Positive = 0.01  # learning rate of the scores
    warmup: Fraction = 0.08  # share of the steps before the ramp: MNLI's; SQuAD has 0.05
    cooldown: Fraction = 0.4  # share of the steps after it: between MNLI's 0.33 and SQuAD's 0.49
    neuron_multiple: Count = 16  # FFN widths that matrix kernels like; 1: the paper's; the "block" variant has its block's
    fill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup and cooldown must be at most 1 together, got {self.warmup}, {self.cooldown}")
        if self.keep_weights is not None and self.keep is not None:
            raise ValueError(f"keep must be null beside keep_weights: they are two budgets, got {self.keep:g}")
        if self.keep_weights is not None and self.fill:
            raise ValueError("fill must be false with keep_weights: it would take back the zeros that were asked for")

    def effects(self) -> Effects:
        if self.keep_weights is not None:
            return Effects(cuts=True, uneven=True, zeros=Zeros.RESULT)
        return Effects(cuts=True, uneven=True, zeros=Zeros.NONE if self.fill else Zeros.SPARE)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        grids = self._grids(anatomy)
        if self.keep_weights is not None:
            self._check_weights(anatomy, grids)
        if self.keep is None or cost is None:
            return
        least = cost_above({name: np.zeros(len(curve) - 1) for name, curve in cost.curves.items()}, cost, 0.0)
        if self.keep * cost.dense < least:
            raise TargetError(
                f"keep of {self.keep:.3g} cannot be reached: with one head or neuron in each sublayer "
                f"{least / cost.dense:.1%} of the {cost.unit} remain.",
                help="ask for more, or take whole layers out first (`layers`).",
            )

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        return _State(self._scores(context), context, self.score_lr)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        """lambda(t) times the weighted mean over attention and FFN, those of a decoder apart, of the mean sigmoid(score)."""
        now = self.lambda_final * cubic_ramp(step.progress, self.warmup, self.cooldown)
        parts: dict[tuple[str, bool], list[Tensor]] = {}
        for scores in cast(_State, state).each():
            parts.setdefault(scores.part, []).append(torch.sigmoid(scores.value).mean())
        if now == 0 or not parts:
            return None
        weights = {"attention": self.lambda_attention, "ffn": self.lambda_ffn}
        terms = [
            weights[part] * (self.lambda_decoder if decodes else 1.0) * torch.stack(means).mean()
            for (part, decodes), means in parts.items()
        ]
        return now * torch.stack(terms).mean()

    def advance(self, state: State, progress: Progress) -> None:
        state = cast(_State, state)
        done = cubic_ramp(progress, self.warmup, self.cooldown)
        if not self.budgeted:
            self._can_cross(progress)
            state.close_up_to(state.probabilities(), self.threshold * done)
        elif done > 0 and (progress.step % EVERY == 0 or progress.step == progress.total):
            values = state.ranks()
            state.close_up_to(values, math.floor(done * (self._bar(state, values) + 1)) - 1)

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        opened = sum(int(scores.open.sum()) for scores in state.each())
        alive = {site: units.astype(np.float64) for site, units in state.alive().items()}
        total = sum(scores.open.numel() for scores in state.each())
        found = {"open": opened / max(1, total), "cost": cost_above(alive, state.cost, 0.0) / state.cost.dense}
        if self.keep_weights is not None:
            left = [value > 0 for value in state.survivals([scores.open.double() for scores in state.each()])]
            found["weights"] = sum(int(part.sum()) for part in left) / sum(part.numel() for part in left)
        return found

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        values = state.ranks() if self.budgeted else state.probabilities()
        bar = self._bar(state, values)
        if not self.budgeted and all(bool((value > bar).all()) for value in values):
            lowest = min(float(value.min()) for value in values)
            raise TargetError(
                f"no score fell below the threshold, nothing is cut: the lowest sigmoid(score) is {lowest:.3f}, "
                f"threshold {bar:g}.",
                help="raise lambda_final or score_lr, train longer, or set `keep`, which needs no threshold.",
            )
        state.close_up_to(values, bar)
        lives = state.lives(values)
        stay: dict[str, tuple[int, ...]] = {}
        for site, alive in state.alive().items():
            units = np.flatnonzero(alive) if alive.any() else np.array([lives[site].argmax()])
            if len(units) < len(alive):
                stay[site] = tuple(int(unit) for unit in units)
        parameters = dict(context.model.named_parameters())
        with torch.no_grad():
            weights = {name: masked(parameters[name], mask()) for name, mask in state.masks()}
        if self.fill:
            _fill(weights, parameters, context, stay)
        return Decision(Plan(stay), weights=weights)

    @property
    def budgeted(self) -> bool:
        """Whether a share decides, and not lambda and the threshold."""
        return self.keep is not None or self.keep_weights is not None

    def _bar(self, state: _State, values: Sequence[Tensor]) -> float:
        """The final bar, in the space of `values`: the lowest that leaves what may stay, or the threshold."""
        if self.keep_weights is not None:
            return bar_of_weights(state.survivals(values), self.keep_weights)
        return self.threshold if self.keep is None else lowest_bar(state.lives(values), state.cost, self.keep)

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of a block of Q, K, V."""
        return self.block if isinstance(self.block, tuple) else (self.block, self.block)

    def _grids(self, anatomy: Anatomy) -> list[tuple[Matrix, tuple[int, int]]]:
        """The matrices whose blocks have scores, and how many blocks each has along its axes."""
        found = []
        head_dims = {site.sublayer: site.taps[0].unit for site in anatomy.of_kind(Kind.HEADS)}
        for matrix in anatomy.matrices.values():
            if matrix.role not in ATTENTION_ROLES and not (self.variant == "block" and matrix.role in FFN_ROLES):
                continue
            rows, columns = self.blocks if self.variant != "struct" else (head_dims[matrix.sublayer], matrix.shape[1])
            if matrix.role in READERS:
                rows, columns = (matrix.shape[0], rows) if self.variant == "struct" else (columns, rows)
            found.append((matrix, grid_of(matrix.shape, (rows, columns), matrix.id)))
        return found

    def _check_weights(self, anatomy: Anatomy, grids: Sequence[tuple[Matrix, tuple[int, int]]]) -> None:
        """TargetError if not even one block could stay."""
        total = sum(math.prod(matrix.shape) for matrix in anatomy.encoder_matrices())
        least = min((math.prod(matrix.shape) // math.prod(grid) for matrix, grid in grids), default=0) / total
        if cast(float, self.keep_weights) < least:
            raise TargetError(
                f"keep_weights is {self.keep_weights:.3g}, and one block alone is {least:.3g} of the encoder's weights.",
                help="ask for more, or take smaller blocks.",
            )

    def _scores(self, context: Context) -> list[_Scores]:
        parameters = set(dict(context.model.named_parameters()))
        found = []
        for matrix, grid in self._grids(context.anatomy):
            bias = f"{matrix.module}.bias"
            part = ("attention" if matrix.role in ATTENTION_ROLES else "ffn", _decodes(context.anatomy, matrix.sublayer))
            biases = [(bias, _any_in_row)] if bias in parameters else []
            found.append(_Scores(grid, part, [(f"{matrix.module}.weight", _as_it_is)], biases, 1))
        for site in context.anatomy.of_kind(Kind.NEURONS) if self.variant != "block" else ():
            weights: list[Cover] = []
            biases = []
            for piece in site.slices:
                if piece.dim == 1:
                    weights.append((piece.param, _as_columns))
                elif piece.param.endswith(".weight"):
                    weights.append((piece.param, partial(_as_rows, piece.parts)))
                else:
                    biases.append((piece.param, partial(_in_parts, piece.parts)))
            part = ("ffn", _decodes(context.anatomy, site.sublayer))
            found.append(_Scores((site.size,), part, weights, biases, self.neuron_multiple))
        return found

    def _can_cross(self, progress: Progress) -> None:
        """Refuses a run too short for any score: Adam moves a score by about its rate in a step, and the rate falls to 0."""
        far = -math.log(self.threshold / (1 - self.threshold))
        if self.score_lr * progress.total < far:
            raise TargetError(
                f"no score can cross the threshold: it lies {far:.2f} below their start, and {progress.total} steps at "
                f"score_lr {self.score_lr:g} move a score by {self.score_lr * progress.total:.2f} at best.",
                help=f"train longer, set score_lr to {4 * far / progress.total:.2g} or more, or set `keep`, which needs no "
                "threshold.",
            )


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """All scores, and the masks they put on the model."""

    def __init__(self, scores: Sequence[_Scores], context: Context, lr: float) -> None:
        super().__init__()
        self.scores = nn.ModuleList(scores)
        self.lr = lr
        self.anatomy, self.cost = context.anatomy, context.cost
        stack = ExitStack()
        stack.enter_context(masked_weights(context.model, dict(self.masks())))
        self.on_close(stack.close)

    def each(self) -> list[_Scores]:
        return [cast(_Scores, scores) for scores in self.scores]

    def masks(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for scores in self.each():
            yield from scores.masks()

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": self.lr, "weight_decay": 0.0}]

    def probabilities(self) -> list[Tensor]:
        """sigmoid(score), per group of scores."""
        return [_together(torch.sigmoid(scores.value.detach()), scores.multiple) for scores in self.each()]

    def ranks(self) -> list[Tensor]:
        """The place of each score among all, the lowest 0, per group of scores; equal scores are told apart by their order."""
        flat = torch.cat([scores.value.detach().flatten() for scores in self.each()])
        ranks = torch.empty(len(flat), dtype=torch.float64, device=flat.device if flat.device.type != "mps" else "cpu")
        ranks[flat.argsort(stable=True).to(ranks.device)] = torch.arange(len(flat), dtype=ranks.dtype, device=ranks.device)
        pieces = ranks.split([scores.value.numel() for scores in self.each()])
        return [_together(piece.view_as(s.value), s.multiple) for piece, s in zip(pieces, self.each(), strict=True)]

    def close_up_to(self, values: Sequence[Tensor], bar: float) -> None:
        """Opens what is above the bar, closes the rest."""
        for scores, value in zip(self.each(), values, strict=True):
            scores.open.copy_(value > bar)

    def lives(self, values: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """Site -> (size,): the largest bar that each unit survives."""
        return {
            site: life.double().cpu().numpy() for site, life in liveliness(self.anatomy, self._by_parameter(values)).items()
        }

    def survivals(self, values: Sequence[Tensor]) -> list[Tensor]:
        """For each matrix, (rows, columns): the largest bar that each weight survives, by itself and in its unit.

        The longest-lived unit of a site stays in any case, and the weights of it that are open.
        """
        shapes = {f"{matrix.module}.weight": matrix.shape for matrix in self.anatomy.matrices.values()}
        found = {name: expand(value, shapes[name]) for name, value in self._by_parameter(values).items()}
        for name, life in self.lives(values).items():
            life[life.argmax()] = np.inf
            site, units = self.anatomy.sites[name], torch.from_numpy(life)
            for piece in site.slices:
                if piece.param in found:
                    weights = found[piece.param]
                    along = units.to(weights).repeat_interleave(piece.unit).repeat(piece.parts)  # (rows,) or (columns,)
                    found[piece.param] = weights.minimum(along[:, None] if piece.dim == 0 else along[None, :])
        return list(found.values())

    def _by_parameter(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: cover(value) for scores, value in zip(self.each(), values, strict=True) for name, cover in scores.weights}

    def alive(self) -> dict[str, np.ndarray]:
        """Site -> (size,): whether a unit has anything left."""
        return {site: life > 0 for site, life in self.lives([scores.open.double() for scores in self.each()]).items()}


class _Scores(nn.Module):
    """Scores of a matrix's blocks or of an FFN's neurons, which of them are open, and the parameters they mask.

    `part`: "attention" or "ffn", and whether it is a decoder's.
    """

    def __init__(
        self, shape: Sequence[int], part: tuple[str, bool], weights: Sequence[Cover], biases: Sequence[Cover], multiple: int
    ) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(*shape))
        self.open: Tensor
        self.register_buffer("open", torch.ones(*shape, dtype=torch.bool))
        self.part, self.weights, self.biases, self.multiple = part, tuple(weights), tuple(biases), multiple

    def masks(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Each parameter with a function that gives its mask. A bias goes with its row, and teaches the scores nothing."""
        for name, cover in self.weights:
            yield name, partial(self._through, cover)
        for name, cover in self.biases:
            yield name, partial(self._plain, cover)

    def _through(self, cover: Callable[[Tensor], Tensor]) -> Tensor:
        return cover(straight_through(self.value, self.open))

    def _plain(self, cover: Callable[[Tensor], Tensor]) -> Tensor:
        return cover(self.open)


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def straight_through(scores: Tensor, open: Tensor) -> Tensor:
    """`open` as a mask of exact 0 and 1, whose gradient reaches the scores as if it were they."""
    return open.to(scores.dtype) + (scores - scores.detach())


def lowest_bar(lives: Mapping[str, np.ndarray], cost: Cost, keep: float) -> float:
    """The lowest bar at which the survivors cost at most `keep` of the dense cost; -1 closes nothing. `attach` checks that one
    exists.
    """
    ordered = {name: np.sort(life) for name, life in lives.items()}
    bars = np.unique(np.concatenate([[-1.0], *(life[np.isfinite(life)] for life in ordered.values())]))
    budget = keep * cost.dense * (1 + 1e-12)
    low, high = 0, len(bars) - 1
    while low < high:
        middle = (low + high) // 2
        if cost_above(ordered, cost, bars[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    return float(bars[low])


def bar_of_weights(survivals: Sequence[Tensor], keep: float) -> float:
    """The lowest bar that at most the share `keep` of the weights survives; -1 closes nothing."""
    flat = torch.cat([value.flatten() for value in survivals])
    going = len(flat) - math.floor(keep * len(flat) + 1e-9)
    return float(flat.kthvalue(going).values) if going else -1.0


def cost_above(ordered: Mapping[str, np.ndarray], cost: Cost, bar: float) -> float:
    """Cost of the units above the bar, one in each site at least."""
    counts = {name: max(1, int((life > bar).sum())) for name, life in ordered.items()}
    return cost.fixed + sum(float(curve[counts[name]]) for name, curve in cost.curves.items())


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _fill(
    weights: dict[str, Tensor], parameters: Mapping[str, Tensor], context: Context, keep: Mapping[str, tuple[int, ...]]
) -> None:
    """Replaces zeros in the kept units by N(mean W, (0.01 std W)^2), in place.

    W is the whole trained matrix, masked entries included: our choice, for its spread is then never 0.
    """
    for site in context.anatomy.units:
        for piece in site.slices:
            if piece.param not in weights or not piece.param.endswith(".weight"):
                continue
            weight, trained = weights[piece.param], parameters[piece.param].detach()
            rows = piece.rows(site.size, keep.get(site.id, range(site.size)))
            inside = torch.zeros(weight.shape[piece.dim], dtype=torch.bool, device=weight.device)
            inside[rows] = True
            zeros = (weight == 0) & (inside[:, None] if piece.dim == 0 else inside[None, :])
            noise = torch.randn(int(zeros.sum()), generator=context.generator).to(weight)
            weight[zeros] = trained.mean() + SPREAD * trained.std() * noise


def _together(value: Tensor, multiple: int) -> Tensor:
    """Each value replaced by the largest of its `multiple` neighbours in order, so that they cross a bar together."""
    if multiple == 1:
        return value
    order = value.argsort(descending=True, stable=True)
    result = torch.empty_like(value)
    result[order] = value[order[::multiple]].repeat_interleave(multiple)[: len(value)]
    return result


def _decodes(anatomy: Anatomy, sublayer: str | None) -> bool:
    """Whether a sublayer is a decoder's."""
    return sublayer is not None and anatomy.stack_of(anatomy.sites[sublayer].layer) is not anatomy.stacks[0]


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _any_in_row(open: Tensor) -> Tensor:
    return open.any(1)


def _as_rows(parts: int, value: Tensor) -> Tensor:
    return value.repeat(parts)[:, None]


def _as_columns(value: Tensor) -> Tensor:
    return value[None, :]


def _in_parts(parts: int, value: Tensor) -> Tensor:
    return value.repeat(parts)
