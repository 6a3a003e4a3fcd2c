"""A recipe: model, task and stages as data; read from YAML, checked whole before anything starts, run stage by stage.

    model: ./my-bert
    task: {use: classification, data: ./reviews, text: sentence, label: label}
    stages:
      - calibrate: {method: {use: fisher, keep: 0.5}}
      - train: {epochs: 3, methods: [{use: distillation}]}
      - export: {}
      - bench: {}

A method or task is named by its file. All mistakes are shown together, each with its place. `export` and `bench` close a recipe:
they need to know the stages before them, because a fair rival is trained by the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from slimformer import registry
from slimformer.errors import RecipeError, nearest
from slimformer.measuring.latency import Levels
from slimformer.options import changed_options, named_options
from slimformer.quantizing.calibration import Calibration, check_calibration, check_percentile
from slimformer.rules import Points, Seconds, Seed, check_options, mistakes_in, some_of
from slimformer.running.fresh import Fresh
from slimformer.running.places import options_seen_from, seen_from
from slimformer.saving.sparse import Values
from slimformer.tasks.base import Task
from slimformer.training.stage import TASK_TEXT, Calibrate, Stage, Train, TrimVocabulary

if TYPE_CHECKING:
    from slimformer.exporters.base import Exporter

RivalName = Literal["teacher-int8", "small-dense", "openvino-int8", "ctranslate2-int8"]
RIVALS: tuple[RivalName, ...] = ("teacher-int8", "small-dense", "openvino-int8", "ctranslate2-int8")
Rivals = Annotated[tuple[RivalName, ...], some_of(*RIVALS, none=True)]


@dataclass(frozen=True)
class Export:
    """Which files to write.

    Attributes:
        to: The exporter. Any but "onnx" takes the fields of its own class as options, in a recipe beside these.
        choose_within: The fastest file that loses at most so many points of the metric is called the best.
        values: How matrices and tables are stored in model.safetensors. int8 is exact for weights that `quantization` left on 8, 6
            or 4 bits; otherwise smaller values are rounded.
        calibration: How the range of an activation of an int8 file is found if none was learned.
        percentile: The percentile for `calibration="percentile"`, above 50 and at most 100.
        reduce_range: Stores int8 weights in 7 bits, for processors whose int8 sums overflow (x86 without VNNI). This rounds weights
            again that `quantization` trained on 8 bits; 6 bits never overflow, and keep the file equal to the model.
        floats: Points of the anatomy whose matrices stay in float in int8 files, or "auto": they are searched, so that int8 loses at
            most `choose_within`, and kept if that makes the best file faster.
        dense: Also delivers the weights in the shapes before the cut, with zeros for what is gone, at the top of the folder: plain
            transformers then loads it, with the same answers, and no faster than the original.
        openvino: Also delivers OpenVINO's own int8 file, made by NNCF, which the extra slimformer[openvino] brings.
        options: The options of any exporter but "onnx", by name.

    Raises:
        ValueError: An option is out of range, or does not suit the exporter.

    Example:
        >>> Export(calibration="entropy").floats
        ()
    """

    to: str = "onnx"
    choose_within: Points = 1.0
    calibration: Calibration = "least_squares"
    percentile: float = 99.99
    reduce_range: bool = False
    floats: tuple[str, ...] | Literal["auto"] = ()
    values: Values = "float32"
    openvino: bool = False
    dense: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.floats != "auto":
            object.__setattr__(self, "floats", tuple(self.floats))
        if self.values not in get_args(Values):
            raise ValueError(f"values: there is no '{self.values}'; {nearest(str(self.values), get_args(Values))}")
        if self.openvino and self.to != "onnx":
            raise ValueError("openvino: its file is made from the ONNX file; export to onnx")
        check_calibration(self.calibration)
        check_percentile(self.percentile)
        check_options(self)

    def exporter(self) -> Exporter:
        """The exporter with these options. It refuses no int8 file: each is judged by what it loses on validation examples.

        Returns:
            An exporter of the kind that `to` names.

        Example:
            >>> Export(reduce_range=True).exporter().weight_bits
            7
        """
        cls = registry.find("exporters", self.to)
        exporter: Exporter
        if self.to != "onnx":
            exporter = cls(**self.options)
        else:
            exporter = cls(
                weight_bits=7 if self.reduce_range else 8,
                agreement=0.0,
                calibration=self.calibration,
                percentile=self.percentile,
                floats=() if self.floats == "auto" else self.floats,
            )
        return exporter


@dataclass(frozen=True)
class Bench:
    """The baselines to measure, and the time for each of the two workloads.

    Attributes:
        rivals: The baselines to measure: "teacher-int8", "small-dense", "openvino-int8" (only if OpenVINO is installed),
            "ctranslate2-int8" (only if CTranslate2 is installed and the model writes). The teacher in fp32 is always measured.
        seconds: The time for each workload (batch 1 and batch 32), in seconds.
        openvino: Our own files of standard operators are measured in OpenVINO too.
        fused: Our model in fp32 is measured with fused operators too, as the teacher's fp32 file is. It shows the effect of the cut
            alone; that file is not delivered.

    Example:
        >>> Bench(rivals=("teacher-int8",), seconds=5).fused
        False
    """

    rivals: Rivals = RIVALS
    seconds: Seconds = 60.0
    openvino: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Recipe:
    """A model, a task and the stages that make the model small; `run` carries it out, `read_recipe` reads one from YAML.

    Attributes:
        model: A folder, an id on the hub ("owner/name", "owner/name@revision"), or a `Fresh` model that is built.
        task: Where the examples come from, and how they are scored.
        stages: `Train`, `Calibrate` and `TrimVocabulary` stages, in order.
        teacher: Another model to learn from; by default the model itself, after the leading stages of plain fine-tuning if it came
            without a head.
        seed: The seed of all random numbers.
        export: Which files to write.
        bench: Which baselines to measure, and for how long.
        latency: The times of heads and neurons that were measured when the recipe was written. With them a budget in latency leads
            to the same plan on any machine; without them they are measured on this one.

    Example:
        >>> from slimformer import Calibrate, Recipe
        >>> from slimformer.methods.fisher import Fisher
        >>> from slimformer.tasks.classification import Classification
        >>> recipe = Recipe("./my-bert", Classification(data="reviews"), (Calibrate(Fisher(keep=0.5)),))
        >>> recipe.stages[0].method.keep
        0.5

    Raises:
        RecipeError: A value is out of range.
    """

    model: str | Fresh
    task: Task
    stages: tuple[Stage, ...]
    teacher: str | None = None
    seed: Seed = 17
    export: Export = Export()
    bench: Bench = Bench()
    latency: Levels | None = None

    def __post_init__(self) -> None:
        wrong = mistakes_in(self)
        if isinstance(self.model, Fresh) and self.model.is_student and self.teacher is None:
            wrong.append(f"model.use: a {self.model.use} is made from a teacher, and the recipe names no `teacher:`")
        if wrong:
            raise RecipeError("this recipe cannot be used.", facts=wrong, help="correct these values.")

    def to_data(self) -> dict[str, Any]:
        """The recipe as plain data; `parse_recipe` gives it back.

        Returns:
            Dicts, lists, texts and numbers: what a YAML file holds.

        Example:
            >>> from slimformer.tasks.intents import Intents
            >>> Recipe("./my-bert", Intents(), (Train(epochs=2),)).to_data()["stages"][0]
            {'train': {'epochs': 2}}
        """
        stages: list[dict[str, Any]] = []
        for stage in self.stages:
            if isinstance(stage, Train):
                options = changed_options(stage)
                if stage.methods:
                    options["methods"] = [named_options(method) for method in stage.methods]
                stages.append({"train": options})
            elif isinstance(stage, Calibrate):
                stages.append({"calibrate": {"method": named_options(stage.method)}})
            else:
                stages.append({stage.kind: changed_options(stage)})
        export = changed_options(replace(self.export, options={})) | dict(self.export.options)
        stages += [{"export": export}, {"bench": changed_options(self.bench)}]
        data: dict[str, Any] = {
            "model": self.model if isinstance(self.model, str) else _plain(self.model),
            "task": named_options(self.task),
            "stages": stages,
        }
        if self.teacher:
            data["teacher"] = self.teacher
        if self.seed != 17:
            data["seed"] = self.seed
        if self.latency is not None:
            data["latency"] = self.latency.to_data()
        return data

    def seen_from(self, folder: Path) -> Recipe:
        """The recipe for a file in `folder`: its paths are relative to that folder, so that the file can be run from anywhere.

        Args:
            folder: Where the file will lie.

        Returns:
            The recipe with other paths.

        Example:
            >>> from slimformer.tasks.intents import Intents
            >>> Recipe("my-bert", Intents(), ()).seen_from(Path("runs")).model
            '../my-bert'
        """

        def stage_from(stage: Stage) -> Stage:
            if isinstance(stage, TrimVocabulary):
                return replace(stage, text=stage.text and seen_from(folder, stage.text))
            if not isinstance(stage, Train):
                return stage
            text = seen_from(folder, stage.text) if stage.text not in (None, TASK_TEXT) else stage.text
            words = stage.augment_model and seen_from(folder, stage.augment_model)
            return replace(stage, text=text, augment_model=words)

        places = {name: getattr(self.task, name) for name in type(self.task).paths}
        return replace(
            self,
            model=seen_from(folder, self.model) if isinstance(self.model, str) else self.model,
            teacher=self.teacher and seen_from(folder, self.teacher),
            task=replace(self.task, **options_seen_from(folder, places, places)),  # type: ignore[type-var]
            stages=tuple(map(stage_from, self.stages)),
        )

    def to_yaml(self) -> str:
        """The recipe as YAML text.

        Returns:
            What `read_recipe` reads.

        Example:
            >>> from slimformer.tasks.intents import Intents
            >>> Recipe("./my-bert", Intents(), ()).to_yaml().splitlines()[0]
            'model: ./my-bert'
        """
        import yaml

        return yaml.safe_dump(self.to_data(), sort_keys=False, width=120)


def _plain(model: Fresh) -> dict[str, Any]:
    """A model to be built, as plain data."""
    data = asdict(model)
    return data if model.vocabulary is not None else {name: value for name, value in data.items() if name != "vocabulary"}
