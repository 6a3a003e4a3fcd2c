"""`slimformer bench`: model folders or ONNX files side by side on the dev split of a task.

A path is turned into a file, a runtime opens it, the task encodes the same examples for it, and `measuring` does the rest.
Exported files are benched with neither torch nor transformers installed.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimformer import registry
from slimformer.data.batching import collate, in_order
from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.errors import DataError, ExtraError, ModelError, RecipeError
from slimformer.exporters.base import FILES, Variant, variant_of
from slimformer.measuring.machine import Load, cores, quiet
from slimformer.measuring.records import Standing
from slimformer.measuring.scoring import Entry, Measurement, measure
from slimformer.measuring.timing import Engine, model_inputs
from slimformer.reporting.ledger import read_facts
from slimformer.runtimes.base import Runner
from slimformer.saving.checkpoint import TOKENIZER_FILES, load, read_config
from slimformer.tasks.base import Example, Features, Split, Task

_log = logging.getLogger(__name__)

# From the fastest file of an export to the plainest: the first stands for a folder that does not name its best.
_FASTEST_FIRST = (Variant.INT8_FUSED, Variant.INT8_STATIC, Variant.FUSED, Variant.FLOAT)


@dataclass(frozen=True)
class _Found:
    """A model file on disk, with the folder that holds its tokenizer and config."""

    name: str
    file: Path
    folder: Path
    precision: str
    facts: Mapping[str, Any]


def bench(
    paths: Sequence[Path],
    task: Task | None = None,
    *,
    task_name: str = "",
    runtimes: Sequence[str] = ("onnxruntime",),
    threads: int | None = None,
    max_length: int | None = None,
    rounds: int = 10,
    limit: int = 100,
    seconds: float | None = 60.0,
    wait_seconds: float = 60.0,
    load: Load | None = None,
    seed: int = 0,
) -> Measurement:
    """Models side by side on the task's dev split, ratios over the first path; `report.table(result.records)` shows them.

    A path is a folder with ONNX files (its best one is taken; of a single folder, all), an .onnx file in such a folder, or a
    plain transformers folder, which is exported first and needs torch. Without a task it is the one that the first folder which
    names one was made for. `seconds` is for each of the two workloads; without a `load` it waits up to `wait_seconds` for a
    quiet machine. ModelError, DataError or ExtraError say what is wrong.
    """
    if not paths:
        raise ModelError("there is nothing to bench.", help="name one or more model folders.")
    with tempfile.TemporaryDirectory(prefix="slimformer-bench-") as scratch:
        task = task or _recorded_task([Path(path) for path in paths])
        found = _find_all([Path(path) for path in paths], task, Path(scratch), max_length)
        length = max_length or _max_length(found)
        examples = task.split(Split.DEV)
        threads = threads or cores()
        encoded: dict[tuple[bytes, str], tuple[Task, Features]] = {}
        entries: list[Entry] = []
        for item in found:
            bound, features = _encode(item.folder, task, examples, length, encoded)
            bound = _fitted(bound, item)
            for runtime in runtimes:
                opened = open_model(item.file, runtime, threads)
                if opened is None:
                    continue
                name = item.name if len(runtimes) == 1 else f"{item.name}, {runtime}"
                first = not entries and item.precision in {"fused", "float"}
                role = Standing.TEACHER_FP32 if first else Standing.OTHER
                entries.append(Entry(name, role, item.precision, *opened, bound, features, item.file, item.facts))
        if not entries:
            raise ModelError(
                f"none of {', '.join(runtimes)} can run {found[0].file.name}.",
                help="choose another runtime with --runtime, or export again.",
            )
        return measure(
            entries,
            examples,
            baseline=entries[0].name,
            task_name=task_name,
            model=entries[0].name,
            rounds=rounds,
            limit=limit,
            budget_seconds=seconds,
            load=load or quiet(wait_seconds),
            seed=seed,
        )


def _fitted(task: Task, item: _Found) -> Task:
    """The task with the options that were fitted when this file was made, where any were."""
    facts = read_facts(item.folder)
    if not task.fits or facts is None or facts.task.get("use") != registry.name_of(task):
        return task
    if not facts.fitted:
        raise DataError(
            f"{item.folder} was made for data of another kind: {registry.name_of(task)} fits an option to each file, and none was "
            "fitted for these (a SQuAD v1.1 model cannot say that there is no answer).",
            help="bench it on data like those it was made for, or make it again with these.",
        )
    return replace(task, **facts.fitted.get(item.file.name, {}))  # type: ignore[type-var]


def _recorded_task(paths: Sequence[Path]) -> Task:
    for path in paths:
        facts = read_facts(path if path.is_dir() else path.parent)
        if facts is not None and "use" in facts.task:
            options = {name: value for name, value in facts.task.items() if name != "use"}
            task: Task = registry.find("tasks", str(facts.task["use"]))(**options)
            return task
    raise RecipeError("there is no data to bench on.", help="name it with --data ./folder, or --task glue/sst2 --data ...")


def open_model(path: Path, runtime: str, threads: int) -> tuple[Runner, Engine] | None:
    """A model file opened in a runtime, or None where that runtime cannot run such a file; ExtraError where it is missing."""
    engine = registry.find("runtimes", runtime)()
    if not engine.available():
        extra = f"slimformer[{engine.extra}]" if engine.extra else runtime
        raise ExtraError(f"the runtime '{runtime}' is not installed.", help=f"pip install '{extra}'")
    if not engine.accepts(path):
        return None
    return engine.load(path, threads), Engine(runtime, engine.version(), threads)


def _find_all(paths: Sequence[Path], task: Task, scratch: Path, max_length: int | None) -> list[_Found]:
    """The model file of each path, plain folders exported into `scratch`; of a single folder all its files, fp32 first."""
    found: list[_Found] = []
    for place, path in enumerate(paths):
        if path.is_file() and path.suffix in {".onnx", ".xml"}:
            found.append(_of_file(path, f"{path.parent.name}/{path.name}"))
            continue
        if not path.is_dir():
            raise ModelError(
                f"{path} is no model: there is no such folder.", help="name a folder with config.json and a model."
            )
        files = [file for variant in _FASTEST_FIRST if (file := path / FILES[variant].name).is_file()]
        if not files:
            found.append(_export(path, task, scratch / str(place), max_length))
        elif len(paths) == 1:
            found.extend(_of_file(file, file.name) for file in sorted(files, key=_is_int8))
        else:
            found.append(_of_file(_best(path, files), path.resolve().name))
    seen: dict[str, int] = {}
    unique = []
    for item in found:
        seen[item.name] = seen.get(item.name, 0) + 1
        name = item.name if seen[item.name] == 1 else f"{item.name} ({seen[item.name]})"
        unique.append(_Found(name, item.file, item.folder, item.precision, item.facts))
    return unique


def _is_int8(file: Path) -> bool:
    variant = variant_of(file.name)
    return variant is not None and FILES[variant].int8


def _of_file(file: Path, name: str) -> _Found:
    facts = read_facts(file.parent)
    known = {} if facts is None else facts.of_record()
    small = facts is not None and file.suffix == ".xml"  # ours are int8 by NNCF
    return _Found(name, file, file.parent, Variant.INT8_STATIC if small else variant_of(file.name) or Variant.FLOAT, known)


def _best(folder: Path, files: Sequence[Path]) -> Path:
    facts = read_facts(folder)
    if facts is None:
        return files[0]
    best = folder / facts.best
    if best not in files:
        raise ModelError(
            f"{folder}/slimformer.json names '{facts.best}' as the best file, which is not there.",
            facts=[f"there: {', '.join(file.name for file in files)}"],
            help="copy the whole folder again, or name one .onnx file.",
        )
    return best


def _export(folder: Path, task: Task, scratch: Path, max_length: int | None) -> _Found:
    """A plain transformers folder as fp32 ONNX with fused attention, in `scratch`, beside its tokenizer and config."""
    config = read_config(folder)
    if not _installed("torch", "transformers"):
        raise ExtraError(
            f"{folder} holds no ONNX file, and exporting it needs torch and transformers, which are not installed.",
            help="pip install torch transformers, or bench a folder that `slimformer compress` wrote.",
        )
    model = load(folder)
    examples = task.split(Split.DEV)[:40]
    features = task.bind(config).encode(examples, load_tokenizer(folder), max_length or max_length_of(folder))
    names = model_inputs(features)
    groups = [in_order(len(features), 1)[0], *in_order(len(features), 8)]
    scratch.mkdir(parents=True)
    _log.info("%s holds no ONNX file: exporting it to a temporary folder.", folder)
    exporter = registry.find("exporters", "onnx")()
    batches = [collate(features, group, names) for group in groups]
    file = scratch / FILES[Variant.FUSED].name
    exporter.export(model, batches, file, Variant.FUSED, task.outputs)
    for name in ("config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, scratch / name)
    facts = {"params": sum(parameter.numel() for parameter in model.parameters())}
    return _Found(folder.resolve().name, file, scratch, str(Variant.FUSED), facts)


def _installed(*names: str) -> bool:
    try:
        return all(find_spec(name) is not None for name in names)
    except ModuleNotFoundError:
        return False


def _max_length(found: Sequence[_Found]) -> int:
    """One length limit for all: what the first export was made with, else what every model can take."""
    said = [facts.max_length for item in found if (facts := read_facts(item.folder)) is not None]
    return min([*said[:1], *(max_length_of(item.folder) for item in found)])


def _encode(
    folder: Path, task: Task, examples: Sequence[Example], max_length: int, done: dict[tuple[bytes, str], tuple[Task, Features]]
) -> tuple[Task, Features]:
    """The task bound to this model's labels, and the examples as its rows; equal tokenizers and labels share them."""
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    key = (tokenizer.to_str().encode(), json.dumps([config.get("id2label"), config.get("problem_type")], sort_keys=True))
    if key not in done:
        bound = task.bind(config)
        done[key] = (bound, bound.encode(examples, tokenizer, max_length))
    return done[key]
