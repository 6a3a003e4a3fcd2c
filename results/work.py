"""The work that tables of methods are measured on: its tasks, its teachers, and how a ledger's rows are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from sweep import Job
from tables import Run

from slimformer.exporters.base import Variant
from slimformer.recipe import Bench, Export, Recipe
from slimformer.report import Record, Role
from slimformer.stages import Train
from slimformer.tasks.classification import Classification
from slimformer.tasks.question_answering import QuestionAnswering

ROOT = Path(__file__).resolve().parent.parent
DATA = "../shared/data"
ENCODER = "runs/encoder"  # a link to the demo's encoder: recipes/mrpc-tune.yaml shows how it is made
SST2_TEACHER, SQUAD_TEACHER = "../shared/models/minilm-sst2", "../shared/models/minilm-squad1"
FOLDERS = {"mrpc": "MRPC", "sst2": "SST-2", "stsb": "STS-B", "cola": "CoLA", "rte": "RTE"}
EXPORT = Export(choose_within=1.0)


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


def teacher(table: str, task: str) -> Job:
    """The encoder tuned on a task of GLUE: what other jobs start from, or learn from."""
    tune = Train(epochs=5.0, lr=8e-5)
    return Job(
        f"{table}/{task}/teacher", Recipe(ENCODER, glue(task), (tune,), export=EXPORT, bench=Bench(("teacher-int8",), 20.0))
    )


def folder_of(job: Job) -> str:
    """Where a job leaves its model, as recipes name it."""
    return str(job.scratch.relative_to(ROOT))


def dense(run: Run) -> Record:
    """The teacher in fp32, that all ratios compare with."""
    return next(record for record in run.records if record.role == Role.TEACHER_FP32)


def ours_in(run: Run, precision: Variant, *, openvino: bool = False) -> Record | None:
    """Our file of one precision, in ONNX Runtime or in OpenVINO, whether it was chosen or not."""
    rows = [record for record in run.records if record.role == Role.OURS and record.precision == precision]
    return next((record for record in rows if record.name.endswith("in OpenVINO") == openvino), None)


def plain_in(run: Run) -> Record | None:
    """Our file in fp32, with fused operators where that was measured: those are what the dense model is timed with."""
    return ours_in(run, Variant.FUSED) or ours_in(run, Variant.FLOAT)


def left(record: Record, whole: Record) -> float:
    """Share of the dense encoder's weights that are there and not 0."""
    if not whole.encoder_params or record.encoder_nonzero is None:
        return 1.0
    return record.encoder_nonzero / whole.encoder_params


def rising(scores: Sequence[float]) -> str:
    """Whether each is better than the one before."""
    steps = [later - earlier for earlier, later in pairwise(scores)]
    return "yes" if min(steps) > 0 else "no" if min(steps) < 0 else "no difference"
