"""Draws docs/results.md and the table in README.md from all ledgers under results/: `make docs`, or `python
results/tables.py`.

The one idea: no figure in the docs is typed by hand. A run is a folder with a ledger.jsonl and the recipe.yaml that
repeats it; all that is shown is read from the ledger's rows. Theory (multiply-accumulates) and measured speed never
share a table. Nothing is measured here. With `--check` nothing is written: the exit status is 1 if a page differs from
what the ledgers give.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

import families
import generation
import loads
import numerics
import ordeals
import published
import structured
import survey
from pages import HOME, METHODS, Run, bullets, interval, row_times, runs_of, safe, spread, table, turns, wrapped

from slimformer.measuring.records import Record, Standing
from slimformer.reporting.circumstances import circumstances
from slimformer.reporting.verdicts import Conclusion, against, doubts, judge, tally
from slimformer.reporting.words import count_text, interval_text, layers_text, mb_text, signed

COMMAND = "python results/tables.py"
BEGIN, END = "<!-- {part}:begin -->", "<!-- {part}:end -->"
FIRST = "glue/sst2"  # the task that the README shows
WEAK = "glue/rte"  # its MiniLM scores 0.5523, one answer for all examples 0.5271; its rows are older than `Record.chance`
NONE = "No run has been recorded yet: there is no ledger under `results/`."
HEAD = ("task", "model", "metric", "points lost (95 %)", "MB", "× batch 32", "× batch 1", "minutes")
# These rows stand beside ours in the README.
SHOWN = (Standing.TEACHER_FP32, Standing.TEACHER_INT8, Standing.OPENVINO_INT8, Standing.SMALL_DENSE, Standing.CUT)


def runs(home: Path) -> list[Run]:
    """All runs under results/ except those of tables that have a page of their own."""
    return [run for run in runs_of(home, home) if run.folder.parts[0] != METHODS]


# -- Pages ---------------------------------------------------------------------------------------------------------------------


def results_page(found: Sequence[Run]) -> str:
    """docs/results.md: every row of every run, a verdict on it, and the machine that measured it."""
    lines = [
        "# Results",
        "",
        f"Drawn from the ledgers under [`results/`](../results/README.md) by `{COMMAND}`; nothing here is typed by hand.",
        "",
    ]
    if not found:
        return "\n".join([*lines, NONE, ""])
    lines += [
        *bullets(
            (
                "**Points lost**: points of the metric below the dense teacher in fp32, on the exported file and the whole dev "
                "split, with the 95 % interval of the paired bootstrap.",
                "**×**: times as fast as that teacher in ONNX Runtime fp32: the median over rounds in which all files take turns, with "
                "the 10th to 90th percentile. Batch 32 is sorted by length, batch 1 has the order of the data.",
                "**MB**: the whole file. **Minutes**: the time to make the model from its teacher.",
                "**Bold**: the file that ships. It was chosen on validation examples from the training data, never on dev.",
                *turns(found, up=""),
            )
        ),
        "",
    ]
    for title, part in _by_task(found).items():
        lines += [f"## {title}", ""]
        for run in part:
            lines += _run(run)
        lines += spread(part)
    return "\n".join(lines).rstrip() + "\n"


def readme_table(found: Sequence[Run]) -> str:
    """The table in README.md: the file that ships and its baselines on one task, and the range of all other tasks."""
    if not found:
        return f"{NONE} `{COMMAND}` will draw the table here."
    shown, *others = _claims(found)
    ours = shown.ours
    rows = [_row(record, record is ours) for record in shown.records if record.role in SHOWN or record is ours]
    sizes = " and ".join(
        sorted({count_text(record.params) for record in shown.records if record.role == Standing.TEACHER_FP32})
    )
    text = (
        f"{safe(shown.records[0].task)}; a dense model of {sizes} parameters; the exported files on the whole dev split; "
        f"{_machine(shown)}; one "
        "seed. **×**: times as fast as the dense model in fp32 in ONNX Runtime, the median over rounds in which all files take "
        "turns. **Bold**: the "
        f"file that ships. {_beaten(shown)}{_others(others, shown.folder.name)}"
        "[All rows](docs/results.md), with the machine that measured them. "
        f"Drawn by `{COMMAND}`."
    )
    return "\n".join([*table(HEAD[1:], [row[1:] for row in rows]), "", *wrapped(text)])


def readme_lead(found: Sequence[Run]) -> str:
    """README's first sentence: the loss and the speedup of one run on one task."""
    shown = _claims(found)[0] if found else None
    ours = shown.ours if shown else None
    if shown is None or ours is None or ours.loss is None or (faster := ours.times_faster(32)) is None:
        return NONE
    (dense,) = (record for record in shown.records if record.role == Standing.TEACHER_FP32)
    sizes = f"{mb_text(ours.size_bytes)} instead of {mb_text(dense.size_bytes)} MB"
    lost = "a loss too close to call" if ours.loss.low <= 0 <= ours.loss.high else "a loss"
    text = (
        f"On SST-2 slimformer made a fine-tuned six-layer MiniLM **{faster.median:.1f} times as fast** and its file "
        f"**{sizes}**, within {_minutes(ours.minutes)} minutes, with {lost}: {signed(ours.loss.value)} points lost, 95 % interval "
        f"{interval_text(ours.loss)} (ONNX Runtime, batch 32, {_machine(shown)})."
    )
    return "\n".join(wrapped(text))


def _claims(found: Sequence[Run]) -> list[Run]:
    """One run of each claim, that of the README's task first: by name, so that a run without a seed in its name counts."""
    first: dict[tuple[str, str], Run] = {}
    for run in found:
        first.setdefault((_title(run.records[0]), run.claim), run)
    return sorted(first.values(), key=lambda run: run.records[0].task != FIRST)


def _machine(run: Run) -> str:
    """The processor and threads that a run was measured with."""
    threads = sorted({timing.threads for record in run.records for timing in record.timings})
    processors = " and ".join(sorted({record.environment.cpu for record in run.records}))
    return processors + (f", {' or '.join(map(str, threads))} threads" if threads else "")


def _beaten(run: Run) -> str:
    """Sentences on the rows that beat the file that ships."""
    ours = run.ours
    lost = [] if ours is None else [item.text for item in against(ours, run.records) if item.conclusion is Conclusion.NO]
    return "".join(f"{safe(text)} " for text in lost)


def _others(runs: Sequence[Run], asked: str) -> str:
    """Sentences on all other requests, whatever became of them; `asked`: the name of those that asked for the same as the first."""
    same = [run for run in runs if run.folder.name == asked]
    fair = [run for run in same if run.records[0].task != WEAK]
    parts = []
    ours = [run.ours for run in fair]
    losses = [record.loss.value for record in ours if record and record.loss]
    speeds = [times.median for record in ours if record and (times := record.times_faster(32))]
    if losses and speeds:
        tasks = ", ".join(f"{safe(run.records[0].task)} ({_goal(run)})" for run in fair)
        lost = f"{signed(min(losses))} to {signed(max(losses))} points"
        parts.append(f"The same request lost {lost} at {min(speeds):.1f} to {max(speeds):.1f} times the speed on {tasks}.")
    parts += [_told(run, ", whose teacher is hardly better than one answer for all") for run in same if run not in fair]
    parts += [_told(run, f" (`{run.folder.name}`)") for run in runs if run not in same]
    return "".join(f"{part} " for part in parts if part)


def _told(run: Run, more: str) -> str:
    """A request in a sentence: what was lost, how fast it came out, and whether that is what was asked for."""
    record = run.ours
    times = record.times_faster(32) if record else None
    if record is None or record.loss is None or times is None:
        return ""
    task = safe(run.records[0].task)
    return f"On {task}{more}: {interval(record)} points at {times.median:.1f} times the speed, {_goal(run)}."


def _goal(run: Run) -> str:
    """Whether a run's goal is met, by its own verdict."""
    assert run.ours is not None, "a run that is told has a file that ships"
    conclusion = judge(run.ours, run.records).conclusion
    return {Conclusion.YES: "met", Conclusion.NO: "not met", Conclusion.OPEN: "open"}[conclusion] if conclusion else "no goal"


def placed(text: str, drawn: str, part: str = "results") -> str:
    """`text` with `drawn` between the markers of a part; ValueError if they are missing."""
    begin, end = BEGIN.format(part=part), END.format(part=part)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page must hold {begin} and {end}")
    return f"{before}{begin}\n{drawn}\n{end}{after}"


# -- Parts ---------------------------------------------------------------------------------------------------------------------


def _title(record: Record) -> str:
    return f"{record.task}, {record.model}"


def _by_task(found: Iterable[Run]) -> dict[str, list[Run]]:
    parts: dict[str, list[Run]] = {}
    for run in found:
        parts.setdefault(_title(run.records[0]), []).append(run)
    return dict(sorted(parts.items()))


def _run(run: Run) -> list[str]:
    ours = run.ours
    recipe = f"../results/{run.name}/recipe.yaml"
    lines = [f"### {run.name}", "", f"[`recipe.yaml`]({recipe}) repeats it."]
    lines += ["", *table(HEAD, [_row(record, record is ours) for record in run.records]), ""]
    if ours is not None:
        verdicts = against(ours, run.records)
        said = [
            judge(ours, run.records).text,
            *(verdict.text for verdict in verdicts),
            tally(verdicts),
            *doubts(run.records),
            "Weak teacher: it is hardly better than one answer for all examples." if run.records[0].task == WEAK else "",
            layers_text(ours),
        ]
        lines += [*bullets(safe(text) for text in said if text), ""]
    lines += _theory(run)
    about = [f"{label}: {value}" for label, value in circumstances(run.records) if label not in {"Recipe", "Plan"}]
    trained = {record.train_examples for record in run.records if record.train_examples is not None}
    about += [f"Trained on: {', '.join(f'{count:,}' for count in sorted(trained))} examples"] if trained else []
    seeds = sorted({record.seed for record in run.records if record.seed is not None})
    about += [f"Seed: {', '.join(map(str, seeds))}"] if seeds else []
    return [
        *lines,
        "<details><summary>Measured on</summary>",
        "",
        *bullets(safe(line) for line in about),
        "",
        "</details>",
        "",
    ]


def _theory(run: Run) -> list[str]:
    """A table of the figures that are counted, not measured."""
    dense = next((record.macs for record in run.records if record.role == Standing.TEACHER_FP32), None)
    models: dict[tuple[int | None, int | None, int | None], Record] = {}
    for record in run.records:  # several files may hold one model: named by the file that ships
        counted = (record.macs, record.params, record.encoder_params)
        if record.macs is not None and (counted not in models or record is run.ours):
            models[counted] = record
    rows = []
    for (macs, *parameters), record in models.items():
        share = f"{100 * (macs or 0) / dense:.0f} %" if dense else ""
        rows.append((safe(record.name), count_text(macs), share, *map(count_text, parameters)))
    if not rows:
        return []
    head = ("model", "MACs per example", "share of dense", "parameters", "of the encoder's matrices")
    return [
        "Counted, not measured (multiply-accumulates of the encoder; never to be read as speed):",
        "",
        *table(head, rows),
        "",
    ]


def _row(record: Record, ships: bool) -> tuple[str, ...]:
    name = safe(record.name)
    return (
        safe(record.task),
        f"**{name}**" if ships else name,
        f"{record.metric.replace('_', ' ')} {record.score:.4f}",
        interval(record),
        mb_text(record.size_bytes),
        row_times(record, 32),
        row_times(record, 1),
        f"{record.minutes:.0f}" if record.minutes is not None and record.minutes >= 10 else _minutes(record.minutes),
    )


def _minutes(minutes: float | None) -> str:
    return f"{minutes:.1f}" if minutes else ""


def main(arguments: Sequence[str]) -> int:
    """Writes both pages, or with --check only checks whether they show what the ledgers hold."""
    root = HOME.parent
    found = runs(HOME)
    readme = root / "README.md"
    pages = {
        root / "docs" / "results.md": results_page(found),
        readme: placed(placed(readme.read_text(encoding="utf-8"), readme_table(found)), readme_lead(found), "lead"),
        **structured.pages(),
        **numerics.pages(),
        **published.pages(),
        **generation.pages(),
        **survey.pages(),
        **families.pages(),
        loads.PAGE: placed(loads.PAGE.read_text(encoding="utf-8"), loads.load_table(), "load"),
        ordeals.RELIABILITY: placed(ordeals.RELIABILITY.read_text(encoding="utf-8"), ordeals.ordeal_table(), "gauntlet"),
        ordeals.CLUSTER: placed(ordeals.CLUSTER.read_text(encoding="utf-8"), ordeals.cluster_table(), "cluster"),
        ordeals.SCALING: reduce(
            lambda text, part: placed(text, ordeals.SCALING_PARTS[part](), part),
            ordeals.SCALING_PARTS,
            ordeals.SCALING.read_text(encoding="utf-8"),
        ),
    }
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(root)} is not what the ledgers give: run `{COMMAND}`.")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
    print(
        f"{len(found)} runs; wrote "
        f"{', '.join(str(path.relative_to(root)) for path in stale) or 'nothing, all is as it should be'}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
