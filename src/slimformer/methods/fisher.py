"""One-shot pruning: Fisher information of gates, a search under a budget, least-squares repair of what is left.

Kwon, Kim, Mahoney, Hassoun, Keutzer, Gholami: A Fast Post-Training Pruning Framework for Transformers (NeurIPS 2022) for the
importance; Park, Choi, Kang: Accurate Retraining-free Pruning (ICLR 2024) for the repair of whole output matrices.
Differences: gradients are squared per example, not per batch mean, and only order the units of a sublayer; what a sublayer loses at
each size is measured, since squared gradients say little about cutting most of it (docs/decisions/0005-measured-damage.md); heads,
neurons and whole sublayers compete in one exact search under MACs, parameters or measured milliseconds; the repair runs in float64
with a ridge towards the old weights, solves the bias too, and never stops early. Choose it to start from a tuned model when minutes
matter; distil afterwards to win back what it lost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.budget import allocate
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.hooks.gating import gated
from slimformer.methods.base import Batch, Context, Method, State
from slimformer.tasks.base import Task
from slimformer.training.precision import looking
from slimformer.training.runstate import model_digest

SHARES = (0.0, 0.05, 0.125, 0.25, 0.5, 0.75)  # of a site's units, at which the damage of keeping no more is measured
FLOOR = 0.02  # the least weight of a token: later layers may still read it


@final
@dataclass(frozen=True)
class Fisher(Method):
    """`keep`: share of the dense cost that may remain. `ridge`: relative to the mean diagonal of the normal equations."""

    keep: float = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    examples: int = 2048  # for the gradients; Kwon et al. use 2,048
    damage_examples: int = 256  # on which the loss of each size is measured; 0 takes the sum of the Fisher information instead
    repair_tokens: int = 12_288  # for the least squares; 8 rows for each of 1,536 unknowns, the ridge does the rest
    ridge: float = 1e-3
    neuron_multiple: int = 16  # one row of a vector register of int8 quads; see docs/decisions
    sublayers: bool = True
    repair: bool = True

    decides: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}")

    @property
    def fills(self) -> bool:  # type: ignore[override]
        """The least squares solve for whole matrices."""
        return self.repair

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            self._chosen(Weighed({name: np.zeros(len(curve) - 1) for name, curve in cost.curves.items()}, None), anatomy, cost)

    def decide(self, state: State, context: Context) -> Decision:
        plan = self.plan(context, self.weigh(context))
        if not self.repair:
            return Decision(plan)
        return Decision(plan, weights=repaired(context, plan, tokens=self.repair_tokens, ridge=self.ridge))

    def weigh(self, context: Context) -> Weighed:
        """What the search needs to know of the model; the same for every budget, so a run finds it once for the same weights."""
        key = f"fisher {self.examples} {self.damage_examples} {model_digest(context.model)}"
        if key not in context.memo:
            importance = information(context, self.examples)
            worth = worths(context, importance, self.damage_examples) if self.damage_examples else None
            context.memo[key] = Weighed(importance, worth)
        return cast(Weighed, context.memo[key])

    def plan(self, context: Context, weighed: Weighed) -> Plan:
        """The best plan within `keep` of the dense cost; TargetError where there is none."""
        return self._chosen(weighed, context.anatomy, context.cost)

    def _chosen(self, weighed: Weighed, anatomy: Anatomy, cost: Cost) -> Plan:
        return allocate(
            anatomy,
            weighed.importance,
            cost,
            self.keep * cost.dense,
            worth=weighed.worth,
            neuron_multiple=self.neuron_multiple,
            sublayers=self.sublayers,
        )


@dataclass(frozen=True)
class Weighed:
    """`importance` orders the units of each site: (size,). `worth` is what 0, 1, ... kept units are worth: (size + 1,)."""

    importance: Mapping[str, np.ndarray]
    worth: Mapping[str, np.ndarray] | None


def worths(context: Context, importance: Mapping[str, np.ndarray], examples: int) -> dict[str, np.ndarray]:
    """Minus the measured damage of keeping only the best 0, 1, ... units of one site: site -> (size + 1,), rising to 0.

    The damage is the divergence of the task's outputs from those of the uncut model, with one site gated and all others whole, at a few
    sizes (`SHARES`), in between in step with the Fisher information that is cut. At 0 the whole sublayer is gone. Sites are measured
    one by one; the search adds them up.
    """
    model, anatomy, task = context.model, context.anatomy, context.task
    batches = [dict(batch) for batch in context.batches(examples)]
    was_training = model.training
    model.eval()

    def outputs(batch: Batch) -> dict[str, Tensor]:
        found = model(**{name: value for name, value in batch.items() if name != "labels"})
        return {name: found[name].float() for name in task.outputs}

    try:
        with torch.no_grad(), looking(next(model.parameters()).device):
            whole = [outputs(batch) for batch in batches]
            found = {}
            start = 0
            states: list[Tensor | None] = [None] * len(batches)  # what enters layer `start`: earlier ones are whole
            for name, units in importance.items():
                site = anatomy.sites[name]
                if site.layer > start:
                    states = _forward_to(model, anatomy, site.layer, batches, start, states)
                    start = site.layer
                order = np.argsort(-units, kind="stable")
                counts = sorted({round(share * site.size) for share in SHARES} - {site.size})
                lost = []
                for count in counts:
                    gate = torch.zeros(site.size, device=next(model.parameters()).device)
                    gate[order[:count].copy()] = 1.0
                    gates = {name: gate} if count or site.sublayer is None else {site.sublayer: gate[:1]}
                    total = rows = 0.0
                    with gated(model, anatomy, gates):
                        for batch, state, expected in zip(batches, states, whole, strict=True):
                            with _starting(model, anatomy, start, state):
                                total += float(task.divergence(outputs(batch), expected, batch, 1.0)) * len(batch["input_ids"])
                            rows += len(batch["input_ids"])
                    lost.append(total / rows)
                cut = np.concatenate([np.cumsum(np.sort(units))[::-1], [0.0]])  # information lost with 0, 1, ... units kept
                knots = [*counts, site.size]
                damage = np.interp(cut, cut[knots][::-1], [*lost, 0.0][::-1])
                found[name] = -np.maximum.accumulate(damage[::-1])[::-1]  # more units never do more damage: else it is noise
    finally:
        model.train(was_training)
    return found


def information(context: Context, examples: int) -> dict[str, np.ndarray]:
    """Diagonal Fisher information of each head and neuron: site -> (size,), mean over examples of the squared gate gradient."""
    sites = [site for site in context.anatomy.sites.values() if site.kind is not Kind.SUBLAYER]
    total = {site.id: np.zeros(site.size) for site in sites}
    seen = 0
    was_training = context.model.training
    context.model.eval()
    try:
        for batch in context.batches(examples):
            rows = len(batch["input_ids"])
            gates = {
                site.id: torch.ones(rows, site.size, device=batch["input_ids"].device, requires_grad=True) for site in sites
            }
            device = batch["input_ids"].device
            with torch.enable_grad(), gated(context.model, context.anatomy, gates), looking(device):
                output = context.model(**{name: value for name, value in batch.items() if name != "labels"})
                loss = context.task.loss(output, batch) * rows  # a sum, so that each row's gradient is its own
            gradients = torch.autograd.grad(loss, list(gates.values()))
            for name, gradient in zip(gates, gradients, strict=True):
                total[name] += gradient.double().square().sum(0).cpu().numpy()  # (units,)
            seen += rows
    finally:
        context.model.train(was_training)
    return {name: value / max(1, seen) for name, value in total.items()}


def repaired(context: Context, plan: Plan, *, tokens: int, ridge: float) -> dict[str, Tensor]:
    """New output weights and biases, in shapes before the cut, that make each kept sublayer match the uncut model.

    Sublayers are solved from the first to the last, each on the inputs that the already repaired ones give, so later ones absorb
    what earlier ones lost. Columns of units that go are zero.
    """
    anatomy = context.anatomy
    batches = _some(context, tokens)
    sites = [site for site in anatomy.sites.values() if site.kind is not Kind.SUBLAYER]
    ordered = [site for site in sites if site.sublayer is None or plan.keep.get(site.sublayer) != ()]
    first = next((index for index, site in enumerate(ordered) if site.id in plan.keep), None)
    dropped = [site for site in sites if site not in ordered]
    if not ordered or (first is None and not dropped):
        return {}
    model = copy.deepcopy(context.model).eval()
    wanted = [_sums(model, anatomy, ordered, batch, context.task) for batch in batches]
    gates = _zeros_and_ones(anatomy, plan, next(model.parameters()).device)
    weights: dict[str, Tensor] = {}
    with torch.no_grad(), gated(model, anatomy, gates):
        start = 0
        states: list[Tensor | None] = [None] * len(batches)  # what enters layer `start`, once that is known
        for site in ordered:
            if not _downstream(site, plan, anatomy):
                continue
            if site.layer > start:
                states = _forward_to(model, anatomy, site.layer, batches, start, states)
                start = site.layer
            kept = plan.keep.get(site.id, tuple(range(site.size)))
            tap = site.taps[0]
            linear = cast(nn.Linear, model.get_submodule(tap.module))
            columns = torch.tensor([unit * tap.unit + row for unit in kept for row in range(tap.unit)])
            goals = [goal[site.id] for goal in wanted]
            solved, bias = _solve(model, anatomy, site, linear, columns, batches, states, goals, ridge)
            linear.weight.zero_()
            linear.weight[:, columns] = solved.to(linear.weight)
            linear.bias.copy_(bias)
            weights[f"{tap.module}.weight"] = linear.weight.detach().clone()
            weights[f"{tap.module}.bias"] = linear.bias.detach().clone()
    return weights


def _downstream(site: Site, plan: Plan, anatomy: Anatomy) -> bool:
    """Whether anything was cut in this sublayer or before it: only then is there something to repair."""
    order = list(anatomy.sites)
    return any(order.index(name) <= order.index(site.id) for name in plan.keep)


def _zeros_and_ones(anatomy: Anatomy, plan: Plan, device: torch.device) -> Mapping[str, Tensor]:
    gates = {}
    for name, kept in plan.keep.items():
        gate = torch.zeros(anatomy.sites[name].size, device=device)
        gate[list(kept)] = 1.0
        gates[name] = gate
    return gates


def _some(context: Context, tokens: int) -> list[Batch]:
    """Training batches of about `tokens` real tokens in all."""
    taken: list[Batch] = []
    count = 0
    for batch in context.batches(10**9):
        taken.append(batch)
        count += int(batch["attention_mask"].sum())
        if count >= tokens:
            break
    return taken


class _Stop(Exception):
    """Ends a forward pass once all that is needed was seen."""


@contextmanager
def _watching(model: nn.Module, anatomy: Anatomy, site: Site, seen: dict[str, Tensor], *, stop: bool) -> Iterator[None]:
    """Puts a sublayer's residual, and its output matrix's input and output, into `seen` under site.id + /r, /x, /y."""
    assert site.sublayer is not None
    end = anatomy.sites[site.sublayer].taps[0]
    assert end.residual is not None

    def residual(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[f"{site.id}/r"] = args[0]

    def output(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        seen[f"{site.id}/x"], seen[f"{site.id}/y"] = args[0], result
        if stop:
            raise _Stop

    handles = [
        model.get_submodule(end.residual).register_forward_pre_hook(residual),
        model.get_submodule(site.taps[0].module).register_forward_hook(output),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Given(nn.Module):
    """Stands for a layer that has been computed already, or passes on what comes where `state` is None."""

    def __init__(self, state: Tensor | None) -> None:
        super().__init__()
        self.state = state

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states if self.state is None else self.state


@contextmanager
def _starting(model: nn.Module, anatomy: Anatomy, layer: int, state: Tensor | None) -> Iterator[None]:
    """Lets a forward pass begin at `layer`, with `state` (batch, seq, hidden) as what enters it; None: from the start."""
    earlier = anatomy.layers[:layer] if state is not None else ()
    real = {name: model.get_submodule(name) for name in earlier}
    try:
        for name in earlier:
            model.set_submodule(name, _Given(state if name == earlier[-1] else None))
        yield
    finally:
        for name, module in real.items():
            model.set_submodule(name, module)


def _entering(model: nn.Module, anatomy: Anatomy, layer: int, batch: Batch, start: int, state: Tensor | None) -> Tensor:
    """What enters `layer`: (batch, seq, hidden), computed from what enters the earlier layer `start`."""
    seen: list[Tensor] = []

    def catch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)
        raise _Stop

    handle = model.get_submodule(anatomy.layers[layer - 1]).register_forward_hook(catch)
    try:
        with _starting(model, anatomy, start, state), suppress(_Stop):
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        handle.remove()
    return seen[0]


def _forward_to(
    model: nn.Module, anatomy: Anatomy, layer: int, batches: Sequence[Batch], start: int, states: list[Tensor | None]
) -> list[Tensor | None]:
    """What enters `layer` in each batch, from what enters the earlier layer `start`."""
    return [_entering(model, anatomy, layer, batch, start, state) for batch, state in zip(batches, states, strict=True)]


def _sums(model: nn.Module, anatomy: Anatomy, sites: list[Site], batch: Batch, task: Task) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site, at real tokens: branch + residual of the uncut model (tokens, hidden), and each token's weight (tokens,).

    A token weighs as much as the loss of its example feels it: the squared norm of the loss gradient there, mean 1. In the last layer
    of a classifier that is the first token alone.
    """
    seen: dict[str, Tensor] = {}
    mask = batch["attention_mask"].bool()
    with ExitStack() as stack, torch.enable_grad():
        for site in sites:
            stack.enter_context(_watching(model, anatomy, site, seen, stop=False))
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
        loss = task.loss(output, batch) * len(mask)
        gradients = torch.autograd.grad(loss, [seen[f"{site.id}/y"] for site in sites])
    found = {}
    for site, gradient in zip(sites, gradients, strict=True):
        weight = gradient.square().sum(-1)  # (batch, seq)
        weight = weight / (weight * mask).sum(1, keepdim=True).clamp_min(1e-30) * mask.sum(1, keepdim=True)
        total = (seen[f"{site.id}/y"] + seen[f"{site.id}/r"]).detach()
        found[site.id] = (total[mask], weight[mask] * (1 - FLOOR) + FLOOR)
    return found


def _solve(
    model: nn.Module,
    anatomy: Anatomy,
    site: Site,
    linear: nn.Linear,
    columns: Tensor,
    batches: list[Batch],
    states: list[Tensor | None],
    wanted: list[tuple[Tensor, Tensor]],
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """argmin sum_t w_t |X W' + b - (wanted - residual)|^2 + ridge |W - W_old|^2 over kept columns: (out, kept), (out,), float64."""
    size = len(columns) + 1  # the last unknown is the bias
    old = torch.cat([linear.weight[:, columns], linear.bias[:, None]], dim=1).double()  # (out, kept + 1)
    gram = torch.zeros(size, size, dtype=torch.float64, device=old.device)
    right = torch.zeros(size, old.shape[0], dtype=torch.float64, device=old.device)
    seen: dict[str, Tensor] = {}
    for batch, (target, importance) in zip(batches, wanted, strict=True):
        mask = batch["attention_mask"].bool()
        with _watching(model, anatomy, site, seen, stop=True), suppress(_Stop):
            model(**{name: value for name, value in batch.items() if name != "labels"})
        x = seen[f"{site.id}/x"][mask][:, columns].double()  # (tokens, kept)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        y = target.double() - seen[f"{site.id}/r"][mask].double()  # (tokens, out)
        weighted = (x * importance.double()[:, None]).T
        gram += weighted @ x
        right += weighted @ y
    weight = ridge * gram.diagonal().mean()
    gram.diagonal().add_(weight)
    solution = torch.linalg.solve(gram, right + weight * old.T).T  # (out, kept + 1)
    return solution[:, :-1], solution[:, -1]
