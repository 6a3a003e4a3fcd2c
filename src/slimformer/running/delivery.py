"""From a finished model to what a person holds: files, the choice among them on held examples, the bench on dev, the page.

The one idea: whatever is chosen is chosen on the held slice, whatever is reported is measured on dev, and the rivals run in the
same rounds as ours. Nothing is trained or cut here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimformer import registry
from slimformer.core.plan import Plan
from slimformer.data.batching import collate
from slimformer.exporters.base import Artifact, Exporter, Variant
from slimformer.log import Log
from slimformer.measuring import machine
from slimformer.running.stages import HELD_ROWS, Bundle, Calibrate, Material, Run, Stage, Train, advance, subset
from slimformer.saving import checkpoint
from slimformer.saving.files import in_turn, remove_parts, whole_folder, write_text
from slimformer.saving.sparse import Values, rounding, size_bytes
from slimformer.tasks.base import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.core.anatomy import Matrix
    from slimformer.quantizing.ranges import Ranges
    from slimformer.reporting.ledger import Target
    from slimformer.running.bench import Entry, Measurement
    from slimformer.runtimes.base import Runner

FILES = {
    Variant.FLOAT: "model.onnx",
    Variant.FUSED: "model_fused.onnx",
    Variant.INT8_DYNAMIC: "model_int8_dynamic.onnx",
    Variant.INT8_FUSED: "model_int8_ort.onnx",
    Variant.INT8_STATIC: "model_int8_qdq.onnx",
}
# The int8 file for ONNX Runtime has fixed ranges, not dynamic ones: docs/decisions/0002-onnx-graphs.md
SHIPPED = (Variant.FLOAT, Variant.INT8_FUSED, Variant.INT8_STATIC)
STANDARD = (Variant.FLOAT, Variant.INT8_STATIC)  # without ONNX Runtime's own operators
INT8 = (Variant.INT8_DYNAMIC, Variant.INT8_FUSED, Variant.INT8_STATIC)
SATURATES = (
    "this processor has no VNNI: its int8 sums can overflow, which costs accuracy that other processors do not lose. All losses are "
    "measured here; if int8 loses too much, set `reduce_range: true` under `export` in a recipe (7-bit weights)."
)
OPENVINO = "openvino_model.xml"  # its weights lie beside it, in a file that ends in .bin
TEACHER_FILES = "teacher-files"
NOTES = "notes.json"  # beside exported files: file -> what its artifact notes


def export_files(
    model: PreTrainedModel,
    material: Material,
    folder: Path,
    variants: Sequence[Variant],
    log: Log,
    *,
    exporter: Exporter | None = None,
    ranges: Ranges | None = None,
) -> dict[Variant, Artifact]:
    """The model as ONNX files in `folder`, the fp32 ones proven against the model on real batches.

    No int8 file is refused here: each is judged by what it loses on held examples.
    """
    from slimformer.families.base import family_of

    options: Any = exporter or registry.find("exporters", "onnx")(agreement=0.0)
    batches = material.batches(family_of(model.config.model_type).inputs(model))
    paths = {variant: folder / FILES[variant] for variant in variants}
    made: dict[Variant, Artifact] = options.export_all(model, batches, paths, material.task.outputs, ranges)
    keep_notes(folder, made.values(), log)
    return made


def keep_notes(folder: Path, made: Iterable[Artifact], log: Log) -> None:
    """Writes down what is known of exported files: in the log, and beside them for the card."""
    notes = read_notes(folder)
    for artifact in made:
        log.event("exported", **{key: str(value) for key, value in asdict(artifact).items()})
        notes[artifact.path.name] = list(artifact.notes)
    write_text(folder / NOTES, json.dumps(notes, indent=1))


def read_notes(folder: Path) -> dict[str, list[str]]:
    """What `keep_notes` wrote, by the name of the file."""
    file = folder / NOTES
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


@dataclass(frozen=True)
class Trial:
    """One file on held examples: its score, the points it loses to the teacher, its speed over the teacher's fp32 file."""

    variant: Variant
    score: float
    loss: float
    speed_32: float
    speed_1: float
    size_bytes: int


def load(path: Path, threads: int) -> Runner:
    """A file in ONNX Runtime."""
    runner: Runner = registry.find("runtimes", "onnxruntime")().load(path, threads)
    return runner


@dataclass(frozen=True)
class Reference:
    """The teacher's scores that losses are counted from.

    A model that came tuned may have been tuned on the held examples, where it then looks better than it is; on examples that teacher
    and student have both seen, the student looks better than it is. The truth lies between the two, and the mean is taken. A teacher
    that was tuned here has not seen the held examples, and they alone count.
    """

    held: float
    seen: float
    trusted: bool


def reference(bundle: Bundle, run: Run) -> Reference:
    """Scores of the teacher's fp32 file on held and on training examples, each with what is fitted there; kept beside the file."""
    if machine.saturates(machine.environment().flags) and not run.memo.get(SATURATES):
        run.memo[SATURATES] = True
        run.log.say(SATURATES)
    fused, material = teacher_files(bundle, run)[Variant.FUSED], bundle.material
    rows = repr((material.task, [material.examples[split] for split in (Split.HELD, Split.TRAIN)]))
    file = fused.with_name(f"scores-{_digest(rows)}.json")
    with _teacher_turn(fused.parent, run):
        if not file.is_file():
            runner = load(fused, run.threads)
            write_text(file, json.dumps([_score(runner, material, split) for split in (Split.HELD, Split.TRAIN)]))
    held, seen = json.loads(file.read_text(encoding="utf-8"))
    return Reference(held, seen, bundle.tuned_here)


def _score(runner: Runner, material: Material, split: Split) -> float:
    from slimformer.running.bench import evaluate

    features, examples = subset(material, split, HELD_ROWS)
    outputs = evaluate(runner, features, 32)
    return material.task.tune(outputs, features, examples).score(outputs, features, examples)[material.task.metric]


def _tuned(runner: Runner, material: Material) -> Task:
    """The task with what is fitted on held examples for this file."""
    from slimformer.running.bench import evaluate

    if not material.task.fits:
        return material.task
    features, examples = subset(material, Split.HELD, HELD_ROWS)
    return material.task.tune(evaluate(runner, features, 32), features, examples)


def _fitted(task: Task, tuned: Task) -> dict[str, Any]:
    """The options in which a tuned task differs."""
    before, after = vars(task), vars(tuned)
    return {name: value for name, value in after.items() if value != before[name]}


def try_out(
    files: Mapping[Variant, Path], baseline: Path, bundle: Bundle, run: Run, reference: Reference, *, seconds: float = 10.0
) -> list[Trial]:
    """Each file on held examples, side by side with the teacher's fp32 file."""
    from slimformer.running.bench import Engine, compare, quiet, ratio, workloads

    material = bundle.material
    runners = {str(variant): load(path, run.threads) for variant, path in files.items()}
    scores, losses = {}, {}
    for name, runner in runners.items():
        scores[name], losses[name] = loss_of(runner, material, reference)
    runners["teacher"] = load(baseline, run.threads)
    engine = Engine("onnxruntime", registry.find("runtimes", "onnxruntime")().version(), run.threads)
    state = quiet(run.wait_seconds)
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    features, _ = subset(material, Split.HELD, 640)
    for workload in workloads(features, limit=20)[::-1]:
        timings = compare(
            runners, workload, engines=dict.fromkeys(runners, engine), load=state, rounds=30, budget_seconds=seconds
        )
        for name, timing in timings.items():
            speeds[name].append(ratio(timings["teacher"], timing).median)
    trials = [
        Trial(variant, scores[name], losses[name], speeds[name][0], speeds[name][1], files[variant].stat().st_size)
        for variant, name in ((variant, str(variant)) for variant in files)
    ]
    for trial in trials:
        run.log.event("trial", **asdict(trial))
    for trial, speed in slower(trials):
        run.log.say(
            f"on this machine {FILES[trial.variant]} is slower than float: {trial.speed_32:.2f} times the teacher's fp32 speed at "
            f"batch 32, float has {speed:.2f}."
        )
    return trials


def slower(trials: Sequence[Trial]) -> list[tuple[Trial, float]]:
    """Int8 files that are slower than the float file beside them, or where there is none than the teacher's; with its speed."""
    float_speed = next((trial.speed_32 for trial in trials if trial.variant is Variant.FLOAT), 1.0)
    return [(trial, float_speed) for trial in trials if trial.variant in INT8 and trial.speed_32 < float_speed]


def loss_of(runner: Runner, material: Material, reference: Reference) -> tuple[float, float]:
    """A file's score on held examples, and the points that it loses there to the teacher."""
    sign = 100 if material.task.higher_is_better else -100
    score = _score(runner, material, Split.HELD)
    loss = sign * (reference.held - score)
    if not reference.trusted:
        loss = (loss + sign * (reference.seen - _score(runner, material, Split.TRAIN))) / 2
    return score, loss


def teacher_files(bundle: Bundle, run: Run) -> dict[Variant, Path]:
    """The teacher's own files: fp32 fused (the baseline), fp32 standard, int8. Exported once a run, or once a cache."""
    folder = _teacher_home(bundle, run)
    wanted = (Variant.FUSED, Variant.FLOAT, Variant.INT8_DYNAMIC)
    with _teacher_turn(folder, run):
        missing = [variant for variant in wanted if not (folder / FILES[variant]).is_file()]
        if missing:
            export_files(bundle.teacher, bundle.material, folder, missing, run.log)
    return {variant: folder / FILES[variant] for variant in wanted}


def _teacher_home(bundle: Bundle, run: Run) -> Path:
    """The folder of what is made of the teacher: the run's own, or one in its cache for the same weights, rows and packages."""
    if run.cache is None:
        return run.root / TEACHER_FILES
    from slimformer.training.runstate import features_digest, model_digest

    rows = [features_digest(bundle.material.features[split]) for split in (Split.HELD, Split.TRAIN)]
    parts = [model_digest(bundle.teacher), *rows, *map(str, machine.environment().packages.items())]
    return run.cache / TEACHER_FILES / _digest(" ".join(parts))


@contextmanager
def _teacher_turn(home: Path, run: Run) -> Iterator[None]:
    """Owns the folder of a teacher's files, without what a killed run left there; waits for another run that is at work in it."""
    with in_turn(home, lambda: run.log.say("another run makes files of this teacher: waiting for it.")):
        remove_parts(home)
        yield


def rivals(
    bundle: Bundle, stages: Sequence[Stage], wanted: Sequence[str], teacher: Mapping[Variant, Path], run: Run
) -> list[Rival]:
    """The baseline first, then the rivals that are wanted and can run here."""
    from slimformer.reporting.ledger import Role

    dense = facts_of(replace(bundle, model=bundle.teacher, plan=Plan(), minutes=0.0), bundle.teacher, run, "")
    dense |= {"minutes": None, "threads": None, "peak_rss_bytes": None}
    found = [Rival("dense fp32", Role.TEACHER_FP32, teacher[Variant.FUSED], Variant.FUSED, facts=dense)]
    if "teacher-int8" in wanted:
        path = teacher[Variant.INT8_DYNAMIC]
        found.append(Rival("dense int8", Role.TEACHER_INT8, path, Variant.INT8_DYNAMIC, facts=dense))
    if "openvino-int8" in wanted and find_spec("openvino") is not None and find_spec("nncf") is not None:
        home = teacher[Variant.FLOAT].parent
        with _teacher_turn(home, run):
            path = openvino_int8(teacher[Variant.FLOAT], bundle.teacher, bundle.material, home / "openvino")
        found.append(Rival("dense OpenVINO int8", Role.OPENVINO_INT8, path, Variant.INT8_STATIC, "openvino", dense))
    cutting = any(isinstance(stage, Calibrate) or any(m.decides for m in getattr(stage, "methods", ())) for stage in stages)
    if "small-dense" in wanted and cutting and bundle.plan != Plan():  # where only zeros were made, the teacher is as small
        small = small_dense(bundle, stages, run)
        folder, wanted_file = run.root / "small", [Variant.INT8_DYNAMIC]
        made = export_files(small.model, small.material, folder, wanted_file, run.log, ranges=small.ranges)
        facts = facts_of(small, bundle.teacher, run, "")
        count = sum(layer.heads + layer.neurons > 0 for layer in facts["layers"])
        name = f"{count} dense layer{'s' if count > 1 else ''} int8"
        file = made[Variant.INT8_DYNAMIC].path
        found.append(Rival(name, Role.SMALL_DENSE, file, Variant.INT8_DYNAMIC, facts=facts))
    return found


def small_dense(bundle: Bundle, stages: Sequence[Stage], run: Run) -> Bundle:
    """The smaller dense model of about equal MACs: whole layers dropped evenly, then the same training stages."""
    from slimformer.core import cost
    from slimformer.families.base import anatomy_of

    anatomy = anatomy_of(bundle.teacher)
    lengths = bundle.material.features[Split.TRAIN].lengths()
    share = cost.macs(anatomy_of(bundle.model), lengths).dense / cost.macs(anatomy, lengths).dense
    count = max(1, round(share * len(anatomy.layers)))
    layers = registry.find("methods", "layers")(keep=count / len(anatomy.layers) + 1e-9)
    made: list[Stage] = [Calibrate(layers)]
    for stage in stages:
        if isinstance(stage, Train):
            made.append(undecided(stage))
    run.log.say(f"training the smaller dense rival ({count} of {len(anatomy.layers)} layers) with the same budget.")
    start = replace(bundle, model=bundle.teacher, plan=Plan(), minutes=0.0, peak_rss_bytes=0)
    return advance(made, start, run.under("rival"))


def undecided(stage: Train) -> Train:
    """The stage without what decides; where only that could train, the weights train in its stead, so that the passes are as many."""
    methods = tuple(method for method in stage.methods if not method.decides)
    alone = stage.freeze == "everything" and methods != stage.methods
    return replace(stage, methods=methods, freeze="nothing" if alone else stage.freeze)


def openvino_int8(path: Path, model: PreTrainedModel, material: Material, folder: Path) -> Path:
    """The fp32 file of a model as OpenVINO's own, int8 by NNCF on 300 training examples; made once in `folder`."""
    from slimformer.families.base import family_of
    from slimformer.runtimes.openvino import nncf_int8

    made = folder / OPENVINO
    if not made.is_file():
        names = family_of(model.config.model_type).inputs(model)
        features = material.features[Split.TRAIN]
        rows = [int(row) for row in np.linspace(0, len(features) - 1, min(300, len(features)))]
        nncf_int8(path, [collate(features, [row], names) for row in rows], folder)
    return made


def choose(trials: Sequence[Trial], max_loss: float) -> Trial:
    """The fastest at batch 32 of those that lose at most `max_loss` points; else the one that loses least."""
    good = [trial for trial in trials if trial.loss <= max_loss]
    if good:
        return max(good, key=lambda trial: trial.speed_32)
    return min(trials, key=lambda trial: trial.loss)


# -- The delivered folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rival:
    """A model to stand beside ours: its file, how it is called, and what is known of it."""

    name: str
    role: str
    path: Path
    variant: Variant
    runtime: str = "onnxruntime"
    facts: Mapping[str, Any] | None = None


def facts_of(bundle: Bundle, dense: PreTrainedModel, run: Run, recipe: str, values: Values = "float32") -> dict[str, Any]:
    """Fields of a Record that belong to a model, whatever file it is in. `values`: how model.safetensors stores large matrices."""
    from slimformer.core import cost
    from slimformer.core.anatomy import Role
    from slimformer.families.base import anatomy_of
    from slimformer.reporting.ledger import layers

    anatomy = anatomy_of(bundle.model)
    inside = [matrix for matrix in anatomy.matrices.values() if matrix.role not in (Role.EMBEDDING, Role.CLASSIFIER)]
    lengths = bundle.material.features[Split.DEV].lengths()
    weights = checkpoint.unshared(bundle.model)
    return {
        "params": bundle.model.num_parameters(),
        "encoder_params": sum(matrix.parameters for matrix in inside),
        "encoder_nonzero": sum(_nonzero(weights, matrix) for matrix in inside),
        "weights_bytes": size_bytes(weights, values, checkpoint.heads(bundle.model)),
        "macs": round(cost.macs(anatomy, lengths).dense),
        "layers": layers(anatomy_of(dense), bundle.plan),
        "minutes": round(bundle.minutes, 2),
        "threads": bundle.threads,
        "peak_rss_bytes": bundle.peak_rss_bytes,
        "seed": run.seed,
        "train_examples": len(bundle.material.examples[Split.TRAIN]),
        "plan": bundle.plan.digest(),
        "recipe": recipe,
    }


def _nonzero(weights: Mapping[str, Any], matrix: Matrix) -> int:
    """Numbers of a matrix that are not 0, in whatever form it is stored."""
    if matrix.dense:
        return int((weights[f"{matrix.module}.weight"] != 0).sum())
    return sum(int((weights[f"{matrix.module}.{name}"] != 0).sum()) for name in ("a", "b"))


def measure_all(
    entries: Sequence[Entry], material: Material, run: Run, *, task_name: str, model: str, seconds: float
) -> Measurement:
    """Everything side by side on dev: scores, sizes, speeds; the first entry is the baseline."""
    from slimformer.running.bench import measure, quiet

    return measure(
        entries,
        material.examples[Split.DEV],
        baseline=entries[0].name,
        task_name=task_name,
        model=model,
        rounds=30,
        budget_seconds=seconds,
        load=quiet(run.wait_seconds),
        seed=run.seed,
    )


def _entry(item: Rival, material: Material, threads: int) -> Entry:
    from slimformer.running.bench import Engine, Entry

    runtime = registry.find("runtimes", item.runtime)()
    runner = runtime.load(item.path, threads)
    return Entry(
        name=item.name,
        role=item.role,
        precision=str(item.variant),
        runner=runner,
        engine=Engine(item.runtime, runtime.version(), threads),
        task=_tuned(runner, material),
        features=material.features[Split.DEV],
        path=item.path,
        facts=item.facts or {},
    )


def deliver(
    bundle: Bundle,
    exported: Path,
    out: Path,
    run: Run,
    *,
    best: Trial,
    rivals: Sequence[Rival],
    recipe: str,
    target: Target | None,
    task_options: Mapping[str, Any],
    model_name: str,
    task_name: str,
    command: str,
    seconds: float = 60.0,
    openvino: bool = False,
    fused: bool = False,
    openvino_file: bool = False,
    values: Values = "float32",
) -> Measurement:
    """Measures the files in `exported` beside the rivals and fills `out`: model, ONNX files, card, page, ledger, recipe.

    `openvino`: our files of standard operators run there too, where it is installed. `fused`: the fused fp32 file that lies in `exported`
    is measured, not delivered. `openvino_file`: our model is delivered and measured as OpenVINO's own int8 file besides, made by NNCF.
    `values`: how large and sparse matrices are stored in model.safetensors; what rounding that means is in the log and on the card.
    The ledger row and every file that another tool needs are there when this returns; a call that was killed can be made again.
    """
    from slimformer.reporting.card import card
    from slimformer.reporting.ledger import LEDGER, Facts, Role, append, changed, write_facts
    from slimformer.reporting.page import Details, page

    material = bundle.material
    digest = _digest(recipe)
    shared = facts_of(bundle, bundle.teacher, run, digest, values)

    def mine(variant: Variant, path: Path, name: str = "", runtime: str = "onnxruntime", *, chosen: bool = False) -> Rival:
        facts = {**shared, "chosen": chosen, "target": target}
        return Rival(f"slimformer {name or _short(variant)}", str(Role.OURS), path, variant, runtime, facts)

    ours = [mine(variant, exported / FILES[variant], chosen=variant == best.variant) for variant in SHIPPED]
    if openvino and find_spec("openvino") is not None:
        standard = [item for item in ours if item.variant in STANDARD]
        ours += [mine(item.variant, item.path, f"{_short(item.variant)} in OpenVINO", "openvino") for item in standard]
    if fused:
        ours.append(mine(Variant.FUSED, exported / FILES[Variant.FUSED]))
    made = run.root / "openvino"
    if openvino_file:
        run.log.say("making OpenVINO's int8 file by NNCF.")
        path = openvino_int8(exported / FILES[Variant.FLOAT], bundle.model, material, made)
        ours.append(mine(Variant.INT8_STATIC, path, "OpenVINO int8", "openvino"))
    entries = [_entry(item, material, run.threads) for item in (*rivals, *ours)]
    own = {FILES[variant]: entry.task for variant, entry in zip(SHIPPED, entries[len(rivals) :], strict=False)}
    if openvino_file:
        own[OPENVINO] = entries[-1].task
    found = measure_all(entries, material, run, task_name=task_name, model=model_name, seconds=seconds)
    chosen = next(record for record in found.records if record.chosen)
    told = Facts(
        best=FILES[best.variant],
        task=dict(task_options),
        max_length=material.max_length,
        metric=material.task.metric,
        name=f"{model_name} (slimformer)",
        model=model_name,
        fitted={name: options for name, task in own.items() if (options := _fitted(material.task, task))},
        **shared,
    )
    with whole_folder(run.root / "delivery") as part:
        checkpoint.write(bundle.model, bundle.plan, part, tokenizer_from=material.source, values=values, ranges=bundle.ranges)
        stored = _stored(bundle.model, values)
        if stored:
            run.log.say(f"model.safetensors: {stored}.")
        for variant in SHIPPED:
            (part / FILES[variant]).write_bytes((exported / FILES[variant]).read_bytes())
        for file in made.iterdir() if openvino_file else ():
            (part / file.name).write_bytes(file.read_bytes())
        write_facts(part, told)
        write_text(part / "recipe.yaml", recipe)
        texts = [example.texts for example in material.examples[Split.DEV][:2]]
        notes = read_notes(exported).get(FILES[best.variant], [])
        card(
            part,
            chosen,
            found.records,
            texts=texts,
            max_length=material.max_length,
            base_model=model_name,
            notes=notes,
            stored=stored,
        )
        differences = changed(found, material.examples[Split.DEV], rivals[0].name, chosen.name)
        page(found.records, Details(changed=differences, command=command), part / "report.html")
        for record in found.records:
            append(part / LEDGER, record)
    for file in sorted((run.root / "delivery").iterdir()):
        file.replace(out / file.name)
    return found


def _stored(model: PreTrainedModel, values: Values) -> str:
    """What is to be said of values that are stored smaller; nothing where they are not."""
    if values == "float32":
        return ""
    lost = rounding(checkpoint.unshared(model), values, checkpoint.heads(model))
    how = f"rounded by at most {lost:.2g} of a matrix's largest" if lost else "exact"
    return f"matrices and word tables as {values}, {how}"


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _short(variant: Variant) -> str:
    return {
        Variant.FLOAT: "fp32",
        Variant.FUSED: "fp32 fused",
        Variant.INT8_DYNAMIC: "int8 dynamic",
        Variant.INT8_FUSED: "int8",
        Variant.INT8_STATIC: "int8 static",
    }[variant]


def save_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Keeps what was tried, for a resumed run."""
    write_text(path, json.dumps([asdict(trial) for trial in trials]))


def read_trials(path: Path) -> list[Trial]:
    """What `save_trials` kept."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [replace(Trial(**row), variant=Variant(row["variant"])) for row in rows]
