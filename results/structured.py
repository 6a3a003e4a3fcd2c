"""Structured pruning side by side: the jobs behind docs/methods/structured.md, and the page itself.

    python results/structured.py --plan            # the jobs, which of them are done, how many hours
    python results/structured.py --only mrpc       # run it; stop and start it at will
    python results/structured.py --draw            # only draw the page from the rows that stand

Each method gets the same teacher, the same epochs in all and the same share of the dense multiply-accumulates at each
point; the rival is a smaller dense model (whole layers dropped evenly) trained for as long. The jobs stand in the order
of interest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

from pages import Run, bullets, interval, row_times, safe, spread, table, turns, wrapped
from sweep import Job, main
from transplant import Target, save, transplant
from work import (
    DISTIL,
    ENCODER,
    EXPORT,
    ROOT,
    SQUAD_TEACHER,
    SST2_TEACHER,
    by_task,
    claims,
    dense,
    epochs,
    folder_of,
    found_in,
    glue,
    heading,
    left,
    met,
    minutes,
    notes,
    orders,
    ours_in,
    plain_in,
    questions,
    recipe_link,
    small_squad,
    still_to_run,
    teacher,
    write,
)

from slimformer.exporters.base import Variant
from slimformer.measuring.records import Record, Standing
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.gates import Gates
from slimformer.methods.group_lasso import GroupLasso
from slimformer.methods.importance import Importance
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.layers import Layers
from slimformer.methods.movement import Movement
from slimformer.reporting.svg import draw_bars
from slimformer.reporting.words import mb_text
from slimformer.running.recipe import Bench, Recipe
from slimformer.saving import checkpoint
from slimformer.tasks.base import Task
from slimformer.training.stage import Calibrate, Stage, Train

HOME = Path(__file__).resolve().parent
TABLE = "structured"
COMMAND = "python results/structured.py"
POINTS = (0.35, 0.5, 0.25)  # shares of the dense multiply-accumulates, the middle one first
BENCH = Bench(rivals=("teacher-int8",), seconds=20.0, fused=True)


def methods(share: float, epochs: float, distil: Train, gating: float = 0.5) -> dict[str, tuple[Stage, ...]]:
    """The stages of each method at one point: `epochs` in all; `gating`: the share of them that gates get."""

    def learn(count: float, *more: Gates | Movement | GroupLasso | Distillation, like: Train = distil) -> Train:
        return replace(like, epochs=count, methods=more or (Distillation(),))

    gates = Gates(keep=share, size="top_k", apart=True, fold=False, sublayers=False)
    movement = Movement(keep=share, fill=True)
    lasso = GroupLasso(keep=share)
    return {
        "layers": (Calibrate(Layers(keep=max(1, round(6 * share)) / 6 + 1e-9)), learn(epochs)),  # of six, the nearest number
        "fisher": (Calibrate(Fisher(keep=share, cost="macs")), learn(epochs)),
        "gates": (
            replace(learn(epochs * gating, gates), freeze="everything", task_weight=1.0),
            learn(epochs * (1 - gating)),
        ),
        "movement": (learn(epochs * 3 / 4, movement, Distillation()), learn(epochs / 4)),
        "group_lasso": (learn(epochs / 2, lasso, Distillation()), learn(epochs / 2)),
    }


def ladder(share: float, distil: Train) -> dict[str, tuple[Stage, ...]]:
    """The ways to set the gates of McCarley et al., with no training afterwards: how good is the choice itself?"""
    gates = Gates(keep=share, size="top_k", apart=True, fold=False, sublayers=False)
    return {
        "random": (Calibrate(Importance(how="random", keep=share)),),
        "gain": (Calibrate(Importance(how="gain", keep=share)),),
        "l0": (replace(distil, epochs=2.0, methods=(gates,), freeze="everything", task_weight=1.0),),
        "l0-long": (replace(distil, epochs=8.0, methods=(gates,), freeze="everything", task_weight=1.0),),
        "fisher": (Calibrate(Fisher(keep=share, cost="macs")),),
    }


def heads_ladder(share: float) -> dict[str, tuple[Stage, ...]]:
    """The same for heads alone, which are few enough to leave out one at a time."""
    gates = Gates(keep=share, size="top_k", units="heads", fold=False, sublayers=False)
    ways = ("random", "gain", "leave_one_out")
    return {
        **{way: (Calibrate(Importance(how=way, keep=share, units="heads", examples=400)),) for way in ways},  # type: ignore[arg-type]
        "l0": (replace(DISTIL, epochs=1.0, methods=(gates,), freeze="everything", task_weight=1.0),),
        "l0-long": (replace(DISTIL, epochs=4.0, methods=(gates,), freeze="everything", task_weight=1.0),),
    }


def ablations(share: float, epochs: float, distil: Train, gating: float = 0.5) -> dict[str, tuple[Stage, ...]]:
    """With a teacher or without, filled or not, other granularities: one option changed at a time."""
    whole = methods(share, epochs, distil, gating)
    filled, rest = whole["movement"]
    assert isinstance(filled, Train)
    assert isinstance(rest, Train)

    def movement(**options: object) -> tuple[Stage, ...]:
        return (replace(filled, methods=(replace(Movement(keep=share, fill=True), **options), Distillation())), rest)  # type: ignore[arg-type]

    gated, healed = whole["gates"]
    assert isinstance(gated, Train)
    assert isinstance(healed, Train)
    return {
        "movement-not-filled": (movement(fill=False)[0], replace(rest, methods=(KeepZeros(), *rest.methods))),
        "movement-struct": movement(variant="struct"),
        "movement-block": movement(variant="block"),
        "movement-no-teacher": (
            replace(filled, methods=(Movement(keep=share, fill=True),), task_weight=1.0),
            replace(rest, methods=(), task_weight=1.0),
        ),
        "gates-no-teacher": (gated, replace(healed, methods=(), task_weight=1.0)),
        "gates-together": (
            replace(gated, methods=(Gates(keep=share, fold=False, sublayers=False),)),
            healed,
        ),
    }


def chain(share: float) -> dict[str, tuple[Stage, ...]]:
    """What `compress` does between the teacher and the files, and the same with one part of it switched off or in another's place."""
    cut = Fisher(keep=share, cost="macs")
    whole = Distillation(temperature=1.0, hidden=6.0, scores=6.0, relative=False)
    lesson = replace(DISTIL, methods=(whole,), lr=8e-4, task_weight=0.0, epochs=2.4, augment=4)
    slower = replace(lesson, lr=DISTIL.lr, task_weight=0.1)  # as fast as a student without attention scores can learn
    without = {
        "no-damage": replace(cut, damage_examples=0),
        "no-repair": replace(cut, repair=False),
        "no-sublayers": replace(cut, sublayers=False),
        "removal": replace(cut, order="removal"),
    }
    return {
        "whole": (Calibrate(cut), lesson),
        **{name: (Calibrate(method), lesson) for name, method in without.items()},
        "no-copies": (Calibrate(cut), replace(lesson, augment=0, epochs=12.0)),
        "no-scores": (Calibrate(cut), replace(slower, methods=(Distillation(),))),
        "logits-alone": (Calibrate(cut), replace(slower, methods=(Distillation(hidden=0.0),))),
        "no-training": (Calibrate(cut),),
        "no-training-no-repair": (Calibrate(without["no-repair"]),),
        "no-training-removal": (Calibrate(without["removal"]),),
    }


def from_pretrained(share: float, epochs: float) -> dict[str, tuple[Stage, ...]]:
    """Hybrid Filled from weights that are not tuned, with the teacher's logits alone and no weight decay, to a share of the cost."""
    learn = replace(DISTIL, methods=(Distillation(logits=0.9, hidden=0.0),), weight_decay=0.0)
    cut = replace(learn, methods=(Movement(keep=share, fill=True), *learn.methods), epochs=epochs * 3 / 4)
    return {"movement-pretrained": (cut, replace(learn, epochs=epochs / 4))}


def five_times(keep: float, epochs: float, distil: Train) -> dict[str, tuple[Stage, ...]]:
    """Li et al. at their largest ratio: whole units, or their rows inside blocks, which leave zeros; and fewer layers."""
    whole = methods(keep, epochs, distil)
    rows = GroupLasso(groups="block_rows", keep=keep)
    return {
        "layers": whole["layers"],
        "group_lasso": whole["group_lasso"],
        "group_lasso-block_rows": (
            replace(distil, epochs=epochs / 2, methods=(rows, Distillation())),
            replace(distil, epochs=epochs / 2, methods=(KeepZeros(), Distillation())),
        ),
    }


def _carried(source: str, to: Target) -> tuple[str, Callable[[], None]]:
    """The folder of a model whose weights are carried over into another family, and a function that makes it if need be."""
    folder = ROOT / "runs" / f"{Path(source).name}-{to}"

    def make() -> None:
        if not folder.is_dir():
            save(transplant(checkpoint.load_dense(ROOT / source), to).model, folder, tokenizer_from=ROOT / source)

    return f"runs/{folder.name}", make


def _job(
    task: Task,
    name: str,
    model: str,
    stages: Sequence[Stage],
    share: float,
    needs: str = "",
    before: Callable[[], None] | None = None,
    teacher: str | None = None,
    seed: int | None = None,
) -> Job:
    recipe = Recipe(model, task, tuple(stages), teacher=teacher, export=EXPORT, bench=BENCH)
    if seed is not None:  # how much of a difference is chance; its speeds are those of the first seed, so measured briefly
        recipe = replace(recipe, seed=seed, bench=replace(BENCH, seconds=4.0))
    return Job(f"{TABLE}/{name}", recipe, share, needs, before)


@cache
def jobs() -> tuple[Job, ...]:
    """All jobs of the table, in the order of interest."""
    mrpc, sst2, squad, squad2, nq = (
        glue("mrpc"),
        glue("sst2"),
        small_squad(),
        questions("v2", None),
        questions("v1", None, "nq"),
    )
    tuned_mrpc = teacher("minilm", "mrpc")
    long = replace(DISTIL, batch_size=16)
    found = [tuned_mrpc]

    def add(
        task: Task, name: str, model: str | Job, some: Mapping[str, Sequence[Stage]], share: float, seed: int | None = None
    ) -> None:
        source, needs = (model, "") if isinstance(model, str) else (folder_of(model), model.folder)
        point = f"{share * 100:.0f}" if seed is None else f"{share * 100:.0f}-seed{seed}"
        found.extend(
            _job(task, f"{name}/{what}-{point}", source, stages, share, needs, seed=seed) for what, stages in some.items()
        )

    def tuned(task: Task, name: str, model: str, before: Callable[[], None] | None, stage: Train) -> Job:
        found.append(_job(task, f"{name}/teacher", model, (stage,), 1.0, before=before))
        return found[-1]

    def only(some: Mapping[str, tuple[Stage, ...]], *names: str) -> dict[str, tuple[Stage, ...]]:
        return {name: some[name] for name in names}

    middle, mild, deep = POINTS
    add(mrpc, "mrpc", tuned_mrpc, methods(middle, 8.0, DISTIL), middle)
    add(squad, "squad1", SQUAD_TEACHER, methods(middle, 6.0, long), middle)
    add(squad, "squad1", SQUAD_TEACHER, {"gates-quarter": methods(middle, 6.0, long, 0.25)["gates"]}, middle)
    add(sst2, "sst2", SST2_TEACHER, methods(middle, 4.0, DISTIL), middle)
    add(mrpc, "mrpc-choice", tuned_mrpc, ladder(0.75, DISTIL), 0.75)
    add(mrpc, "mrpc-heads", tuned_mrpc, heads_ladder(0.85), 0.85)
    add(mrpc, "mrpc-ablations", tuned_mrpc, ablations(middle, 8.0, DISTIL), middle)
    ((name, stages),) = from_pretrained(middle, 8.0).items()
    taught = folder_of(tuned_mrpc)
    found.append(_job(mrpc, f"mrpc-ablations/{name}-35", ENCODER, stages, middle, tuned_mrpc.folder, teacher=taught))

    tune = Train(epochs=2.0, lr=1e-4, batch_size=16)
    dense_models = (
        tuned(squad2, "squad2", SQUAD_TEACHER, None, tune),
        tuned(nq, "nq", *_carried(SQUAD_TEACHER, "roberta"), tune),
    )
    for whole, name, count in zip(dense_models, ("squad2", "nq"), (6.0, 12.0), strict=True):
        gated = methods(0.48, count, long, 1 / 3)  # about twice as fast
        alone = {"gates-no-teacher": ablations(0.48, count, long, 1 / 3)["gates-no-teacher"]}
        add(whole.recipe.task, name, whole, only(gated, "gates", "layers") | alone, 0.48)
    # these tasks have few questions, so each gets more passes
    add(nq, "nq", dense_models[1], {"gates-long": methods(0.48, 30.0, long, 1 / 3)["gates"]}, 0.48)

    # The main aim: three quarters of the weights gone. The hidden states for 20,000 questions or more are too many to keep.
    both = replace(long, task_weight=0.5)  # the teacher saw its questions once: the answers teach as much as it does
    add(questions("v1", 10_000), "squad1-10k", SQUAD_TEACHER, only(methods(0.25, 6.0, both), "fisher", "movement"), 0.25)
    as_many = questions("v1", 20_000)  # as the teacher saw
    add(as_many, "squad1-20k", SQUAD_TEACHER, only(methods(0.25, 6.0, both), "fisher", "movement"), 0.25)
    answers = replace(long, epochs=1.0, lr=1e-4, methods=(), task_weight=1.0)
    cut = methods(0.25, 0.5, both)["fisher"]
    add(questions("v1", None), "squad1-all", SQUAD_TEACHER, {"fisher": (*cut, answers)}, 0.25)
    add(sst2, "sst2", SST2_TEACHER, five_times(0.2, 6.0, DISTIL), 0.2)
    add(mrpc, "mrpc", tuned_mrpc, five_times(0.2, 10.0, DISTIL), 0.2)
    families: tuple[Target, ...] = ("distilbert", "roberta")
    for to in families:
        name, share = f"mrpc-{to}", 1 / 1.79
        whole = tuned(mrpc, name, *_carried(ENCODER, to), Train(epochs=5.0, lr=8e-5))
        names: tuple[str, ...] = (
            ("group_lasso", "layers") if to == "distilbert" else ("gates", "movement", "group_lasso", "layers")
        )
        add(mrpc, name, whole, only(methods(share, 8.0, DISTIL), *names), share)
    for share in (mild, deep):
        add(mrpc, "mrpc", tuned_mrpc, methods(share, 8.0, DISTIL), share)
        names = ("fisher", "layers") if share == mild else ("fisher",)  # of six layers a quarter is two, as 35 % is
        add(squad, "squad1", SQUAD_TEACHER, only(methods(share, 6.0, long), *names), share)
    add(mrpc, "mrpc", tuned_mrpc, methods(middle, 8.0, DISTIL), middle, seed=18)
    add(mrpc, "mrpc-chain", tuned_mrpc, chain(middle), middle)
    return tuple(found)


# -- The page ------------------------------------------------------------------------------------------------------------------

HEAD = (
    "run",
    "score",
    "points lost (95 %)",
    "encoder weights left",
    "× batch 32",
    "× batch 1",
    "× fp32 file",
    "MB",
    "epochs",
    "minutes",
)
ORDERS = (  # findings of papers: the first run loses most
    (
        "McCarley et al.: random < gain < L0 gates, before any retraining",
        ("mrpc-choice/random-75", "mrpc-choice/gain-75", "mrpc-choice/l0-long-75"),
    ),
    (
        "the same for heads alone, with leave-one-out",
        ("mrpc-heads/random-85", "mrpc-heads/gain-85", "mrpc-heads/leave_one_out-85", "mrpc-heads/l0-long-85"),
    ),
    ("McCarley et al.: retraining with distillation is better", ("squad2/gates-no-teacher-48", "squad2/gates-48")),
    ("the same on Natural Questions, in RoBERTa's class", ("nq/gates-no-teacher-48", "nq/gates-48")),
    ("Lagunas et al.: a teacher helps", ("mrpc-ablations/movement-no-teacher-35", "mrpc/movement-35")),
    ("Lagunas et al.: filled is better than not filled", ("mrpc-ablations/movement-not-filled-35", "mrpc/movement-35")),
)
AIMS = (  # the run named for it, points that may be lost, times as fast in fp32, share of the encoder's weights left
    ("SQuAD v1.1, 2.4 times in the same precision, 1.0 F1, a quarter of the weights", "squad1-10k/movement-25", 1.0, 2.4, 0.25),
    ("the same by fisher, which none of the three papers has", "squad1-20k/fisher-25", 1.0, 2.4, 0.25),
    (
        "the same with the answers to nearly four times as many questions as the dense model saw",
        "squad1-all/fisher-25",
        1.0,
        2.4,
        0.25,
    ),
    ("SQuAD v2.0 part, gates with distillation, 1.9 times, 1.5 F1", "squad2/gates-48", 1.5, 1.9, 1.0),
    ("Natural Questions, gates with distillation, 1.9 times, 0.5 F1", "nq/gates-48", 0.5, 1.9, 1.0),
    ("SST-2, group_lasso, a fifth of the weights, 1.0 point", "sst2/group_lasso-20", 1.0, 0.0, 0.2),
    ("MRPC, group_lasso, a fifth of the weights, 1.0 point", "mrpc/group_lasso-20", 1.0, 0.0, 0.2),
    (
        "MRPC in DistilBERT's class, group_lasso, 1.79 times fewer weights, 1.0 point",
        "mrpc-distilbert/group_lasso-56",
        1.0,
        0.0,
        1 / 1.79,
    ),
)
CLAIMS = (  # in relative terms; the gates' speed has no batch or hardware beside it, the second one's is a GPU's at batch 128
    ("gates", "BERT-large, SQuAD 2.0: 1.95 times as fast, 1.4 F1 lost, 39 % of the encoder's weights left"),
    (
        "gates",
        "RoBERTa-large, Natural Questions, with distillation: almost twice as fast, less than 0.5 F1 of short answers lost",
    ),
    ("movement", "BERT-base, SQuAD 1.1, Hybrid Filled: 2.25 times as fast, 0.8 F1 lost, 25 % left; 2.69 times, 1.7 lost, 19 %"),
    ("group_lasso", "BERT-base, GLUE: up to 5.0 times fewer weights, no or minor loss on certain tasks; no speed given"),
    ("group_lasso", "DistilBERT, GLUE: 1.79 times fewer weights on average, with the same words"),
)
READING = (  # how to read the tables
    "Every table stands on one encoder, all-MiniLM-L6 (six layers, width 384), tuned on the task. `mrpc-roberta`, `mrpc-distilbert` "
    "and `nq` are that encoder too: its weights were carried, function for function, into the classes of RoBERTa and DistilBERT. "
    "They show that the methods work in those classes, and nothing about roberta-base or distilbert-base.",
    "No row here is a paper's own recipe: the methods share rates, losses, freezing and epochs, so that they can be compared. Rows as "
    "the papers ran them, also on twelve layers, stand in [As the papers ran them](published.md).",
    "The dense model of `mrpc` scores {dense}; that of the [numbers](numbers.md) is another draw of the same recipe. Each run is "
    "compared with the model that it learned from, and no two runs of different ones with each other.",
    "The number in the name of a run is the share of the dense encoder's multiply-accumulates that stays, in per cent.",
    "All runs of a task have the same teacher and, at each point, the same epochs. `gates-long` has more. `mrpc-choice` "
    "and `mrpc-heads` compare choices alone, before any retraining. In `mrpc-chain`, `whole` does what `compress` does, and in each "
    "other run one part of it is switched off, or has another in its place.",
    "`layers` is the baseline: whole layers dropped evenly, and the rest trained for as long. It keeps the nearest whole "
    "number of layers.",
    "Score, loss, size and speed are those of the int8 file for ONNX Runtime. **×**: times as fast as the dense teacher in "
    "fp32 in ONNX Runtime. **× fp32 file**: our fp32 file at batch 32. The aims below are judged by the fp32 files, which "
    "have the same precision as the dense model.",
    "**encoder weights left**: the numbers of the encoder's matrices that are not 0. **epochs**: those of each stage, the "
    "stage that cuts first (gates train there while the weights are frozen).",
    "Each run has one seed unless a table of seeds stands below; that table is for the fp32 files. A difference that is "
    "smaller than its interval is no finding.",
)
NOTES = (  # sentences on the rows; work.notes reads the figures from the rows
    "Gates need several hundred training steps to do better than `gain`, the mean gradient. "
    "Before any retraining `mrpc-choice/gain-75` lost "
    "{mrpc-choice/gain-75:lost} points; gates lost no less after 2 epochs of MRPC (`l0-75`: {mrpc-choice/l0-75:lost}), and "
    "hardly any after 8 (`l0-long-75`: {mrpc-choice/l0-long-75:lost}). So gates get as many epochs there as the "
    "retraining. On SQuAD a quarter of the epochs has enough steps, and the retraining makes better use of the rest: "
    "`gates-quarter-35` lost {squad1/gates-quarter-35:lost} F1, `gates-35` {squad1/gates-35:lost}. On v2.0 and Natural "
    "Questions gates get a third.",
    "With few examples the one-shot choice is hard to beat. On SQuAD with 4,000 questions and 35 %, `fisher` lost "
    "{squad1/fisher-35:lost} F1, `movement` {squad1/movement-35:lost} (three quarters of its steps go into the decision), "
    "`group_lasso` {squad1/group_lasso-35:lost} and `gates` {squad1/gates-35:lost}. The last two decide within some "
    "hundreds of steps here, and within tens of thousands in the papers.",
    "On MRPC the methods differ more, the less is left. At 50 % `gates` gained {mrpc/gates-50:gained} points, "
    "`group_lasso` {mrpc/group_lasso-50:gained} and `fisher` {mrpc/fisher-50:gained}, all within the noise of 408 "
    "examples. At 25 % `fisher` lost {mrpc/fisher-25:lost}, `gates` {mrpc/gates-25:lost}, `movement` "
    "{mrpc/movement-25:lost}, `group_lasso` {mrpc/group_lasso-25:lost}.",
    "With a fifth of the weights left as whole units, `group_lasso` lost {sst2/group_lasso-20:lost} points on SST-2 and "
    "{mrpc/group_lasso-20:lost} on MRPC. With a fifth left as rows inside blocks of 32 (distilled, with frozen embeddings), it lost "
    "{sst2/group_lasso-block_rows-20:lost} and {mrpc/group_lasso-block_rows-20:lost}, at "
    "{sst2/group_lasso-block_rows-20:faster} times the speed. One layer of six lost {sst2/layers-20:lost} and "
    "{mrpc/layers-20:lost}.",
    "MiniLM's weights in other classes, 1.79 times fewer of them: no method surely loses, three dense layers do in DistilBERT's. "
    "In RoBERTa's class `movement` gained {mrpc-roberta/movement-56:gained} points, `gates` {mrpc-roberta/gates-56:gained} and "
    "`group_lasso` {mrpc-roberta/group_lasso-56:gained}; in DistilBERT's `group_lasso` gained "
    "{mrpc-distilbert/group_lasso-56:gained}. Three of six layers lost {mrpc-roberta/layers-56:lost} and "
    "{mrpc-distilbert/layers-56:lost}.",
    "A quarter of the weights on SQuAD: with 10,000 questions `fisher` kept {squad1-10k/fisher-25:left} % of them and lost "
    "{squad1-10k/fisher-25:lost} F1 at {squad1-10k/fisher-25:faster} times the speed in fp32.",
    "10,000 questions are enough for a choice that learns: with the same questions and passes `movement` kept "
    "{squad1-10k/movement-25:left} % and lost {squad1-10k/movement-25:lost}, at {squad1-10k/movement-25:faster} times the "
    "speed.",
    "With 20,000 questions, as many as the teacher saw, `fisher` gained {squad1-20k/fisher-25:gained} F1 at "
    "{squad1-20k/fisher-25:faster} times the speed in fp32, and lost {squad1-20k/fisher-25:int8} in int8. The teacher saw "
    "its questions once; this model saw them six times and learned from the answers and the teacher in equal parts. A "
    "dense model that is tuned for as long may be better than both.",
    "`squad1-all` trains on the 76,159 questions whose answer occurs once: first on half of them from the teacher, then on "
    "each once from its answer alone. It gained {squad1-all/fisher-25:gained} F1 over a teacher that saw 20,000 of them "
    "once. That is not a fair comparison, but it is open to a user who has more answers than the model was tuned on.",
    "On v2.0 gates with distillation made a model {squad2/gates-48:faster} times as fast that lost {squad2/gates-48:lost} "
    "F1. Without a teacher in the retraining it lost {squad2/gates-no-teacher-48:lost}; three dense layers lost "
    "{squad2/layers-48:lost}. On Natural Questions, with a quarter of the questions to learn from, the three lost "
    "{nq/gates-48:lost}, {nq/gates-no-teacher-48:lost} and {nq/layers-48:lost}.",
    "With two and a half times as many passes over those few questions of Natural Questions, gates lost "
    "{nq/gates-long-48:lost}.",
    "Dropping layers evenly gives the most speed for the same operations. Two of six lost more than what cuts inside layers; with "
    "three no difference is sure. On MRPC two of "
    "six layers lost {mrpc/layers-35:lost} points at {mrpc/layers-35:faster} times the speed, three lost "
    "{mrpc/layers-50:lost} at {mrpc/layers-50:faster} times. At that last speed `fisher-35` gained "
    "{mrpc/fisher-35:gained}.",
    "`squad1/movement-35` shared its two cores with other work, so its minutes are too many by about a quarter. "
    "`squad1-10k/movement-25` had one core of a slower processor for most of its training: do not compare its minutes with "
    "others.",
)
STYLE = (
    "<style>text{font:12px sans-serif;fill:#333}.panel{font-weight:bold}.of{fill:#e4ddd3}.kept{fill:#0b6b5d}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.of{fill:#444}.kept{fill:#4db6a5}}</style>"
)


def pages() -> dict[Path, str]:
    """The page and its pictures, as the ledgers give them."""
    folder, found = ROOT / "docs" / "methods", found_in(TABLE)
    firsts = {name: run for name, run in found.items() if run.claim == run.name}
    made = {folder / "structured.md": _page(firsts, found)}
    for task, part in by_task(firsts):
        panels = _panels(part)
        if panels:
            picture = draw_bars(panels, width=760, columns=2)
            made[folder / f"structured-{task}.svg"] = picture.replace(">", f">{STYLE}", 1) + "\n"
    return made


def _page(found: dict[str, Run], with_seeds: dict[str, Run]) -> str:
    lines = [
        "# Structured pruning, side by side",
        "",
        *wrapped(
            f"Drawn from the ledgers under [`results/methods/structured/`](../../results/README.md) by `{COMMAND} --draw`. "
            "Without that option it first runs the jobs that are missing; it can be stopped and started at any time."
        ),
        "",
        *bullets((*(text.replace("{dense}", _dense_scores(found)) for text in READING), *turns(found.values()))),
        "",
    ]
    lines += still_to_run(jobs(), COMMAND)
    for task, part in by_task(found):
        lines += heading(task, part)
        rows = [_row(name, run) for name, run in part.items() if not name.endswith("/teacher")]
        lines += [*table(HEAD, [*_teachers(list(part.values())[-1]), *rows]), ""]
        lines += spread([run for name, run in with_seeds.items() if name.startswith(f"{task}/")], plain_in)
        if _panels(part):
            lines += [f"![Heads and neurons kept in each layer](structured-{task}.svg)", "", *_where(part), ""]
    lines += notes(NOTES, found)
    lines += [*_aims(found), *orders("Ablations that the papers report", ORDERS, found)]
    lines += claims(CLAIMS)
    return "\n".join(lines).rstrip() + "\n"


def _dense_scores(found: Mapping[str, Run]) -> str:
    scores = {f"{dense(run).score:.4f}" for name, run in found.items() if name.startswith("mrpc/")}
    return " or ".join(sorted(scores))


def _teachers(run: Run) -> list[tuple[str, ...]]:
    """The dense rows, from one of the runs: speeds are ratios to the first."""
    roles = (Standing.TEACHER_FP32, Standing.TEACHER_INT8)
    return [_cells(record.name, record, None) for record in run.records if record.role in roles]


def _row(name: str, run: Run) -> tuple[str, ...]:
    ours = ours_in(run, Variant.INT8_FUSED)
    assert ours is not None, f"{run.name} has no int8 row of ours"
    link = recipe_link(TABLE, name)
    passes = epochs(jobs(), f"{TABLE}/{name}")
    return _cells(link, ours, dense(run), plain_in(run), passes)


def _cells(name: str, record: Record, whole: Record | None, plain: Record | None = None, passes: str = "") -> tuple[str, ...]:
    share = 1.0 if whole is None else left(record, whole)
    return (
        name if name.startswith("[") else safe(name),
        f"{record.score:.4f}",
        interval(record),
        f"{100 * share:.0f} %",
        row_times(record, 32),
        row_times(record, 1),
        row_times(plain, 32) if plain else "",
        mb_text(record.size_bytes),
        passes,
        minutes(record),
    )


def _aims(found: dict[str, Run]) -> list[str]:
    """What the run that was named for each aim shows.

    It is met, or not, only if the 95 % interval of the loss and the spread of the speed say so; weights are counted exactly.
    """
    rows = []
    for what, name, allowed, times, share in AIMS:
        plain = plain_in(found[name]) if name in found else None
        if plain is None:
            rows.append((what, name, "not run yet", "", ""))
            continue
        faster, rest = plain.times_faster(32), left(plain, dense(found[name]))
        speed = faster.median if faster else 0.0
        verdict = met(plain, allowed, times, rest <= share * 1.02)
        rows.append((what, name, f"{speed:.2f} × in fp32, {100 * rest:.0f} % of the weights", interval(plain), verdict))
    head = ("aim", "run", "speed, size", "points lost (95 %)", "met")
    return ["## What we set out to show", "", *table(head, rows), ""]


def _cut(part: dict[str, Run]) -> dict[str, Record]:
    """The runs whose layers differ from each other, so that a picture is worth drawing."""
    ours = {name.split("/")[1]: run.ours for name, run in part.items()}
    return {name: record for name, record in ours.items() if record and uneven(record) and not name.startswith("layers")}


def _panels(part: dict[str, Run]) -> list[tuple[str, list[tuple[str, int, int]]]]:
    panels = []
    for name, record in _cut(part).items():
        panels.append((f"{name}: heads", [(layer.name, layer.heads, layer.heads_of) for layer in record.layers]))
        panels.append((f"{name}: neurons", [(layer.name, layer.neurons, layer.neurons_of) for layer in record.layers]))
    return panels


def _where(part: dict[str, Run]) -> list[str]:
    """The third of the layers that kept most, for each method; McCarley et al. found that the middle third kept most."""
    lines = [
        "McCarley et al. saw the bottom and the top cut most and the middle least. The share of weights kept in "
        "each third here:",
        "",
    ]
    rows = []
    for name, record in _cut(part).items():
        if name.startswith("random"):
            continue
        shares = thirds(record)
        agrees = "yes" if shares[1] == max(shares) else "no"
        rows.append((name, *(f"{100 * share:.0f} %" for share in shares), agrees))
    return [*lines, *table(("run", "bottom", "middle", "top", "as the paper saw it"), rows)]


def uneven(record: Record) -> bool:
    """Whether some layers keep more than others: zeros inside matrices take no unit."""
    return len({(layer.heads, layer.neurons) for layer in record.layers}) > 1


def thirds(record: Record) -> tuple[float, float, float]:
    """The share of the weights that the bottom, the middle and the top third of the layers keep; a neuron counts twice a head's share."""
    layers = record.layers
    third = max(1, len(layers) // 3)
    shares = [
        fmean((layer.heads / layer.heads_of + 2 * layer.neurons / layer.neurons_of) / 3 for layer in some)
        for some in (layers[:third], layers[third:-third], layers[-third:])
    ]
    return shares[0], shares[1], shares[2]


def draw() -> None:
    """Writes the page and its pictures."""
    write(pages())


if __name__ == "__main__":
    sys.exit(main(jobs(), draw, sys.argv[1:]))
