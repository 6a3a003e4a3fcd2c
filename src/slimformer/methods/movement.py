"""Block movement pruning: blocks of weights go that training moves towards zero, heads and neurons go with their last block.

Lagunas, Charlaix, Sanh, Rush: Block Pruning For Faster Transformers (EMNLP 2021), sections 3 and 4; constants and schedule as in their
code. A score per block, started at 0: the mask is 1 where sigmoid(score) is above a threshold, and gradients pass it straight
through; the threshold and the penalty on mean sigmoid(score) rise by a cubic ramp. Differences: warm-up and cool-down are *shares*
of the steps; a head goes only where its output is exactly zero (the paper also cuts heads with zero queries or keys, which still
average); and with a `target` no threshold is fixed: it is the one that leaves this cost, found by bisection over ranked scores.

As recipes, each variant with its `variant` option: a teacher is `distillation` beside it with `task_weight: 0.1`; no teacher (NT): leave
`distillation` out; large teacher (LT): name the larger tuned model as the recipe's `teacher`. Block and Hybrid keep zeros inside
surviving heads: train on with `keep_zeros`. Hybrid Filled: `fill: true`, then a dense stage with `distillation`.
Our recipes differ from the paper's runs: they prune the tuned model, which is its own teacher, where the paper prunes the pre-trained
weights and has a tuned model beside them; `distillation` learns hidden states (weight 1) and logits (1), where the paper's loss is 0.9
of the logits' divergence and 0.1 of the cross entropy, at temperature 2; and `train` decays weights by 0.01, where the paper has 0.
docs/methods.md shows the paper's own form.
Choose it when there is time for several epochs, and over `gates` where quality at high compression counts most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Matrix, Role
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.weights import grid_of, liveliness, masked, masked_weights
from slimformer.methods.base import Context, Method, Progress, State, Step, Zeros

ATTENTION = (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)
FFN = (Role.FFN_IN, Role.FFN_OUT)
READERS = (Role.ATTENTION_OUT, Role.FFN_OUT)  # their blocks are transposed: a head's or a neuron's own weights are columns
EVERY = 8  # steps between two searches for the threshold: each sorts all scores, which takes milliseconds
SPREAD = 0.01  # of the filled weights, in standard deviations of their matrix; from the authors' code

Cover = tuple[str, Callable[[Tensor], Tensor]]  # a parameter, and how its mask is made of scores


def ramp(progress: Progress, warmup: float, cooldown: float) -> float:
    """1 - c^3, from 0 after the warm-up share of the steps to 1 where the cool-down share begins."""
    begin, end = warmup * progress.total, (1 - cooldown) * progress.total
    if progress.step <= begin:
        return 0.0
    if progress.step >= end:
        return 1.0
    return float(1 - (1 - (progress.step - begin) / (end - begin)) ** 3)


def straight_through(scores: Tensor, open: Tensor) -> Tensor:
    """`open` as a mask of exact 0 and 1, whose gradient reaches the scores as if it were they."""
    return open.to(scores.dtype) + (scores - scores.detach())


class _Scores(nn.Module):
    """Scores of a matrix's blocks or of an FFN's neurons, which of them are open, and the parameters they mask."""

    def __init__(
        self, shape: Sequence[int], part: str, weights: Sequence[Cover], biases: Sequence[Cover], multiple: int
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
        named = {
            name: cover(value) for scores, value in zip(self.each(), values, strict=True) for name, cover in scores.weights
        }
        return {site: life.double().cpu().numpy() for site, life in liveliness(self.anatomy, named).items()}

    def kept(self) -> dict[str, np.ndarray]:
        """Site -> (size,): whether a unit has anything left."""
        return {site: life > 0 for site, life in self.lives([scores.open.double() for scores in self.each()]).items()}


@final
@dataclass(frozen=True)
class Movement(Method):
    """`target`: share of the dense cost to keep, reached whatever the scores are; None: lambda and `threshold` decide, as published.

    With a target all scores form one ranking, and the lowest are closed up to a place. Cost falls when units vanish, in every variant:
    heads without an open value or output block, neurons without an open row or column. The final place is the first at which the
    cost of what is left meets the target; while training, the ramp leads from 0 to that place, which is found anew as scores move.
    (A ramp of the cost itself would close most blocks at once: the first unit only goes when all its blocks are among the lowest.)
    Each attention keeps one head and each FFN one neuron, a masked one if need be, as in the paper.
    `variant`: "block": blocks on all matrices; "hybrid": blocks on attention, whole neurons of the FFN; "struct": whole rows of
    a head in each attention matrix, whole neurons. `block`: rows and columns of a block (of Q, K, V; transposed for output
    matrices), not used by "struct"; one that does not divide every matrix it is laid on is refused: nothing is padded. `fill`: zeros
    left in surviving units become small noise, so that a dense stage can use them.
    """

    variant: Literal["block", "hybrid", "struct"] = "hybrid"
    block: int | tuple[int, int] = 32
    target: float | None = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    lambda_final: float = 10.0  # the paper's 5 to 30: more closes more blocks
    lambda_attention: float = 1.0  # the paper's Struct has 1/32
    lambda_ffn: float = 1.0
    threshold: float = 0.1  # of sigmoid(score), at the end; not used with a target
    score_lr: float = 0.01
    warmup: float = 0.08  # share of the steps before the ramp: MNLI's; SQuAD has 0.05
    cooldown: float = 0.4  # share of the steps after it: between MNLI's 0.33 and SQuAD's 0.49
    neuron_multiple: int = 16  # FFN widths that matrix kernels like; 1: the paper's; the "block" variant has its block's
    fill: bool = False

    decides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variant not in ("block", "hybrid", "struct"):
            raise ValueError(f"variant must be block, hybrid or struct, got {self.variant!r}")
        if min(self.blocks) < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"target must be above 0 and at most 1, got {self.target}")
        if self.cost not in ("macs", "parameters", "latency"):
            raise ValueError(f"cost must be macs, parameters or latency, got {self.cost!r}")
        for name in ("lambda_final", "lambda_attention", "lambda_ffn"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above, and finite, got {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        if not 0 < self.score_lr < math.inf:
            raise ValueError(f"score_lr must be above 0, and finite, got {self.score_lr}")
        if not (self.warmup >= 0 and self.cooldown >= 0 and self.warmup + self.cooldown <= 1):
            raise ValueError(
                f"warmup and cooldown must be 0 or above and at most 1 together, got {self.warmup}, {self.cooldown}"
            )
        if self.neuron_multiple < 1:
            raise ValueError(f"neuron_multiple must be at least 1, got {self.neuron_multiple}")

    @property
    def leaves(self) -> Zeros:  # type: ignore[override]
        return Zeros.NONE if self.fill else Zeros.SPARE

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of a block of Q, K, V."""
        return (self.block, self.block) if isinstance(self.block, int) else self.block

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        self._grids(anatomy)
        if self.target is None or cost is None:
            return
        least = _cost({name: np.zeros(len(curve) - 1) for name, curve in cost.curves.items()}, cost, 0.0)
        if self.target * cost.dense < least:
            raise TargetError(
                f"a target of {self.target:.3g} cannot be reached: with one head or neuron in each sublayer "
                f"{least / cost.dense:.1%} of the {cost.unit} remain.",
                help="ask for more, or take whole layers out first (`layers`).",
            )

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        return _State(self._scores(context), context, self.score_lr)

    def _grids(self, anatomy: Anatomy) -> list[tuple[Matrix, tuple[int, int]]]:
        """The matrices whose blocks have scores, and how many blocks each has along its axes."""
        found = []
        for matrix in anatomy.matrices.values():
            if matrix.role not in ATTENTION and not (self.variant == "block" and matrix.role in FFN):
                continue
            rows, columns = self.blocks if self.variant != "struct" else (anatomy.head_dim, matrix.shape[1])
            if matrix.role in READERS:
                rows, columns = (matrix.shape[0], rows) if self.variant == "struct" else (columns, rows)
            found.append((matrix, grid_of(matrix.shape, (rows, columns), matrix.id)))
        return found

    def _scores(self, context: Context) -> list[_Scores]:
        parameters = set(dict(context.model.named_parameters()))
        found = []
        for matrix, grid in self._grids(context.anatomy):
            bias = f"{matrix.module}.bias"
            part = "attention" if matrix.role in ATTENTION else "ffn"
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
            found.append(_Scores((site.size,), "ffn", weights, biases, self.neuron_multiple))
        return found

    def penalty(self, state: State, step: Step) -> Tensor | None:
        """lambda(t) times the weighted mean over attention and FFN of the mean sigmoid(score) in each group."""
        now = self.lambda_final * ramp(step.progress, self.warmup, self.cooldown)
        parts: dict[str, list[Tensor]] = {}
        for scores in cast(_State, state).each():
            parts.setdefault(scores.part, []).append(torch.sigmoid(scores.value).mean())
        if now == 0 or not parts:
            return None
        weights = {"attention": self.lambda_attention, "ffn": self.lambda_ffn}
        terms = [weights[part] * torch.stack(means).mean() for part, means in parts.items()]
        return now * torch.stack(terms).mean()

    def advance(self, state: State, progress: Progress) -> None:
        state = cast(_State, state)
        done = ramp(progress, self.warmup, self.cooldown)
        if self.target is None:
            self._can_cross(progress)
            state.close_up_to(state.probabilities(), self.threshold * done)
        elif done > 0 and (progress.step % EVERY == 0 or progress.step == progress.total):
            values = state.ranks()
            last = _lowest_bar(state.lives(values), state.cost, self.target)
            state.close_up_to(values, math.floor(done * (last + 1)) - 1)

    def _can_cross(self, progress: Progress) -> None:
        """Refuses a run too short for any score: Adam moves a score by about its rate in a step, and the rate falls to 0."""
        far = -math.log(self.threshold / (1 - self.threshold))
        if self.score_lr * progress.total < far:
            raise TargetError(
                f"no score can cross the threshold: it lies {far:.2f} below their start, and {progress.total} steps at score_lr "
                f"{self.score_lr:g} move a score by {self.score_lr * progress.total:.2f} at best.",
                help=f"train longer, set score_lr to {4 * far / progress.total:.2g} or more, or set a target, which needs no threshold.",
            )

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        opened = sum(int(scores.open.sum()) for scores in state.each())
        kept = {site: life.astype(np.float64) for site, life in state.kept().items()}
        total = sum(scores.open.numel() for scores in state.each())
        return {"open": opened / max(1, total), "cost": _cost(kept, state.cost, 0.0) / state.cost.dense}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        values = state.probabilities() if self.target is None else state.ranks()
        bar = self.threshold if self.target is None else _lowest_bar(state.lives(values), state.cost, self.target)
        if self.target is None and all(bool((value > bar).all()) for value in values):
            lowest = min(float(value.min()) for value in values)
            raise TargetError(
                f"no score fell below the threshold, nothing is cut: the lowest sigmoid(score) is {lowest:.3f}, threshold {bar:g}.",
                help="raise lambda_final or score_lr, train longer, or set a target, which needs no threshold.",
            )
        state.close_up_to(values, bar)
        lives, kept = state.lives(values), state.kept()
        keep: dict[str, tuple[int, ...]] = {}
        for site, alive in kept.items():
            units = np.flatnonzero(alive) if alive.any() else np.array([lives[site].argmax()])
            if len(units) < len(alive):
                keep[site] = tuple(int(unit) for unit in units)
        parameters = dict(context.model.named_parameters())
        with torch.no_grad():
            weights = {name: masked(parameters[name], mask()) for name, mask in state.masks()}
        if self.fill:
            _fill(weights, parameters, context, keep)
        return Decision(Plan(keep), weights=weights)


def _lowest_bar(lives: Mapping[str, np.ndarray], cost: Cost, target: float) -> float:
    """The lowest bar at which what survives costs at most `target` of the dense cost; -1 closes nothing. `attach` made sure of one."""
    ordered = {name: np.sort(life) for name, life in lives.items()}
    bars = np.unique(np.concatenate([[-1.0], *(life[np.isfinite(life)] for life in ordered.values())]))
    budget = target * cost.dense * (1 + 1e-12)
    low, high = 0, len(bars) - 1
    while low < high:
        middle = (low + high) // 2
        if _cost(ordered, cost, bars[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    return float(bars[low])


def _cost(ordered: Mapping[str, np.ndarray], cost: Cost, bar: float) -> float:
    """Cost of the units above the bar, one in each site at least."""
    counts = {name: max(1, int((life > bar).sum())) for name, life in ordered.items()}
    return cost.fixed + sum(float(curve[counts[name]]) for name, curve in cost.curves.items())


def _fill(
    weights: dict[str, Tensor], parameters: Mapping[str, Tensor], context: Context, keep: Mapping[str, tuple[int, ...]]
) -> None:
    """Replaces zeros in the kept units by N(mean W, (0.01 std W)^2), in place.

    W is the whole trained matrix, masked entries included: our choice, for its spread is then never 0.
    """
    for site in context.anatomy.sites.values():
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
