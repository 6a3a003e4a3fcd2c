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

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from slimformer import registry
from slimformer.core.plan import Plan
from slimformer.data.augmentation import check_masked_model
from slimformer.errors import ModelError, OutputError, RecipeError, SlimformerError, nearest
from slimformer.log import Log
from slimformer.measuring.latency import Levels
from slimformer.methods.base import Method, Zeros
from slimformer.quantizing.ranges import Calibration, check_calibration, check_percentile
from slimformer.running.stages import (
    TASK_TEXT,
    Bundle,
    Calibrate,
    Material,
    Run,
    Stage,
    Train,
    advance,
    check_text,
    prepare,
    refuse_cuts,
    sampled_lengths,
    torch_outputs,
)
from slimformer.saving import checkpoint
from slimformer.saving.files import claim
from slimformer.saving.sparse import Values
from slimformer.tasks.base import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.exporters.base import Exporter
    from slimformer.reporting.ledger import Target
    from slimformer.running.bench import Measurement
    from slimformer.running.delivery import Trial

RivalName = Literal["teacher-int8", "small-dense", "openvino-int8"]
TRIED = 100  # held examples on which a model that came tuned is looked at
RIVALS: tuple[RivalName, ...] = ("teacher-int8", "small-dense", "openvino-int8")


@dataclass(frozen=True)
class Export:
    """Which files to write. `choose_within`: points of loss within which the fastest file is called the best.

    Of the int8 files: `calibration` and `percentile` say how the range of an activation is found, where none was learned;
    `reduce_range` stores weights in 7 bits, for processors whose int8 sums overflow (x86 without VNNI), and so rounds weights again that
    `quantization` trained on 8 bits: train on 6, which never overflow, where the file must equal the model; `floats` names points of
    the anatomy whose matrices stay in float, or is "auto": they are searched (`floats.py`), so that int8 loses at most
    `choose_within`, and kept where that makes the best file faster. `values`: how matrices and tables are stored in
    model.safetensors; int8 is exact for weights that `quantization` left on 8, 6 or 4 bits, else smaller values are rounded.
    `openvino`: OpenVINO's own int8 file besides, made by NNCF, which the extra slimformer[openvino] brings.
    """

    to: Literal["onnx"] = "onnx"
    choose_within: float = 1.0
    calibration: Calibration = "least_squares"
    percentile: float = 99.99
    reduce_range: bool = False
    floats: tuple[str, ...] | Literal["auto"] = ()
    values: Values = "float32"
    openvino: bool = False

    def __post_init__(self) -> None:
        if self.floats != "auto":
            object.__setattr__(self, "floats", tuple(self.floats))
        if self.values not in get_args(Values):
            raise ValueError(f"values: there is no '{self.values}'; {nearest(str(self.values), get_args(Values))}")
        check_calibration(self.calibration)
        check_percentile(self.percentile)

    def exporter(self) -> Exporter:
        """The exporter with these options. It refuses no int8 file: each is judged by what it loses on held examples."""
        made: Exporter = registry.find("exporters", self.to)(
            weight_bits=7 if self.reduce_range else 8,
            agreement=0.0,
            calibration=self.calibration,
            percentile=self.percentile,
            floats=() if self.floats == "auto" else self.floats,
        )
        return made


@dataclass(frozen=True)
class Bench:
    """What to measure beside ours, and for how long each of the two workloads is timed.

    The teacher in fp32 and int8 and the smaller dense model always run where they are named; OpenVINO where it is installed.
    `openvino`: our own files of standard operators are measured there too. `fused`: our model in fp32 with fused operators too, which is
    what the teacher's fp32 is: what cutting alone gains. That file is not delivered.
    """

    rivals: tuple[RivalName, ...] = RIVALS
    seconds: float = 60.0
    openvino: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Recipe:
    """What to do to which model. `teacher`: another model to learn from; by default the model itself, once tuned.

    `latency`: what heads and neurons were measured to cost when the recipe was written; with it, a budget in latency leads to the
    same plan on any machine, without it they are measured on this one.
    """

    model: str
    task: Task
    stages: tuple[Stage, ...]
    teacher: str | None = None
    seed: int = 17
    export: Export = Export()
    bench: Bench = Bench()
    latency: Levels | None = None

    @staticmethod
    def read(path: str | Path) -> Recipe:
        """The recipe in a YAML file; RecipeError with every mistake and its place. Paths in it are relative to the file."""
        import yaml

        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {file}: {error}.", help="name a YAML file.") from None
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{file} is not YAML: {str(error).splitlines()[0]}", help="check its indentation.") from None
        return Recipe.parse(data, where=str(file), base=file.parent)

    @staticmethod
    def parse(data: Any, *, where: str = "recipe", base: Path | None = None) -> Recipe:
        """A recipe from plain data, as YAML gives it."""
        reader = _Reader(base or Path())
        recipe = reader.recipe(data)
        if reader.mistakes:
            count = len(reader.mistakes)
            raise RecipeError(
                f"{where} has {count} mistake{'s' if count > 1 else ''}.",
                facts=reader.mistakes,
                help="docs/concepts.md shows a recipe.",
            )
        assert recipe is not None
        return recipe

    def to_data(self) -> dict[str, Any]:
        """The recipe as plain data; `Recipe.parse` gives it back."""
        stages: list[dict[str, Any]] = []
        for stage in self.stages:
            if isinstance(stage, Train):
                options = _changed_options(stage)
                if stage.methods:
                    options["methods"] = [_named(method) for method in stage.methods]
                stages.append({"train": options})
            elif isinstance(stage, Calibrate):
                stages.append({"calibrate": {"method": _named(stage.method)}})
        stages += [{"export": _changed_options(self.export)}, {"bench": _changed_options(self.bench)}]
        data: dict[str, Any] = {"model": self.model, "task": _named(self.task), "stages": stages}
        if self.teacher:
            data["teacher"] = self.teacher
        if self.seed != 17:
            data["seed"] = self.seed
        if self.latency is not None:
            data["latency"] = asdict(self.latency)
        return data

    def to_yaml(self) -> str:
        """The recipe as a YAML text."""
        import yaml

        return yaml.safe_dump(self.to_data(), sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _changed_options(item: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, as plain data."""
    found = {}
    for entry in dataclasses.fields(item):
        value = getattr(item, entry.name)
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        if entry.name not in {"methods", "method"} and (default is dataclasses.MISSING or value != default):
            found[entry.name] = _plain(value)
    return found


def _named(item: Any) -> dict[str, Any]:
    return {"use": registry.name_of(item), **_changed_options(item)}


def _methods(stage: Stage) -> tuple[Method, ...]:
    """What takes part in a stage; methods that could not be read are None and left out."""
    found = (stage.method,) if isinstance(stage, Calibrate) else stage.methods if isinstance(stage, Train) else ()
    return tuple(method for method in found if method is not None)


def disorder(stage: Stage, before: Sequence[Stage]) -> Iterator[str]:
    """Why a stage makes no sense after the stages `before` it: what it would lose of them, and what to do."""
    methods, earlier = _methods(stage), [method for item in before for method in _methods(item)]
    factoring = next((registry.name_of(method) for method in earlier if method.forms), None)
    closing = next((registry.name_of(method) for method in earlier if method.closes), None)
    zeros = _zeros_after(before)
    for method in methods:
        name = registry.name_of(method)
        if factoring and method.decides and not method.forms:
            yield f"{name} cannot cut what {factoring} has factored before: cut first, factor after"
        if zeros and method.fills:
            yield (
                f"{name} gives matrices new values, and the zeros that {registry.name_of(zeros)} left would be gone: leave out "
                "one of the two"
            )
    if closing and not any(method.closes for method in methods):
        yield f"{closing} has learned grids and ranges, which this stage would lose: make {closing} the last stage"
    if zeros and zeros.leaves is Zeros.RESULT and _fills(stage):
        yield f"training would fill the zeros that {registry.name_of(zeros)} left: add keep_zeros to the methods of this stage"


def _zeros_after(stages: Sequence[Stage]) -> Method | None:
    """The method whose zeros are in the matrices after these stages."""
    found: Method | None = None
    for stage in stages:
        methods = _methods(stage)
        if _fills(stage) or any(method.fills for method in methods):
            found = None
        found = next((method for method in methods if method.leaves is not Zeros.NONE), found)
    return found


def _fills(stage: Stage) -> bool:
    """Whether training in a stage makes zeros in the encoder's matrices other numbers for good."""
    if not isinstance(stage, Train) or stage.freeze in ("encoder", "everything"):
        return False
    return not any(method.keeps_zeros or method.leaves is Zeros.RESULT for method in _methods(stage))


class _Reader:
    """Reads plain data, collecting mistakes with their places instead of stopping at the first."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mistakes: list[str] = []

    def recipe(self, data: Any) -> Recipe | None:
        if not isinstance(data, Mapping):
            self.mistakes.append("the recipe must be a mapping with model, task and stages")
            return None
        known = ("model", "task", "stages", "teacher", "seed", "latency")
        for key in data:
            if key not in known:
                self.mistakes.append(f"{key}: unknown key; {nearest(str(key), known)}")
        for key in ("model", "task", "stages"):
            if key not in data:
                self.mistakes.append(f"{key}: missing")
        for key in ("model", "teacher"):
            if key in data and not isinstance(data[key], str):
                self.mistakes.append(f"{key}: must be a path, not {data[key]!r}")
        seed = data.get("seed", 17)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            self.mistakes.append(f"seed: must be a whole number from 0, not {seed!r}")
        task = self.named(data["task"], "tasks", "task") if "task" in data else None
        latency = self.build(Levels, data["latency"], "latency") if "latency" in data else None
        stages, export, bench = self.stages(data.get("stages", []))
        if self.mistakes or task is None:
            return None
        teacher = self.path(data["teacher"]) if "teacher" in data else None
        return Recipe(self.path(data["model"]), task, tuple(stages), teacher, seed, export, bench, latency)

    def path(self, name: str) -> str:
        """A path relative to the recipe, where there is something."""
        beside = self.base / name
        return str(beside) if not Path(name).is_absolute() and beside.exists() else name

    def stages(self, data: Any) -> tuple[list[Stage], Export, Bench]:
        found: list[Stage] = []
        export, bench = Export(), Bench()
        if not isinstance(data, Sequence) or isinstance(data, str):
            self.mistakes.append("stages: must be a list")
            return found, export, bench
        for index, entry in enumerate(data):
            place = f"stages[{index}]"
            if not isinstance(entry, Mapping) or len(entry) != 1:
                self.mistakes.append(f"{place}: must be one of train, calibrate, export, bench with its options")
                continue
            kind, options = next(iter(entry.items()))
            place = f"{place}.{kind}"
            made: Any = None
            if kind == "train":
                made = self.train(options, place)
            elif kind == "calibrate":
                made = self.calibrate(options, place)
            elif kind == "export":
                export = self.build(Export, options, place) or export
            elif kind == "bench":
                bench = self.build(Bench, options, place) or bench
            else:
                self.mistakes.append(f"{place}: unknown stage; {nearest(str(kind), ('train', 'calibrate', 'export', 'bench'))}")
            if made is not None:
                self.mistakes += [f"{place}: {mistake}" for mistake in disorder(made, found)]
                found.append(made)
        return found, export, bench

    def train(self, options: Any, place: str) -> Train | None:
        options = dict(options) if isinstance(options, Mapping) else options
        entries = options.pop("methods", []) if isinstance(options, dict) else []
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            self.mistakes.append(f"{place}.methods: must be a list")
            entries = []
        methods = [self.named(entry, "methods", f"{place}.methods[{number}]") for number, entry in enumerate(entries)]
        deciding = [registry.name_of(m) for m in methods if m is not None and (m.decides or m.rewrites)]
        for number, method in enumerate(methods):
            if method is not None and not method.trains:
                name = registry.name_of(method)
                self.mistakes.append(f"{place}.methods[{number}]: '{name}' looks once; put it in a calibrate stage")
        if len(deciding) > 1:
            self.mistakes.append(f"{place}: {' and '.join(deciding)} both decide what to cut; give each its own stage")
        text = options.get("text") if isinstance(options, dict) else None
        if isinstance(text, str):
            options["text"] = text if text == TASK_TEXT else self.path(text)
            if not any(method.needs_teacher for method in methods if method is not None):
                self.mistakes.append(f"{place}.text: text has no labels, so there is nothing to learn; add distillation")
        if isinstance(options, dict) and isinstance(options.get("augment_model"), str):
            options["augment_model"] = self.path(options["augment_model"])
        stage = self.build(Train, options, place)
        if stage is not None:
            try:
                stage.settings(0)
            except RecipeError as error:
                self.mistakes += [f"{place}.{fact}" for fact in error.facts]
        return replace(stage, methods=tuple(methods)) if stage is not None else None

    def calibrate(self, options: Any, place: str) -> Calibrate | None:
        if not isinstance(options, Mapping) or set(options) != {"method"}:
            self.mistakes.append(f"{place}: needs method, and nothing else")
            return None
        method = self.named(options["method"], "methods", f"{place}.method")
        if method is not None and method.trains:
            self.mistakes.append(f"{place}.method: '{registry.name_of(method)}' has to train; put it in a train stage")
        return Calibrate(method) if method is not None else None

    def named(self, data: Any, kind: str, place: str) -> Any:
        """{use: name, option: value, ...} as an instance; a bare string is a name without options."""
        if isinstance(data, str):
            data = {"use": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("use"), str):
            self.mistakes.append(f"{place}: needs use, the name of one of the {kind}")
            return None
        name = data["use"]
        if name not in registry.names(kind):
            self.mistakes.append(f"{place}.use: there is no '{name}'; {nearest(name, registry.names(kind))}")
            return None
        options = {key: value for key, value in data.items() if key != "use"}
        for key in ("data", "dev", "train_rows", "train_ids") if kind == "tasks" else ():
            if isinstance(options.get(key), str):
                options[key] = self.path(options[key])
        return self.build(registry.find(kind, name), options, place)

    def build(self, cls: type[Any], options: Any, place: str) -> Any:
        """A dataclass from plain options, checked by pydantic; unknown names get the nearest known one."""
        from pydantic import TypeAdapter, ValidationError

        options = {} if options is None else options
        if not isinstance(options, Mapping):
            self.mistakes.append(f"{place}: must be a mapping of options, not {options!r}")
            return None
        known = [entry.name for entry in dataclasses.fields(cls) if entry.name not in {"methods", "method"}]
        unknown = [key for key in options if key not in known]
        self.mistakes += [f"{place}.{key}: unknown option; {nearest(str(key), known)}" for key in unknown]
        if unknown:
            return None
        try:
            return TypeAdapter(cls).validate_python(dict(options))
        except ValidationError as error:
            for item in error.errors():
                path = "".join(f".{part}" for part in item["loc"])
                given = f", not {item['input']!r}" if item["loc"] else ""
                self.mistakes.append(f"{place}{path}: {item['msg'].removeprefix('Value error, ')}{given}")
        except SlimformerError as error:
            self.mistakes += [f"{place}: {fact}" for fact in error.facts or (error.what,)]
        return None


# -- Running -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: the folder, and all that was measured."""

    out: Path
    measurement: Measurement


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    log: Log | None = None,
    command: str = "",
    threads: int | None = None,
    wait_seconds: float = 60.0,
    cache: str | Path | None = None,
) -> Outcome:
    """Runs a recipe into the folder `out`, going on after the last finished stage where a former run was cut off.

    `cache`: a folder for what is made of teachers (outputs, exported files, their scores), which other runs with the same teacher and
    rows will read instead of making it again; gigabytes may lie there, and stay.
    """
    look(recipe)
    given = Given(log, threads, wait_seconds, _folder(cache))
    with _staged(recipe, Path(out), given) as (bundle, stages, state):
        measurement = finish(bundle, stages, recipe, state, Path(out), command=command)
        tidy(state)
    return Outcome(Path(out), measurement)


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    log: Log | None = None,
    wait_seconds: float = 60.0,
    cache: str | Path | None = None,
) -> None:
    """Runs the stages of a recipe and delivers nothing: `run` with the same recipe and folder goes on from there.

    What is trained needs no quiet machine, what is measured does: several recipes can be trained side by side, then delivered in turn.
    """
    look(recipe)
    with _staged(recipe, Path(out), Given(log, None, wait_seconds, _folder(cache))):
        pass


def _folder(cache: str | Path | None) -> Path | None:
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise OutputError(f"{cache} is a file.", help="choose a folder as --cache; it is made where there is none.")
    return None if cache is None else Path(cache)


@contextmanager
def _staged(recipe: Recipe, out: Path, given: Given) -> Iterator[tuple[Bundle, tuple[Stage, ...], Run]]:
    """The bundle after all stages, and those that ran after the teacher was ready; the folder is claimed meanwhile."""
    with working(out, f"recipe {_digest(recipe)}", recipe.seed, given, recipe.latency) as state:
        bundle, stages = begin(recipe, state)
        state.root.mkdir(exist_ok=True)
        yield advance(stages, bundle, state), stages, state


@dataclass(frozen=True)
class Given:
    """How a run talks and what it may use, as the caller said."""

    log: Log | None
    threads: int | None
    wait_seconds: float
    cache: Path | None = None


@contextmanager
def working(folder: Path, purpose: str, seed: int, given: Given, levels: Levels | None = None) -> Iterator[Run]:
    """The output folder, claimed for one purpose and one process; RecipeError where it is finished already."""
    with claim(folder, purpose):
        if (folder / "report.html").is_file() and not (folder / "work").exists():
            raise RecipeError(f"{folder} is finished already.", help="look at its report.html, or choose another --out.")
        scratch = folder / "work"
        threads = given.threads or _cores()
        yield Run(scratch, scratch, given.log or Log(folder), seed, threads, levels, given.wait_seconds, given.cache)


def _digest(recipe: Recipe) -> str:
    import hashlib

    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:12]


def _cores() -> int:
    from slimformer.running.bench import cores

    return cores()


def tidy(state: Run) -> None:
    """Removes what only a resumed run would need."""
    import shutil

    shutil.rmtree(state.root)


def look(recipe: Recipe) -> None:
    """All checks of what the user gave that are quick, before anything is made; the errors of `begin`, but earlier."""
    from slimformer.data.tokenizer import load_tokenizer, max_length_of
    from slimformer.families.base import family_of
    from slimformer.runtimes.openvino import require_nncf

    orders = [fact for number, stage in enumerate(recipe.stages) for fact in disorder(stage, recipe.stages[:number])]
    if orders:
        raise RecipeError(
            "the stages of this recipe undo each other.", facts=orders, help="docs/concepts.md says what may follow."
        )
    if recipe.export.openvino:
        require_nncf()
    for source in map(Path, filter(None, (recipe.model, recipe.teacher))):
        family_of(checkpoint.base_type(checkpoint.read_config(source)))
        checkpoint.weights_file(source)
    look_at_gains(Path(recipe.model), recipe.stages)
    source, task = Path(recipe.model), recipe.task
    task.split(Split.DEV)
    if checkpoint.is_tuned(source, task.auto_class):
        task = task.bind(checkpoint.read_config(source) | _marks(recipe))
    elif recipe.teacher is None and not _lead(recipe.stages):
        raise RecipeError(
            f"{source} is not tuned for this task, and the recipe does not begin by tuning it.",
            help="put a stage '- train: {epochs: 3}' first, or name a tuned `teacher:`.",
        )
    if recipe.teacher:
        _look_at_teacher(Path(recipe.teacher), source, recipe.task)
    for stage in recipe.stages:
        if isinstance(stage, Train) and stage.augment_model:
            check_masked_model(Path(stage.augment_model), source)
    for split in Split:
        task.split(split)
    for stage in recipe.stages:
        if isinstance(stage, Train) and stage.text not in (None, TASK_TEXT):
            check_text(Path(str(stage.text)))
    load_tokenizer(source)
    max_length_of(source)
    _look_at_cuts(recipe, task)


def _look_at_cuts(recipe: Recipe, task: Task) -> None:
    """RecipeError, TargetError or PlanError where the first method that decides cannot do so with this model.

    What a later one meets is known only once there is something left to cut.
    """
    from slimformer.core import cost
    from slimformer.families.base import anatomy_of

    first = next((method for stage in recipe.stages for method in _methods(stage) if method.decides), None)
    if first is None:
        return
    source = Path(recipe.model)
    model = checkpoint.skeleton(source, task.auto_class)
    refuse_cuts((first,), model)
    anatomy = anatomy_of(model)
    counted = None  # latency takes weights and a minute to measure
    if first.cost == "parameters":
        counted = cost.parameters(model, anatomy)
    elif first.cost == "macs":
        counted = cost.macs(anatomy, sampled_lengths(task, source))
    first.check(anatomy, counted)


def look_at_gains(source: Path, stages: Sequence[Stage]) -> None:
    """RecipeError where a model comes with zeros or learned ranges, as a run delivers it, that the stages would lose."""
    lost = []
    if stages and checkpoint.load_ranges(source) is not None and not any(method.closes for method in _methods(stages[0])):
        lost.append("it has learned grids and ranges, which the first stage would lose: begin with quantization")
    spoiling = next((stage for stage in stages if _fills(stage) or any(method.fills for method in _methods(stage))), None)
    if spoiling is not None and checkpoint.sparse_matrices(source):
        filling = next((registry.name_of(method) for method in _methods(spoiling) if method.fills), None)
        if filling:
            lost.append(f"it was saved without its zeros, and {filling} gives matrices new values: leave out {filling}")
        else:
            lost.append(
                "it was saved without its zeros, which training would fill: add keep_zeros to the methods of each stage"
            )
    if lost:
        raise RecipeError(
            f"the stages would undo what was made of {source}.",
            facts=lost,
            help="docs/concepts.md says what may follow, and how to give up zeros and ranges.",
        )


def _look_at_teacher(teacher: Path, source: Path, task: Task) -> None:
    """ModelError or DataError where a teacher is no model for this task, or reads other token ids than the model."""
    from slimformer.data.tokenizer import OTHER_FORMS, load_tokenizer

    config = checkpoint.read_config(teacher)
    if not checkpoint.is_tuned(teacher, task.auto_class):
        kind = ", ".join(map(str, config.get("architectures") or ["model without a head"]))
        raise ModelError(
            f"the teacher {teacher} is a {kind}, and the task {registry.name_of(task)} needs one that ends in "
            f"{task.auto_class.removeprefix('AutoModel')}.",
            help="name a teacher that was tuned for this task.",
        )
    task.bind(config)
    if not any((teacher / name).is_file() for name in ("tokenizer.json", *OTHER_FORMS)):
        return  # sizes are compared when it is loaded
    mine, theirs = (load_tokenizer(folder).get_vocab() for folder in (source, teacher))
    if mine != theirs:
        differing = sum(theirs.get(token) != index for token, index in mine.items())
        raise ModelError(
            f"the teacher {teacher} has another tokenizer than the model {source}: {differing:,} of {len(mine):,} tokens have another "
            "id there, or none.",
            help="teacher and student must read the same token ids.",
        )


def _lead(stages: Sequence[Stage]) -> int:
    """How many plain `train` stages a recipe begins with."""
    count = 0
    while count < len(stages) and isinstance(stages[count], Train) and not cast(Train, stages[count]).methods:
        count += 1
    return count


def _marks(recipe: Recipe) -> dict[str, Any]:
    """What the config of the recipe's model says once leading `train` stages have trained it on the task's data."""
    return dict(recipe.task.marks()) if _lead(recipe.stages) else {}


def begin(recipe: Recipe, state: Run) -> tuple[Bundle, tuple[Stage, ...]]:
    """The bundle with a teacher that is ready, and the stages still to run; `look` has checked the recipe.

    A model that is not tuned, or whose config says that it was tuned on data of another kind, is first tuned by the recipe's leading
    plain `train` stages, and is then its own teacher. Where the recipe names a teacher, such a model itself is the student.
    """
    source = Path(recipe.model)
    config = checkpoint.read_config(source)
    tuned = checkpoint.is_tuned(source, recipe.task.auto_class)
    ready = tuned
    if tuned:
        marks = _marks(recipe)
        ready = all(config.get(name, value) == value for name, value in marks.items())
        task = recipe.task.bind(config | marks)
        model, plan, ranges = checkpoint.load(source), checkpoint.load_plan(source), checkpoint.load_ranges(source)
        for name, value in marks.items():
            setattr(model.config, name, value)  # reaches a file only with the weights that a stage has trained
    else:
        ranges = None
        # a named teacher knows the order of the classes, which the fresh head must share
        task = recipe.task.bind(checkpoint.read_config(Path(recipe.teacher))) if recipe.teacher else recipe.task
        model, plan = checkpoint.load_dense(source, task.auto_class, task.configure(), state.seed), Plan()
        task = task.bind(model.config.to_dict())
    material = prepare(task, source)
    _tell(material, state.log)
    stages = recipe.stages
    if recipe.teacher:
        teacher_config = checkpoint.read_config(Path(recipe.teacher))
        task.bind(teacher_config)
        teacher = checkpoint.load(recipe.teacher)
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ModelError(
                f"the teacher {recipe.teacher} has another vocabulary ({teacher.config.vocab_size} tokens) than the model "
                f"({model.config.vocab_size}).",
                help="teacher and student must read the same token ids.",
            )
        _try_out(teacher, material)
        return Bundle(model, plan, material, teacher, ranges=ranges), stages
    if ready:
        if not _lead(stages):  # else the first stage may teach it what it lacks
            _try_out(model, material)
        return Bundle(model, plan, material, model, ranges=ranges), stages
    lead = _lead(stages)
    bundle = advance(stages[:lead], Bundle(model, plan, material, model), state.under("teacher"))
    return Bundle(bundle.model, bundle.plan, material, bundle.model, tuned_here=not tuned), stages[lead:]


def _try_out(model: PreTrainedModel, material: Material) -> None:
    """The task's own look at a model that came tuned."""
    material.task.suits(model.config, lambda: torch_outputs(model, material, Split.HELD, TRIED))


def _tell(material: Any, log: Log) -> None:
    train, dev = material.examples[Split.TRAIN], material.examples[Split.DEV]
    held = material.examples[Split.HELD]
    log.say(f"{len(train):,} examples to train on, {len(held):,} held aside to choose on, {len(dev):,} to report on.")
    for remark in material.task.remarks():
        log.say(remark)
    for split, features in material.features.items():
        if features.truncated:
            share = features.truncated / max(1, len(material.examples[split]))
            log.say(f"{features.truncated:,} inputs of {split} ({share:.1%}) are cut off at {material.max_length} tokens.")


@dataclass(frozen=True)
class Ready:
    """Files that were exported and tried on held examples already."""

    folder: Path
    trials: tuple[Trial, ...]


def finish(
    bundle: Bundle,
    stages: Sequence[Stage],
    recipe: Recipe,
    state: Run,
    out: Path,
    *,
    target: Target | None = None,
    command: str = "",
    ready: Ready | None = None,
) -> Measurement:
    """Exports, chooses on held examples, measures beside the rivals on dev, and fills `out`."""
    from slimformer.exporters.base import Variant
    from slimformer.running import delivery
    from slimformer.running import rescue as floats

    log = state.log
    teacher = delivery.teacher_files(bundle, state)
    allowed = target.max_loss if target else recipe.export.choose_within
    if ready is None:
        log.say("exporting, and comparing the files on held examples.")
        folder, exporter = state.root / "export", recipe.export.exporter()
        files = delivery.export_files(
            bundle.model, bundle.material, folder, delivery.SHIPPED, log, exporter=exporter, ranges=bundle.ranges
        )
        paths = {variant: artifact.path for variant, artifact in files.items()}
        reference = delivery.reference(bundle, state)
        ready = Ready(folder, tuple(delivery.try_out(paths, teacher[Variant.FUSED], bundle, state, reference)))
        if recipe.export.floats == "auto":
            found = floats.rescue(bundle, folder, ready.trials, state, reference, allowed, exporter=exporter)
            ready = ready if found is None else Ready(found.folder, found.trials)
    best = delivery.choose(ready.trials, allowed)
    rivals = delivery.rivals(bundle, stages, recipe.bench.rivals, teacher, state)
    if recipe.bench.fused:
        delivery.export_files(bundle.model, bundle.material, ready.folder, (Variant.FUSED,), log)
    log.say("measuring everything side by side on the dev examples.")
    return delivery.deliver(
        bundle,
        ready.folder,
        out,
        state,
        best=best,
        rivals=rivals,
        recipe=recipe.to_yaml(),
        target=target,
        task_options=_named(bundle.material.task),
        model_name=model_name(recipe.model),
        task_name=task_name(recipe.task),
        command=command,
        seconds=recipe.bench.seconds,
        openvino=recipe.bench.openvino,
        fused=recipe.bench.fused,
        openvino_file=recipe.export.openvino,
        values=recipe.export.values,
    )


def model_name(path: str) -> str:
    """How a model is called in tables: its folder, or the one above where the folder is only called "model"."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name in {"model", "checkpoint"} and folder.parent.name else folder.name


def task_name(task: Task) -> str:
    """How a task is called in tables: its name, and what it reads where it reads something."""
    options = asdict(task)  # type: ignore[call-overload]
    data = options.get("glue") or options.get("data")
    if options.get("glue"):
        return f"glue/{options['glue']}"
    return f"{registry.name_of(task)} {Path(data).resolve().name}" if data else registry.name_of(task)
