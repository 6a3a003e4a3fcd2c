"""Delivers a candidate: measures its files beside the rivals on dev, then fills the folder with files, card and page.

Nothing is trained, cut or chosen here: the candidate was chosen on validation examples, the rivals were made in `rivals.py`.
"""

from __future__ import annotations

import os.path
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimformer import registry
from slimformer.data.tokenizer_files import write_tokenizer
from slimformer.digests import digest
from slimformer.exporters.base import OPENVINO, SLIM, Variant, files_of, is_pair
from slimformer.files import whole_folder, write_text
from slimformer.measuring.beside import write_decoder
from slimformer.measuring.records import Facts, FileFacts, Goal, Heading, Standing
from slimformer.measuring.scoring import Entry, Measurement, measure
from slimformer.measuring.sessions import installed_runtime, open_session, runtime_for
from slimformer.measuring.timing import Rounds
from slimformer.options import named_options
from slimformer.reporting.answers import changed_answers
from slimformer.reporting.card import Card, base_card, told_of, write_card
from slimformer.reporting.ledger import LEDGER, append_record, write_facts
from slimformer.reporting.page import Details, write_page
from slimformer.running.bundle import Made, Run
from slimformer.running.candidate import Candidate
from slimformer.running.exports import (
    export_files,
    export_parts,
    kernels_int8,
    openvino_int8,
    plain_exporter,
    read_notes,
    told_parts,
)
from slimformer.running.facts import facts_of
from slimformer.running.places import options_seen_from
from slimformer.running.recipe import Recipe
from slimformer.running.rivals import Contestant
from slimformer.running.stages import dev_scores
from slimformer.running.trials import Judge, fitted_options, tuned_task
from slimformer.saving import checkpoint
from slimformer.saving.cross_encoder_writing import deliver_scores
from slimformer.saving.folders import MODEL_FOLDER
from slimformer.saving.sentence_folder import ENCODER_FOLDER
from slimformer.saving.sentence_writing import deliver_vectors
from slimformer.saving.sparse import Values, rounding
from slimformer.saving.tensors import fixed_digest
from slimformer.tasks.base import Split, Task


@dataclass(frozen=True)
class Order:
    """The recipe that made a delivery, with all its choices spelled out, and the goal that the user gave."""

    recipe: Recipe
    model_name: str
    task_name: str
    goal: Goal | None = None  # it is None for a recipe, which asks for no speed
    command: str = ""  # the page shows it
    allowed: float | None = None  # points of loss within which the fastest file is the best, if not those of the goal

    @property
    def max_loss(self) -> float:
        """Points of loss within which the fastest file is the best."""
        if self.allowed is not None:
            return self.allowed
        return self.goal.max_loss if self.goal else self.recipe.export.choose_within


def finish(candidate: Candidate, rivals: Sequence[Contestant], order: Order, judge: Judge, run: Run, out: Path) -> Measurement:
    """Measures everything side by side on dev, the baseline first, and fills `out`.

    The ledger rows and every file that another tool needs are there when this returns; a call that was killed can be made again.
    """
    ours = _ours(candidate, order, run, out)
    entries, measurement = side_by_side([(item, candidate) for item in (*rivals, *ours)], order, run)
    measured = [
        *zip(ours, entries[len(rivals) :], strict=True)
    ]  # a file that OpenVINO runs too keeps what its own runtime fits
    tasks = {str(item.facts["file"]): entry.task for item, entry in reversed(measured)}
    deliver(candidate, order, measurement, tasks, run, out)
    return measurement


def side_by_side(
    contestants: Sequence[tuple[Contestant, Candidate]], order: Order, run: Run, *, each_other: bool = False
) -> tuple[list[Entry], Measurement]:
    """Scores and times files in one race on the dev examples, the baseline first; each comes with the candidate that it belongs to.

    `each_other`: every file is compared with every other one, not only ours with the rivals.
    """
    run.log.say("measuring everything side by side on the dev examples.")
    entries = [_entry(item, candidate, run.threads) for item, candidate in contestants]
    bundle = contestants[0][1].made.bundle
    measurement = measure(
        entries,
        bundle.material.examples[Split.DEV],
        Heading(order.model_name, order.task_name, teacher=fixed_digest(bundle.uncut.teacher.model)),
        rounds=Rounds(30, seconds=order.recipe.bench.seconds),
        load=run.quiet.load(),
        seed=run.seed,
        each_other=each_other,
    )
    return entries, measurement


def best_file(candidate: Candidate, order: Order, run: Run, out: Path, name: str) -> Contestant:
    """The file of a candidate that its delivery calls the best, alone in a comparison; its row begins with `name`."""
    variant = candidate.best(order.max_loss).variant
    kind, path = candidate.kinds[variant], candidate.files[variant]
    own = {"chosen": True, "file": kind.place}
    return Contestant(
        f"{name} {kind.label}", Standing.OURS, path, variant, runtime_for(path), _facts(candidate, order, run, out) | own
    )


def fitted_tasks(candidate: Candidate, threads: int) -> dict[str, Task]:
    """The task with the options that are fitted on validation examples for each file of a candidate, by the file's place."""
    material = candidate.made.bundle.material
    return {
        candidate.kinds[variant].place: tuned_task(open_session(path, threads, runtime_for(path)), material)
        if material.task.tunes
        else material.task
        for variant, path in candidate.files.items()
    }


def _facts(candidate: Candidate, order: Order, run: Run, out: Path) -> dict[str, Any]:
    """What the rows of all files of a candidate hold alike."""
    text = order.recipe.seen_from(out).to_yaml()
    return facts_of(candidate.made, run, digest(text), order.recipe.export.values) | {"target": order.goal}


def _ours(candidate: Candidate, order: Order, run: Run, out: Path) -> list[Contestant]:
    """Our files that are measured: those that ship, and those that the recipe's `export` and `bench` add."""
    bundle, recipe, kinds = candidate.made.bundle, order.recipe, candidate.kinds
    best = candidate.best(order.max_loss).variant
    facts = _facts(candidate, order, run, out)

    def ours(
        variant: str, path: Path, name: str, place: str, runtime: str = "onnxruntime", *, chosen: bool = False
    ) -> Contestant:
        own = {"chosen": chosen, "file": place}
        return Contestant(f"slimformer {name}", Standing.OURS, path, variant, runtime, facts | own)

    files = [
        ours(name, path, kinds[name].label, kinds[name].place, runtime_for(path), chosen=name == best)
        for name, path in candidate.files.items()
    ]
    if recipe.bench.openvino and find_spec("openvino") is not None:
        engine = registry.find("runtimes", "openvino")()
        standard = [item for item in files if engine.accepts(item.path)]
        files += [
            ours(item.variant, item.path, f"{kinds[item.variant].label} in OpenVINO", kinds[item.variant].place, "openvino")
            for item in standard
        ]
    if recipe.bench.fused:
        assert candidate.folder is not None
        made = export_files(bundle.subject, bundle.material, candidate.folder, [Variant.FUSED], run.log)
        kind = plain_exporter().kinds_for(bundle.subject.model)[Variant.FUSED]
        files.append(ours(Variant.FUSED, made[Variant.FUSED], kind.label, kind.place))
    if recipe.export.openvino:
        run.log.say("making OpenVINO's int8 file by NNCF.")
        path = openvino_int8(candidate.files[Variant.FLOAT], bundle.subject, bundle.material, _openvino_home(run))
        files.append(ours(Variant.INT8_STATIC, path, OPENVINO.label, OPENVINO.place, "openvino"))
    slim = (
        None
        if Variant.INT8_KERNELS in candidate.files
        else kernels_int8(bundle.subject, bundle.material, _slim_home(run), run.log)
    )
    if slim is not None:
        files.append(ours(Variant.INT8_KERNELS, slim, SLIM.label, SLIM.place))
    return files


def _openvino_home(run: Run) -> Path:
    return run.root / "openvino"


def _slim_home(run: Run) -> Path:
    return run.root / "kernels"


def _slim_ships(measurement: Measurement) -> bool:
    """Whether the kernels' file is the fastest of ours, at batch 32 or at batch 1."""
    ours = [record for record in measurement.records if record.role == Standing.OURS]
    slim = next((record for record in ours if record.precision == Variant.INT8_KERNELS), None)
    if slim is None:
        return False
    speeds = {
        batch: {record.name: speed.median for record in ours if (speed := record.times_faster(batch))} for batch in (32, 1)
    }
    return any(slim.name == max(found, key=found.__getitem__) for found in speeds.values() if found)


def _entry(item: Contestant, candidate: Candidate, threads: int) -> Entry:
    material = item.material or candidate.made.bundle.material
    session = open_session(item.path, threads, item.runtime)
    beams = candidate.made.bundle.teacher.beams
    greedy = None if beams in (None, 1) else open_session(item.path, threads, item.runtime, {"num_beams": 1})
    chosen_by = [trial.forecast for trial in candidate.trials if trial.variant == item.variant and item.facts.get("chosen")]
    return Entry(
        name=item.name,
        role=item.standing,
        precision=str(item.variant),
        session=session,
        task=tuned_task(session, material),
        features=material.features[Split.DEV],
        facts={**item.facts, "forecast": next(iter(chosen_by), None)},
        beams=beams,
        greedy=greedy,
    )


def deliver(candidate: Candidate, order: Order, measurement: Measurement, tasks: dict[str, Task], run: Run, out: Path) -> None:
    """Fills `out`, all at once: the model, its files, card, page, ledger and recipe. `tasks`: as fitted to each file, by name."""
    bundle, export, files = candidate.made.bundle, order.recipe.export, candidate.files
    material, model = bundle.material, bundle.subject.model
    variant = candidate.best(order.max_loss).variant
    best = files[variant]
    chosen = next(record for record in measurement.records if record.chosen)
    delivered = [(variant, candidate.kinds[variant]) for variant in files]
    delivered += [(Variant.INT8_STATIC, OPENVINO)] if export.openvino else []
    slim = Variant.INT8_KERNELS not in files and _slim_ships(measurement)
    delivered += [(Variant.INT8_KERNELS, SLIM)] if slim else []
    fitted = {kind.place: fitted_options(material.task, tasks[kind.place]) for _, kind in delivered}
    text = order.recipe.seen_from(out).to_yaml()
    facts = Facts(
        best=candidate.kinds[variant].place,
        task=options_seen_from(out, named_options(material.task), type(material.task).paths),
        max_length=material.max_length,
        metric=material.task.metric,
        name=f"{order.model_name} (slimformer)",
        model=order.model_name,
        fitted={name: options for name, options in fitted.items() if options},
        files=tuple(FileFacts(kind.place, str(variant), kind.int8) for variant, kind in delivered),
        **facts_of(candidate.made, run, digest(text), export.values),
    )
    stored = _stored(bundle.subject.model, export.values)
    if stored:
        run.log.say(f"model.safetensors: {stored}.")
    with whole_folder(run.root / "delivery") as part:
        source, ranges = material.source, bundle.ranges
        (part / MODEL_FOLDER).mkdir()
        checkpoint.write(
            model,
            bundle.plan,
            part / MODEL_FOLDER,
            tokenizer_from=source,
            values=export.values,
            ranges=ranges,
        )
        for folder in dict.fromkeys(["", *(kind.folder for _, kind in delivered)]):
            checkpoint.write_surroundings(model, part / folder, tokenizer_from=source)
        vectors = deliver_vectors(model, part, tokenizer_from=source)
        vectors += () if export.dense else deliver_scores(model, part)
        if export.dense:
            checkpoint.write_dense(model, bundle.plan, part, tokenizer_from=source)
        plain = [ENCODER_FOLDER] if (part / ENCODER_FOLDER).is_dir() else []
        for folder in dict.fromkeys(["", MODEL_FOLDER, *plain, *(kind.folder for _, kind in delivered)]):
            write_tokenizer(source, part / folder)
        for name, path in files.items():
            _copy(path, part / candidate.kinds[name].place)
        places = {name: part / candidate.kinds[name].place for name in files}
        parts = export_parts(bundle.subject, material, places, run.log)
        for folder in {"", *(candidate.kinds[name].folder for name in files)} if is_pair(best) else ():
            write_decoder(part / folder)
        if export.openvino:
            _copy(_openvino_home(run) / OPENVINO.name, part / OPENVINO.place)
        if slim:
            _copy(_slim_home(run) / SLIM.name, part / SLIM.place)
        write_facts(part, facts)
        write_text(part / "recipe.yaml", text)
        texts = [example.texts for example in material.examples[Split.DEV][:2]]
        task, name = tasks.get(chosen.file, material.task), runtime_for(best)
        runtime = installed_runtime(name)
        notes = (*read_notes(best.parent).get(best.name, []), *told_parts(parts), *vectors)
        given, data = str(order.recipe.model), getattr(material.task, "data", "")
        base = "" if os.path.exists(given) else given.partition("@")[0]  # a hub id may name a revision
        card = Card(
            chosen,
            measurement.records,
            runtime.snippet(task, part, chosen.file, texts, material.max_length),
            base_model=base,
            data=data if isinstance(data, str) else "",
            **told_of(bundle.uncut.material.source),
            notes=notes,
            stored=stored,
            kinds=tuple(kind for _, kind in delivered),
            runtime=name,
            packages=runtime.packages,
        )
        write_card(part, card)
        before, after = (measurement.scored[name] for name in (measurement.records[0].name, chosen.name))
        differences = changed_answers(before, after, material.examples[Split.DEV])
        write_page(measurement.records, part / "report.html", Details(changed=differences, command=order.command))
        for record in measurement.records:
            append_record(part / LEDGER, record)
    _move(run.root / "delivery", out)


def deliver_model(made: Made, order: Order, run: Run, out: Path, *, headless: bool) -> None:
    """Fills `out` with a model for PyTorch that others start from, nothing exported and nothing timed, and says how good it is.

    `headless`: the teacher's head for the task is a fresh one, so that its score would say nothing.
    """
    bundle, export = made.bundle, order.recipe.export
    material, source = bundle.material, bundle.material.source
    whole = bundle.uncut
    names = ({} if headless else {"the teacher": (whole.teacher, whole.material)}) | {"the model": (bundle.subject, material)}
    scores = {name: dev_scores(*read) for name, read in names.items()}
    told = [
        f"{name}: {', '.join(f'{metric} {value:.4g}' for metric, value in found.items())}" for name, found in scores.items()
    ]
    run.log.say(f"on dev, in PyTorch: {'; '.join(told)}.")
    run.log.event("scores", **{name.removeprefix("the "): found for name, found in scores.items()})
    text = order.recipe.seen_from(out).to_yaml()
    facts = Facts(
        best="",
        task=options_seen_from(out, named_options(material.task), type(material.task).paths),
        max_length=material.max_length,
        metric=material.task.metric,
        name=f"{order.model_name} (slimformer)",
        model=order.model_name,
        **facts_of(made, run, digest(text), export.values),
    )
    with whole_folder(run.root / "delivery") as part:
        (part / MODEL_FOLDER).mkdir()
        checkpoint.write(
            bundle.subject.model,
            bundle.plan,
            part / MODEL_FOLDER,
            tokenizer_from=source,
            values=export.values,
            ranges=bundle.ranges,
        )
        checkpoint.write_surroundings(bundle.subject.model, part, tokenizer_from=source)
        for folder in ("", MODEL_FOLDER):
            write_tokenizer(source, part / folder)
        write_facts(part, facts)
        write_text(part / "recipe.yaml", text)
        write_text(part / "README.md", base_card(facts, order.task_name, scores))
    _move(run.root / "delivery", out)


def _copy(file: Path, to: Path) -> None:
    """Copies a model file with the files that hold its weights."""
    for path in files_of(file):
        shutil.copyfile(path, to.with_name(path.name))


def _move(delivery: Path, out: Path) -> None:
    """Moves everything into the result's folder, file by file, so that a call that was killed here can be made again."""
    for file in sorted(item for item in delivery.rglob("*") if item.is_file()):
        place = out / file.relative_to(delivery)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)


def _stored(model: object, values: Values) -> str:
    """A sentence on how model.safetensors rounds the values; it is empty if nothing is rounded."""
    if values == "float32":
        return ""
    lost = rounding(checkpoint.unshared(model), values, checkpoint.heads(model))  # type: ignore[arg-type]
    how = f"rounded by at most {lost:.2g} of a matrix's largest" if lost else "exact"
    return f"matrices and word tables as {values}, {how}"
