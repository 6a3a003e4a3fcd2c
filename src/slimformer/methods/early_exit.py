"""Early exit: a classifier behind each layer, and an input leaves at the first one that is sure enough of its answer.

Paper: Xin, Tang, Lee, Yu, Lin: DeeBERT (ACL 2020), section 3; Zhou, Xu, Ge, McAuley, Xu, Wei: BERT Loses Patience (PABEE,
NeurIPS 2020), section 3. Exits that learn from the last layer: Liu et al.: FastBERT (ACL 2020), section 3.

Idea: Many inputs are easy. A small classifier reads the first token behind each layer but the last. If the entropy of its classes is
low (DeeBERT), its largest probability high, or if several exits in a row agree (PABEE), the input leaves with that answer.

Differs: DeeBERT trains exits after the model, which is frozen; PABEE trains both together, weighted by depth. Here the stage says
which: `freeze: everything` is the first. The loss is PABEE's weighted mean in both. The threshold is not set by hand: it is the one by
which the fewest layers are computed on validation examples, of those that lose at most `max_loss` points of the task's metric there,
against the last layer. `thresholds: each` gives each exit one of its own, where the papers have one for all. DeeBERT starts the poolers
of exits from the model's own; here they start at random. In a batch, rows that are sure leave it, and the others go on without them,
so that no answer depends on its neighbours.

Choose when: inputs come one by one, and many are easy. In large batches the gain is smaller: products of few rows are less
efficient, and an exit costs as much at batch 1 as a part of a layer. The model does not get smaller, but a little larger.

Cost: training a few small matrices, or a training run; then some passes over the validation examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.cost import Cost
from slimformer.core.deciding import ExitHead, choose, doubt, last_linear
from slimformer.core.junction import EXIT, Confidence, Exit, unreachable
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.capture import Capture, capturing
from slimformer.methods.base import Context, Effects, Held, Method, State, Step
from slimformer.rules import Count, LayerNumbers, NotNegative, Points, Positive
from slimformer.tasks.base import Task

CANDIDATES = 200  # thresholds that are tried on validation examples
EACH = 20  # of each exit, if each has its own
PRICES = (0.5, 1.0, 2.0, 4.0, 8.0)  # layers that a point of the metric is worth, in turn


@final
@dataclass(frozen=True)
class EarlyExit(Method):
    """`confidence`: what lets an input leave: low "entropy", a large "maximum" of the probabilities, or "patience".

    `threshold` and `patience` are chosen on validation examples if they are not given: by them as few layers are computed as
    possible, with at most `max_loss` points lost. A score has no classes: it needs "patience", and `threshold` is how far two scores in
    a row may differ.
    `thresholds`: "one" for all exits, or one for "each", which lets an early exit be stricter than a late one, and fits the validation
    examples more closely than others.
    `layers`: those with an exit behind them, counted from 1; without it all but the last.
    `head`: an exit is one matrix ("linear"), or has a matrix and tanh before it, as BERT's pooler has.
    `learn`: exits learn the "labels", or what the last layer gives ("model").
    `weight`: of the exits' loss beside others. `lr`: of the exits; without it that of the stage.

    It is the last stage of a recipe that trains. `freeze: everything` leaves the model as it is and trains exits alone.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=2, freeze="everything", methods=(EarlyExit(max_loss=0.5),)).cuts
        False
    """

    confidence: Confidence = "entropy"
    threshold: NotNegative | None = None
    patience: Count | None = None
    thresholds: Literal["one", "each"] = "one"
    max_loss: Points = 0.5
    layers: LayerNumbers | None = None
    head: Literal["linear", "pooler"] = "pooler"
    learn: Literal["labels", "model"] = "labels"
    weight: Positive = 1.0
    lr: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.confidence != "patience":
            raise ValueError(
                f"patience counts exits that agree, and confidence is '{self.confidence}': leave out one of the two"
            )
        if self.thresholds == "each" and (self.threshold is not None or self.confidence == "patience"):
            raise ValueError(
                "thresholds: each exit's is chosen by entropy or maximum; leave out threshold, or take one for all"
            )

    def effects(self) -> Effects:
        return Effects(branches=True, needs=frozenset({Capture.HIDDEN, Capture.LOGITS}), encoders_only=True)

    def problem(self, task: Task) -> str | None:
        if task.auto_class != "AutoModelForSequenceClassification":
            return "exits are for tasks with one answer for each text: classification, or a score"
        if task.configure().get("problem_type") == "multi_label_classification":
            return "an exit asks how sure one answer is, and a text may have several labels here"
        outputs = int(task.configure().get("num_labels", 2))
        if self.confidence == "patience" and outputs > 1 and self.threshold is not None:
            return "with patience, classes agree or do not: leave out threshold"
        return unreachable(self.confidence, self.threshold, self.patience, outputs)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        places = exit_places(anatomy, self.layers)
        if self.patience is not None and self.patience >= len(places):
            raise TargetError(
                f"no input can leave: of {len(places)} exits at most {len(places) - 1} agree with the one before, and patience is "
                f"{self.patience}.",
                help=f"ask for a patience of {len(places) - 1} or less." if len(places) > 1 else "use another confidence.",
            )
        if self.confidence == "patience" and len(places) < 2:
            raise TargetError("patience compares exits, and there is only one.", help="use another confidence.")

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        outputs = last_linear(context.model, context.anatomy).out_features
        problem = unreachable(self.confidence, self.threshold, self.patience, outputs)
        if problem is not None:
            raise TargetError(f"{problem}.", help="give another threshold, or none: it is then chosen.")
        if context.held is None and not self._settled(outputs):
            raise TargetError(
                "a threshold is chosen on validation examples, and there are none here.", help="give a threshold."
            )
        exit = Exit(outputs, self.confidence, patience=self.patience or 0, pooler=self.head == "pooler")
        return _State(context, exit_places(context.anatomy, self.layers), exit, self.lr)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state, total = cast(_State, state), []
        for place, head in state.heads():
            said = {"logits": head(step.student.hidden[1 + place])}
            if self.learn == "labels":
                loss = step.task.loss(said, step.batch)
            else:
                taught = {"logits": step.student.output["logits"].detach()}
                loss = step.task.divergence(said, taught, step.batch, 1.0)
            total.append((1 + place) * loss)
        depths = sum(1 + place for place in state.places)
        return self.weight * torch.stack(total).sum() / depths

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        exits, note = [state.exit] * len(state.places), ""
        names = list(context.anatomy.layer_modules)
        if context.held is not None:
            said, last = answers(state, context, context.held)
            found = self._found(state, said, last, context.held)
            depth, examples = state.passed[-1], len(last)
            if found is None:
                return Decision(notes=(_nothing(self, examples),))
            exits, note = list(found.exits), found.told(depth, examples)
        else:
            exits = [replace(state.exit, threshold=self.threshold or 0.0, patience=self.patience or 0)] * len(exits)
        plan = Plan(junctions={names[place]: exit for place, exit in zip(state.places, exits, strict=True)})
        weights = {
            f"{context.anatomy.layers[place]}.{EXIT}.{name}": value.detach()
            for place, head in state.heads()
            for name, value in head.named_parameters()
        }
        return Decision(plan, weights=weights, notes=(note,) if note else ())

    def _settled(self, outputs: int) -> bool:
        """Whether nothing is left to be chosen."""
        needs_threshold = self.confidence != "patience" or outputs == 1
        return (self.threshold is not None or not needs_threshold) and (
            self.patience is not None or self.confidence != "patience"
        )

    def _with(self, exit: Exit, threshold: float, patience: int) -> Exit:
        return replace(exit, threshold=four_figures(threshold, up=self.confidence != "maximum"), patience=patience)

    def _found(self, state: _State, said: Sequence[Tensor], last: Tensor, held: Held) -> Outcome | None:
        """The choice by which the fewest layers are computed, of those that lose at most `max_loss`, or the one that was given; None if
        no example would leave early."""
        given = [] if self.threshold is None else [self.threshold]
        tried = [
            replace(state.exit, threshold=threshold, patience=patience)
            if given
            else self._with(state.exit, threshold, patience)
            for threshold, patience in candidates_of(state.exit, said, given, self.patience)
        ]
        allowed = np.inf if self._settled(state.exit.outputs) else self.max_loss
        whole = held.score({"logits": last.numpy()})

        def outcome(exits: Sequence[Exit]) -> Outcome:
            answer, place = choose(exits, said, last)
            counts = torch.bincount(place, minlength=len(said) + 1).tolist()
            loss = 100 * (whole - held.score({"logits": answer.numpy()}))
            return Outcome(tuple(exits), tuple(counts), tuple(state.passed), loss)

        outcomes = [outcome([exit] * len(said)) for exit in dict.fromkeys(tried) if exit.problem() is None]
        if self.thresholds == "each" and outcomes:
            outcomes += list(self._each(outcome, min(outcomes, key=lambda item: (item.loss > allowed, item.mean)), said))
        early = [item for item in outcomes if item.loss <= allowed + 1e-9 and item.counts[-1] < sum(item.counts)]
        return min(early, key=lambda item: (item.mean, item.loss), default=None)

    def _each(self, outcome: Callable[[Sequence[Exit]], Outcome], start: Outcome, said: Sequence[Tensor]) -> Iterator[Outcome]:
        """Outcomes with a threshold for each exit: one after the other is moved to where layers and loss together are least.

        A point of loss is weighed as so many layers, from few to many; the caller takes the best that it may.
        """
        grids = [
            [self._with(start.exits[0], value, 0) for value in _quantiles(doubt(start.exits[0], logits), EACH)]
            for logits in said
        ]
        never = replace(start.exits[0], threshold=1e-6 if self.confidence == "entropy" else 1 - 1e-6)
        for price in PRICES:
            best = start
            for _ in range(2):
                for place, grid in enumerate(grids):
                    moves = [exit for exit in dict.fromkeys([*grid, never]) if exit.problem() is None]
                    tried = [outcome([*best.exits[:place], exit, *best.exits[place + 1 :]]) for exit in moves]
                    best = min([best, *tried], key=lambda item: item.mean + price * max(0.0, item.loss))
                    yield best


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """The classifiers, one for each layer of `places`."""

    def __init__(self, context: Context, places: Sequence[int], exit: Exit, lr: float | None) -> None:
        super().__init__()
        self.places, self.exit, self._lr = tuple(places), exit, lr
        names = list(context.anatomy.layer_modules)
        self.passed = context.anatomy.passed(names[place] for place in places)
        self.exits = nn.ModuleList(ExitHead(exit, context.anatomy.hidden_size) for _ in places)

    def heads(self) -> Iterator[tuple[int, ExitHead]]:
        """The place of each layer with an exit, and the exit."""
        return zip(self.places, cast("Sequence[ExitHead]", self.exits), strict=True)

    def groups(self) -> list[dict[str, object]]:
        return [group | ({} if self._lr is None else {"lr": self._lr}) for group in super().groups()]


@dataclass(frozen=True)
class Outcome:
    """What becomes of the validation examples with an exit behind each layer: how many leave at each, and at the end."""

    exits: tuple[Exit, ...]
    counts: tuple[int, ...]
    layers: tuple[int, ...]  # that were computed when they leave there
    loss: float  # points of the metric

    @property
    def mean(self) -> float:
        """Layers that are computed on average."""
        return sum(count * layers for count, layers in zip(self.counts, self.layers, strict=True)) / sum(self.counts)

    def told(self, depth: int, examples: int) -> str:
        """The outcome in a sentence."""
        first = self.exits[0]
        limits = ", ".join(f"{exit.threshold:g}" for exit in (self.exits if len(set(self.exits)) > 1 else self.exits[:1]))
        rule = {
            "entropy": f"entropy up to {limits}",
            "maximum": f"probability from {limits}",
            "patience": f"patience {first.patience}" + (f", up to {limits} apart" * (first.outputs == 1)),
        }[first.confidence]
        total = sum(self.counts)
        where = ", ".join(f"{layers}: {count / total:.0%}" for count, layers in zip(self.counts, self.layers, strict=True))
        return (
            f"early_exit: {rule}; {self.mean:.2f} of {depth} layers on average over {examples:,} validation examples, and "
            f"{self.loss:.2f} points lost; by layers: {where}."
        )


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def exit_places(anatomy: Anatomy, layers: Sequence[int] | None) -> list[int]:
    """The places, from 0, of the layers that get an exit: of those that are not gone all but the last, or those that are named.

    TargetError if there are none, or if a layer is named that can have none.
    """
    alive = sorted({site.layer for site in anatomy.of_kind(Kind.SUBLAYER)})
    able = [layer for layer in alive[:-1] if layer < len(anatomy.layers) - 1]
    if anatomy.junctions or len(anatomy.stacks) > 1 or not able:
        why = f"it has {len(alive)} layer{'s' * (len(alive) != 1)} left"
        why = "it has exits or sieves already" if anatomy.junctions else "it writes texts" if len(anatomy.stacks) > 1 else why
        raise TargetError(
            f"early_exit cannot give this model exits: {why}.", help="start from an encoder of two layers or more."
        )
    wrong = [layer for layer in layers or () if layer - 1 not in able]
    if wrong:
        raise TargetError(
            f"there can be no exit behind layer {wrong[0]}: it is gone, the last, or not there.",
            help=f"layers that can have one: {', '.join(str(layer + 1) for layer in able)}.",
        )
    return able if layers is None else [layer - 1 for layer in layers]


def four_figures(value: float, *, up: bool) -> float:
    """Four figures of a threshold, rounded so that the example it was taken from still leaves.

    >>> four_figures(0.731059, up=False), four_figures(0.02345678, up=True)
    (0.731, 0.02346)
    """
    if value <= 0:
        return 0.0
    factor = 10.0 ** (3 - math.floor(math.log10(value)))
    return (math.ceil(value * factor) if up else math.floor(value * factor)) / factor


def candidates_of(
    exit: Exit, said: Sequence[Tensor], thresholds: Sequence[float], patience: int | None
) -> Iterator[tuple[float, int]]:
    """Thresholds with a patience to try: those given, or quantiles of what exits say on examples, and each number of exits."""
    if exit.confidence != "patience":
        values = torch.cat([doubt(exit, logits) for logits in said])
        yield from ((float(value), 0) for value in thresholds or _quantiles(values))
        return
    if exit.outputs == 1:
        gaps = torch.cat([(one - other).abs()[:, 0] for one, other in zip(said[1:], said[:-1], strict=True)])
        thresholds = thresholds or _quantiles(gaps)
    for threshold in thresholds or [0.0]:
        for count in [patience] if patience is not None else range(1, len(said)):
            yield threshold, count


@torch.no_grad()
def answers(state: _State, context: Context, held: Held) -> tuple[list[Tensor], Tensor]:
    """What each exit says of the validation examples, and what the last layer says: (examples, outputs)."""
    said: list[list[Tensor]] = [[] for _ in state.places]
    last = []
    subject = context.subject
    with subject.evaluating(), capturing(subject.model, subject.anatomy, {Capture.HIDDEN}) as recorder:
        for batch in held.batches():
            output = subject.model(**subject.feed(batch))
            seen = recorder.take({"logits": output["logits"]})
            last.append(seen.output["logits"].cpu())
            for index, (place, head) in enumerate(state.heads()):
                said[index].append(head(seen.hidden[1 + place]).float().cpu())
    return [torch.cat(parts) for parts in said], torch.cat(last)


def _nothing(method: EarlyExit, examples: int) -> str:
    if method.threshold is None and method.patience is None:
        why = f"no threshold lets examples leave early at a loss of at most {method.max_loss:g} points"
    else:
        given = f"threshold of {method.threshold:g}" if method.threshold is not None else f"patience of {method.patience}"
        why = f"no example reaches the {given} early"
    return f"early_exit: {why}, of {examples:,} for validation: the model gets no exits."


def _quantiles(values: Tensor, count: int = CANDIDATES) -> list[float]:
    return [float(value) for value in np.quantile(values.numpy(), np.linspace(0, 1, count + 1))]
