"""Knowledge-aware sparse pruning: a student from the pre-trained weights is pruned while it learns from the tuned teacher.

Paper: Xu, Yen, Zhao, Xiao: Rethinking Network Pruning under the Pre-train and Fine-tune Paradigm (NAACL 2021); share, number of
updates and cubic ramp as in their code. Second-order scores: Kurtic et al.: The Optimal BERT Surgeon (EMNLP 2022), sections 3.1
and 3.2.

Idea: Some hundred times in a run the lowest weights of every encoder matrix are closed for good, by a cubic ramp.

Differs: Weights are masked in the forward pass instead of zeroed after each step (a closed weight reads as 0 and gets no
gradient; `decide` writes exact zeros). The last update leaves the share itself. The weights that stay are not solved again as
by Kurtic et al., training does that. The stage trains as all stages do: a tenth of the steps warms up, the rate then falls to
0, gradients are clipped by their norm over all tensors. (Theirs: 3e-5 throughout, no warm-up, each tensor clipped to a norm of
1 by itself.)

Choose when: you want the smallest file. Zeros make no dense kernel faster: take 1x4 or N:M if a kernel for them is at hand.
With few passes a start from the tuned weights and ten times the usual rate of distillation do far better: docs/decisions/0008.

Cost: a training run with a mask over each matrix; with `score: fisher` also 4 * `fisher_block` bytes a weight, and a pass with
gradients over single examples at each refresh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, cast, final

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Matrix
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.hooks.weights import expand, grid_of, masked_weights
from slimformer.methods._ranking import highest
from slimformer.methods._schedules import cubic_decay, updates_due
from slimformer.methods.base import Context, Effects, Method, Progress, State, Zeros
from slimformer.rules import Count, Positive, ProperFraction, Rule, Share

KEEP_OF_THE_PAPER = 0.05  # 20 times fewer weights: the paper's
RANK = 8  # gradients that enter an inverse at once; each takes as much memory as the weights

PatternText = Annotated[
    str,
    Rule(
        "unstructured, RxC such as 1x4, or N:M such as 2:4 with N below M",
        lambda text: isinstance(text, str) and Pattern.parse(text) is not None,
        ("4:4", "0x4", "?", None),
    ),
]


@final
@dataclass(frozen=True)
class KnowledgeSparse(Method):
    """`keep`: share of the encoder's matrix weights that stays; None: 0.05, or N/M, which is all that an N:M pattern can have.

    - `pattern`: "unstructured"; "RxC", blocks of R outputs and C inputs, above all "1x4": four consecutive inputs of one
      output, the quad that int8 dot-product instructions take; "N:M", at most N of M consecutive inputs (in YAML with quotes:
      2:4 is a number there).
    - `scope`: every matrix to the same share, or one threshold for the whole model, under which a matrix may lose all.
    - `score`: "magnitude", or "fisher", the damage w^T ((F^-1)_QQ)^-1 w / 2 of closing the block Q, where F = lambda I + 1/m
      sum g g^T over the gradients of m examples of the task's loss, in blocks of consecutive inputs. It is measured anew
      `refreshes` times a run and takes 4 * `fisher_block` bytes a weight.
    - `dampening`: lambda, relative to the mean square of the gradients, so that it suits any task. Kurtic et al. have m =
      1,024, blocks of 50 and lambda 1e-7; ours are smaller, so that they suit a machine without a large memory.

    In a recipe `model` is the pre-trained encoder, `teacher` the tuned one, and `distillation` stands beside this with
    `task_weight: 0`. Its `relative: false` with `hidden` and `scores` at the number of layers and `embedding: 1` has the terms
    and weights of the paper's loss. (There padding counts, scores are not centred, and the cross entropy of logits is a mean
    over classes; of a score, as in STS-B, they take the squared error to the label, we that to the teacher.) Train on with
    `keep_zeros`.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(KnowledgeSparse(pattern="2:4"),)).methods[0].effects().zeros
        <Zeros.RESULT: 'result'>
    """

    keep: Share | None = None
    pattern: PatternText = "unstructured"
    scope: Literal["matrix", "model"] = "matrix"
    updates: Count = 100  # how often a run chooses the weights anew
    cooldown: ProperFraction = 0.0  # share of the steps after the last update; 0 is the paper's, whose ramp is flat at its end
    score: Literal["magnitude", "fisher"] = "magnitude"
    fisher_examples: Count = 256  # training examples whose gradients are looked at
    fisher_block: Count = 32
    dampening: Positive = 0.01
    refreshes: Count = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = self.shape
        if self.keep is not None and pattern.of and not math.isclose(self.keep, pattern.keep / pattern.of, rel_tol=1e-3):
            raise ValueError(f"keep must be {pattern.keep / pattern.of:g} with the pattern {self.pattern}, got {self.keep}")
        if self.score == "fisher" and self.fisher_block % pattern.columns:
            raise ValueError(
                f"fisher_block must be a multiple of the {pattern.columns} columns of a block, got {self.fisher_block}"
            )

    def effects(self) -> Effects:
        alike = self.score == "magnitude" and self.scope == "matrix"  # equal matrices then lose the same weights
        return Effects(cuts=True, zeros=Zeros.RESULT, alike=alike)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        self._grids(anatomy)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        return Plan()  # zeros stay in their matrices

    def attach(self, context: Context) -> State:
        pattern, fisher = self.shape, self.score == "fisher"
        masks = [
            _Mask(f"{matrix.module}.weight", matrix.shape, grid, pattern, fisher)
            for matrix, grid in self._grids(context.anatomy)
        ]
        return _State(masks, context)

    def advance(self, state: State, progress: Progress) -> None:
        state = cast(_State, state)
        now, total = updates_due(progress, self.updates, self.cooldown)
        before, _ = updates_due(Progress(progress.step - 1, progress.total), self.updates, self.cooldown)
        if now == before:
            return
        if self.score == "fisher" and (
            before == 0 or before * self.refreshes // total > (before - 1) * self.refreshes // total
        ):
            measure_curvature(state, self.fisher_examples, self.fisher_block, self.dampening)
        self._close(state, self.share + (1 - self.share) * cubic_decay(now / total))

    def report(self, state: State) -> Mapping[str, float]:
        return {"open": cast(_State, state).opened}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        weights = {}
        for mask in state.each():
            weight = state.weights[mask.parameter].detach()
            weights[mask.parameter] = torch.where(expand(mask.open, weight.shape), weight, 0.0)
        return Decision(weights=weights)

    @property
    def shape(self) -> Pattern:
        """The pattern, read."""
        return cast(Pattern, Pattern.parse(self.pattern))  # the rule of the option has read it

    @property
    def share(self) -> float:
        """The share that is left at the end."""
        pattern = self.shape
        return pattern.keep / pattern.of if pattern.of else KEEP_OF_THE_PAPER if self.keep is None else self.keep

    def _grids(self, anatomy: Anatomy) -> list[tuple[Matrix, tuple[int, int]]]:
        """The encoder's matrices and their numbers of blocks by axis; RecipeError if the pattern does not divide one."""
        pattern = self.shape
        grids = []
        for matrix in anatomy.encoder_matrices():
            grid_of(matrix.shape, (1, pattern.of or 1), matrix.id)
            grids.append((matrix, grid_of(matrix.shape, (pattern.rows, pattern.columns), matrix.id)))
        return grids

    def _close(self, state: _State, share: float) -> None:
        """Closes the lowest of what is open, down to this share."""
        if share >= 1:
            return
        with torch.no_grad():
            masks = state.each()
            scores = [mask.ranked(self._scores(mask, state.weights[mask.parameter])) for mask in masks]
            whole = [torch.cat(scores)] if self.scope == "model" and scores else scores
            opened = torch.cat([highest(flat, max(1, round(share * len(flat)))) for flat in whole]) if whole else None
            for mask, part in zip(masks, () if opened is None else opened.split([len(flat) for flat in scores]), strict=True):
                mask.open.copy_(part.view_as(mask.open))

    def _scores(self, mask: _Mask, weight: Tensor) -> Tensor:
        return mask.damages(weight) if self.score == "fisher" else mask.magnitudes(weight)


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """All masks, on the model while this lasts."""

    def __init__(self, masks: Sequence[_Mask], context: Context) -> None:
        super().__init__()
        self.masks = nn.ModuleList(masks)
        self.context = context
        self.weights = dict(context.model.named_parameters())  # a plain dict: they are the model's, not ours
        stack = ExitStack()
        stack.enter_context(masked_weights(context.model, {mask.parameter: partial(_open, mask) for mask in masks}))
        self.on_close(stack.close)

    def each(self) -> list[_Mask]:
        return [cast(_Mask, mask) for mask in self.masks]

    @property
    def opened(self) -> float:
        """The share of the blocks that is open."""
        return sum(int(mask.open.sum()) for mask in self.each()) / max(1, sum(mask.open.numel() for mask in self.each()))


class _Mask(nn.Module):
    """Which blocks of one matrix are open, and what is known of its curvature; as buffers, so that a resumed run has them."""

    def __init__(self, parameter: str, shape: tuple[int, int], grid: tuple[int, int], pattern: Pattern, fisher: bool) -> None:
        super().__init__()
        self.parameter, self.shape, self.pattern = parameter, shape, pattern
        self.open: Tensor
        self.register_buffer("open", torch.ones(grid, dtype=torch.bool))
        self.curvature: Tensor
        if fisher:
            groups, columns = shape[1] // pattern.columns, pattern.columns
            self.register_buffer("curvature", torch.zeros(shape[0], groups, columns, columns))

    def magnitudes(self, weight: Tensor) -> Tensor:
        """L2 norm of each block: like `open`."""
        return torch.linalg.vector_norm(self._split(weight), dim=(1, 3))

    def damages(self, weight: Tensor) -> Tensor:
        """1/2 w^T ((F^-1)_QQ)^-1 w of each block, rows of a block added up: like `open`."""
        rows = weight.reshape(*self.curvature.shape[:3])  # (rows, groups, columns)
        damage = torch.einsum("rgi,rgij,rgj->rg", rows, self.curvature, rows) / 2
        return damage.reshape(len(self.open), self.pattern.rows, -1).sum(1)

    def ranked(self, scores: Tensor) -> Tensor:
        """The scores flat: -1 for what is closed already, infinite for the best N of M inputs, which never go."""
        scores = scores.clamp_min(0).masked_fill(~self.open, -1.0)
        if self.pattern.of:
            groups = scores.reshape(-1, self.pattern.of)
            best = groups.argsort(dim=1, descending=True, stable=True)[:, : self.pattern.keep]
            scores = groups.scatter(1, best, math.inf)
        return scores.flatten()

    def _split(self, weight: Tensor) -> Tensor:
        return weight.reshape(len(self.open), self.pattern.rows, -1, self.pattern.columns)


@dataclass(frozen=True)
class Pattern:
    """Which weights are closed together: blocks of `rows` x `columns`, single ones with `keep` of every `of` inputs, or
    neither.
    """

    rows: int = 1
    columns: int = 1
    keep: int = 0
    of: int = 0

    @staticmethod
    def parse(text: str) -> Pattern | None:
        """ "unstructured", "RxC" or "N:M"; None for anything else."""
        if text == "unstructured":
            return Pattern()
        match = re.fullmatch(r"(\d{1,5})([x:])(\d{1,5})", text, re.ASCII)
        first, second = (int(match[1]), int(match[3])) if match else (0, 0)
        if match and match[2] == "x" and min(first, second) >= 1:
            return Pattern(first, second)
        if match and match[2] == ":" and 1 <= first < second:
            return Pattern(keep=first, of=second)
        return None


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def woodbury(inverse: Tensor, gradients: Tensor, count: int) -> None:
    """Adds k of `count` gradients to inverses of F = lambda I + 1/count sum g g^T, in place: one for each block of weights.

    F^-1 -= U (count I + G U)^-1 U^T with U = F^-1 G^T; `inverse` (blocks, size, size), `gradients` G (k, blocks, size).
    """
    rows = gradients.transpose(0, 1)  # (blocks, k, size)
    moved = inverse @ rows.transpose(1, 2)  # (blocks, size, k)
    inner = rows @ moved  # (blocks, k, k)
    inner.diagonal(dim1=1, dim2=2).add_(count)
    inverse.baddbmm_(moved, torch.linalg.solve(inner, moved.transpose(1, 2)), alpha=-1)


def curvature(inverse: Tensor, columns: int) -> Tensor:
    """((F^-1)_QQ)^-1 for every group Q of consecutive weights: (blocks, size, size) -> (groups, columns, columns)."""
    blocks, size, _ = inverse.shape
    if columns == 1:
        return inverse.diagonal(dim1=1, dim2=2).reciprocal().reshape(-1, 1, 1)
    parts = inverse.view(blocks, size // columns, columns, size // columns, columns)
    diagonal = parts.diagonal(dim1=1, dim2=3)  # (blocks, columns, columns, groups of a block)
    return torch.linalg.inv(diagonal.permute(0, 3, 1, 2).reshape(-1, columns, columns))


def measure_curvature(state: _State, examples: int, size: int, dampening: float) -> None:
    """Fills the masks' curvature from the gradients of single examples, in blocks of `size` consecutive inputs of one output.

    If there are fewer than `examples`, all of them count. The mean square that dampening is relative to is that of open
    weights over the first RANK.
    """
    masks = state.each()
    weights = [state.weights[mask.parameter] for mask in masks]
    inverses: list[Tensor] = []
    batches = list(state.context.batches(examples))
    seen = sum(len(batch["attention_mask"]) for batch in batches)
    for chunk in _chunks(_gradients(state.context, weights, batches), RANK):
        blocks = [_blocks(torch.stack(grads), size) for grads in zip(*chunk, strict=True)]  # each (k, blocks, size)
        if not inverses:
            opened = [mask.open.float().mean().clamp_min(1e-6) for mask in masks]  # closed weights have no gradient
            squares = [block.square().mean() / share for block, share in zip(blocks, opened, strict=True)]
            scales = [(dampening * square).clamp_min(1e-12) for square in squares]
            eyes = [torch.eye(size, device=block.device).repeat(block.shape[1], 1, 1) for block in blocks]
            inverses = [eye / scale for eye, scale in zip(eyes, scales, strict=True)]
        for inverse, block in zip(inverses, blocks, strict=True):
            woodbury(inverse, block, seen)
    for mask, inverse in zip(masks, inverses, strict=True):
        groups = -(-mask.shape[1] // size) * size // mask.pattern.columns  # with those of the padding
        matrices = curvature(inverse, mask.pattern.columns).view(mask.shape[0], groups, *mask.curvature.shape[2:])
        mask.curvature.copy_(matrices[:, : mask.curvature.shape[1]])


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _open(mask: _Mask) -> Tensor:
    return mask.open


def _gradients(context: Context, weights: Sequence[Tensor], batches: Iterable[Mapping[str, Tensor]]) -> Iterator[list[Tensor]]:
    """The gradient of the task's loss for one example after another, in eval mode and float32."""
    trainable = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                one = {name: value[row : row + 1] for name, value in batch.items()}
                fed = context.subject.feed(one)
                padded = one["attention_mask"].shape[1]
                labelled = any(value.shape[1:2] == (padded,) for name, value in one.items() if name not in fed)  # each word
                width = padded if labelled else length
                inputs = {name: value if name.startswith("decoder_") else value[:, :width] for name, value in fed.items()}
                with torch.enable_grad(), context.subject.evaluating():
                    yield list(torch.autograd.grad(context.task.loss(context.model(**inputs), one | inputs), weights))
    finally:
        for weight, before in zip(weights, trainable, strict=True):
            weight.requires_grad_(before)


def _chunks(items: Iterator[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _blocks(gradients: Tensor, size: int) -> Tensor:
    """(k, rows, columns) in pieces of `size` consecutive columns, the last filled up with zeros: (k, blocks, size)."""
    padded = nn.functional.pad(gradients, (0, -gradients.shape[2] % size))
    return padded.reshape(len(gradients), -1, size)
