"""`slimformer bench` compares model folders or ONNX files side by side on the dev split of a task.

A path becomes a model file, a runtime opens it, the task encodes the same examples for it, and `measuring` does the rest.
Exported files are benched with neither torch nor transformers installed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimformer import registry
from slimformer.core.pooling import EMBEDDER, SENTENCE_VECTOR
from slimformer.data.batching import collate, in_order
from slimformer.data.material import encode_rows
from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.data.trimming import SAMPLE_TEXTS, UNREADABLE, unknown_share
from slimformer.errors import DataError, ExtraError, ModelError, RecipeError, readable, shown
from slimformer.exporters.base import Variant, is_pair, variant_of
from slimformer.families.base import subject_of
from slimformer.measuring.beside import make_readable
from slimformer.measuring.machine import Load, Quiet, cores
from slimformer.measuring.records import Facts, FileFacts, Heading, Standing
from slimformer.measuring.scoring import Entry, Measurement, measure
from slimformer.measuring.sessions import installed_runtime, open_session
from slimformer.measuring.timing import Rounds, model_inputs
from slimformer.reporting.delivered import facts_beside, fastest_file, home_of, model_files, named_in
from slimformer.reporting.ledger import FACTS_FILE, read_facts
from slimformer.running.places import each_place, read_in
from slimformer.runtimes._texts import settings_of
from slimformer.saving.checkpoint import TOKENIZER_FILES, check_weights, load, load_as, model_config, read_config
from slimformer.saving.resaving import write_base_config
from slimformer.saving.sentence_told import told_folder
from slimformer.tasks.base import Example, Features, Split, Task, refuse_pretraining

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Model:
    """A model file on disk, and the folder with its tokenizer and config. `known` holds fields of its record."""

    name: str
    file: Path
    folder: Path
    precision: str
    int8: bool
    facts: Facts | None
    known: Mapping[str, Any]

    @property
    def fitted(self) -> Mapping[str, Any]:
        """The options of the task that were fitted for this file."""
        return {} if self.facts is None else self.facts.fitted.get(str(self.known.get("file", self.file.name)), {})


def bench(
    paths: Sequence[str | Path],
    task: Task | None = None,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    threads: int | None = None,
    max_length: int | None = None,
    rounds: int = 10,
    seconds: float | None = 60.0,
    wait_seconds: float = 60.0,
    load: Load | None = None,
    seed: int = 0,
) -> Measurement:
    """Scores and times models side by side on the task's dev split. The first path is the baseline of all ratios.

    Args:
        paths: Each one is a folder with ONNX files, at its top or in its folder `onnx` (the best file is taken; of a single
            folder, all files), an .onnx or .xml file in such a folder, or a plain transformers folder, which is exported first; that
            needs torch.
        task: Without a task, it is the one that the first folder with a slimformer.json was made for.
        runtimes: The runtimes that every file is run by, if they can run such a file.
        threads: How many threads a runtime may use; all cores by default.
        max_length: Tokens that an input may have; by default as many as the first folder was made with, or as every model can take.
        rounds: Each batch is timed at most so often.
        seconds: The time for each of the two workloads, batch 1 and batch 32.
        wait_seconds: It waits at most so long, in seconds, until nothing else runs; 0 does not wait.
        load: The load of the machine, if it is known; then it does not wait.
        seed: The seed of the bootstrap.

    Returns:
        A record of each file with its scores and raw times, and the answers that differ.

    Raises:
        ModelError: A path holds no model.
        DataError: The data cannot be read, or do not suit a model.
        RecipeError: There is no task, neither given nor recorded.
        ExtraError: A package is missing.

    Example:
        >>> from slimformer import bench
        >>> from slimformer.tasks.classification import Classification
        >>> result = bench(["dense", "small"], Classification(data="reviews"), seconds=1, wait_seconds=0)
        >>> [(row.name, row.score) for row in result.records]
        [('dense', 0.8), ('small', 0.6)]
        >>> result.records[1].times_faster(32).median > 0
        True
    """
    folders = [Path(path) for path in paths]
    if not folders:
        raise ModelError("there is nothing to bench.", help="name one or more model folders.")
    with tempfile.TemporaryDirectory(prefix="slimformer-bench-") as scratch:
        task = task or _recorded_task(folders)
        refuse_pretraining(task, "bench")
        models = _models(folders, task, Path(scratch), max_length)
        _refuse_unread(models, runtimes, named=len(folders) > 1)
        examples = task.split(Split.DEV)
        encoder = _Encoder(task, examples, max_length or _length_limit(models, task))
        entries = list(_entries(models, encoder, runtimes, threads or cores()))
        if not entries:
            raise ModelError(
                f"none of {', '.join(runtimes)} can run {models[0].file.name}.",
                help="choose another runtime with --runtime, or export again.",
            )
        return measure(
            entries,
            examples,
            Heading(entries[0].name, registry.name_of(task)),
            rounds=Rounds(rounds, seconds=seconds),
            load=load or Quiet(wait_seconds).load(),
            seed=seed,
            strangers=True,
        )


def _recorded_task(paths: Sequence[Path]) -> Task:
    """The task in the first slimformer.json beside these paths."""
    for path in paths:
        facts, folder = facts_beside(path) if os.path.isfile(path) else (read_facts(path), path)
        if facts is not None and "use" in facts.task:
            return _task_of(facts, folder)
    raise RecipeError("there is no data to bench on.", help="name it with --data ./folder, or --task glue/sst2 --data ...")


def _task_of(facts: Facts, folder: Path) -> Task:
    """The task that slimformer.json in `folder` names, with its data where they are now.

    ModelError if another version wrote options that are unknown here or cannot be; DataError if the data are gone.
    """
    from pydantic import TypeAdapter, ValidationError

    name, file = str(facts.task["use"]), folder / FACTS_FILE
    other = "another version of slimformer may have written it: name the task and its data, --task ... --data ./folder."
    if name not in registry.names("tasks"):
        raise ModelError(f"{file} names the task {shown(name)}, which is not installed.", help=other)
    cls = registry.find("tasks", name)
    options = {key: value for key, value in facts.task.items() if key != "use"}
    unknown = sorted(set(options) - {entry.name for entry in fields(cls)})
    if unknown:
        raise ModelError(f"{file}: the task {name} has no option {readable(unknown[0])}.", help=other)
    for key in set(cls.paths) & set(options):
        options[key] = each_place(options[key], partial(read_in, folder))
    try:
        task: Task = TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        item = error.errors()[0]
        place = ".".join(map(str, item["loc"]))
        raise ModelError(f"{file}: {readable(place)}: {item['msg']}, not {shown(item['input'])}.", help=other) from None
    except RecipeError as error:
        raise ModelError(f"{file}: {error.what}", facts=error.facts, help=other) from None
    for key in cls.paths:
        path = getattr(task, key)
        if isinstance(path, str) and os.path.isabs(path) and not os.path.exists(path):
            raise DataError(
                f"the data that {folder} was made with are gone: {path}.", help="say where they are now: --data ./folder."
            )
    return task


# -- From paths to model files -----------------------------------------------------------------------------------------------


def _models(paths: Sequence[Path], task: Task, scratch: Path, max_length: int | None) -> list[_Model]:
    """The model file of each path, or all files of a single folder, fp32 first. A plain folder is exported into `scratch`."""
    accepting = [registry.find("runtimes", name)().accepts for name in registry.names("runtimes")]
    models: list[_Model] = []
    for place, path in enumerate(paths):
        if os.path.isfile(path) and any(accepts(path) for accepts in accepting):
            models.append(_model(path, f"{path.parent.name}/{path.name}"))
            continue
        if not os.path.isdir(path):  # os.path takes any text, pathlib raises if a name is too long
            raise ModelError(
                f"{path} is no model: there is no such folder.", help="name a folder with config.json and a model."
            )
        files = model_files(path)
        if not files:
            models.append(_export(path, task, scratch / str(place), max_length))
        elif len(paths) == 1:
            models += sorted((_model(file, str(file.relative_to(path))) for file in files), key=lambda model: model.int8)
        else:
            models.append(_model(fastest_file(path, files), path.resolve().name))
    return _named_apart(models)


def _refuse_unread(models: Sequence[_Model], runtimes: Sequence[str], *, named: bool) -> None:
    """ModelError if none of the runtimes reads a model: any that was `named`, or all files of a single folder."""
    engines = [installed_runtime(name) for name in runtimes]
    unread = [model for model in models if not any(engine.accepts(model.file) for engine in engines)]
    if not unread or not (named or len(unread) == len(models)):
        return
    file = unread[0].file
    others = [name for name in registry.names("runtimes") if registry.find("runtimes", name)().accepts(file)]
    raise ModelError(
        f"{file} cannot be run by {' or '.join(runtimes)}.",
        help=f"say --runtime {' or '.join(others)}." if others else "name another file.",
    )


def _named_apart(models: Sequence[_Model]) -> list[_Model]:
    """The models with a number behind each name that has been given before."""
    count: Counter[str] = Counter()
    apart = []
    for model in models:
        count[model.name] += 1
        number = count[model.name]
        apart.append(model if number == 1 else replace(model, name=f"{model.name} ({number})"))
    return apart


def _model(file: Path, name: str) -> _Model:
    facts, _ = facts_beside(file)
    variant = variant_of(file.name) or Variant.FLOAT
    item = named_in(facts, file) or FileFacts(file.name, variant, variant.int8)
    known = {} if facts is None else facts.of_record() | {"file": item.name}
    return _Model(name, file, home_of(file), item.precision, item.int8, facts, known)


def _export(folder: Path, task: Task, scratch: Path, max_length: int | None) -> _Model:
    """A plain transformers folder as fp32 ONNX with fused attention, in `scratch`, beside its tokenizer and config."""
    config = read_config(folder)
    if not _installed("torch", "transformers"):
        raise ExtraError(
            f"{folder} holds no ONNX file, and exporting it needs torch and transformers, which are not installed.",
            help="pip install torch transformers, or bench a folder that `slimformer compress` wrote.",
        )
    vectors = task.auto_class == EMBEDDER
    write = told_folder(folder, task.told_vectors, narrows=False) if vectors else None
    if write is not None:
        told = scratch.with_name(f"{scratch.name}-told")
        told.mkdir()
        write(told)
        folder, config = told, read_config(told)
    check_weights(folder)
    model = load_as(folder, EMBEDDER, {}, 0) if vectors else load(folder)
    config = model_config(folder, EMBEDDER) if vectors else config
    examples = task.split(Split.DEV)[:40]
    features = encode_rows(task.bind(config), examples, folder, max_length or max_length_of(folder))
    groups = [in_order(len(features), 1)[0], *in_order(len(features), 8)]
    batches = [collate(features, group, model_inputs(features)) for group in groups]
    _log.info("%s holds no ONNX file: exporting it to a temporary folder.", folder)
    scratch.mkdir(parents=True)
    exporter = registry.find("exporters", "onnx")()
    file = scratch / exporter.kinds_for(model)[Variant.FUSED].name
    exporter.export(model, batches, file, Variant.FUSED, task.outputs)
    make_readable(subject_of(model), folder, scratch)
    for name in ("config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, scratch / name)
    if vectors:
        write_base_config(model, scratch)
    params = sum(parameter.numel() for parameter in model.parameters())
    return _Model(folder.resolve().name, file, scratch, Variant.FUSED, False, None, {"params": params})


def _installed(*names: str) -> bool:
    try:
        return all(find_spec(name) is not None for name in names)
    except ModuleNotFoundError:
        return False


# -- From model files to entries ---------------------------------------------------------------------------------------------


def _warn_unknown(folder: Path, tokenizer: str, examples: Sequence[Example]) -> None:
    """Says so if most words of the texts are unknown to a tokenizer."""
    share, text = unknown_share(tokenizer, [text for example in examples[:SAMPLE_TEXTS] for text in example.texts])
    if share > UNREADABLE:
        _log.warning(
            "%s: %.0f%% of the words of these texts are unknown to its tokenizer, such as in %s: is it for another language or "
            "script, or was its vocabulary cut to other texts?",
            folder,
            100 * share,
            shown(text, 60),
        )


class _Encoder:
    """Encodes the examples for one model after the other; models with equal tokenizers and labels share their rows."""

    def __init__(self, task: Task, examples: Sequence[Example], max_length: int) -> None:
        self.task = task
        self.examples = examples
        self.max_length = max_length
        self._encoded: dict[tuple[str, str], tuple[Task, Features]] = {}

    def encode(self, folder: Path) -> tuple[Task, Features]:
        """The task bound to this model's labels, and the examples as rows for its tokenizer."""
        config, tokenizer = read_config(folder), load_tokenizer(folder)
        told = [config.get(name) for name in ("id2label", "problem_type", SENTENCE_VECTOR)]
        key = (tokenizer.to_str(), json.dumps(told, sort_keys=True))
        if key not in self._encoded:
            bound = self.task.bind(config)
            _warn_unknown(folder, key[0], self.examples)
            self._encoded[key] = (bound, encode_rows(bound, self.examples, folder, self.max_length))
        return self._encoded[key]


def _entries(models: Sequence[_Model], encoder: _Encoder, runtimes: Sequence[str], threads: int) -> Iterator[Entry]:
    """Each model in each runtime that can run it. The first one counts as the dense teacher if it is fp32."""
    baseline = True
    for model in models:
        task, features = encoder.encode(model.folder)
        task = _fitted(task, model)
        for runtime in runtimes:
            if not installed_runtime(runtime).accepts(model.file):
                continue
            name = model.name if len(runtimes) == 1 else f"{model.name}, {runtime}"
            dense = baseline and not model.int8
            role = Standing.TEACHER_FP32 if dense else Standing.OTHER
            session, beams = open_session(model.file, threads, runtime), _beams(model)
            greedy = None if beams in (None, 1) else open_session(model.file, threads, runtime, {"num_beams": 1})
            yield Entry(name, role, model.precision, session, task, features, model.known, beams, greedy)
            baseline = False


def _beams(model: _Model) -> int | None:
    """On how many beams a model writes its texts; None if it writes none."""
    return settings_of(model.file.parent, {}).num_beams if is_pair(model.file) else None


def _fitted(task: Task, model: _Model) -> Task:
    """The task with the options that were fitted when this file was made, if any were."""
    facts = model.facts
    if not task.tunes or facts is None or facts.task.get("use") != registry.name_of(task):
        return task
    if not facts.fitted:
        raise DataError(
            f"{model.file} was made for data of another kind: {registry.name_of(task)} needs an option that was fitted for "
            "the file, and it has none (a SQuAD v1.1 model has no threshold below which there is no answer).",
            help="bench it on data like those it was made for, or make it again with these.",
        )
    try:
        return replace(task, **model.fitted)  # type: ignore[type-var]
    except (TypeError, RecipeError) as error:
        raise ModelError(
            f"slimformer.json holds options for {model.file} that the task {registry.name_of(task)} does not take: {error}",
            help="copy the whole folder again, or bench it with the version of slimformer that made it.",
        ) from None


def _length_limit(models: Sequence[_Model], task: Task) -> int:
    """One length limit for all: what the first delivered folder was made with, but no more than any model can take.

    A model that writes texts may take any number of tokens: then it is no more than the task says.
    """
    recorded = [model.facts.max_length for model in models if model.facts is not None]
    if recorded and recorded[0] < 1:
        raise ModelError(
            f"slimformer.json says that texts have at most {recorded[0]} tokens.",
            help="copy the whole folder again, or say --max-length.",
        )
    said = [task.max_length] if task.stand_in else []
    return min([*recorded[:1], *said, *(max_length_of(model.folder) for model in models)])
