"""docs/choosing.md: which method for which need, with the figures of the survey's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pages import Run, bullets, row_times, table, turns, wrapped
from work import ROOT, interval_of, lost, ours_in

from slimformer.exporters.base import Variant
from slimformer.measuring.records import Record, Standing
from slimformer.reporting.svg import Mark, Scatter, draw_scatter
from slimformer.reporting.verdicts import frontier, slowness
from slimformer.reporting.words import mb_text

FURTHEST_RIGHT = 40.0  # times as fast: faster rows would press all others together
PICTURE = "choosing.svg"
SURVEY = "../results/methods/survey"
DRAWN = ("sst2", "SST-2")  # the task of the picture
TASK_NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "e5-mrpc": "MRPC, e5-small", "squad": "SQuAD"}
SCATTER_STYLE = (
    "<style>text{font:12px sans-serif;fill:#333}.tick,.label{fill:#666}.grid{stroke:#ddd}.axis{stroke:#888}"
    ".front{fill:none;stroke:#0b6b5d;stroke-width:1.5;stroke-dasharray:5 4}.leader{stroke:#888;stroke-width:.75}"
    ".m-ours,.m-chosen{fill:#0b6b5d}.m-rival{fill:#fff;stroke:#333;stroke-width:1.6}.strong{font-weight:650}"
    ".spread{stroke:#999}.m-beaten{fill:#fff;stroke:#0b6b5d;stroke-width:1.6}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.tick,.label{fill:#aaa}.grid{stroke:#444}.m-rival{fill:#222;stroke:#ddd}"
    ".m-beaten{fill:#222;stroke:#4db6a5}.m-ours,.m-chosen{fill:#4db6a5}.front{stroke:#4db6a5}}</style>"
)


@dataclass(frozen=True)
class Need:
    """What somebody wants, what to take, and the rows that show it, by the run's name; `file`: whose figures count."""

    want: str
    take: str
    rows: tuple[str, ...]
    file: Variant = Variant.INT8_FUSED


NEEDS = (
    Need(
        "faster without a new package, with no sure loss",
        "[fisher](methods.md#fisher), then distillation: `slimformer compress`",
        ("fisher-50",),
    ),
    Need(
        "the most speed without a new package, for one to five points",
        "every second layer: [layers](methods.md#layers), then distillation",
        ("logits", "layers-even"),
    ),
    Need(
        "more speed, and the compiled kernels may be installed",
        "blocks of zeros: recipes/sst2-fast-zeros.yaml, [kernels](kernels.md)",
        ("knowledge_sparse-4x4-20",),
        Variant.INT8_KERNELS,
    ),
    Need(
        "the most speed, for one to two points",
        "heads and neurons first, then blocks of zeros: recipes/sst2-fastest.yaml",
        ("fisher-40-blocks-20-copies", "fisher-40-blocks-20", "width-67-blocks-20"),
        Variant.INT8_KERNELS,
    ),
    Need(
        "a very small file, for some two points",
        "words, width, neurons and the word table together: recipes/sst2-smallest.yaml",
        ("smallest-longer-int8", "smallest-longer", "smallest"),
    ),
    Need(
        "the best answers at less cost",
        "a narrower model: [hidden_width](methods.md#hidden_width)",
        ("hidden_width-67", "hidden_width-50"),
    ),
    Need("inputs come one by one, many are easy", "[early_exit](methods.md#early_exit)", ("early_exit-three", "early_exit")),
    Need(
        "texts of 40 tokens and more, one answer each",
        "[word_elimination](methods.md#word_elimination)",
        ("word_elimination-40",),
    ),
    Need(
        "the same passages, asked again and again",
        "[decomposed_attention](methods.md#decomposed_attention), [passages](passages.md)",
        ("decomposed_attention-4", "decomposed_attention-3"),
    ),
    Need(
        "ten times as fast and more, and points may go",
        "[students](methods.md) without layers: word vectors, an LSTM",
        ("static", "bilstm", "cnn"),
    ),
    Need("several depths of one training", "[layer_drop](methods.md#layer_drop), then `layers`", ("layer_drop",)),
    Need("several widths and depths of one training", "[elastic](methods.md#elastic), then `leading`", ("elastic-30",)),
    Need(
        "a word table that is most of the file",
        "[trim_vocabulary](methods.md#trim_vocabulary); then codes",
        ("trim_vocabulary", "codebook"),
    ),
    Need("matrices that stay matrices, fewer operations", "[low_rank](methods.md#low_rank)", ("low_rank-40",)),
    Need("no training at all", "[outliers](methods.md#outliers), or plain int8", ("outliers",)),
)

WORDS = (
    "Start with `slimformer compress`: it cuts heads and neurons, distils, writes int8, and tells whether a smaller dense model or "
    "plain int8 would have done as well. Come here if that is not enough.",
    "If you do not know your need, let the machine choose: [`slimformer compare`](quickstart.md#several-ways-at-once) tries recipes "
    "within the hours that you have.",
    "The name of a run leads to its recipe, whose `stages:` you can copy; [Recipes](recipes.md) has one for most rows.",
    "**×** is the speed over the dense model in fp32 with fused operators, at batch 32 and at batch 1; **MB** the whole file; **lost** "
    "the points of accuracy with their 95 % intervals. All rows, their intervals and the papers' claims: [Every branch of the "
    "survey](methods/survey.md).",
)


def choosing_pages(groups: Mapping[str, list[Run]]) -> dict[Path, str]:
    """The page and its picture, as the rows of the survey give them."""
    docs = ROOT / "docs"
    made = {docs / "choosing.md": _text(groups)}
    picture = _picture(groups)
    if picture:
        made[docs / PICTURE] = picture
    return made


def _text(groups: Mapping[str, list[Run]]) -> str:
    rows = []
    for need in NEEDS:
        want, take = need.want, need.take
        for task, name in ((task, name) for name in need.rows for task in TASK_NAMES):
            runs = groups.get(f"{task}/{name}")
            record = _file(runs[0], need.file) if runs else None
            if runs is None or record is None:
                continue
            times = (row_times(record, batch) for batch in (32, 1))
            size, loss = mb_text(record.size_bytes or 0), interval_of(lost(runs, lambda run, file=need.file: _file(run, file)))  # type: ignore[misc]
            rows.append((want, take, TASK_NAMES[task], f"[{name}]({SURVEY}/{task}/{name}/recipe.yaml)", *times, size, loss))
            want = take = ""
        if want:
            rows.append((want, take, "no row yet", "", "", "", "", ""))
    head = ("you want", "take", "task", "run", "× batch 32", "× batch 1", "MB", "lost")
    drawn = (
        "Figures and picture are drawn from [the ledgers](../results/README.md) by `python results/survey.py --draw`. It shows "
        f"{DRAWN[1]}, without what is more than {FURTHEST_RIGHT:g} times as fast; the line joins what no other beats."
    )
    lines = [
        "# Which method for which need",
        "",
        *bullets((*WORDS, *turns(chain(*groups.values()), up=""))),
        "",
        *wrapped(drawn),
        "",
    ]
    lines += [f"![Points against speed, {DRAWN[1]}]({PICTURE})", "", *table(head, rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _file(run: Run, file: Variant) -> Record | None:
    """A run's file of this kind, or the plainer int8 one."""
    return ours_in(run, file) or ours_in(run, Variant.INT8_DYNAMIC)


def _best(run: Run) -> Record | None:
    """A run's fastest file at batch 32."""
    ours = [record for record in run.records if record.role == Standing.OURS and record.times_faster(32)]
    return min(ours, key=slowness, default=None)


def _picture(groups: Mapping[str, list[Run]]) -> str:
    task, title = DRAWN
    found = {name.partition("/")[2]: _best(runs[0]) for name, runs in groups.items() if name.startswith(f"{task}/")}
    rows = {name: record for name, record in found.items() if record is not None and slowness(record) > 1 / FURTHEST_RIGHT}
    if not rows:
        return ""
    some = next(runs[0] for name, runs in groups.items() if name.startswith(f"{task}/"))
    rivals = [record for record in some.records if record.role == Standing.TEACHER_INT8]
    front = frontier([*rows.values(), *rivals], slowness)
    marks = [_mark(name, record, "chosen" if record in front else "ours") for name, record in rows.items()]
    marks += [_mark("dense int8", record, "base") for record in rivals]
    steps = [(1 / slowness(record), -_points(record)) for record in front]
    scatter = Scatter(
        marks,
        steps,
        x_label="times as fast as the dense model in fp32, batch 32, the fastest file of each run",
        y_label=f"points of accuracy above or below the dense model, {title}",
        more_is_right=True,
    )
    return draw_scatter(scatter, 900, 480).replace(">", f">{SCATTER_STYLE}", 1) + "\n"


def _points(record: Record) -> float:
    return record.loss.value if record.loss else 0.0


def _mark(name: str, record: Record, style: str) -> Mark:
    speed = record.times_faster(32)
    assert speed is not None, "rows without a time are left out"
    kernels = " (kernels)" if record.file.endswith("_slim.onnx") else ""
    return Mark(
        speed.median,
        -_points(record),
        f"{name}{kernels}",
        style,
        f"{name}: {speed.median:.1f} times, {_points(record):+.1f} points lost",
    )
