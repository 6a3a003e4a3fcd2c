"""The six systems as their papers ran them, on an encoder of six layers and one of twelve: the jobs behind
docs/methods/published.md, and the page itself.

    python results/published.py --plan            # the jobs, which of them are done, how many hours
    python results/published.py --only e5-mrpc/   # run them; stop and start at will
    python results/published.py --draw            # only draw the page from the rows that stand

A row that is named after a paper is run as the paper ran it, passes and data apart, which the page states. Beside it stand what
we make of the method (`-ours`), dense int8, and dense models of fewer layers. The jobs stand in the order of interest.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache

from numerics import COPIES, OURS_LR, PAPER_LOSS, PASSES, more_ids
from sweep import Job, main
from work import (
    DISTIL,
    ENCODERS,
    EXPORT,
    TUNED,
    TUNING,
    folder_of,
    glue,
    teacher,
    twenty_thousand,
)

from slimformer.methods.base import Method
from slimformer.methods.distillation import Distillation
from slimformer.methods.group_lasso import GroupLasso
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.methods.layers import Layers
from slimformer.methods.movement import Movement
from slimformer.methods.quantization import Quantization
from slimformer.running.recipe import Bench, Recipe
from slimformer.tasks.base import Task
from slimformer.training.stage import Calibrate, Stage, Train

TABLE = "published"
COMMAND = "python results/published.py"
BENCH = Bench(rivals=("teacher-int8",), seconds=8.0, fused=True)
LAYERS = {"minilm": 6, "e5": 12}
SEEDS = (17, 18, 19)  # of runs that take less than ten minutes
ROLES = ("matrix", "head", "attention", "softmax", "norm", "branch", "embedding")
Stages = tuple[Stage, ...]


def paper_loss(encoder: str) -> Distillation:
    """The sums of Xu et al. and Tahaei et al. over the layers of an encoder."""
    return replace(PAPER_LOSS, hidden=float(LAYERS[encoder]), scores=float(LAYERS[encoder]))


def followed(encoder: str, task: str, *more: Method, lr: float, passes: float = PASSES) -> Train:
    """Distillation with the papers' loss and no labels; `passes` over the rows of a small task, half as many over a large one."""
    small = task != "sst2"
    copies = COPIES if small else 0
    epochs = passes / (1 + copies) if small else passes / 2
    return Train(methods=(*more, paper_loss(encoder)), lr=lr, epochs=epochs, augment=copies, task_weight=0.0, dropout=False)


def fully_quantized(bits: int) -> Stages:
    """Prato et al.: everything on a grid of so many bits, the task's loss alone."""
    fake = Quantization(
        weights=bits,
        activations=bits,
        embeddings=bits,
        roles=ROLES,
        grid="affine",
        exact_zero=False,  # type: ignore[arg-type]
    )
    return (Train(methods=(fake,), lr=4e-5, epochs=2.0, dropout=False),)


def sparse(encoder: str, task: str) -> Stages:
    """Xu et al. at 20 times: from weights that are not tuned, their loss, their shape of the run."""
    return (followed(encoder, task, KnowledgeSparse(keep=0.05), lr=1.6e-4),)


def sparse_ours(encoder: str, task: str, times: float = 1.0) -> Stages:
    """The same as it suits few passes: from the tuned weights and at ten times the rate."""
    return (followed(encoder, task, KnowledgeSparse(keep=0.05), lr=OURS_LR, passes=PASSES * times),)


def movement(epochs: float) -> Stages:
    """Lagunas et al., Hybrid Filled: published penalty and threshold, logits and labels, no decay; then the dense stage."""
    taught = Distillation(logits=0.9, hidden=0.0)
    learn = Train(methods=(taught,), lr=1.6e-4, task_weight=0.1, weight_decay=0.0)
    cut = replace(
        learn, methods=(Movement(keep=None, fill=True, lambda_final=20.0, neuron_multiple=1), taught), epochs=epochs * 3 / 4
    )
    return (cut, replace(learn, epochs=epochs / 4))


def group_lasso(epochs: float) -> Stages:
    """Li et al.: rows inside blocks, a fifth of each matrix, the task's loss alone; then masked retraining."""
    learn = Train(lr=1.6e-4, epochs=epochs / 2)
    rows = GroupLasso(groups="block_rows", keep=0.2, block=48)
    return (replace(learn, methods=(rows,)), replace(learn, methods=(KeepZeros(),)))


def dense_layers(share: float, epochs: float) -> Stages:
    """A dense model of fewer layers."""
    return (Calibrate(Layers(keep=share + 1e-9)), replace(DISTIL, epochs=epochs))


@cache
def jobs() -> tuple[Job, ...]:
    """All jobs of the table, in the order of interest."""
    tuned = {names: teacher(*names) for names in TUNING if names != ("minilm", "rte")}
    found: list[Job] = list(tuned.values())

    def add(
        encoder: str,
        task: str,
        some: Mapping[str, Stages],
        share: float = 1.0,
        *,
        start: str = "",
        seeds: Iterable[int] = (17,),
    ) -> None:
        """`start`: the model that trains, if it is another than the teacher."""
        job = tuned.get((encoder, task))
        taught = folder_of(job) if job else TUNED[encoder, task]
        at_hand: Task = twenty_thousand() if task == "squad1" else glue(task)
        for name, stages in some.items():
            for seed in seeds:
                bench = BENCH if seed == 17 else replace(BENCH, seconds=3.0, fused=False)
                recipe = Recipe(
                    start or taught, at_hand, stages, teacher=taught if start else None, seed=seed, export=EXPORT, bench=bench
                )
                last = "" if seed == 17 else f"-seed{seed}"
                found.append(Job(f"{TABLE}/{encoder}-{task}/{name}{last}", recipe, share, job.folder if job else ""))

    for encoder in ("minilm", "e5"):
        for task in ("mrpc", "sst2"):
            add(encoder, task, {"quantization-8": fully_quantized(8)}, seeds=SEEDS)
            add(encoder, task, {f"quantization-{bits}": fully_quantized(bits) for bits in (6, 4)})
    for task in ("mrpc", "sst2", "rte", "cola", "stsb"):
        add("e5", task, {"sparse-ours-5": sparse_ours("e5", task)})
    for encoder, tasks in (("minilm", ("mrpc", "stsb", "cola", "sst2")), ("e5", ("mrpc", "sst2", "rte", "cola", "stsb"))):
        for task in tasks:
            add(encoder, task, {"sparse-5": sparse(encoder, task)}, start=ENCODERS[encoder])
    for task in ("mrpc", "sst2", "cola", "stsb"):
        add("minilm", task, {"sparse-ours-5": sparse_ours("minilm", task)})
    unique = {job.folder: job for job in found}
    return tuple(unique.values())


if __name__ == "__main__":
    more_ids()
    sys.exit(main(jobs(), lambda: None, sys.argv[1:]))
