"""Structured pruning side by side: the jobs behind docs/methods/structured.md, and the page itself.

    python results/structured.py --plan            # what would run, what stands already, how many hours
    python results/structured.py --only mrpc       # run it; stop and start it at will
    python results/structured.py --draw            # only draw the page from the rows that stand

Each method gets the same teacher, the same epochs in all and the same share of the dense multiply-accumulates at each point; the rival
is a smaller dense model (whole layers dropped evenly) trained for as long. The order of the jobs is that of what one wants to know first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from sweep import Job, main
from tables import Run, interval, row_times, runs_of, safe, table

from slimformer.figures import bars
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.gates import Gates
from slimformer.methods.group_lasso import GroupLasso
from slimformer.methods.importance import Importance
from slimformer.methods.layers import Layers
from slimformer.methods.movement import Movement
from slimformer.recipe import Bench, Export, Recipe
from slimformer.report import Record, Role, mb_text
from slimformer.stages import Calibrate, Stage, Train
from slimformer.tasks.base import Task
from slimformer.tasks.classification import Classification
from slimformer.tasks.question_answering import QuestionAnswering

HOME = Path(__file__).resolve().parent
ROOT = HOME.parent
TABLE = "structured"
COMMAND = "python results/structured.py"
DATA = "../shared/data"
POINTS = (0.35, 0.5, 0.25)  # shares of the dense multiply-accumulates, the middle one first
EXPORT, BENCH = Export(choose_within=1.0), Bench(rivals=("teacher-int8",), seconds=20.0)
DISTIL = Train(
    methods=(Distillation(),), lr=1.6e-4, task_weight=0.1, dropout=False, freeze="embeddings"
)  # what follows every cut; a width of 384


def methods(share: float, epochs: float, distil: Train) -> dict[str, tuple[Stage, ...]]:
    """The stages of each method at one point: `epochs` in all, however they are divided."""

    def learn(count: float, *more: Gates | Movement | GroupLasso | Distillation, like: Train = distil) -> Train:
        return replace(like, epochs=count, methods=more or (Distillation(),))

    gates = Gates(target=share, size="top_k", apart=True, fold=False, sublayers=False)
    movement = Movement(target=share, fill=True)
    lasso = GroupLasso(keep=share)
    return {
        "layers": (Calibrate(Layers(keep=share + 1e-9)), learn(epochs)),
        "fisher": (Calibrate(Fisher(keep=share, cost="macs")), learn(epochs)),
        "gates": (replace(learn(epochs / 4, gates), freeze="everything", task_weight=1.0), learn(epochs * 3 / 4)),
        "movement": (learn(epochs * 3 / 4, movement, Distillation()), learn(epochs / 4)),
        "group_lasso": (learn(epochs / 2, lasso, Distillation()), learn(epochs / 2)),
    }


def ladder(share: float, distil: Train) -> dict[str, tuple[Stage, ...]]:
    """The ways to set the gates of McCarley et al., with no training afterwards: how good is the choice itself?"""
    gates = Gates(target=share, size="top_k", apart=True, fold=False, sublayers=False)
    return {
        "random": (Calibrate(Importance(how="random", keep=share)),),
        "gain": (Calibrate(Importance(how="gain", keep=share)),),
        "l0": (replace(distil, epochs=2.0, methods=(gates,), freeze="everything", task_weight=1.0),),
        "fisher": (Calibrate(Fisher(keep=share, cost="macs")),),
    }


def ablations(share: float, epochs: float, distil: Train) -> dict[str, tuple[Stage, ...]]:
    """With a teacher or without, filled or not, other granularities: one option changed at a time."""
    whole = methods(share, epochs, distil)
    alone = {"task_weight": 1.0}
    filled, rest = whole["movement"]
    assert isinstance(filled, Train)
    assert isinstance(rest, Train)

    def movement(**options: object) -> tuple[Stage, ...]:
        return (replace(filled, methods=(replace(Movement(target=share, fill=True), **options), Distillation())), rest)  # type: ignore[arg-type]

    taught = whole["gates"]
    assert isinstance(taught[1], Train)
    return {
        "movement-not-filled": movement(fill=False),
        "movement-struct": movement(variant="struct"),
        "movement-block": movement(variant="block", target=max(share, 0.5)),
        "movement-no-teacher": (
            replace(filled, methods=(Movement(target=share, fill=True),), **alone),  # type: ignore[arg-type]
            replace(rest, methods=(), **alone),  # type: ignore[arg-type]
        ),
        "gates-no-teacher": (taught[0], replace(taught[1], methods=(), **alone)),  # type: ignore[arg-type]
    }


def _job(task: Task, name: str, model: str, stages: Sequence[Stage], share: float, needs: str = "") -> Job:
    return Job(f"{TABLE}/{name}", Recipe(model, task, tuple(stages), export=EXPORT, bench=BENCH), share, needs)


@cache
def jobs() -> tuple[Job, ...]:
    """All of the table, the first point of each task before the others."""
    mrpc = Classification(data=f"{DATA}/glue/MRPC", glue="mrpc")
    sst2 = Classification(data=f"{DATA}/glue/SST-2", glue="sst2", train_rows=f"{DATA}/splits/sst2-20k.json")
    small = f"{DATA}/splits/squad-v1.1-small.json"
    squad = QuestionAnswering(data=f"{DATA}/squad", version="v1", max_length=256, stride=96, train_ids=small)
    teacher = _job(mrpc, "mrpc/teacher", "runs/encoder", (Train(epochs=5.0, lr=8e-5),), 1.0)
    tuned = str(teacher.scratch.relative_to(ROOT))
    long = replace(DISTIL, batch_size=16)
    found = [teacher]
    for share in POINTS:
        name = f"{share * 100:.0f}"
        found += [
            _job(mrpc, f"mrpc/{method}-{name}", tuned, stages, share, teacher.folder)
            for method, stages in methods(share, 8.0, DISTIL).items()
        ]
        if share == POINTS[0]:
            found += [
                _job(sst2, f"sst2/{method}-{name}", "../shared/models/minilm-sst2", stages, share)
                for method, stages in methods(share, 4.0, DISTIL).items()
            ]
            found += [
                _job(squad, f"squad1/{method}-{name}", "../shared/models/minilm-squad1", stages, share)
                for method, stages in methods(share, 6.0, long).items()
            ]
            found += [
                _job(mrpc, f"mrpc-choice/{way}-75", tuned, stages, 0.75, teacher.folder)
                for way, stages in ladder(0.75, DISTIL).items()
            ]
            found += [
                _job(mrpc, f"mrpc-ablations/{what}-{name}", tuned, stages, share, teacher.folder)
                for what, stages in ablations(share, 8.0, DISTIL).items()
            ]
        else:
            found += [
                _job(squad, f"squad1/{method}-{name}", "../shared/models/minilm-squad1", stages, share)
                for method, stages in methods(share, 6.0, long).items()
                if method in ("fisher", "layers")
            ]
    return tuple(found)


# -- The page ------------------------------------------------------------------------------------------------------------------

HEAD = ("run", "score", "points lost (95 %)", "encoder weights left", "× batch 32", "× batch 1", "MB", "minutes")
CLAIMS = (  # in relative terms; the gates' speed has no batch or hardware beside it, the second one's is a GPU's at batch 128
    ("gates", "BERT-large, SQuAD 2.0: 1.95 times as fast, 1.4 F1 lost, 39 % of the encoder's weights left"),
    ("movement", "BERT-base, SQuAD 1.1, Hybrid Filled: 2.25 times as fast, 0.8 F1 lost, 25 % left; 2.69 times, 1.7 lost, 19 %"),
    ("group_lasso", "BERT-base, GLUE: up to 5.0 times fewer weights, no or minor loss on certain tasks; no speed given"),
)
STYLE = (
    "<style>text{font:12px sans-serif;fill:#333}.panel{font-weight:bold}.of{fill:#e4ddd3}.kept{fill:#0b6b5d}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.of{fill:#444}.kept{fill:#4db6a5}}</style>"
)


def pages() -> dict[Path, str]:
    """The page and its pictures, as the ledgers give them."""
    folder = ROOT / "docs" / "methods"
    found = {run.folder.relative_to(Path("methods") / TABLE).as_posix(): run for run in runs_of(HOME / "methods" / TABLE)}
    made = {folder / "structured.md": _page(found)}
    for task in dict.fromkeys(name.split("/")[0] for name in found):
        panels = _panels({name: run for name, run in found.items() if name.startswith(f"{task}/")})
        if panels:
            picture = bars(panels, width=760, columns=2)
            made[folder / f"structured-{task}.svg"] = picture.replace(">", f">{STYLE}", 1) + "\n"
    return made


def _page(found: dict[str, Run]) -> str:
    lines = [
        "# Structured pruning, side by side",
        "",
        f"Drawn from the ledgers under [`results/methods/structured/`](../../results/README.md) by `{COMMAND} --draw`, which also runs",
        "what is missing: one command, stopped and started at will. The number in a run's name is the share of the dense encoder's",
        "multiply-accumulates that stays, in per cent. All runs of a task have the same teacher and the same epochs in all; `layers` is",
        "the honest alternative: whole layers dropped evenly, trained for as long. **×**: times faster than the dense teacher in ONNX",
        "Runtime fp32, in the file that was chosen on held examples; **encoder weights left**: of the encoder's matrices.",
        "",
    ]
    left = [job for job in jobs() if not job.stands]
    if left:
        lines += [f"{len(left)} of {len(jobs())} runs are still to be made (`{COMMAND} --plan` names them).", ""]
    for task in dict.fromkeys(name.split("/")[0] for name in found):
        part = {name: run for name, run in found.items() if name.startswith(f"{task}/")}
        title = next(run.records[0].task for run in part.values())
        lines += [f"## {task}", "", f"{title}; metric: {next(iter(part.values())).records[0].metric}.", ""]
        rows = [_row(name.split("/")[1], run) for name, run in part.items()]
        lines += [*table(HEAD, [*_teachers(part), *rows]), ""]
        if _panels(part):
            lines += [f"![What is kept in each layer](structured-{task}.svg)", "", *_where(part), ""]
    lines += ["## What the papers say", "", *(f"- `{name}`: {claim}." for name, claim in CLAIMS), ""]
    return "\n".join(lines).rstrip() + "\n"


def _teachers(part: dict[str, Run]) -> list[tuple[str, ...]]:
    """The dense rows, from one of the runs: speeds are ratios to the first."""
    some = list(part.values())[-1]
    roles = (Role.TEACHER_FP32, Role.TEACHER_INT8)
    return [_cells(record.name, record, None) for record in some.records if record.role in roles]


def _row(name: str, run: Run) -> tuple[str, ...]:
    dense = next(record for record in run.records if record.role == Role.TEACHER_FP32)
    ours = run.ours
    assert ours is not None, f"{run.name} has no row of ours"
    return _cells(f"[{name}](../../results/methods/{TABLE}/{run.folder.parent.name}/{name}/recipe.yaml)", ours, dense)


def _cells(name: str, record: Record, dense: Record | None) -> tuple[str, ...]:
    left = 100.0
    if dense is not None and dense.encoder_params and record.encoder_params is not None:
        left = 100 * record.encoder_params / dense.encoder_params
    return (
        name if name.startswith("[") else safe(name),
        f"{record.score:.4f}",
        interval(record),
        f"{left:.0f} %",
        row_times(record, 32),
        row_times(record, 1),
        mb_text(record.size_bytes),
        f"{record.minutes:.1f}" if record.minutes else "",
    )


def _cut(part: dict[str, Run]) -> dict[str, Record]:
    """The runs whose layers differ from each other: what a picture is worth drawing of."""
    ours = {name.split("/")[1]: run.ours for name, run in part.items()}
    return {
        name: record
        for name, record in ours.items()
        if record and len({(layer.heads, layer.neurons) for layer in record.layers}) > 1 and not name.startswith("layers")
    }


def _panels(part: dict[str, Run]) -> list[tuple[str, list[tuple[str, int, int]]]]:
    panels = []
    for name, record in _cut(part).items():
        panels.append((f"{name}: heads", [(layer.name, layer.heads, layer.heads_of) for layer in record.layers]))
        panels.append((f"{name}: neurons", [(layer.name, layer.neurons, layer.neurons_of) for layer in record.layers]))
    return panels


def _where(part: dict[str, Run]) -> list[str]:
    """Which third of the layers kept most, method by method, against what McCarley et al. saw: the middle is kept most."""
    lines = [
        "McCarley et al. saw the bottom and the top cut most, the middle least. Here, share of weights kept in each third:",
        "",
    ]
    rows = []
    for name, record in _cut(part).items():
        layers = record.layers
        third = max(1, len(layers) // 3)
        shares = [
            sum(layer.heads / layer.heads_of + 2 * layer.neurons / layer.neurons_of for layer in some) / 3 / len(some)
            for some in (layers[:third], layers[third:-third], layers[-third:])
            if some
        ]
        agrees = "yes" if len(shares) == 3 and shares[1] == max(shares) else "no"
        rows.append((name, *(f"{100 * share:.0f} %" for share in shares), agrees))
    return [*lines, *table(("run", "bottom", "middle", "top", "as the paper saw it"), rows)]


def draw() -> None:
    """Writes the page and its pictures."""
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(jobs(), draw, sys.argv[1:]))
