"""The six systems as their papers ran them, on an encoder of six layers and one of twelve: the jobs behind
docs/methods/published.md, and the page itself.

    python results/published.py --plan            # the jobs, which of them are done, how many hours
    python results/published.py --only e5-mrpc/   # run them; stop and start at will
    python results/published.py --draw            # only draw the page from the rows that stand

A row that is named after a paper is run as the paper ran it, passes and data apart, which the page states. Beside it stand what
we make of the method (`-ours`), dense int8, and dense models of fewer layers. The jobs stand in the order of interest.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from math import hypot
from pathlib import Path
from statistics import fmean

import again
import structured
from numerics import COPIES, FIVE, OURS_LR, PAPER_LOSS, PASSES, SENTENCES, STRONG, contexts, more_ids
from pages import Run, bullets, interval, row_times, table, turns, wrapped
from sweep import Job, main
from work import (
    DISTIL,
    ENCODERS,
    EXPORT,
    ROOT,
    TUNED,
    TUNING,
    as_trained,
    dense,
    epochs,
    folder_of,
    found_in,
    glue,
    interval_of,
    left,
    lost,
    orders,
    ours_in,
    plain_in,
    recipe_link,
    series,
    simulated,
    still_to_run,
    teacher,
    twenty_thousand,
    write,
)

from slimformer.exporters.base import Variant
from slimformer.files import write_text
from slimformer.measuring.records import Interval, Record, Standing
from slimformer.methods.base import Method
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.gates import Gates
from slimformer.methods.group_lasso import GroupLasso
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.methods.kronecker import KroneckerFactors
from slimformer.methods.layers import Layers
from slimformer.methods.movement import Movement
from slimformer.methods.quantization import Quantization
from slimformer.reporting.verdicts import Conclusion, all_of, likely_speed, reached, weak, within
from slimformer.running.recipe import Bench, Recipe
from slimformer.tasks.base import Task
from slimformer.tasks.text import Text
from slimformer.training.stage import Calibrate, Stage, Train

TABLE = "published"
COMMAND = "python results/published.py"
BENCH = Bench(rivals=("teacher-int8",), seconds=8.0, fused=True)
LAYERS = {"minilm": 6, "e5": 12}
PENALTY = {"minilm": 41.0, "e5": 71.0}  # what Li et al.'s 1e-4 for each group comes to, the word table's groups included
DEPTHS = ("even", "bottom", "chosen")  # the ways to drop layers
ENCODER_NAMES = {"minilm": "MiniLM, 6 layers", "e5": "e5-small, 12 layers"}
TRAINED = tuple(names for names in TUNING if names != ("minilm", "rte"))  # that one is hardly better than chance
EPOCHS = {"mrpc": 8.0, "sst2": 4.0}  # of the structured methods, all stages together
LONGER = {"twice": 2.0, "four-times": 4.0}  # as many passes
PASSAGES = "runs/sweep/passages.txt"
SEEDS = (17, 18, 19)  # of runs that take less than ten minutes
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
    """Prato et al.: every operand on a grid of so many bits, of each feature where files compute in float; the labels alone."""
    fake = Quantization(weights=bits, activations=bits, embeddings=bits, roles="all", activation_buckets="feature")
    return (Train(methods=(fake,), lr=4e-5, epochs=2.0, dropout=False),)


def sparse(encoder: str, task: str) -> Stages:
    """Xu et al. at 20 times: from weights that are not tuned, their loss, their shape of the run."""
    return (followed(encoder, task, KnowledgeSparse(keep=0.05), lr=1.6e-4),)


def sparse_ours(encoder: str, task: str, times: float = 1.0) -> Stages:
    """The same as it suits few passes: from the tuned weights and at ten times the rate."""
    return (followed(encoder, task, KnowledgeSparse(keep=0.05), lr=OURS_LR, passes=PASSES * times),)


def answered() -> Train:
    """On SQuAD with as many questions as the teacher saw: answers and teacher teach alike, without attention scores."""
    return replace(DISTIL, batch_size=16, task_weight=0.5)


def sparse_variants(encoder: str) -> dict[str, Stages]:
    """Xu et al. with one choice changed: one threshold for the whole model, second-order scores, two of four weights."""
    ways = {
        "global-10": KnowledgeSparse(keep=0.1, scope="model"),
        "fisher-10": KnowledgeSparse(keep=0.1, score="fisher", refreshes=4),
        "10": KnowledgeSparse(keep=0.1),
        "2of4": KnowledgeSparse(pattern="2:4"),
    }
    return {f"sparse-{name}": (followed(encoder, "mrpc", method, lr=1.6e-4),) for name, method in ways.items()}


def movement(epochs: float) -> Stages:
    """Lagunas et al., Hybrid Filled: published penalty and threshold, logits and labels, no decay; then the dense stage."""
    taught = Distillation(logits=0.9, hidden=0.0)
    learn = Train(methods=(taught,), lr=1.6e-4, task_weight=0.1, weight_decay=0.0)
    cut = replace(
        learn, methods=(Movement(keep=None, fill=True, lambda_final=20.0, neuron_multiple=1), taught), epochs=epochs * 3 / 4
    )
    return (cut, replace(learn, epochs=epochs / 4))


def passages() -> None:
    """Writes text whose order counts, if it does not exist: sentences of SQuAD's contexts, a blank line after each context."""
    if (ROOT / PASSAGES).is_file():
        return
    parts = contexts()
    every = -(-sum(map(len, parts)) // SENTENCES)
    write_text(ROOT / PASSAGES, "\n\n".join("\n".join(part) for part in parts[::every]) + "\n")


def on_text(encoder: str, shapes: str = "7.7x", *, taught: bool = True) -> Stages:
    """Tahaei et al., the first stage: the nearest factors, then text, with the pre-trained model as teacher."""
    loss = replace(paper_loss(encoder), logits=0.0)
    learn = Train(methods=(loss,) if taught else (), lr=1e-3, epochs=1.0, batch_size=64, dropout=False)
    return (Calibrate(KroneckerFactors(shapes=shapes)), learn)  # type: ignore[arg-type]


def on_task(encoder: str, task: str, *, taught: bool = True) -> Stages:
    """Tahaei et al., the second stage: the tuned model teaches, the labels count as much, no copies of rows."""
    loss = (paper_loss(encoder),) if taught else ()
    return (Train(methods=loss, lr=2e-4, epochs=PASSES if task != "sst2" else PASSES / 2, dropout=False),)


def gates(epochs: float) -> Stages:
    """McCarley et al.: gates alone learn, then heads and neurons go, as many of each as in their fastest row below 1.5 F1."""
    chosen = Gates(
        keep=None,
        keep_heads=0.469,
        keep_neurons=0.351,
        size="top_k",
        apart=True,
        neuron_multiple=1,
        fold=False,
        sublayers=False,
    )
    gated = replace(DISTIL, epochs=epochs / 2, methods=(chosen,), freeze="everything", task_weight=1.0)
    return (gated, replace(DISTIL, epochs=epochs / 2))


def group_lasso(encoder: str, epochs: float) -> Stages:
    """Li et al.: rows inside eight blocks of each matrix and of the word table, a fifth of each, the labels; then masked retraining."""
    learn = Train(lr=1.6e-4, epochs=epochs / 2)
    rows = GroupLasso(groups="block_rows", keep=0.2, blocks_per_matrix=8, embeddings=True, strength=PENALTY[encoder])
    return (replace(learn, methods=(rows,)), replace(learn, methods=(KeepZeros(),)))


def dense_layers(which: str, epochs: float) -> Stages:
    """A dense model of half the layers."""
    return (Calibrate(Layers(keep=0.5 + 1e-9, which=which)), replace(DISTIL, epochs=epochs))  # type: ignore[arg-type]


def narrow(encoder: str, task: str) -> Stages:
    """A narrow model of as many encoder weights as `sparse_ours` has, trained alike: the same rate, loss and free embeddings."""
    return (Calibrate(Fisher(keep=0.05, cost="macs")), followed(encoder, task, lr=OURS_LR))


@cache
def jobs() -> tuple[Job, ...]:
    """All jobs of the table, in the order of interest."""
    tuned = {names: teacher(*names) for names in TRAINED}
    found: list[Job] = list(tuned.values())

    def add(
        encoder: str,
        task: str,
        some: Mapping[str, Stages],
        share: float = 1.0,
        *,
        start: str = "",
        after: Job | None = None,
        seeds: Iterable[int] = (17,),
    ) -> None:
        """`start`: the model that trains, if it is another than the teacher; `after`: the job that makes it."""
        job = tuned.get((encoder, task))
        taught = folder_of(job) if job else TUNED[encoder, task]
        needs = after.folder if after else job.folder if job else ""
        at_hand: Task = twenty_thousand() if task == "squad1" else glue(task)
        for name, stages in some.items():
            for seed in seeds:
                bench = BENCH if seed == 17 else replace(BENCH, seconds=3.0, fused=False)
                recipe = Recipe(
                    start or taught, at_hand, stages, teacher=taught if start else None, seed=seed, export=EXPORT, bench=bench
                )
                last = "" if seed == 17 else f"-seed{seed}"
                folder = f"{TABLE}/{encoder}-{task}/{name}{last}"
                more = simulated if name.startswith("quantization") else None
                found.append(Job(folder, recipe, share, needs, more=more))

    for encoder in ("minilm", "e5"):
        for task in ("mrpc", "sst2"):
            add(encoder, task, {"quantization-8": fully_quantized(8)}, seeds=SEEDS)
            add(encoder, task, {f"quantization-{bits}": fully_quantized(bits) for bits in (6, 4)})
    for encoder in ("e5", "minilm"):
        for task in FIVE if encoder == "e5" else STRONG:
            add(encoder, task, {"sparse-ours-5": sparse_ours(encoder, task)})
            add(encoder, task, {"sparse-5": sparse(encoder, task)}, start=ENCODERS[encoder])
    for encoder in ("minilm", "e5"):
        for task in ("mrpc", "sst2"):
            add(encoder, task, {"gates": gates(EPOCHS[task])}, 0.39)
            add(encoder, task, {f"layers-{which}": dense_layers(which, EPOCHS[task]) for which in DEPTHS}, 0.5)
            add(encoder, task, {"movement": movement(EPOCHS[task])}, start=ENCODERS[encoder])
            add(encoder, task, {"group_lasso": group_lasso(encoder, EPOCHS[task])})
        add(encoder, "mrpc", {"narrow-5": narrow(encoder, "mrpc")}, 0.05)
    add("minilm", "mrpc", sparse_variants("minilm"), start=ENCODERS["minilm"])
    for encoder in ("minilm", "e5"):
        squad = replace(answered(), methods=(Movement(keep=0.25, fill=True), *answered().methods))
        add(encoder, "squad1", {"movement-ours": (replace(squad, epochs=3.0), replace(answered(), epochs=1.0))}, 0.25)
        add(encoder, "squad1", {"movement": movement(4.0)}, start=ENCODERS[encoder])
        add(encoder, "squad1", {"gates": gates(2.0)}, 0.39)
    add(
        "minilm",
        "squad1",
        {
            "sparse-ours-10": (
                replace(answered(), methods=(KnowledgeSparse(keep=0.1), *answered().methods), lr=8e-4, epochs=2.0),
            )
        },
    )
    add("minilm", "mrpc", {f"sparse-ours-5-{name}": sparse_ours("minilm", "mrpc", times) for name, times in LONGER.items()})
    factored: dict[tuple[str, str], Job] = {}
    for encoder, name, stages in (
        ("minilm", "7.7x", on_text("minilm")),
        ("e5", "7.7x", on_text("e5")),
        ("minilm", "5.5x", on_text("minilm", "5.5x")),
        ("minilm", "7.7x-no-kd-on-text", on_text("minilm", taught=False)),
    ):
        text = Text(data=PASSAGES, next_sentence=True, metric="likelihood")
        recipe = Recipe(ENCODERS[encoder], text, stages)
        factored[encoder, name] = Job(f"{TABLE}/{encoder}-text/kronecker-{name}", recipe)
    found.extend(factored.values())
    for (encoder, name), job in factored.items():
        for task in STRONG if name == "7.7x" else ("mrpc",):
            add(encoder, task, {f"kronecker-{name}": on_task(encoder, task)}, start=folder_of(job), after=job)
    last = factored["minilm", "7.7x"]
    add(
        "minilm",
        "mrpc",
        {"kronecker-7.7x-no-kd-on-task": on_task("minilm", "mrpc", taught=False)},
        start=folder_of(last),
        after=last,
    )
    add("minilm", "mrpc", {"kronecker-7.7x-one-stage": (on_text("minilm")[0], *on_task("minilm", "mrpc"))})
    unique = {job.folder: job for job in found}
    return tuple(unique.values())


# -- The page ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A paper's part of the page: what it claims, how our rows of its name were run, and which runs stand in its table."""

    title: str
    claim: str
    run: str  # how the rows named after the paper were run, and in what they differ from it
    names: str  # a regular expression on the names of runs, without task and seed
    timed: bool = False  # whether speed is what the rows show


@dataclass(frozen=True)
class Aim:
    """What one named run, or the mean of one over several tasks, has to show; the names were fixed before the runs were scored."""

    what: str
    run: str
    tasks: tuple[str, ...]
    allowed: float = 0.0  # points
    times: float = 0.0  # as fast as the dense model in fp32
    share: float = 1.0  # of the encoder's weights
    kept: float = 0.0  # share of the teacher's metric, on all tasks but one


READING = (
    "**score** and **points lost** are those of the fp32 file on the whole dev split, **int8** the points that the int8 file for "
    "ONNX Runtime lost. The 95 % interval is that of the paired bootstrap over examples; with several seeds it is that of their "
    "mean, over examples and seeds.",
    "**encoder weights**: the numbers of the encoder's matrices that are not 0, and how many times fewer they are than in the "
    "dense model. **whole**: the same of the whole model with its word table, which is large in small models.",
    "**×**: times as fast as the dense model in fp32 in ONNX Runtime, both with fused operators, with 80 % of the rounds.",
    "**passes**: over the rows of the task, copies of rows counted, stage by stage.",
    "A run is named after a paper only if it is run as the paper ran it; what differs stands above its table. `-ours` is the same "
    "method as it suits few passes. All runs of an encoder and a task have the same teacher, which the first table names by the "
    "digest of its weights; older tables of methods have other teachers.",
    "No mean holds a task whose teacher is not clearly better than the best answer that is the same for every example.",
)

SYSTEMS = (
    System(
        "Gates: McCarley, Chakravarti, Sil",
        "BERT-large on SQuAD 2.0: 1.95 times as fast, 1.4 F1 lost, 39 % of the encoder's weights left; the middle layers keep most.",
        "`gates`: of the tuned model all weights are frozen while gates learn, heads and neurons apart, with the task's loss; 46.9 % of "
        "the heads and 35.1 % of the neurons stay, as in the row that the claim is of, and train on, with distillation of hidden states "
        "and outputs. In the paper gates learn for one epoch and retraining takes one; here both take half of the passes. The paper's "
        "recipe of distillation was not to be had.",
        r"gates.*",
        timed=True,
    ),
    System(
        "Block movement pruning: Lagunas, Charlaix, Sanh, Rush",
        "BERT-base on SQuAD 1.1, Hybrid Filled: 2.25 times as fast, 0.8 F1 lost, a quarter of the encoder's weights left.",
        "`movement`: from weights that are not tuned, with the published penalty (lambda 20), threshold (0.1), blocks of 32 and "
        "whole neurons, the paper's loss (0.9 of the teacher's outputs at temperature 2, 0.1 of the labels), no decay of weights, "
        "zeros filled, then a dense stage. Twenty passes there, fewer here, at a higher rate. `movement-ours` prunes the tuned model "
        "to a share of the multiply-accumulates and learns hidden states too.",
        r"movement.*",
        timed=True,
    ),
    System(
        "Reweighted group lasso: Li, Kong, Zhang, Li, Li, Liu, Ding",
        "BERT-base on GLUE: up to 5.0 times fewer weights with no or minor loss on certain tasks.",
        "`group_lasso`: rows inside eight blocks of each matrix and of the word table, as in the authors' profiles of 2020, a fifth of "
        "each left, the published penalty, the labels alone; then retraining under the mask. The penalty is renewed four times in a "
        "run; in the authors' short runs it never was. Zeros inside matrices bring no speed in ONNX Runtime.",
        r"group_lasso.*",
    ),
    System(
        "Knowledge-aware sparse pruning: Xu, Yen, Zhao, Xiao",
        "BERT-base on four tasks of GLUE: 20 times fewer encoder weights, 1.4 points lost on average.",
        "`sparse-5`: from weights that are not tuned, the paper's loss (embedding, hidden states and attention scores of all layers, "
        "outputs at temperature 1; no labels), 100 updates to the end, a twentieth of each matrix left. The paper has 30 copies of "
        "each row and 12 passes over these, and a constant rate of 3e-5; here there are four copies and ten passes over rows in "
        "all, at 1.6e-4, which falls. `sparse-ours-5` starts from the tuned weights at ten times that rate.",
        r"(sparse|narrow).*",
    ),
    System(
        "Kronecker factors: Tahaei, Charlaix, Partovi Nia, Ghodsi, Rezagholizadeh",
        "BERT-base on GLUE: 7.7 times smaller, 97 % of its scores or more; 21 times smaller, 91 % or more.",
        "`kronecker-7.7x`: the published shapes; a stage on text with the pre-trained model as teacher, masked words and neighbouring "
        "sentences beside it, whose heads are fresh because neither encoder came with its own; then one on the task with the tuned "
        "model as teacher. Sums of squared errors, outputs and labels, all weights 1, no copies of rows. The paper's text is a tenth of "
        "Wikipedia, three times over; here it is some 50,000 sentences of SQuAD's contexts, once. `no-kd-on-text`, `no-kd-on-task`, "
        "`one-stage`: the paper's ablations. `5.5x`: sums of four products.",
        r"kronecker.*",
    ),
    System(
        "Fully quantized Transformer: Prato, Charlaix, Rezagholizadeh",
        "Translation: 8 bits lose nothing against float.",
        "`quantization-8`, `-6`, `-4`: every operand of the paper on a grid of so many bits: inputs and weights of matrices, queries, "
        "keys and values, numerator, denominator and output of softmax and layer norm, activations, embeddings; biases and sums of "
        "residuals in float. From the tuned model, the labels alone, two passes. The paper translates, and trains from scratch; its "
        "grids need not hold 0, ours do, and those of weights are symmetric, so that files can have them. **score** here is that of "
        "the model as it was trained, with everything on its grid, simulated in PyTorch; files compute products of matrices in "
        "integers, and the rest in float.",
        r"quantization.*",
    ),
    System(
        "Beside them: dense models of fewer layers",
        "Sajjad, Dalvi, Durrani, Nakov: dropping the top layers is best.",
        "`layers-even`, `layers-bottom`, `layers-chosen`: half of the layers, spaced evenly, the lowest, or those that the loss needs "
        "most; trained with distillation for as long as `gates` and `movement`. `layers` below stands for the one that lost least on "
        "validation examples.",
        r"layers.*",
        timed=True,
    ),
)
AIMS = (
    Aim("Xu et al., as published: 20 times fewer encoder weights, at most 1.4 points lost on average", "sparse-5", FIVE, 1.4),
    Aim("the same by `sparse-ours-5`", "sparse-ours-5", FIVE, 1.4),
    Aim(
        "Tahaei et al., as published: 97 % of the teacher's metric on three of four tasks", "kronecker-7.7x", STRONG, kept=0.97
    ),
    Aim("Prato et al., everything at 8 bits: at most 0.5 points lost, MRPC", "quantization-8", ("mrpc",), 0.5),
    Aim("the same, SST-2", "quantization-8", ("sst2",), 0.5),
    Aim("Lagunas et al., as published: 2.4 times as fast, at most 1.0 F1 lost", "movement", ("squad1",), 1.0, 2.4),
    Aim("Lagunas et al., `movement` to a share: the same", "movement-ours", ("squad1",), 1.0, 2.4),
    Aim("McCarley et al.: 1.9 times as fast, at most 1.4 points lost, MRPC", "gates", ("mrpc",), 1.4, 1.9),
    Aim("the same, SST-2", "gates", ("sst2",), 1.4, 1.9),
    Aim(
        "Li et al., as published: a fifth of the encoder's weights, at most 1.0 point lost, MRPC",
        "group_lasso",
        ("mrpc",),
        1.0,
        share=0.2,
    ),
    Aim("the same, SST-2", "group_lasso", ("sst2",), 1.0, share=0.2),
)


def pages() -> dict[Path, str]:
    """The page, as the ledgers give it."""
    return {ROOT / "docs" / "methods" / "published.md": _page(series(found_in(TABLE)), found_in("teachers"))}


def _page(groups: Mapping[str, list[Run]], teachers: Mapping[str, Run]) -> str:
    lines = [
        "# As the papers ran them",
        "",
        *wrapped(
            f"Drawn from the ledgers under [`results/methods/{TABLE}/`](../../results/README.md) by `{COMMAND} --draw`. "
            "Without that option it first runs the jobs that are missing; it can be stopped and started at any time."
        ),
        "",
        *bullets((*READING, *turns(chain(*groups.values())))),
        "",
        *still_to_run(jobs(), COMMAND),
        *_teacher_table(teachers, groups),
        *_aims(groups),
    ]
    for system in SYSTEMS:
        lines += _system(system, groups)
    lines += orders("What the papers found, here", ORDERS, with_best_layers(found_in(TABLE)))
    return "\n".join([*lines, *_where(groups), *again.part()]).rstrip() + "\n"


def _teacher_table(teachers: Mapping[str, Run], groups: Mapping[str, list[Run]]) -> list[str]:
    """The dense models: what all rows are compared with."""
    rows = []
    named = {name: dense(run) for name, run in teachers.items()}
    named |= {name.split("/")[0]: dense(some[0]) for name, some in groups.items() if name.split("/")[0] not in named}
    int8 = {
        name: next((record for record in run.records if record.role == Standing.TEACHER_INT8), None)
        for name, run in ({**teachers} | {name.split("/")[0]: some[0] for name, some in groups.items()}).items()
    }
    for name, record in sorted(named.items()):
        encoder, task = name.split("-", 1)
        whole, inner = record.params or 0, record.encoder_params or 0
        rival = int8.get(name)
        rows.append(
            (
                *(ENCODER_NAMES[encoder], task),
                f"{record.metric.replace('_', ' ')} {record.score:.4f}" + (" (weak)" if weak(record) else ""),
                f"{record.chance:.4f}" if record.chance is not None else "",
                f"{rival.score:.4f}, {interval(rival)}" if rival else "",
                f"{inner / 1e6:.1f} M of {whole / 1e6:.1f} M",
                f"`{record.teacher}`",
            )
        )
    head = (
        "encoder",
        "task",
        "dense fp32",
        "best constant answer",
        "dense int8, points lost",
        "encoder weights of all",
        "weights",
    )
    return ["## The dense models", "", *table(head, rows), ""] if rows else []


def _system(system: System, groups: Mapping[str, list[Run]]) -> list[str]:
    rows = []
    for name, some in groups.items():
        place, run_name = name.split("/", 1)
        if not re.fullmatch(system.names, run_name):
            continue
        encoder, task = place.split("-", 1)
        plain, integers = plain_in(some[0]), ours_in(some[0], Variant.INT8_FUSED)
        assert plain is not None, f"{name} has no fp32 row"
        whole, share = dense(some[0]), left(plain, dense(some[0]))
        count = (plain.encoder_nonzero or 0) / 1e6
        times = (
            whole.params / (plain.params - (plain.encoder_params or 0) + (plain.encoder_nonzero or 0))
            if whole.params and plain.params
            else 1
        )
        faster = (
            (row_times(plain, 32), row_times(plain, 1), row_times(integers, 32) if integers else "") if system.timed else ()
        )
        trained = as_trained if run_name.startswith("quantization") else in_float
        scores = [file.score for run in some if (file := trained(run))]
        spread = f" ({min(scores):.4f} to {max(scores):.4f})" if len(scores) > 1 else ""
        rows.append(
            (
                *(ENCODER_NAMES[encoder], task, recipe_link(TABLE, name), str(len(some))),
                f"{fmean(scores):.4f}{spread}",
                interval_of(lost(some, trained)),
                interval_of(lost(some, in_int8)),
                f"{count:.2f} M ({1 / share:.1f} ×)",
                f"{times:.1f} ×",
                *faster,
                epochs(jobs(), f"{TABLE}/{name}"),
            )
        )
    head = ("encoder", "task", "run", "seeds", "score", "points lost (95 %)", "int8", "encoder weights", "whole")
    speeds = ("× batch 32", "× batch 1", "× int8, batch 32") if system.timed else ()
    body = table((*head, *speeds, "passes"), rows) if rows else ["Not run yet."]
    return [f"## {system.title}", "", *bullets((f"The paper: {system.claim}", system.run)), "", *body, ""]


def in_float(run: Run) -> Record | None:
    """Our fp32 file."""
    return ours_in(run, Variant.FLOAT)


def in_int8(run: Run) -> Record | None:
    """Our int8 file with fused operators."""
    return ours_in(run, Variant.INT8_FUSED)


def _aims(groups: Mapping[str, list[Run]]) -> list[str]:
    """Each aim on each encoder, judged by the run that was named for it."""
    rows = [(aim.what, ENCODER_NAMES[encoder], *_judged(aim, encoder, groups)) for aim in AIMS for encoder in ENCODER_NAMES]
    head = ("aim", "encoder", "run", "there", "met")
    return ["## What we set out to show", "", *table(head, rows), ""]


def _judged(aim: Aim, encoder: str, groups: Mapping[str, list[Run]]) -> tuple[str, str, str]:
    asked = [task for task in aim.tasks if (encoder, task) in {*TRAINED, *TUNED}]
    there = {task: groups[name] for task in asked if (name := f"{encoder}-{task}/{aim.run}") in groups}
    strong = {task: some for task, some in there.items() if not weak(dense(some[0]))}
    if not strong or len(there) < len(asked):
        return (aim.run, f"{len(there)} of {len(asked)} tasks run", "")
    trained = as_trained if aim.run.startswith("quantization") else in_float
    found = {task: lost(some, trained) for task, some in strong.items()}
    losses = {task: loss for task, loss in found.items() if loss is not None}
    said = ", ".join(f"{task} {interval_of(loss)}" for task, loss in losses.items())
    if aim.kept:
        answers = [
            within(loss.low, loss.high, 100 * (1 - aim.kept) * dense(strong[task][0]).score) for task, loss in losses.items()
        ]
        shares = ", ".join(f"{task} {100 - loss.value / dense(strong[task][0]).score:.0f} %" for task, loss in losses.items())
        best = sorted(answers, key=[Conclusion.YES, Conclusion.OPEN, Conclusion.NO].index)[: max(1, len(answers) - 1)]
        return (aim.run, shares, all_of(best))
    mean = fmean(loss.value for loss in losses.values())
    low = hypot(*(loss.value - loss.low for loss in losses.values())) / len(losses)  # the tasks share no example
    high = hypot(*(loss.high - loss.value for loss in losses.values())) / len(losses)
    total = Interval(mean, mean - low, mean + high)
    answers = [within(total.low, total.high, aim.allowed)]
    text = f"{interval_of(total)} points" + (f" on {len(losses)} tasks: {said}" if len(losses) > 1 else "")
    first = next(iter(strong.values()))[0]
    plain = plain_in(first)
    if aim.times and plain is not None:
        speed = likely_speed(plain)
        answers.append(reached(speed, aim.times) if speed else Conclusion.OPEN)
        text += f", {speed.median:.2f} × in fp32" if speed else ""
    if aim.share < 1 and plain is not None:
        answers.append(Conclusion.YES if left(plain, dense(first)) <= aim.share * 1.02 else Conclusion.NO)
    return (aim.run, text, all_of(answers))


def _where(groups: Mapping[str, list[Run]]) -> list[str]:
    """Which third of the layers keeps most, on twelve layers and on six."""
    rows = []
    for name, some in groups.items():
        place, run_name = name.split("/", 1)
        record = plain_in(some[0])
        if record and structured.uneven(record) and re.match("gates|movement|group_lasso", run_name):
            shares = structured.thirds(record)
            agrees = "yes" if shares[1] == max(shares) else "no"
            rows.append(
                (
                    ENCODER_NAMES[place.split("-")[0]],
                    place.split("-")[1],
                    run_name,
                    *(f"{100 * share:.0f} %" for share in shares),
                    agrees,
                )
            )
    if not rows:
        return []
    intro = (
        "McCarley et al. saw the bottom and the top cut most and the middle least. The share of heads and neurons kept in each "
        "third here:"
    )
    head = ("encoder", "task", "run", "bottom", "middle", "top", "as the paper saw it")
    return ["## Which layers go", "", *wrapped(intro), "", *table(head, rows), ""]


ORDERS = tuple(
    (f"{what}, {task}, {ENCODER_NAMES[encoder]}", tuple(f"{encoder}-{task}/{name}" for name in names))
    for what, tasks, names in (
        ("Xu et al.: sparse beats narrow with as few encoder weights, trained alike", ("mrpc",), ("narrow-5", "sparse-ours-5")),
        ("Tahaei et al.: a stage on text helps", ("mrpc",), ("kronecker-7.7x-one-stage", "kronecker-7.7x")),
        ("Tahaei et al.: a teacher helps on text", ("mrpc",), ("kronecker-7.7x-no-kd-on-text", "kronecker-7.7x")),
        ("Tahaei et al.: a teacher helps on the task", ("mrpc",), ("kronecker-7.7x-no-kd-on-task", "kronecker-7.7x")),
        ("Prato et al.: 4 bits lose, 8 do not", ("mrpc", "sst2"), ("quantization-4", "quantization-8")),
        ("Sajjad et al.: the lowest layers are the ones to keep", ("mrpc", "sst2"), ("layers-even", "layers-bottom")),
        ("McCarley et al.: cut units rather than layers", ("mrpc", "sst2"), ("layers", "gates")),
        ("Lagunas et al.: the same", ("mrpc", "sst2"), ("layers", "movement")),
    )
    for encoder in ENCODER_NAMES
    for task in tasks
)


def with_best_layers(found: Mapping[str, Run]) -> dict[str, Run]:
    """The runs, and for each encoder and task as "layers" that way to drop layers which lost least on validation examples."""
    best: dict[str, tuple[float, Run]] = {}
    for name, run in found.items():
        place, run_name = name.split("/", 1)
        forecast = run.ours.forecast if run.ours else None
        if run_name in [f"layers-{which}" for which in DEPTHS] and forecast is not None:
            best[place] = min(best.get(place, (float("inf"), run)), (forecast.loss, run), key=lambda item: item[0])
    return {**found} | {f"{place}/layers": run for place, (_, run) in best.items()}


def draw() -> None:
    """Writes the page."""
    write(pages())


if __name__ == "__main__":
    if "--draw" not in sys.argv:  # a page is drawn without data
        more_ids()
        passages()
    sys.exit(main(jobs(), draw, sys.argv[1:]))
