"""What a measurement is once it is done: a `Record`, the row of a ledger, and the nouns in it.

A number is only worth its circumstances, so a record holds the machine, the raw times and the interval of the loss beside the
score. Only data stands here: `scoring` makes records, `reporting` writes, reads and judges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from slimformer.measuring.machine import Environment
from slimformer.measuring.timing import SINGLE, SORTED, Ratio, Timing

if TYPE_CHECKING:
    from slimformer.core.anatomy import Anatomy
    from slimformer.core.plan import Plan


class Standing(StrEnum):
    """What a row stands for in a comparison."""

    TEACHER_FP32 = "teacher-fp32"  # the baseline of every ratio
    TEACHER_INT8 = "teacher-int8"
    OPENVINO_INT8 = "openvino-int8"
    SMALL_DENSE = "small-dense"
    TEACHER_TORCH = "teacher-torch"
    OURS = "ours"
    OTHER = "other"


@dataclass(frozen=True)
class Interval:
    """A difference with the bounds that hold 95 % of its resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Layer:
    """What is left of one layer; zero heads or neurons: that sublayer is gone."""

    name: str
    heads: int
    heads_of: int
    neurons: int
    neurons_of: int


@dataclass(frozen=True)
class Goal:
    """What was asked for: times faster at batch 32, and points of the metric that may be lost."""

    speedup: float
    max_loss: float


@dataclass(frozen=True)
class Record:
    """One model in one file on one runtime, measured once: a row of the ledger. None where a number is not known."""

    name: str
    role: str
    model: str  # the teacher, by name
    task: str
    split: str
    metric: str
    scores: Mapping[str, float]
    date: str
    environment: Environment
    precision: str = ""
    file: str = ""
    higher_is_better: bool = True
    examples: int = 0  # scored
    loss: Interval | None = None  # points of the metric below the baseline; negative: better than it
    versus: Mapping[str, Interval] = field(default_factory=dict)  # points below each rival, by its name
    chosen: bool = False  # the file that ships, picked on validation examples
    target: Goal | None = None
    seed: int | None = None
    train_examples: int | None = None
    params: int | None = None
    encoder_params: int | None = None  # weights of the encoder's Linear layers, embeddings left out
    encoder_nonzero: int | None = None  # of them, those that are not exactly 0
    weights_bytes: int | None = None  # of all tensors as model.safetensors holds them, zeros left out where there are many
    size_bytes: int | None = None
    macs: int | None = None  # per average example, encoder only: theory, never to be read as speed
    layers: tuple[Layer, ...] = ()
    timings: tuple[Timing, ...] = ()
    baseline: str = ""  # name of the row that the speeds compare with, of the same run
    speed: Mapping[str, Ratio] = field(default_factory=dict)  # workload -> times faster than the baseline
    minutes: float | None = None
    threads: int | None = None  # that it was made with in those minutes; timings say theirs
    peak_rss_bytes: int | None = None
    recipe: str = ""
    plan: str = ""
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The task's own metric."""
        return self.scores[self.metric]

    @property
    def quality(self) -> float:
        """The score turned so that more is better."""
        return self.score if self.higher_is_better else -self.score

    def times_faster(self, batch: int = 32) -> Ratio | None:
        """Speed over the baseline at batch 1 or at the larger batch; None where it was not timed."""
        for timing in self.timings:
            if (timing.batch_size == 1) == (batch == 1):
                return self.speed.get(timing.workload)
        return self.speed.get(SINGLE if batch == 1 else SORTED)


@dataclass(frozen=True)
class Facts:
    """slimformer.json of an exported folder: what the files do not say themselves."""

    best: str  # file name
    task: Mapping[str, Any]  # as in a recipe
    max_length: int
    metric: str
    name: str = ""
    model: str = ""
    params: int | None = None
    encoder_params: int | None = None
    encoder_nonzero: int | None = None
    weights_bytes: int | None = None
    macs: int | None = None
    seed: int | None = None
    train_examples: int | None = None
    minutes: float | None = None
    threads: int | None = None
    peak_rss_bytes: int | None = None
    layers: tuple[Layer, ...] = ()
    recipe: str = ""
    plan: str = ""
    fitted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # file name -> options of the task found for it

    def of_record(self) -> dict[str, Any]:
        """The fields that a record of any of these files shares."""
        sizes = ("params", "encoder_params", "encoder_nonzero", "weights_bytes", "macs")
        making = ("seed", "train_examples", "minutes", "threads", "peak_rss_bytes")
        return {name: getattr(self, name) for name in (*sizes, *making, "layers", "recipe", "plan")}


def today() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def kept_layers(anatomy: Anatomy, plan: Plan) -> tuple[Layer, ...]:
    """What `plan` leaves of each layer of the dense `anatomy`."""
    from slimformer.core.anatomy import Kind

    found = []
    for number in range(len(anatomy.layers)):
        kept = {Kind.HEADS: (0, 0), Kind.NEURONS: (0, 0)}
        for site in anatomy.sites.values():
            if site.layer == number and site.kind in kept:
                gone = site.sublayer is not None and plan.keep.get(site.sublayer) == ()
                kept[site.kind] = (0 if gone else len(plan.keep.get(site.id, range(site.size))), site.size)
        found.append(Layer(str(number), *kept[Kind.HEADS], *kept[Kind.NEURONS]))
    return tuple(found)
