"""Training with fake quantization, so that a model learns to live with the integers that its file will compute in.

Paper: Prato, Charlaix, Rezagholizadeh: Fully Quantized Transformer for Machine Translation (Findings of EMNLP 2020).

Idea: Weights are put on grids from their own extremes in every pass, activations on grids from running extremes. Gradients go
straight through, but not where a value was clamped. It is switched on after a short start in float.

Differs: Weight grids are symmetric and 0 lies on every grid by default
(`quantizing/grids.py`: integer kernels want both). The start is a share of the steps by default. A denominator's grid begins
at the smallest one seen, so that none becomes 0. Of Kronecker factors the larger is quantized, and the terms of a sum share one
range (`Quantization` tells why). A pass is quantized with the ranges of the steps before it. What is read after a dropout is
quantized after it: train with `dropout: false`. A table that the last Linear reads too has one grid, a bucket per word, for both:
the paper has a bucket for each row of a weight, and an integer product takes a scale for each output, which is a word.

Choose when: post-training int8 loses too much, or for 6 and 4 bits; with `distillation` from the float model beside it.

Cost: a training run in which each weight and each input of a matrix is rounded in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, final

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Point, PointRole, Tokens
from slimformer.core.plan import Decision
from slimformer.core.ranges import Range, Ranges
from slimformer.forms.base import Formed, shape_of, weight_of
from slimformer.hooks.points import touched
from slimformer.hooks.weights import Change, changed_weights
from slimformer.methods.base import Context, Effects, Method, Progress, State
from slimformer.quantizing.calibration import TABLE_ROWS
from slimformer.quantizing.grids import MOMENTUM, Grid, RunningRange, fake, point_grid, weight_grid
from slimformer.rules import Count, ProperFraction, one_of, some_of

READING = (PointRole.MATRIX, PointRole.HEAD)  # points whose modules are Linears, with a weight to quantize

Bits = Annotated[int, one_of(8, 6, 4, unit="bits")]
ROLES = tuple(map(str, PointRole))
Roles = Annotated[tuple[str, ...] | str, some_of(*ROLES, "all")]


@final
@dataclass(frozen=True)
class Quantization(Method):
    """Bits of `weights`, `activations` and `embeddings` (null: float): 8, 6 or 4. Files hold fewer than 8 bits in bytes.

    - `roles`: what is quantized, of matrix, head, attention, softmax, norm, branch, embedding, or "all" of these, as in the
      paper. `matrix` is all inputs and weights of Linears but the last: int8 files execute it with the very ranges learned
      here. The others are simulated in training and in its evaluations; files compute them in float.
    - `buckets`: a range per output row (per word in a table) or one per tensor.
    - `activation_buckets`: one per tensor, or one per feature for a point that stays in float in int8 files.
    - `grid` of weights: symmetric, as in files, or affine, as in the paper (a file then rounds them a second time, to its own
      grid).
    - `exact_zero`: whether 0 lies on every affine grid. Without it, as in the paper, a file moves each range by up to half a
      step.
    - `denominators`: "own" begins the grid of a denominator at the smallest one seen. "from_zero" begins it at 0, as that of any
      other value that is never negative. That is the naive quantizer, which the paper saw diverge: what is rounded to 0 divides.
    - `start`: share of the steps in float, in which ranges settle; the paper takes some hundred of 100,000. `start_step`, if
      given, overrides it: the step from which on values are quantized.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=1, methods=(Quantization(weights=4),)).methods[0].effects().learns_grids
        True
    """

    weights: Bits = 8
    activations: Bits = 8
    embeddings: Bits | None = 8
    roles: Roles = ("matrix",)
    buckets: Literal["row", "tensor"] = "row"
    activation_buckets: Literal["tensor", "feature"] = "tensor"
    grid: Literal["symmetric", "affine"] = "symmetric"
    exact_zero: bool = True
    denominators: Literal["own", "from_zero"] = "own"
    start: ProperFraction = 0.1
    start_step: Count | None = None
    momentum: ProperFraction = MOMENTUM  # momentum of the running ranges: the higher, the slower they follow the batches

    def __post_init__(self) -> None:
        roles = (self.roles,) if isinstance(self.roles, str) else self.roles
        if isinstance(roles, (list, tuple)):
            object.__setattr__(self, "roles", ROLES if "all" in roles else tuple(map(str, roles)))
        super().__post_init__()

    def effects(self) -> Effects:
        # a zero survives unless 0 is on no grid of a weight: it then becomes the nearest value that is
        moves_zeros = self.grid == "affine" and not self.exact_zero and PointRole.MATRIX in self.roles
        return Effects(rewrites=True, refills=moves_zeros, learns_grids=True)

    def attach(self, context: Context) -> State:
        return _State(context, self)

    def advance(self, state: State, progress: Progress) -> None:
        state = cast(_State, state)
        state.settle()
        if progress.fraction >= self.start if self.start_step is None else progress.step >= self.start_step:
            seen = [running.seen for running in state.each()]
            state.on.copy_(torch.stack(seen).any() if seen else torch.tensor(True))

    def report(self, state: State) -> Mapping[str, float]:
        return {"on": float(cast(_State, state).on)}

    @torch.no_grad()
    def decide(self, state: State, context: Context) -> Decision:
        """The weights as they were computed with, on their grids, and the ranges of all points with one range each."""
        state = cast(_State, state)
        state.settle()
        parameters = dict(context.model.named_parameters(remove_duplicate=False))
        on_grids: dict[str, Callable[[Tensor], Grid]] = dict.fromkeys((*state.weights, *state.gains), self.weight_grid)
        on_grids |= dict.fromkeys((*state.tables, *state.factors, *state.readers), self.table_grid)
        changed = {name: fake(parameters[name], grid(parameters[name])) for name, grid in on_grids.items()}
        own = {id(parameter): name for name, parameter in context.model.named_parameters()}  # of tied ones the first
        changed = {own[id(parameters[name])]: values for name, values in changed.items()}
        seen = [(point, running) for point, running in zip(state.points, state.each(), strict=True) if bool(running.seen)]
        ranges = {point.id: state.ends(point, running)[0] for point, running in seen if running.low.ndim == 0}
        features = {point.id: state.ends(point, running) for point, running in seen if running.low.ndim}
        # matrices that were not trained on a grid are stored as ever
        bits = self.weights if PointRole.MATRIX in self.roles else 8
        learned = Ranges(ranges, bits, self.activations, self.embeddings, self.buckets, features, self.exact_zero)
        return Decision(weights=changed, ranges=learned)

    def weight_grid(self, weight: Tensor) -> Grid:
        rows = self.buckets == "row" and weight.ndim > 1
        return weight_grid(weight, self.weights, rows=rows, even=self.grid == "symmetric", exact_zero=self.exact_zero)

    def table_grid(self, rows: Tensor) -> Grid:
        even, bits = self.grid == "symmetric", self.weights if self.embeddings is None else self.embeddings
        return weight_grid(rows, bits, rows=self.buckets == "row", even=even, exact_zero=self.exact_zero)


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """Running ranges of the points as buffers, whether quantization is on, and what puts it in place."""

    def __init__(self, context: Context, method: Quantization) -> None:
        super().__init__()
        self.method = method
        model = context.model
        roles = {PointRole(role) for role in method.roles}
        self.points = [point for point in context.anatomy.points.values() if point.role in roles]
        self.ranges = nn.ModuleList([RunningRange(_features(context, point, method), method.momentum) for point in self.points])
        self.on: Tensor  # a buffer, so that a resumed run knows it
        self.register_buffer("on", torch.tensor(False))
        self._on, self._masks = False, dict[Tokens, Tensor | None]()
        self._padding: int | None = getattr(model.config, "pad_token_id", None)
        readers = [module for point in self.points if point.role in READING for module in point.modules]
        self.weights = [weight_of(model, reader) for reader in readers]
        tables, parameters = _tables(model), dict(model.named_parameters(remove_duplicate=False))
        read = {id(parameters[name]) for name in self.weights}
        self.tables = {
            name: table for name, table in tables.items() if method.embeddings is not None or id(parameters[name]) in read
        }
        # Linears that read a table which is quantized: one tensor, so one grid
        words = {id(parameters[name]) for name in self.tables}
        self.readers = [
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module.weight) in words
        ]
        self.weights = [name for name in self.weights if name not in self.readers]
        self.factors = _factors(model) if method.embeddings is not None else []
        self.gains = [f"{point.modules[0]}.weight" for point in self.points if point.role is PointRole.NORM and _last(point)]
        stack = ExitStack()
        self.on_close(stack.close)
        stack.callback(model.register_forward_pre_hook(self._begin_pass, with_kwargs=True).remove)
        stack.enter_context(touched(model, context.anatomy, {point.id: self._read(i) for i, point in enumerate(self.points)}))
        stack.enter_context(changed_weights(model, dict.fromkeys((*self.weights, *self.gains), self._weigh)))
        stack.enter_context(changed_weights(model, dict.fromkeys((*self.factors, *self.readers), self._weigh_table)))
        for table in self.tables.values():
            stack.callback(table.register_forward_hook(self._look_up).remove)

    def settle(self) -> None:
        """Moves all ranges by what was gathered in the passes since the last call."""
        for running in self.each():
            running.settle()

    def pool(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Widens the extremes that this process has gathered to those of all processes."""
        ends = [end for running in self.each() for low, high in [running.gathered] for end in (low, -high)]
        lowest = gather(torch.cat([end.flatten() for end in ends])).amin(0) if ends else torch.zeros(0)
        pooled = [part.view_as(end) for part, end in zip(lowest.split([end.numel() for end in ends]), ends, strict=True)]
        for running, low, high in zip(self.each(), pooled[::2], pooled[1::2], strict=True):
            running.gathered = low, -high

    def each(self) -> list[RunningRange]:
        return [cast(RunningRange, item) for item in self.ranges]

    def _begin_pass(self, _: nn.Module, __: Any, given: Mapping[str, Any]) -> None:
        """Once per forward pass: asking a GPU at each point would stall it."""
        self._on, self._masks = bool(self.on), {tokens: self._mask(given, tokens) for tokens in Tokens}

    def _mask(self, given: Mapping[str, Any], tokens: Tokens) -> Tensor | None:
        """1 at real tokens; without a mask of what was said, ids of padding tell it, but for the first: some decoders start with it."""
        mask, ids = given.get(tokens.mask), given.get(tokens.ids)
        if mask is not None or ids is None or self._padding is None or tokens is Tokens.SOURCE:
            return mask
        return torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != self._padding], 1)

    def _read(self, index: int) -> Change:
        running, point = self.each()[index], self.points[index]

        def change(values: Tensor) -> Tensor:
            if self.training:
                tokens = values.flatten(2) if values.ndim == 4 and point.role in READING else values  # a larger factor's input
                running.observe(tokens, self._masks[point.tokens])
            return fake(values, self.grid(point, running)) if self._on else values

        return change

    def _weigh(self, weight: Tensor) -> Tensor:
        return fake(weight, self.method.weight_grid(weight)) if self._on else weight

    def _weigh_table(self, factor: Tensor) -> Tensor:
        return fake(factor, self.method.table_grid(factor)) if self._on else factor

    def _look_up(self, table: nn.Module, _: Any, rows: Tensor) -> Tensor:
        """Quantizes the rows that were read: the same as quantizing the table, which is much larger."""
        if not self._on:
            return rows
        if self.method.buckets == "row":
            return fake(rows, self.method.table_grid(rows))
        scale = float(getattr(table, "embed_scale", 1.0))  # BART's tables multiply by it what they give
        return fake(rows, self.method.table_grid(cast(nn.Embedding, table).weight * scale))

    def ends(self, point: Point, running: RunningRange) -> tuple[Range, ...]:
        """The ranges of a point as its grids have them."""
        zero = self._from_zero(point)
        return tuple(Range(0.0, item.high) if zero else item for item in running.ranges())

    def _from_zero(self, point: Point) -> bool:
        return self.method.denominators == "from_zero" and point.side == "denominator"

    def grid(self, point: Point, running: RunningRange) -> Grid:
        """The grid of a point as it stands now."""
        low = torch.zeros_like(running.low) if self._from_zero(point) else running.low
        return point_grid(point, low, running.high, self.method.activations, exact_zero=self.method.exact_zero)


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _features(context: Context, point: Point, method: Quantization) -> int | None:
    """How many buckets a point has: one, or one per feature if it stays in float in int8 files."""
    if method.activation_buckets == "tensor" or point.role in (*READING, PointRole.SOFTMAX) or point.side == "denominator":
        return None
    module: Any = context.model.get_submodule(point.modules[0])
    weight = getattr(module, "weight", None)
    if weight is None and not isinstance(module, Formed):
        return context.anatomy.hidden_size  # a whole layer
    return len(weight) if weight is not None and weight.ndim == 1 else shape_of(module)[0]


def _tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Embedding tables long enough to be worth it, by the name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= TABLE_ROWS
    }


def _factors(model: nn.Module) -> list[str]:
    """The parameters that hold a row for each word of a table in another form: as long as the table, and looked up like one."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, Formed) and module.table}
    return [f"{name}.{part}" for name, table in tables.items() if table.shape[0] >= TABLE_ROWS for part in table.integers]


def _last(point: Point) -> bool:
    return point.side == "output"
