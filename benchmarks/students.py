"""Compares small students after few passes: their first weights, their losses and their learning rates.

    python benchmarks/students.py sparse --tuned ../shared/models/minilm-sst2 --glue sst2 --data ../shared/data/glue/SST-2 \
        --train-rows ../shared/data/splits/sst2-20k.json [--share 0.05] [--passes 2] [--augment 4] [--only relative]

`sparse` students keep a share of the encoder's weights; the first way is that of Xu et al. (2021). `narrow` ones are cut by `fisher`
to a share of the multiply-accumulates; the first way is what `compress` did. Each other way differs in one choice from one above it.
Stop and start it at will: folders below --out go on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from slimformer.cli import prefer_environment
from slimformer.data.material import Material, prepare
from slimformer.demo import encoder
from slimformer.families.base import Subject, subject_of
from slimformer.log import show_log
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.running.recipe import Recipe
from slimformer.running.runner import train_stages
from slimformer.running.stages import torch_outputs, validation_score
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split, Task
from slimformer.tasks.classification import Classification
from slimformer.tasks.question_answering import QuestionAnswering
from slimformer.training.stage import Calibrate, Stage, Train

PAPER = Distillation(temperature=1.0, hidden=6.0, scores=6.0, embedding=1.0, relative=False)
PLAIN = Train(lr=1.6e-4, task_weight=0.0, dropout=False)
NARROW = Train(methods=(Distillation(),), lr=1.6e-4, task_weight=0.1, dropout=False, freeze="embeddings")


def sparse(share: float) -> dict[str, tuple[bool, Train]]:
    """Whether a student starts from the tuned weights, and its stage."""
    prune = KnowledgeSparse(keep=share)
    paper, relative = replace(PLAIN, methods=(prune, PAPER)), replace(PLAIN, methods=(prune, Distillation()))
    return {
        "Xu et al.": (False, paper),
        "from tuned weights": (True, paper),
        "relative hidden states, no scores": (True, relative),
        "relative, rate 4e-4": (True, replace(relative, lr=4e-4)),
        "relative, rate 8e-4": (True, replace(relative, lr=8e-4)),
        "relative, rate 4e-4, scores of second order": (
            True,
            replace(relative, lr=4e-4, methods=(replace(prune, score="fisher"), Distillation())),
        ),
        **{
            f"from tuned weights, rate {rate}": (True, replace(paper, lr=float(rate)))
            for rate in ("4e-4", "8e-4", "1.6e-3", "3.2e-3")
        },
        "relative with scores, rate 4e-4": (True, replace(relative, lr=4e-4, methods=(prune, Distillation(scores=1.0)))),
    }


def narrow() -> dict[str, Train]:
    """The ways in which a cut student recovers its accuracy."""
    paper = replace(NARROW, methods=(PAPER,), task_weight=0.0)
    without = replace(paper, methods=(replace(PAPER, scores=0.0),))
    with_scores = replace(NARROW, methods=(Distillation(scores=1.0),))
    return {
        "relative hidden states, no scores": NARROW,
        **{f"relative, rate {rate}": replace(NARROW, lr=float(rate)) for rate in ("4e-4", "8e-4")},
        **{f"Xu et al., rate {rate}": replace(paper, lr=float(rate)) for rate in ("4e-4", "8e-4", "1.6e-3")},
        **{f"Xu et al. without scores, rate {rate}": replace(without, lr=float(rate)) for rate in ("4e-4", "8e-4")},
        **{f"relative with scores, rate {rate}": replace(with_scores, lr=float(rate)) for rate in ("4e-4", "8e-4")},
    }


def dev_score(model: Subject, material: Material) -> float:
    """The task's metric on all of dev."""
    outputs, features, rows = torch_outputs(model, material, Split.DEV, 10_000)
    return material.task.score(outputs, features, rows)[material.task.metric]


@show_log()
def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("kind", choices=("sparse", "narrow"))
    reader.add_argument("--tuned", required=True, help="the teacher's folder")
    reader.add_argument("--encoder", default=str(encoder()), help="the same model as it was pre-trained; the demo's by default")
    reader.add_argument("--data", required=True)
    reader.add_argument("--glue", default=None)
    reader.add_argument(
        "--squad", choices=("v1", "v2"), default=None, help="questions in windows of 256 tokens, of a file of ids"
    )
    reader.add_argument("--train-rows", default=None)
    reader.add_argument("--batch-size", type=int, default=32)
    reader.add_argument("--share", type=float, default=0.05)
    reader.add_argument("--passes", type=float, default=2.0)
    reader.add_argument("--augment", type=int, default=0, help="copies of each row with other words in them")
    reader.add_argument("--only", default="", help="part of a line's name")
    reader.add_argument("--out", type=Path, default=Path("runs/students"))
    reader.add_argument("--cache", type=Path, default=None, help="where outputs of the teacher lie; below --out by default")
    chosen = reader.parse_args()
    prefer_environment()
    task: Task = Classification(data=chosen.data, glue=chosen.glue, train_rows=chosen.train_rows)
    if chosen.squad:
        task = QuestionAnswering(data=chosen.data, version=chosen.squad, max_length=256, stride=96, train_ids=chosen.train_rows)
    material = prepare(task, Path(chosen.tuned))
    print(f"{'way':46} {'validation, by pass':20} dev")
    dense = subject_of(checkpoint.load(Path(chosen.tuned)))
    print(f"{'the dense teacher':46} {validation_score(dense, material):<20.3f} {dev_score(dense, material):.3f}", flush=True)
    ways = sparse(chosen.share) if chosen.kind == "sparse" else {name: (True, stage) for name, stage in narrow().items()}
    for name, (from_tuned, stage) in ways.items():
        if chosen.only not in name:
            continue
        source, other = (chosen.tuned, None) if from_tuned else (chosen.encoder, chosen.tuned)
        out = chosen.out / f"{chosen.kind}-{chosen.share:g}-{chosen.passes:g}-{name.replace(' ', '-')}"
        learn = replace(stage, epochs=chosen.passes, augment=chosen.augment, batch_size=chosen.batch_size)
        cut = (Calibrate(Fisher(keep=chosen.share, cost="macs")),)
        stages: tuple[Stage, ...] = (learn,) if chosen.kind == "sparse" else (*cut, learn)
        train_stages(Recipe(source, task, stages, teacher=other), out, cache=chosen.cache or chosen.out / "teachers")
        events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = ", ".join(f"{event['metric']:.3f}" for event in events if event["kind"] == "evaluation")
        made = max(out.glob("work/*/made"), key=lambda folder: folder.stat().st_mtime_ns)
        print(f"{name:46} {scores:20} {dev_score(subject_of(checkpoint.load(made)), material):.3f}", flush=True)


if __name__ == "__main__":
    main()
