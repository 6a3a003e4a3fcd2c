"""What a measurement is once it is done: a `Record`, the row of a ledger, and the nouns in it.

A number is only worth its circumstances, so a record holds the machine, the raw times and the interval of the loss beside the
score. Only data stands here: `scoring` makes records, `reporting` writes, reads and judges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.plan import Plan
from slimformer.measuring.machine import Environment
from slimformer.measuring.timing import SINGLE, SORTED, Ratio, Timing


class Standing(StrEnum):
    """What a row stands for in a comparison."""

    TEACHER_FP32 = "teacher-fp32"  # the baseline of every ratio
    TEACHER_INT8 = "teacher-int8"
    OPENVINO_INT8 = "openvino-int8"
    CTRANSLATE2_INT8 = "ctranslate2-int8"  # of models that write
    SMALL_DENSE = "small-dense"  # of fewer whole layers, trained as ours was
    CUT = "cut"  # the model that was cut inside its layers, if the smaller dense one is delivered
    OURS = "ours"
    OTHER = "other"

    @property
    def is_rival(self) -> bool:
        """Whether ours has to beat such a row."""
        return self not in (Standing.TEACHER_FP32, Standing.OURS, Standing.OTHER)


@dataclass(frozen=True)
class Interval:
    """A difference, with the bounds that hold 95 % of its resamples."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit; a negative factor turns it round.

        >>> Interval(0.25, -0.125, 0.5).scaled(-100)
        Interval(value=-25.0, low=-50.0, high=12.5)
        """
        low, high = sorted((factor * self.low, factor * self.high))
        return Interval(factor * self.value, low, high)


@dataclass(frozen=True)
class Layer:
    """What is left of one layer. With no heads, or no neurons, that sublayer is gone."""

    name: str
    heads: int
    heads_of: int
    neurons: int
    neurons_of: int


@dataclass(frozen=True)
class ExitShare:
    """The share of the examples that a model answered after so many layers."""

    layers: int
    share: float


@dataclass(frozen=True)
class VocabularyFacts:
    """What is left of a vocabulary that was cut, and how it splits texts that it was not cut for."""

    pieces: int
    pieces_of: int
    held: int  # texts of the dev examples, from which no piece was taken
    otherwise: int  # of them: split in other pieces than before
    unreadable: int  # of them: with an unknown piece that was none before
    longer: float  # times as many pieces in all of them


@dataclass(frozen=True)
class Goal:
    """What was asked for: times faster than the baseline at batch 32, and points of the metric that may be lost."""

    speedup: float
    max_loss: float


@dataclass(frozen=True)
class Forecast:
    """What a file was chosen by: its speed at batch 32 and the points that it lost, both on validation examples."""

    speed: Ratio
    rounds: int  # that the speed was taken from
    loss: float


@dataclass(frozen=True)
class Heading:
    """What the rows of one comparison have in common: the teacher's name, the task's, the split they are scored on, and the
    digest of the teacher's weights if there are weights to read.
    """

    model: str
    task: str
    split: str = "dev"
    teacher: str = ""


@dataclass(frozen=True)
class Record:
    """One model in one file on one runtime, measured once: a row of the ledger. A number that is not known is None.

    Attributes:
        name: The row's name in tables.
        role: What the row stands for, a `Standing`.
        model: The teacher's name.
        task: The task's name, such as "glue/sst2".
        split: The split it was scored on.
        teacher: The digest of the teacher's weights: rows of other weights have another baseline, whatever its name is.
        metric: The key of `scores` that counts.
        scores: All metrics of the task, by name.
        date: When it was measured, in UTC.
        environment: The machine and the versions it was measured with.
        precision: The exporter's Variant, or "torch".
        file: The name of the model file.
        higher_is_better: Whether more of the metric is better.
        examples: How many examples were scored.
        loss: Points of the metric below the baseline; negative if it is better.
        versus: Points of the metric below each rival, by the rival's name.
        resampled: The metric on resamples of the examples, the same draws for all models and runs on as many examples: two rows of one
            split are compared in pairs by their differences. It is empty if the metric is undefined on some.
        chosen: Whether this file ships; it was picked on validation examples, never on `split`.
        target: The speed and the loss that were asked for.
        forecast: What the file was chosen by, on validation examples.
        chance: The score of the best answer that is the same for every example.
        run: The folder of the run, if a report gathers several.
        seed: The seed of the run.
        train_examples: How many examples it was trained on.
        params: All parameters.
        encoder_params: Weights of the encoder's matrices, without embeddings and classifier.
        encoder_nonzero: Those of `encoder_params` that are not exactly 0.
        weights_bytes: Bytes of all tensors as model.safetensors stores them.
        size_bytes: Bytes of the model file.
        macs: Multiply-accumulates of the encoder for an average example. This is theory, never to be read as speed.
        layers: What is left of each layer.
        hidden_units: The width of the hidden states, if it was cut; `hidden_units_of` is what it was before.
        hidden_units_of: See `hidden_units`.
        vocabulary: What is left of the vocabulary, if it was cut.
        exits: After how many layers the examples were answered, if the file stops early.
        timings: The raw times, a `Timing` for each workload.
        baseline: The name of the row of the same run that speeds and losses compare with.
        speed: Times faster than the baseline, by the workload's name.
        minutes: How long the compression took.
        threads: The threads it was made with; the timings name their own.
        peak_rss_bytes: Peak resident memory of the compression.
        recipe: The digest of the recipe.
        plan: The digest of the plan.
        notes: What else is worth knowing.

    Example:
        >>> from slimformer.measuring.machine import environment
        >>> row = Record("int8", "other", "my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.5}, today(), environment())
        >>> row.score, row.times_faster(32)
        (0.5, None)
    """

    name: str
    role: str
    model: str
    task: str
    split: str
    metric: str
    scores: Mapping[str, float]
    date: str
    environment: Environment
    teacher: str = ""
    precision: str = ""
    file: str = ""
    higher_is_better: bool = True
    examples: int = 0
    loss: Interval | None = None
    versus: Mapping[str, Interval] = field(default_factory=dict)
    resampled: tuple[float, ...] = ()
    chosen: bool = False
    target: Goal | None = None
    forecast: Forecast | None = None
    chance: float | None = None
    run: str = ""
    seed: int | None = None
    train_examples: int | None = None
    params: int | None = None
    encoder_params: int | None = None
    encoder_nonzero: int | None = None
    weights_bytes: int | None = None
    size_bytes: int | None = None
    macs: int | None = None
    layers: tuple[Layer, ...] = ()
    hidden_units: int | None = None
    hidden_units_of: int | None = None
    vocabulary: VocabularyFacts | None = None
    exits: tuple[ExitShare, ...] = ()
    timings: tuple[Timing, ...] = ()
    baseline: str = ""
    speed: Mapping[str, Ratio] = field(default_factory=dict)
    minutes: float | None = None
    threads: int | None = None
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
        """The score, negated if less of the metric is better."""
        return self.score if self.higher_is_better else -self.score

    def times_faster(self, batch: int = 32) -> Ratio | None:
        """Speed over the baseline at batch 1 or at the larger batch.

        Args:
            batch: 1, or any other number for the larger batch.

        Returns:
            The median of the rounds and its spread; None if it was not timed.

        Example:
            >>> from slimformer import Record
            >>> from slimformer.measuring.machine import environment
            >>> from slimformer.measuring.timing import SORTED, Ratio
            >>> about = ("my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.9}, "2026-01-02", environment())
            >>> record = Record("int8", "ours", *about, speed={SORTED: Ratio(3.1, 2.9, 3.3)})
            >>> record.times_faster(32).median, record.times_faster(1)
            (3.1, None)
        """
        timing = self.timing_at(batch)
        return self.speed.get(timing.workload if timing else SINGLE if batch == 1 else SORTED)

    def timing_at(self, batch: int = 32) -> Timing | None:
        """The raw times at batch 1 or at the larger batch.

        Args:
            batch: 1, or any other number for the larger batch.

        Returns:
            The first such times; None if it was not timed.

        Example:
            >>> from slimformer import Record
            >>> from slimformer.measuring.machine import environment
            >>> about = ("my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.9}, "2026-01-02", environment())
            >>> Record("int8", "ours", *about).timing_at(1) is None
            True
        """
        return next((timing for timing in self.timings if (timing.batch_size == 1) == (batch == 1)), None)


@dataclass(frozen=True)
class FileFacts:
    """A model file of an exported folder: its name, the exporter's variant, and whether its matrices are int8."""

    name: str
    precision: str
    int8: bool = False


@dataclass(frozen=True)
class Facts:
    """slimformer.json of an exported folder: what the files do not say themselves.

    `best` names the file that ships, `files` all of them in the exporter's order, `task` holds the task's options as in a recipe,
    and `fitted` the options of the task that were fitted for a file, by its name. The other fields are those of `Record`.
    """

    best: str
    task: Mapping[str, Any]
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
    hidden_units: int | None = None
    hidden_units_of: int | None = None
    vocabulary: VocabularyFacts | None = None
    recipe: str = ""
    plan: str = ""
    fitted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: tuple[FileFacts, ...] = ()

    def of_record(self) -> dict[str, Any]:
        """The fields that the records of all these files share."""
        sizes = ("params", "encoder_params", "encoder_nonzero", "weights_bytes", "macs")
        making = ("seed", "train_examples", "minutes", "threads", "peak_rss_bytes")
        return {
            name: getattr(self, name)
            for name in (*sizes, *making, "layers", "hidden_units", "hidden_units_of", "vocabulary", "recipe", "plan")
        }


def today() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def kept_layers(anatomy: Anatomy, plan: Plan) -> tuple[Layer, ...]:
    """What `plan` leaves of each layer of the dense `anatomy`; the heads of a decoder's layer are those of both attentions."""
    layers = []
    for number, name in enumerate(layer_names(anatomy)):
        counts = {Kind.HEADS: (0, 0), Kind.NEURONS: (0, 0)}
        for site in anatomy.units:
            if site.layer == number:
                gone = site.sublayer is not None and plan.keep.get(site.sublayer) == ()
                kept, size = counts[site.kind]
                kept += 0 if gone else len(plan.keep.get(site.id, range(site.size)))
                counts[site.kind] = kept, size + site.size
        layers.append(Layer(name, *counts[Kind.HEADS], *counts[Kind.NEURONS]))
    return tuple(layers)


def layer_names(anatomy: Anatomy) -> list[str]:
    """What people call the layers: by their numbers, and by their stack if there are several."""
    several = len(anatomy.stacks) > 1
    return [f"{stack.name} {i}" if several else str(i) for stack in anatomy.stacks for i in range(len(stack.layers))]
