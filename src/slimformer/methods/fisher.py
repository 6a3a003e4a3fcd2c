"""One-shot pruning: Fisher information of gates, a search under a budget, least-squares repair of what is left.

Paper: Kwon, Kim, Mahoney, Hassoun, Keutzer, Gholami: A Fast Post-Training Pruning Framework for Transformers (NeurIPS 2022),
for the importance; Park, Choi, Kang: Accurate Retraining-free Pruning (ICLR 2024), for the repair of whole output matrices; Kurtic,
Frantar, Alistarh: ZipLM (NeurIPS 2023), for `order: removal`, which takes units out one at a time (`_surgeon.py`).

Idea: A gate is put on each head and neuron, and its squared gradient says how much the loss feels that unit. A search keeps
what is worth most within the budget; then the output matrix of each sublayer is solved again, so that it makes up for what was
cut.

Differs: Gradients are squared per example, not per batch mean, and only order the units of a sublayer. What a sublayer loses at
each size is measured, since squared gradients say little about cutting most of it (docs/decisions/0005-measured-damage.md).
Heads, neurons and whole sublayers compete in one exact search under MACs, parameters or measured milliseconds. The repair runs
in float64 with a ridge towards the old weights, solves for the bias too, and never stops early. With `order: removal` the units of a
sublayer are put in order by what the others cannot make up for, scored anew after each that goes, and the loss at each size is measured
with the weights that make up for it; theirs estimates it from squared errors, and searches coefficients for these instead.

Choose when: you start from a tuned model and have minutes, not hours. Distil afterwards to win back what it lost. No row shows
yet where `order: removal` pays.

Cost: one pass with gradients over `examples`; for each sublayer and each of six sizes a pass over `damage_examples` from its
layer on; for the repair a pass from its layer on and a linear system for each sublayer, as wide as what is kept of it. `order: removal`
takes a pass with gradients over `repair_tokens` instead, and for each sublayer time that grows with the cube of its width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Site
from slimformer.core.budget import allocate
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.hooks.feeding import Feed, unpadded, watching
from slimformer.hooks.gating import gated, gates_of
from slimformer.hooks.precision import quick_autocast
from slimformer.methods._gradients import gate_gradients
from slimformer.methods._surgeon import Removal, removal
from slimformer.methods.base import Batch, Context, Effects, Method, State
from slimformer.rules import Count, CountOrZero, Positive, Share
from slimformer.saving.tensors import model_digest

DAMAGE_SHARES = (0.0, 0.05, 0.125, 0.25, 0.5, 0.75)  # of a site's units, at which the damage of keeping no more is measured
FLOOR = 0.02  # the least weight of a token: later layers may still read it


@final
@dataclass(frozen=True)
class Fisher(Method):
    """`keep`: share of the dense `cost` that may remain. `ridge`: relative to the mean diagonal of the normal equations.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(Fisher(keep=0.4)).method.effects().one_shot
        True
    """

    keep: Share = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    examples: Count = 2048  # training examples for the gradients; Kwon et al. use 2,048
    damage_examples: CountOrZero = 256  # each size's loss is measured on so many; 0 takes the sum of the Fisher information
    repair_tokens: Count = 12_288  # tokens for the least squares; 8 rows for each of 1,536 unknowns, the ridge does the rest
    ridge: Positive = 1e-3
    neuron_multiple: Count = 16  # one row of a vector register of int8 quads; see docs/decisions
    sublayers: bool = True  # whether all units of a sublayer may go, and the rest of it with them
    repair: bool = True  # whether the weights that stay are refitted to what the dense model computed
    order: Literal["gradients", "removal"] = "gradients"  # what says which units of a sublayer go first

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order == "removal" and not self.repair:
            raise ValueError("order: removal counts on the units that stay to make up for those that go: leave repair on")

    def effects(self) -> Effects:
        return Effects(cuts=True, uneven=True, one_shot=True, refills=self.repair)  # the least squares solve for whole matrices

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            nothing = {name: np.zeros(len(curve) - 1) for name, curve in cost.curves.items()}
            self.choose(anatomy, cost, Weighed(nothing, None))

    def decide(self, state: State, context: Context) -> Decision:
        plan = self.plan(context, self.weigh(context))
        if not self.repair:
            return Decision(plan)
        return Decision(plan, weights=repaired(context, plan, tokens=self.repair_tokens, ridge=self.ridge))

    def weigh(self, context: Context) -> Weighed:
        """What the search needs to know of the model; the same for every budget, so a run computes it once for its weights."""
        by_removal = self.order == "removal"
        counted = f"removal {self.repair_tokens} {self.ridge:g}" if by_removal else f"{self.examples}"
        key = f"fisher {counted} {self.damage_examples} {model_digest(context.model)}"
        if key not in context.memo:
            found = removals(context, tokens=self.repair_tokens, ridge=self.ridge) if by_removal else {}
            importance = {name: ranks_of(item) for name, item in found.items()} or information(context, self.examples)
            refits = {name: item.refits for name, item in found.items()}
            worth = worths(context, importance, self.damage_examples, refits) if self.damage_examples else None
            context.memo[key] = Weighed(importance, worth)
        return cast(Weighed, context.memo[key])

    def plan(self, context: Context, weighed: Weighed) -> Plan:
        """The best plan within `keep` of the dense cost; TargetError if there is none."""
        return self.choose(context.anatomy, context.cost, weighed)

    def choose(self, anatomy: Anatomy, cost: Cost, weighed: Weighed) -> Plan:
        """The same, for an anatomy and a cost alone."""
        return allocate(
            anatomy,
            weighed.importance,
            cost,
            self.keep * cost.dense,
            values=weighed.worth,
            neuron_multiple=self.neuron_multiple,
            sublayers=self.sublayers,
        )


# -- State ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighed:
    """`importance` orders the units of each site: (size,). `worth` is what 0, 1, ... kept units are worth: (size + 1,)."""

    importance: Mapping[str, np.ndarray]
    worth: Mapping[str, np.ndarray] | None


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def information(context: Context, examples: int) -> dict[str, np.ndarray]:
    """Diagonal Fisher information of each head and neuron: site -> (size,), mean over examples of the squared gate gradient."""
    sites = context.anatomy.units
    total = {site.id: np.zeros(site.size) for site in sites}
    seen = 0
    for gradients in gate_gradients(context, sites, examples):
        for name, gradient in gradients.items():
            total[name] += gradient.square().sum(0).numpy()  # (units,)
        seen += len(next(iter(gradients.values()), ()))
    return {name: value / max(1, seen) for name, value in total.items()}


def removals(context: Context, *, tokens: int, ridge: float) -> dict[str, Removal]:
    """The way of each sublayer's units out of it: site -> their order, and the weights that make up for them at `DAMAGE_SHARES`."""
    anatomy, model = context.anatomy, context.model
    sites = anatomy.units
    grams: dict[str, Tensor] = {}
    with context.subject.evaluating():
        for batch in _batches_of(context, tokens):
            for name, (x, importance) in _read_and_weighed(model, context, sites, batch).items():
                x = x.double()
                gram = (x * importance.double()[:, None]).T @ x
                grams[name] = gram if name not in grams else grams[name] + gram
    found = {}
    for site in sites:
        tap, gram = site.taps[0], grams[site.id]
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        linear = cast(nn.Linear, model.get_submodule(tap.module))
        whole = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
        found[site.id] = removal(whole.detach(), gram, site.size, tap.unit, _damage_counts(site))
    return found


def ranks_of(found: Removal) -> np.ndarray:
    """What units are worth, (size,): the damage of each, but no less than that of one which went before."""
    rising = np.maximum.accumulate(np.asarray(found.damage))
    rising = rising + 1e-9 * max(float(rising[-1]), 1e-30) * np.arange(1, len(rising) + 1)  # of two equal ones, the first goes
    importance = np.empty_like(rising)
    importance[list(found.order)] = rising
    return importance


def worths(
    context: Context,
    importance: Mapping[str, np.ndarray],
    examples: int,
    refits: Mapping[str, Mapping[int, Tensor]] | None = None,
) -> dict[str, np.ndarray]:
    """Minus the measured damage of keeping only the best 0, 1, ... units of one site: site -> (size + 1,), rising to 0.

    The damage is the divergence of the task's outputs from those of the uncut model, with one site gated and all others whole.
    It is measured at a few sizes (`DAMAGE_SHARES`); in between it follows the Fisher information that is cut. At 0 the whole
    sublayer is gone. Sites are measured one by one; the search adds them up. `refits`: site -> number of units -> the output matrix and
    bias that the site has then.
    """
    model, anatomy, task = context.model, context.anatomy, context.task
    batches = [dict(batch) for batch in context.batches(examples)]
    feed = Feed(model, anatomy, [context.subject.feed(batch) for batch in batches])
    device = context.subject.device

    def outputs(index: int) -> dict[str, Tensor]:
        output = feed.run(index)
        return {name: output[name].float() for name in task.outputs}

    def damage(gates: Mapping[str, Tensor]) -> float:
        total = terms = 0.0
        with gated(model, anatomy, gates):
            for index, (batch, expected) in enumerate(zip(batches, whole, strict=True)):
                total += float(task.divergence(outputs(index), expected, batch, 1.0)) * task.terms(batch)
                terms += task.terms(batch)
        return total / terms

    worth = {}
    with context.subject.evaluating(), torch.no_grad(), quick_autocast(device):
        whole = [outputs(index) for index in range(len(batches))]
        for name, units in importance.items():
            site = anatomy.sites[name]
            feed.reach(site.layer)  # earlier layers are whole
            order = np.argsort(-units, kind="stable")
            counts = _damage_counts(site)
            lost = []
            for count in counts:
                gate = torch.zeros(site.size, device=device)
                gate[order[:count].copy()] = 1.0
                with _refitted(model, site, (refits or {}).get(name, {}).get(count)):
                    lost.append(damage({name: gate} if count or site.sublayer is None else {site.sublayer: gate[:1]}))
            cut = np.concatenate([np.cumsum(np.sort(units))[::-1], [0.0]])  # information lost with 0, 1, ... units kept
            knots = [*counts, site.size]
            curve = np.interp(cut, cut[knots][::-1], [*lost, 0.0][::-1])
            worth[name] = -np.maximum.accumulate(curve[::-1])[::-1]  # more units never do more damage: else it is noise
    return worth


def repaired(context: Context, plan: Plan, *, tokens: int, ridge: float) -> dict[str, Tensor]:
    """New output weights and biases, in shapes before the cut, that make each kept sublayer match the uncut model.

    Sublayers are solved from the first to the last, each on the inputs that the already repaired ones give, so later ones
    absorb what earlier ones lost. Columns of units that go are zero.
    """
    anatomy = context.anatomy
    sites = anatomy.units
    kept_sites = [site for site in sites if site.sublayer is None or plan.keep.get(site.sublayer) != ()]
    whole = len(kept_sites) == len(sites) and not any(site.id in plan.keep for site in kept_sites)
    if whole or not kept_sites:
        return {}
    model = copy.deepcopy(context.model).eval()
    batches = _batches_of(context, tokens)
    targets = [_targets(model, context, kept_sites, batch) for batch in batches]
    gates = gates_of(plan, anatomy, context.subject.device)
    feed = Feed(model, anatomy, [context.subject.feed(batch) for batch in batches])
    masks = {tokens: [unpadded(batch, tokens) for batch in batches] for tokens in {stack.tokens for stack in anatomy.stacks}}
    weights: dict[str, Tensor] = {}
    with torch.no_grad(), gated(model, anatomy, gates):
        for site in kept_sites:
            if not _downstream(site, plan, anatomy):
                continue
            feed.reach(site.layer)
            kept = plan.keep.get(site.id, tuple(range(site.size)))
            tap = site.taps[0]
            linear = cast(nn.Linear, model.get_submodule(tap.module))
            columns = torch.tensor([unit * tap.unit + row for unit in kept for row in range(tap.unit)])
            own = masks[anatomy.stack_of(site.layer).tokens]
            solved, bias = least_squares(feed, site, linear, columns, own, [target[site.id] for target in targets], ridge)
            linear.weight.zero_()
            linear.weight[:, columns] = solved.to(linear.weight)
            weights[f"{tap.module}.weight"] = linear.weight.detach().clone()
            if bias is not None:
                linear.bias.copy_(bias)
                weights[f"{tap.module}.bias"] = linear.bias.detach().clone()
    return weights


def least_squares(
    feed: Feed,
    site: Site,
    linear: nn.Linear,
    columns: Tensor,
    masks: Sequence[Tensor],
    targets: Sequence[tuple[Tensor, Tensor]],
    ridge: float,
) -> tuple[Tensor, Tensor | None]:
    """The W and b of argmin sum_t w_t |X W' + b - (target - residual)|^2 + ridge |W - W_old|^2, over kept columns, in float64.

    Shapes: (out, kept), (out,). Without a bias there is no b.
    """
    biases = [] if linear.bias is None else [linear.bias[:, None]]  # the last unknown
    size = len(columns) + len(biases)
    old = torch.cat([linear.weight[:, columns], *biases], dim=1).double()  # (out, kept + 1)
    gram = torch.zeros(size, size, dtype=torch.float64, device=old.device)
    right = torch.zeros(size, old.shape[0], dtype=torch.float64, device=old.device)
    seen: dict[str, Tensor] = {}
    for index, (mask, (target, importance)) in enumerate(zip(masks, targets, strict=True)):
        with watching(feed.model, feed.anatomy, site, seen, stop=True):
            feed.run(index)
        x = seen[f"{site.id}/x"][mask][:, columns].double()  # (tokens, kept)
        x = torch.cat([x, x.new_ones(len(x), len(biases))], dim=1)
        y = target.double() - seen[f"{site.id}/r"][mask].double()  # (tokens, out)
        weighted = (x * importance.double()[:, None]).T
        gram += weighted @ x
        right += weighted @ y
    weight = ridge * gram.diagonal().mean()
    gram.diagonal().add_(weight)
    solution = torch.linalg.solve(gram, right + weight * old.T).T  # (out, kept + 1)
    return (solution[:, :-1], solution[:, -1]) if biases else (solution, None)


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _targets(model: nn.Module, context: Context, sites: list[Site], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site, at real tokens: branch + residual of the uncut model (tokens, hidden), and each token's weight (tokens,).

    A token weighs as much as the loss of its example feels it: the squared norm of the loss gradient there, mean 1. In the last
    layer of a classifier that is the first token alone.
    """
    seen: dict[str, Tensor] = {}
    weights = _token_weights(model, context, sites, batch, seen)
    targets = {}
    for site in sites:
        mask = unpadded(batch, context.anatomy.stack_of(site.layer).tokens)
        total = (seen[f"{site.id}/y"] + seen[f"{site.id}/r"]).detach()
        targets[site.id] = (total[mask], weights[site.id])
    return targets


def _token_weights(
    model: nn.Module, context: Context, sites: Sequence[Site], batch: Batch, seen: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Each real token's weight (tokens,) for each site; what `watching` sees in that pass goes into `seen`."""
    with ExitStack() as stack, torch.enable_grad():
        for site in sites:
            stack.enter_context(watching(model, context.anatomy, site, seen))
        loss = context.task.loss(model(**context.subject.feed(batch)), batch) * context.task.terms(batch)
        gradients = torch.autograd.grad(loss, [seen[f"{site.id}/y"] for site in sites])
    weights = {}
    for site, gradient in zip(sites, gradients, strict=True):
        mask = unpadded(batch, context.anatomy.stack_of(site.layer).tokens)
        weight = gradient.square().sum(-1)  # (batch, seq)
        weight = weight / (weight * mask).sum(1, keepdim=True).clamp_min(1e-30) * mask.sum(1, keepdim=True)
        weights[site.id] = weight[mask] * (1 - FLOOR) + FLOOR
    return weights


def _read_and_weighed(
    model: nn.Module, context: Context, sites: Sequence[Site], batch: Batch
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site, at real tokens: what its output matrix reads, and 1 for its bias, (tokens, n); each token's weight (tokens,)."""
    seen: dict[str, Tensor] = {}
    weights = _token_weights(model, context, sites, batch, seen)
    found = {}
    for site in sites:
        mask = unpadded(batch, context.anatomy.stack_of(site.layer).tokens)
        x = seen[f"{site.id}/x"].detach()[mask]
        linear = cast(nn.Linear, model.get_submodule(site.taps[0].module))
        found[site.id] = (x if linear.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1), weights[site.id])
    return found


def _damage_counts(site: Site) -> list[int]:
    """At how many units of a site the damage is measured."""
    return sorted({round(share * site.size) for share in DAMAGE_SHARES} - {site.size})


@contextmanager
def _refitted(model: nn.Module, site: Site, matrix: Tensor | None) -> Iterator[None]:
    """Gives a site's output matrix and bias other numbers for a while."""
    if matrix is None:
        yield
        return
    linear = cast(nn.Linear, model.get_submodule(site.taps[0].module))
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    before = [part.detach().clone() for part in parts]

    def put(numbers: Sequence[Tensor]) -> None:
        for part, own in zip(parts, numbers, strict=False):
            part.data.copy_(own)
        torch.clear_autocast_cache()  # it holds the numbers before in half precision

    try:
        put([matrix[:, : linear.weight.shape[1]], matrix[:, -1]])
        yield
    finally:
        put(before)


def _downstream(site: Site, plan: Plan, anatomy: Anatomy) -> bool:
    """Whether anything was cut in this sublayer or before it: only then is there something to repair."""
    order = list(anatomy.sites)
    return any(order.index(name) <= order.index(site.id) for name in plan.keep)


def _batches_of(context: Context, tokens: int) -> list[Batch]:
    """Training batches of about `tokens` real tokens in all."""
    taken: list[Batch] = []
    count = 0
    for batch in context.batches(10**9):
        taken.append(batch)
        count += int(batch["attention_mask"].sum())
        if count >= tokens:
            break
    return taken
