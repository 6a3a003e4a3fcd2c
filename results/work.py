"""The common part of the tables of methods: tasks, teachers, readers of a ledger's rows, and parts of their pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import hypot
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import numpy as np
import torch
from pages import Run, bullets, runs_of, table, wrapped
from sweep import Job
from tokenizers import Tokenizer

from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.exporters.base import Variant
from slimformer.families.base import Subject, subject_of
from slimformer.hooks.points import quantized_points
from slimformer.measuring.records import Interval, Record, Standing, today
from slimformer.measuring.scoring import Entry, Scored, evaluate, paired_interval, resampled
from slimformer.methods.distillation import Distillation
from slimformer.reporting.ledger import LEDGER, append_record, read_records
from slimformer.reporting.verdicts import Conclusion, all_of, likely_speed, reached, within
from slimformer.reporting.words import count_text, interval_text, mb_text, signed
from slimformer.running.recipe import Bench, Export, Recipe
from slimformer.saving import checkpoint
from slimformer.saving.folders import MODEL_FOLDER
from slimformer.tasks.base import Split, Task
from slimformer.tasks.classification import Classification
from slimformer.tasks.question_answering import QuestionAnswering
from slimformer.training.stage import Train

ROOT = Path(__file__).resolve().parent.parent
DATA = "../shared/data"
MORE_IDS = "runs/sweep/squad-v1.1-20k.json"
ENCODER = "runs/encoder"  # a link to the demo's encoder, which sweep.py makes
ENCODERS = {"minilm": ENCODER, "e5": "../shared/models/e5-small"}  # six layers and twelve
SST2_TEACHER, SQUAD_TEACHER = "../shared/models/minilm-sst2", "../shared/models/minilm-squad1"
TUNED = {("minilm", "sst2"): SST2_TEACHER, ("minilm", "squad1"): SQUAD_TEACHER}  # teachers that nobody has to train
FOLDERS = {"mrpc": "MRPC", "sst2": "SST-2", "stsb": "STS-B", "cola": "CoLA", "rte": "RTE"}
EXPORT = Export(choose_within=1.0)
SIMULATED = "as trained, simulated"
DISTIL = Train(  # follows a cut, at a width of 384
    methods=(Distillation(),), lr=1.6e-4, task_weight=0.1, dropout=False, freeze="embeddings"
)


def glue(name: str) -> Classification:
    """A task of GLUE on all of its examples; SST-2 on the 20,000 of the split."""
    rows = f"{DATA}/splits/sst2-20k.json" if name == "sst2" else None
    return Classification(data=f"{DATA}/glue/{FOLDERS[name]}", glue=name, train_rows=rows)


def questions(version: str, some: int | str | None, folder: str = "squad") -> QuestionAnswering:
    """Extractive question answering in windows of 256 tokens; `some`: which questions to train on, or how many."""
    return QuestionAnswering(data=f"{DATA}/{folder}", version=version, max_length=256, stride=96, train_ids=some)  # type: ignore[arg-type]


def small_squad() -> QuestionAnswering:
    """SQuAD v1.1 on the small split, 4,000 questions to train on and 1,000 to report on."""
    return questions("v1", f"{DATA}/splits/squad-v1.1-small.json")


TUNING = {  # the one recipe of each teacher; others start or learn from what it makes
    ("minilm", "mrpc"): Train(epochs=5.0, lr=8e-5),
    ("minilm", "stsb"): Train(epochs=5.0, lr=8e-5),
    ("minilm", "cola"): Train(epochs=8.0, lr=1e-4),
    ("minilm", "rte"): Train(epochs=8.0, lr=5e-5, batch_size=16),
    ("e5", "mrpc"): Train(epochs=4.0, lr=1e-4),
    ("e5", "rte"): Train(epochs=4.0, lr=1e-4),
    ("e5", "stsb"): Train(epochs=4.0, lr=1e-4),
    ("e5", "cola"): Train(epochs=8.0, lr=3e-5, batch_size=16),  # at 5e-5 and 1e-4 it gives one answer to all
    ("e5", "sst2"): Train(epochs=2.0, lr=8e-5),
    ("e5", "squad1"): Train(epochs=1.0, lr=1.5e-4, batch_size=16),
}


def twenty_thousand() -> QuestionAnswering:
    """SQuAD v1.1 with 20,000 questions to train on, scored on the 1,000 of the small split."""
    return questions("v1", MORE_IDS)


def teacher(encoder: str, task: str) -> Job:
    """An encoder tuned on a task; on SQuAD with the 20,000 questions that the MiniLM at hand saw too."""
    task_at_hand = twenty_thousand() if task == "squad1" else glue(task)
    recipe = Recipe(
        ENCODERS[encoder], task_at_hand, (TUNING[encoder, task],), export=EXPORT, bench=Bench(("teacher-int8",), 20.0)
    )
    return Job(f"teachers/{encoder}-{task}", recipe)


def folder_of(job: Job) -> str:
    """The folder that a job leaves its model in, as recipes name it."""
    return str(job.scratch.relative_to(ROOT))


Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def answering(subject: Subject, task: Task, _: Tokenizer) -> Runner:
    """The task's outputs, by one pass of the model."""

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            output = subject.model(**subject.feed(batch))
        return {name: output[name].float().numpy() for name in task.outputs}

    return runner


def simulated(job: Job, runner: Callable[[Subject, Task, Tokenizer], Runner] = answering) -> None:
    """Adds a row for the model of a finished run as it was trained: in PyTorch, with everything on its grid that has one."""
    folder = job.scratch / MODEL_FOLDER
    subject, ranges = subject_of(checkpoint.load(folder)), checkpoint.load_ranges(folder)
    assert ranges is not None, f"{folder} has no ranges"
    task = job.recipe.task.bind(subject.model.config)
    tokenizer, examples = load_tokenizer(folder), task.split(Split.DEV)
    features = task.encode(examples, tokenizer, min(task.max_length, max_length_of(folder)))
    with subject.evaluating(), quantized_points(subject.model, subject.anatomy, ranges):
        outputs = evaluate(runner(subject, task, tokenizer), features, 64)
    rows = read_records([job.scratch / LEDGER])
    plain = next(row for row in rows if row.role == Standing.OURS and row.precision == Variant.FLOAT)
    whole = next(row for row in rows if row.name == plain.baseline)
    entry = Entry(SIMULATED, Standing.OTHER, "torch", cast(Any, None), task, features)  # nothing is timed
    scored = Scored.of(entry, outputs, examples)
    again = resampled(scored, examples)
    row = replace(
        plain,
        name=SIMULATED,
        role=Standing.OTHER,
        precision="torch",
        file="",
        chosen=False,
        scores=scored.scores,
        resampled=tuple(round(float(value), 5) for value in again),
        timings=(),
        speed={},
        size_bytes=None,
        forecast=None,
        date=today(),
    )
    gap = paired_interval(whole.score - row.score, np.asarray(whole.resampled) - again)
    append_record(job.scratch / LEDGER, replace(row, loss=gap.scaled(100)))


def as_trained(run: Run) -> Record | None:
    """The row that `simulated` added."""
    return next((record for record in run.records if record.name == SIMULATED), None)


def dense(run: Run) -> Record:
    """The teacher in fp32, with which all ratios compare."""
    return next(record for record in run.records if record.role == Standing.TEACHER_FP32)


def ours_in(run: Run, precision: Variant, *, openvino: bool = False) -> Record | None:
    """Our file of one precision, in ONNX Runtime or in OpenVINO, whether it was chosen or not."""
    rows = [record for record in run.records if record.role == Standing.OURS and record.precision == precision]
    return next((record for record in rows if record.name.endswith("in OpenVINO") == openvino), None)


def plain_in(run: Run) -> Record | None:
    """Our file in fp32, with fused operators if that was measured, because the dense model is timed with them."""
    return ours_in(run, Variant.FUSED) or ours_in(run, Variant.FLOAT)


def left(record: Record, whole: Record) -> float:
    """Share of the dense encoder's weights that are there and not 0."""
    if not whole.encoder_params or record.encoder_nonzero is None:
        return 1.0
    return record.encoder_nonzero / whole.encoder_params


def series(found: Mapping[str, Run]) -> dict[str, list[Run]]:
    """The runs by what they are meant to show: those that differ by their seed alone stand together, the first seed first."""
    parts: dict[str, list[Run]] = {}
    for name, run in sorted(found.items(), key=lambda item: (item[1].claim, item[1].name)):
        parts.setdefault(re.sub(r"-seed\d+$", "", name), []).append(run)
    return parts


def gained(ours: Sequence[Record], than: Sequence[Record]) -> Interval | None:
    """Points by which one model is better than another, each over its seeds, with the 95 % interval over examples and seeds.

    If all rows were scored on the same examples and have the metric on the same resamples of these, the examples' part is that of
    the paired bootstrap; else it is taken as if the two were independent, which is wider: the half-widths of both losses, added in
    squares. The seeds' part is 1.96 standard errors of the mean over seeds, of a kind with several; the two are added in squares.
    """
    mean = 100 * (fmean(record.quality for record in ours) - fmean(record.quality for record in than))
    sign = 1 if ours[0].higher_is_better else -1
    rows = [*ours, *than]
    paired = all(row.resampled for row in rows) and len({(row.teacher, row.task, row.examples) for row in rows}) == 1
    if paired:
        gaps = (
            100 * sign * (np.mean([row.resampled for row in ours], axis=0) - np.mean([row.resampled for row in than], axis=0))
        )
        low, high = (max(0.0, away) for away in np.percentile(gaps, [2.5, 97.5]) * (-1, 1) + (mean, -mean))
    elif any(group[0].loss is None for group in (ours, than)):
        return None
    else:
        low = high = hypot(*((row.loss.high - row.loss.low) / 2 for row in (ours[0], than[0]) if row.loss))
    spread = hypot(*(_standard_error([100 * row.quality for row in group]) for group in (ours, than)))
    return Interval(mean, mean - hypot(low, 1.96 * spread), mean + hypot(high, 1.96 * spread))


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def lost(runs: Sequence[Run], pick: Callable[[Run], Record | None]) -> Interval | None:
    """Points that a model lost to its teacher over the seeds of its runs; for one seed, what its ledger says."""
    files = [file for run in runs if (file := pick(run)) is not None]
    if not files:
        return None
    if len(files) == 1:
        return files[0].loss
    found = gained(files, [dense(runs[0])])
    return found and found.scaled(-1)


def rising(groups: Sequence[Sequence[Record]]) -> Conclusion:
    """Whether each of several models, each over its seeds, is better than the one before."""
    gaps = [gained(later, earlier) for earlier, later in pairwise(groups)]
    return all_of([within(-gap.high, -gap.low, 0.0) if gap else Conclusion.OPEN for gap in gaps])


def met(record: Record, allowed: float, times: float = 0.0, small: bool = True) -> Conclusion:
    """Whether a file is `small`, which is counted exactly, loses at most `allowed` points and is `times` as fast.

    The 95 % interval of its loss and its `likely` speed, judged from its rounds, have to say so; else that is open.
    """
    speed, loss = likely_speed(record), record.loss
    answers = [Conclusion.YES if small else Conclusion.NO]
    answers.append(within(loss.low, loss.high, allowed) if loss else Conclusion.OPEN)
    if times:
        answers.append(reached(speed, times) if speed else Conclusion.OPEN)
    return all_of(answers)


# -- Parts of pages ----------------------------------------------------------------------------------------------------------


def interval_of(found: Interval | None) -> str:
    """Points lost, with their interval."""
    return f"{signed(found.value)} ({interval_text(found)})" if found else ""


def epochs(jobs: Sequence[Job], folder: str) -> str:
    """Passes of a job over the rows, stage by stage, with their copies: '2 + 6'; nothing if the job is none of these."""
    stages = [stage for job in jobs if job.folder == folder for stage in job.recipe.stages if isinstance(stage, Train)]
    return " + ".join(f"{stage.epochs * (1 + stage.augment):.3g}" for stage in stages)


def minutes(record: Record) -> str:
    """The minutes to make a model; with the threads, if they were fewer than the cores of the machine."""
    if not record.minutes:
        return ""
    few = record.threads is not None and record.threads < record.environment.cores
    return f"{record.minutes:.1f}" + f" ({record.threads} thread{'s' * (record.threads != 1)})" * few


def found_in(name: str) -> dict[str, Run]:
    """The runs of a table that stand, by task and run: 'mrpc/fisher-35'."""
    home = Path("methods") / name
    return {run.folder.relative_to(home).as_posix(): run for run in runs_of(Path(__file__).resolve().parent / home)}


def by_task(found: Mapping[str, Run]) -> Iterator[tuple[str, dict[str, Run]]]:
    """The runs of each task without the tuning of its teacher, which had fewer baselines; that alone if it is the only one."""
    for task in dict.fromkeys(name.split("/")[0] for name in found):
        part = {name: run for name, run in found.items() if name.startswith(f"{task}/")}
        yield task, {name: run for name, run in part.items() if not name.endswith("/teacher")} or part


def heading(task: str, part: Mapping[str, Run]) -> list[str]:
    """The title of a task's part of a page, and the size of its data."""
    run = next(iter(part.values()))
    ours, whole = next(record for record in run.records if record.role == Standing.OURS), dense(run)
    size = f"a dense model of {count_text(whole.params)} parameters; " if whole.params else ""
    trained = f"{ours.train_examples:,} examples to train on, " if ours.train_examples else ""
    lines = [f"## {task}", "", f"{whole.task}; metric: {whole.metric}; {size}{trained}{whole.examples:,} scored.", ""]
    scores = [dense(other).score for other in part.values()]
    if min(scores) < max(scores):
        tuned = f"The dense model was tuned more than once: its scores are {min(scores):.4f} to {max(scores):.4f}."
        lines += [f"{tuned} Each run is compared with the one that it learned from.", ""]
    return lines


def still_to_run(jobs: Sequence[Job], command: str) -> list[str]:
    """A word on the rows that are not there yet."""
    rows = [job for job in jobs if job.measured]
    missing = [job for job in rows if not job.stands]
    return [f"{len(missing)} of {len(rows)} runs are still to be made (`{command} --plan` names them).", ""] if missing else []


def recipe_link(table_name: str, name: str) -> str:
    """A run's name, linked to its recipe, from a page under docs/methods/."""
    return f"[{name.split('/')[1]}](../../results/methods/{table_name}/{name}/recipe.yaml)"


def orders(title: str, findings: Sequence[tuple[str, Sequence[str]]], found: Mapping[str, Run]) -> list[str]:
    """Whether the runs come in the same order as in the papers, by fp32 files, or by int8 files if integers matter."""
    rows, groups = [], series(found)
    for what, names in findings:
        shown = " < ".join(name.split("/")[-1] for name in names)
        if any(name not in groups for name in names):
            rows.append((what, shown, "not run yet", ""))
            continue
        integers = "quantization" in names[0]
        files = [
            [file for run in groups[name] if (file := run.ours if integers else ours_in(run, Variant.FLOAT))] for name in names
        ]
        texts = [
            f"{fmean(file.score for file in some):.4f} ({100 * left(some[0], dense(groups[name][0])):.0f} %)"
            for some, name in zip(files, names, strict=True)
        ]
        rows.append((what, shown, ", ".join(texts), rising(files)))
    head = ("finding", "runs", "scores (encoder weights left)", "the same order")
    return [f"## {title}", "", *table(head, rows), ""]


def notes(sentences: Sequence[str], found: Mapping[str, Run]) -> list[str]:
    """Sentences with figures from the rows: '{mrpc/fisher-35:lost}'. A sentence is left out if its row does not exist
    yet.

    lost, gained: points of the fp32 file, refused if the sign is the other; int8: points that the int8 file lost, signed; each
    has its 95 % interval behind it. faster: the fp32 file's times at batch 32; mb: the int8 file's megabytes; left: per cent of
    the encoder's weights.
    """

    def figure(asked: re.Match[str]) -> str:
        name, what = asked.groups()
        run = found[name]
        plain, integers = plain_in(run), ours_in(run, Variant.INT8_FUSED)
        assert plain is not None, f"{name} has no fp32 row"
        assert plain.loss is not None, f"{name} is compared with nothing"
        if what in ("lost", "gained"):
            value = plain.loss.value if what == "lost" else -plain.loss.value
            if value < 0:
                raise ValueError(f"a sentence says {what} of {name}: it is {value:.1f}")
            return f"{abs(value):.1f} ({interval_text(plain.loss.scaled(1 if what == 'lost' else -1))})"
        if what == "int8" and integers is not None and integers.loss is not None:
            return f"{signed(integers.loss.value)} ({interval_text(integers.loss)})"
        if what == "mb" and integers is not None:
            return mb_text(integers.size_bytes)
        if what == "faster" and (times := plain.times_faster(32)):
            return f"{times.median:.1f}"
        if what == "left":
            return f"{100 * left(plain, dense(run)):.0f}"
        raise ValueError(f"{name} has no {what}")

    pattern = re.compile(r"\{([^:{}]+):(\w+)\}")
    there = [sentence for sentence in sentences if all(name in found for name, _ in pattern.findall(sentence))]
    if not there:
        return []
    intro = (
        "Losses and gains in these sentences are those of the fp32 files, unless int8 is named; their 95 % intervals over the dense "
        "model stand in brackets. Two runs whose intervals overlap may differ by chance."
    )
    return ["## What the rows say", "", *wrapped(intro), "", *bullets(pattern.sub(figure, sentence) for sentence in there), ""]


def claims(papers: Sequence[tuple[str, str]]) -> list[str]:
    """The claims of papers on methods."""
    return ["## What the papers say", "", *bullets(f"`{name}`: {claim}." for name, claim in papers), ""]


def write(pages: Mapping[Path, str]) -> None:
    """Pages and pictures onto the disk."""
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
