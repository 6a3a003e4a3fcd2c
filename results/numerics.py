"""Fewer non-zeros, fewer bits, fewer independent numbers: the jobs behind docs/methods/numbers.md, and the page itself.

    python results/numerics.py --plan            # the jobs, which of them are done, how many hours
    python results/numerics.py --only sst2/      # run it; stop and start it at will
    python results/numerics.py --draw            # only draw the page from the rows that stand

Sparse students start from the encoder as it was pre-trained and learn from the tuned teacher; Kronecker and quantized
ones start from the teacher, the former with sentences of SQuAD's contexts as their text without labels. On SQuAD
attention scores are no part of the loss. The rivals at equal encoder weights are a smaller dense model (whole layers
dropped evenly) and a narrower one (heads and neurons cut), trained for as long on the same rows. The jobs stand in the
order of interest.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import hypot
from pathlib import Path
from statistics import fmean

from pages import Run, bullets, interval, row_times, safe, table, turns, wrapped
from sweep import Job, main
from work import (
    DATA,
    DISTIL,
    ENCODER,
    EXPORT,
    MORE_IDS,
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
    questions,
    recipe_link,
    small_squad,
    still_to_run,
    teacher,
    write,
)

from slimformer.exporters.base import Variant
from slimformer.files import write_text
from slimformer.measuring.records import Interval, Record, Standing
from slimformer.methods.base import Method
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.methods.kronecker import KroneckerFactors
from slimformer.methods.layers import Layers
from slimformer.methods.quantization import Quantization
from slimformer.reporting.verdicts import Conclusion, within
from slimformer.reporting.words import interval_text, mb_text, signed
from slimformer.running.recipe import Bench, Export, Recipe
from slimformer.tasks.base import Split, Task
from slimformer.training.stage import Calibrate, Stage, Train

HOME = Path(__file__).resolve().parent
TABLE = "numbers"
COMMAND = "python results/numerics.py"
ENGINES = HOME / "methods" / TABLE / "engines.json"
ENGINES_COMMAND = "python benchmarks/sparse.py --out results/methods/numbers/engines.json"
BENCH = Bench(rivals=("teacher-int8", "openvino-int8"), seconds=20.0, openvino=True)
BRIEF = Bench(rivals=(), seconds=5.0)  # for rows whose speed is known, or is not their subject
FIVE = ("mrpc", "rte", "cola", "stsb", "sst2")
STRONG = ("mrpc", "cola", "stsb", "sst2")  # RTE's dense model is hardly better than chance: it counts in no mean
AUGMENT = {"sst2": 0, "squad1": 0}  # copies of each row; the small sets get COPIES
COPIES = 4
TEXT, SENTENCES = "runs/sweep/sentences.txt", 50_000

PASSES = 10.0  # over the rows of a small set, copies counted; half of that if a set is large

PAPER_LOSS = Distillation(temperature=1.0, hidden=6.0, scores=6.0, embedding=1.0, relative=False)  # Xu et al., Tahaei et al.
NO_SCORES = replace(PAPER_LOSS, scores=0.0)
OURS_LR = 1.6e-3
LEARN = Train(methods=(PAPER_LOSS,), lr=1.6e-4, task_weight=0.0, dropout=False)
FOLLOW = replace(LEARN, lr=8e-4, freeze="embeddings")  # wins back most after a cut: decision 0009


def distilled(task: str, *more: Method, like: Train = LEARN) -> Train:
    """A stage of distillation with other methods, as long for every method of a task."""
    copies = AUGMENT.get(task, COPIES)
    epochs = PASSES / (1 + copies) if copies else PASSES / 2
    size = 16 if task == "squad1" else 32
    weight = 0.0 if copies else like.task_weight  # a copy may mean something else than its label says
    taught = like.methods
    if task == "squad1":  # the scores of windows of 256 tokens fit no cache: computing them takes as long as all the rest
        taught = tuple(replace(method, scores=0.0) if isinstance(method, Distillation) else method for method in taught)
    return replace(like, methods=(*more, *taught), epochs=epochs, augment=copies, batch_size=size, task_weight=weight)


def sparse(task: str, density: float) -> dict[str, tuple[Stage, ...]]:
    """Xu et al. at one density, all of it: start, loss, rate."""
    return {f"sparse-{density * 100:.0f}": (distilled(task, KnowledgeSparse(keep=density)),)}


def sparse_ours(task: str, density: float) -> dict[str, tuple[Stage, ...]]:
    """The same, as it suits few passes: from the tuned weights and at a higher rate."""
    lr = OURS_LR / 2 if task == "squad1" else OURS_LR  # its batches are half as large
    stage = distilled(task, KnowledgeSparse(keep=density), like=replace(LEARN, lr=lr))
    return {f"sparse-ours-{density * 100:.0f}": (stage,)}


def sparse_relative(task: str, density: float) -> dict[str, tuple[Stage, ...]]:
    """The same with another loss and its best rate: outputs and relative hidden states, no attention scores."""
    learn = replace(LEARN, methods=(Distillation(),), lr=4e-4)
    return {f"sparse-relative-{density * 100:.0f}": (distilled(task, KnowledgeSparse(keep=density), like=learn),)}


def patterns(task: str) -> dict[str, tuple[Stage, ...]]:
    """The patterns of hardware: groups of four inputs, and N of M."""
    quads = KnowledgeSparse(keep=0.2, pattern="1x4")
    return {
        "sparse-1x4-20": (distilled(task, quads),),
        "sparse-2of4-50": (distilled(task, KnowledgeSparse(pattern="2:4")),),
        "sparse-1x4-20-quantization": (distilled(task, quads), to_integers(8, KeepZeros())),
    }


def sparse_ablations(density: float) -> dict[str, tuple[Stage, ...]]:
    """One choice of Xu et al. changed at a time, on MRPC; the student from tuned weights differs in its model, not its stages."""
    plain = distilled("mrpc", KnowledgeSparse(keep=density))
    rows_only = replace(plain, augment=0, epochs=PASSES)
    labels = replace(rows_only, methods=(KnowledgeSparse(keep=density),), task_weight=1.0)
    once = KnowledgeSparse(keep=density, updates=1, cooldown=0.99)
    return {
        "sparse-from-tuned": (plain,),
        "sparse-no-copies": (rows_only,),
        "sparse-no-distillation": (labels,),
        "sparse-one-shot": (distilled("mrpc", once),),
        "sparse-global": (distilled("mrpc", KnowledgeSparse(keep=density, scope="model")),),
        "sparse-fisher": (distilled("mrpc", KnowledgeSparse(keep=density, score="fisher")),),
    }


def small_and_dense(task: str, density: float) -> dict[str, tuple[Stage, ...]]:
    """The other ways to as few encoder weights: fewer layers (one at least), narrower ones."""
    learn = distilled(task, like=FOLLOW)
    layers = max(1, round(6 * density))
    return {
        f"layers-{100 * layers / 6:.0f}": (Calibrate(Layers(keep=layers / 6 + 1e-9)), learn),
        f"fisher-{density * 100:.0f}": (Calibrate(Fisher(keep=density, cost="macs")), learn),
    }


def to_integers(bits: int, *more: Method) -> Train:
    """A last stage with fake quantization, after Prato et al., with the float model as teacher."""
    tables = max(bits, 6)  # rows of a table have few values each
    fake = Quantization(weights=bits, activations=max(bits, 6), embeddings=tables)
    return replace(DISTIL, methods=(*more, fake, Distillation()), lr=4e-5, epochs=2.0)


def quantized(*widths: int) -> dict[str, tuple[Stage, ...]]:
    """Training with fake quantization at so many bits; 4 bits of weights come with 6 of activations."""
    return {f"quantization-{bits}": (to_integers(bits),) for bits in widths}


def factored(task: str, shapes: str, *, two_stages: bool = True) -> dict[str, tuple[Stage, ...]]:
    """Tahaei et al.: factors, a stage on text without labels, a stage on the task; or the last alone, half as long again."""
    named = KroneckerFactors(shapes=shapes) if shapes in ("7.7x", "21x") else None  # type: ignore[arg-type]
    start = Calibrate(named or KroneckerFactors(keep=1 / float(shapes[:-1])))
    on_text = replace(LEARN, text=TEXT, epochs=1.0, lr=1e-3, methods=(replace(PAPER_LOSS, logits=0.0),))
    on_task = distilled(task, like=replace(LEARN, lr=2e-4, task_weight=0.1))
    if not two_stages:
        return {f"kronecker-{shapes}-one-stage": (start, replace(on_task, epochs=1.5 * on_task.epochs))}
    return {f"kronecker-{shapes}": (start, on_text, on_task)}


def contexts() -> list[list[str]]:
    """The sentences of each of SQuAD's contexts, in order."""
    articles = json.loads((ROOT / DATA / "squad" / "train-v1.1.json").read_text(encoding="utf-8"))["data"]
    texts = [" ".join(part["context"].split()) for article in articles for part in article["paragraphs"]]
    return [re.split(r"(?<=[.!?]) (?=[A-Z])", text) for text in texts]


def sentences() -> None:
    """Writes the text without labels, if it does not exist: sentences of SQuAD's contexts, drawn over all of them."""
    if (ROOT / TEXT).is_file():
        return
    found = [line for context in contexts() for line in context if len(line) > 20]
    write_text(ROOT / TEXT, "".join(f"{line}\n" for line in found[:: max(1, len(found) // SENTENCES)][:SENTENCES]))


def more_ids() -> None:
    """Writes which questions `squad1-20k` learns from, as many as the teacher saw; it is scored on those of the small split."""
    if (ROOT / MORE_IDS).is_file():
        return
    drawn, few = questions("v1", 20_000), small_squad()
    train = [example.id for split in (Split.TRAIN, Split.VALIDATION) for example in drawn.split(split)]
    write_text(ROOT / MORE_IDS, json.dumps({"train": train, "dev": [example.id for example in few.split(Split.DEV)]}))


def together(task: str) -> dict[str, tuple[Stage, ...]]:
    """Combinations: prune and quantize; the word table in factors besides, which is half of a small model.

    The table as one product, as in the paper, or as a sum of so many that each word has as many numbers of its own: 48
    here, and 72 if the layers leave room for them. Most words of a table are in no row of a small task: `text` learns
    from sentences before. SQuAD's rows came after decision 0009 and learn plain hidden states at a higher rate.
    """
    learn = distilled(task, like=DISTIL)
    taught, rate = Distillation(embedding=1.0), learn.lr
    if task == "squad1":
        taught, rate = NO_SCORES, 5e-4  # its batches are half as large as those of 0009
    open_table = replace(learn, freeze="nothing", lr=rate, methods=(taught,))
    on_text = replace(open_table, text=TEXT, epochs=1.0, lr=5e-4, task_weight=0.0, methods=(replace(taught, logits=0.0),))

    def small(keep: float, table: KroneckerFactors, *before: Train) -> tuple[Stage, ...]:
        return (Calibrate(Fisher(keep=keep, cost="macs")), Calibrate(table), *before, open_table, to_integers(8))

    def of_sums(terms: int) -> KroneckerFactors:
        return KroneckerFactors(keep=1.0, embedding=384, embedding_terms=terms)

    more = {
        "fisher-35-quantization": (Calibrate(Fisher(keep=0.35, cost="macs")), learn, to_integers(8)),
        "fisher-35-table-quantization": small(0.35, KroneckerFactors(keep=1.0, embedding=8)),
        "fisher-35-table-sum-quantization": small(0.35, of_sums(48)),
        "fisher-25-table-text-quantization": small(0.25, of_sums(72), on_text),
    }
    return {
        "fisher-35-table-text-quantization": small(0.35, of_sums(48), on_text),
        **(more if task == "sst2" else {}),
    }


def goes_on() -> dict[str, tuple[Stage, ...]]:
    """SQuAD's combination once more, over other questions: quantized from the first step, as it comes."""
    last = to_integers(8)
    methods = tuple(NO_SCORES if isinstance(each, Distillation) else each for each in last.methods)
    again = replace(last, methods=methods, lr=4e-4, epochs=1.0, batch_size=16, freeze="nothing")
    return {"fisher-35-table-text-more-quantization": (again,)}


@cache
def jobs() -> tuple[Job, ...]:
    """All of the table."""
    tuned = {task: teacher("minilm", task) for task in FIVE if task not in ("mrpc", "sst2")}
    tuned["mrpc"] = teacher("minilm", "mrpc")
    tasks: dict[str, Task] = {**{task: glue(task) for task in FIVE}, "squad1": small_squad()}
    found: list[Job] = list(tuned.values())

    def add(
        task: str,
        some: Mapping[str, tuple[Stage, ...]],
        share: float = 1.0,
        *,
        student: bool = False,
        after: Job | None = None,
        export: Export = EXPORT,
        bench: Bench = BENCH,
    ) -> None:
        needs = after.folder if after else tuned[task].folder if task in tuned else ""
        taught = folder_of(tuned[task]) if task in tuned else SST2_TEACHER if task == "sst2" else SQUAD_TEACHER
        for name, stages in some.items():
            source, other = (ENCODER, taught) if student and "from-tuned" not in name else (taught, None)
            if after:
                source, other = folder_of(after), taught
            recipe = Recipe(source, tasks[task], stages, teacher=other, export=export, bench=bench)
            before = sentences if any(isinstance(stage, Train) and stage.text == TEXT for stage in stages) else None
            found.append(Job(f"{TABLE}/{task}/{name}", recipe, share, needs, before))

    for task in ("sst2", "mrpc"):
        for way in ("least_squares", "min_max", "percentile", "entropy"):
            export = replace(EXPORT, calibration=way)  # type: ignore[arg-type]
            add(task, {f"static-{way}": ()}, export=export, bench=BENCH if task == "sst2" or way == "least_squares" else BRIEF)
    add("mrpc", quantized(8))
    add("mrpc", quantized(6, 4), bench=BRIEF)  # the same files as with 8 bits, for speed
    for task in ("sst2", "rte", "cola", "stsb", "squad1"):
        add(task, quantized(8), bench=BRIEF if task in ("cola", "stsb", "squad1") else BENCH)
    searched = Export(choose_within=0.3, floats="auto", openvino=True)
    add("sst2", {"static-auto": ()}, export=searched)
    add("mrpc", factored("mrpc", "7.7x"))
    for density in (0.2, 0.1, 0.05):
        add("mrpc", sparse("mrpc", density), student=True, bench=BRIEF)
    add("sst2", together("sst2"), 0.35)
    add("mrpc", factored("mrpc", "21x") | factored("mrpc", "7.7x", two_stages=False))
    add("mrpc", factored("mrpc", "3x"), bench=BRIEF)
    factors = next(job for job in found if job.folder == f"{TABLE}/mrpc/kronecker-7.7x")
    add("mrpc", {"kronecker-7.7x-quantization": (to_integers(8),)}, after=factors, bench=BRIEF)
    bytes_only = replace(EXPORT, values="int8")  # exact after fake quantization
    for name, stages in patterns("sst2").items():
        integers = "quantization" in name
        add("sst2", {name: stages}, student=True, export=bytes_only if integers else EXPORT, bench=BENCH if integers else BRIEF)
    for density in (0.2, 0.1, 0.05):
        for task in FIVE:
            add(task, sparse_ours(task, density), bench=BRIEF)
        for task in ("mrpc", "sst2"):
            add(task, sparse_relative(task, density), bench=BRIEF)
    for task in ("sst2", "cola", "stsb", "rte"):
        add(task, factored(task, "7.7x"), bench=BENCH if task == "sst2" else BRIEF)
    add("mrpc", sparse_ablations(0.1), student=True, bench=BRIEF)  # at 0.05 all is lost in so few passes, whatever the choice
    for density in (0.2, 0.1, 0.05):
        add("mrpc", small_and_dense("mrpc", density), density, bench=BRIEF)
    add("squad1", factored("squad1", "7.7x"))
    add("squad1", sparse("squad1", 0.1), student=True, bench=BRIEF)
    add("squad1", sparse_ours("squad1", 0.1), bench=BRIEF)
    add("squad1", together("squad1"), 0.35)
    add("squad1", factored("squad1", "21x"), bench=BRIEF)
    small = next(job for job in found if job.folder == f"{TABLE}/squad1/fisher-35-table-text-quantization")
    tasks["squad1-20k"] = questions("v1", MORE_IDS)
    add("squad1-20k", goes_on(), 0.35, after=small, bench=BRIEF)  # as fast as the model it goes on from
    unique = {job.folder: job for job in found}  # one dense layer is the nearest to several densities
    return tuple(unique.values())


# -- The page ------------------------------------------------------------------------------------------------------------------

HEAD = (
    "run",
    "score",
    "points lost (95 %)",
    "encoder weights",
    "all weights",
    "file MB",
    "stored MB",
    "× batch 32",
    "× batch 1",
    "× OpenVINO",
    "epochs",
    "minutes",
)
ORDERS = (  # findings of papers: the first run loses most
    (
        "Xu et al.: a student from pre-trained weights beats one from tuned weights",
        ("mrpc/sparse-from-tuned", "mrpc/sparse-10"),
    ),
    ("Xu et al.: distillation helps (no copies of rows in either)", ("mrpc/sparse-no-distillation", "mrpc/sparse-no-copies")),
    ("Xu et al.: copies of rows with other words help", ("mrpc/sparse-no-copies", "mrpc/sparse-10")),
    ("Xu et al.: pruning step by step beats one shot", ("mrpc/sparse-one-shot", "mrpc/sparse-10")),
    ("Kurtic et al.: second-order scores beat magnitudes", ("mrpc/sparse-10", "mrpc/sparse-fisher")),
    ("Tahaei et al.: a stage on text before the task helps", ("mrpc/kronecker-7.7x-one-stage", "mrpc/kronecker-7.7x")),
    (
        "matrices alone on integers: 4 bits lose, 8 do not",
        ("mrpc/quantization-4", "mrpc/quantization-6", "mrpc/quantization-8"),
    ),
)
CLAIMS = (
    ("knowledge_sparse", "BERT-base, four GLUE tasks: 20 times fewer encoder weights, 1.4 points lost on average"),
    ("quantization", "Transformer base, WMT14: 8 bits everywhere, no BLEU lost; 4 bits collapse"),
    ("kronecker", "BERT-base, GLUE without CoLA: 7.7 times smaller, 0.5 points lost; SQuAD v1.1: 1.7 F1 lost, at 21 times 7.5"),
)

READING = (  # how to read the tables
    "Every table stands on one encoder, all-MiniLM-L6 (six layers, width 384), tuned on the task. Rows as the papers ran them, also on "
    "twelve layers, stand in [As the papers ran them](published.md).",
    "The dense model of MRPC here is another draw of the same recipe than that of the [structured](structured.md) tables. Each run is "
    "compared with the model that it learned from, and no two runs of different ones with each other.",
    "**encoder weights**: how many numbers in the encoder's matrices are not 0, and how many times fewer these are than in "
    "the dense teacher. **all weights**: the same ratio for the whole model, embeddings included.",
    "**file MB**: the ONNX file of the whole model that was chosen on validation examples. **stored MB**: "
    "`model.safetensors`, without its zeros.",
    "**×**: times as fast as the dense teacher in fp32 in ONNX Runtime. **× OpenVINO**: our static int8 file in OpenVINO "
    "at batch 32, over the same baseline. ONNX Runtime computes zeros like other numbers.",
    "If a run is named after a way to integers, its row shows the int8 file for ONNX Runtime, chosen or not. "
    "Only matrices, their inputs and the word table are on integers; queries, keys, values, softmax and norms stay in float. "
    "`quantization-6` and `-4` have weights of 6 and 4 bits, and activations and tables of 6; the files store them all in "
    "bytes.",
    "`sparse-20`, `-10` and `-5` have the start, loss and schedule of Xu et al., with fewer copies and passes and a rate that falls; "
    "`sparse-<word>` is `sparse-10` with that one setting changed. "
    "`sparse-ours-` starts from the tuned weights and has a higher rate. `sparse-relative-` does so too, and learns only "
    "outputs and relative hidden states.",
    "`7.7x` and `21x` are shapes that were published for BERT-base; they save less in the smaller model here. The stages are ours: "
    "the tuned model teaches on text too, and on the small tasks there are four copies of each row and no labels.",
    "Runs with the same teacher share its outputs, so the time to compute them is in the minutes of at most one row. "
    "`kronecker-7.7x-quantization` continues from the model that `kronecker-7.7x` left. Each run has one seed.",
)
NOTES = (  # work.notes reads the figures from the rows
    "The word table is a large part of a small model's file. With `fisher` at 35 % and int8, the table as one Kronecker "
    "product, as published, lost {sst2/fisher-35-table-quantization:int8} points; the table as a sum of products lost "
    "{sst2/fisher-35-table-sum-quantization:int8}; the same after one pass over 50,000 sentences without labels lost "
    "{sst2/fisher-35-table-text-quantization:int8}. The sentences help because most words of the table are in no row of "
    "the task.",
    "At 80 % zeros in 1x4 blocks, int8 lost {sst2/sparse-1x4-20-quantization:int8} points on SST-2. The zeros bring no "
    "speed in ONNX Runtime, which computes them like other numbers; "
    "[the kernels](../kernels.md) skip such blocks, from a layout of their own.",
    "On MRPC the 7.7x shapes lost {mrpc/kronecker-7.7x:lost} points with {mrpc/kronecker-7.7x:left} % of the encoder's "
    "weights, and {mrpc/kronecker-7.7x:int8} in int8; in fp32 they were {mrpc/kronecker-7.7x:faster} times as fast as the "
    "dense model.",
    "On SST-2 the same shapes lost {sst2/kronecker-7.7x:lost} points, and {sst2/kronecker-7.7x:int8} in int8, in a whole "
    "file of {sst2/kronecker-7.7x:mb} MB.",
    "Small factors need the stage on text. Without it, and with half as many passes more over the rows of the task, the "
    "7.7x shapes lost {mrpc/kronecker-7.7x-one-stage:lost} points on MRPC. The 21x shapes, with it, lost "
    "{mrpc/kronecker-21x:lost} with {mrpc/kronecker-21x:left} % of the encoder's weights.",
    "On SQuAD, with 3,800 questions to learn from, the 7.7x shapes lost {squad1/kronecker-7.7x:lost} F1 and the 21x shapes "
    "{squad1/kronecker-21x:lost}.",
    "A model with a tenth of the encoder's weights, made much as Xu et al. do but without attention scores in the loss, lost "
    "{squad1/sparse-10:lost} F1 on SQuAD in five passes; from the tuned weights at a higher rate it lost "
    "{squad1/sparse-ours-10:lost}.",
    "The file below 6 MB for SQuAD lost {squad1/fisher-35-table-text-quantization:int8} F1 in int8. After one more pass, "
    "over 20,000 questions (as many as the teacher saw), it lost {squad1-20k/fisher-35-table-text-more-quantization:int8}.",
    "A model with a twentieth of the encoder's weights, made much as Xu et al. do, lost {mrpc/sparse-5:lost} points on MRPC in "
    "ten passes: it was no better than one answer to all questions. From the tuned weights at a higher rate it lost "
    "{mrpc/sparse-ours-5:lost}.",
    "Attention scores and plain hidden states are worth their time. With outputs and relative hidden states alone, at a "
    "rate that suits them, a model with a twentieth of the weights lost {mrpc/sparse-relative-5:lost} points on MRPC and "
    "{sst2/sparse-relative-5:lost} on SST-2, while `sparse-ours-` lost {mrpc/sparse-ours-5:lost} and "
    "{sst2/sparse-ours-5:lost}.",
    "Sparse or narrow? With a tenth of the weights the sparse ones lost {mrpc/sparse-ours-10:lost} points on MRPC and narrow ones "
    "{mrpc/fisher-10:lost}; with a twentieth {mrpc/sparse-ours-5:lost} and {mrpc/fisher-5:lost}. The two differ in rate, loss and "
    "frozen embeddings besides, so nothing follows about which is better. The narrow ones are {mrpc/fisher-10:faster} and "
    "{mrpc/fisher-5:faster} times as fast as the dense model in fp32, the sparse ones are no faster at all: if you have no kernel that "
    "skips zeros, cut units.",
    "RTE's dense model is hardly better than chance: the encoder was pre-trained to compare sentences that it reads one by "
    "one, and 2,290 rows do not teach it to read two at once. The {rte/sparse-ours-5:int8} points that a file with a "
    "twentieth of the weights lost there in int8 therefore say little.",
    "`mrpc/sparse-20`, `mrpc/sparse-10` and `mrpc/kronecker-7.7x` trained beside another run, on one core each: do not "
    "compare their minutes with those of other runs.",
)


def pages() -> dict[Path, str]:
    """The page, as the ledgers give it."""
    return {ROOT / "docs" / "methods" / "numbers.md": _page(found_in(TABLE))}


def _page(found: dict[str, Run]) -> str:
    lines = [
        "# Fewer non-zeros, fewer bits, fewer numbers: side by side",
        "",
        *wrapped(
            f"Drawn from the ledgers under [`results/methods/numbers/`](../../results/README.md) by `{COMMAND} --draw`. "
            "Without that option it first runs the jobs that are missing; it can be stopped and started at any time."
        ),
        "",
        *bullets((*READING, *turns(found.values()))),
        "",
    ]
    lines += still_to_run(jobs(), COMMAND)
    for task, part in by_task(found):
        lines += heading(task, part)
        lines += [*table(HEAD, [*_teachers(part.values()), *(_row(name, run) for name, run in part.items())]), ""]
    lines += [
        *notes(NOTES, found),
        *_aims(found),
        *orders("What the papers found, here", ORDERS, found),
        *_engines(),
        *claims(CLAIMS),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _engines() -> list[str]:
    """The engines that gain from zeros on a CPU, as benchmarks/sparse.py measured them."""
    lines = ["## Engines that skip zeros", ""]
    if not ENGINES.is_file():
        return [*lines, f"Not measured yet: `{ENGINES_COMMAND}`.", ""]
    kept = json.loads(ENGINES.read_text(encoding="utf-8"))
    lines += [
        *wrapped(
            f"The six matrix products of one encoder layer, drawn from `{ENGINES_COMMAND}`; **×**: times as fast as PyTorch's "
            f"dense product. {safe(kept['circumstances'])}."
        ),
        "",
        *table(kept["head"], ([safe(cell) for cell in row] for row in kept["rows"])),
        "",
        _fastest(kept["rows"]),
        "",
    ]
    return lines


def _fastest(rows: Sequence[Sequence[str]]) -> str:
    """The fastest engine that skips zeros against dense int8, at the many tokens of the first columns."""
    times = [(float(row[4]), row[2], f"{row[1]} zeros, {row[0]}") for row in rows if row[4] != "-"]
    skip = max(found for found in times if re.search("CSR|BSR|1x4", found[1]))
    dense_int8 = max(found for found in times if found[1] == "ONNX Runtime int8 dense")
    fastest = f"The fastest engine that skips zeros is {skip[1]} ({skip[2]}): {skip[0]:.1f} ×."
    return f"{fastest} Dense int8 in ONNX Runtime: {dense_int8[0]:.1f} ×."


def _teachers(runs: Iterable[Run]) -> list[tuple[str, ...]]:
    """The dense rows, from the last of the runs that measured most of them: speeds are ratios to the first."""
    roles = (Standing.TEACHER_FP32, Standing.TEACHER_INT8, Standing.OPENVINO_INT8)
    found = [[record for record in run.records if record.role in roles] for run in runs]
    return [_cells(safe(record.name), record, None, None) for record in max(reversed(found), key=len)]


def _row(name: str, run: Run) -> tuple[str, ...]:
    integers = re.match("static|quantization", name.split("/")[1]) or name.endswith("-quantization")
    ours = ours_in(run, Variant.INT8_FUSED) if integers else run.ours
    assert ours is not None, f"{run.name} has no row of ours"
    link = recipe_link(TABLE, name)
    passes = epochs(jobs(), f"{TABLE}/{name}")
    return _cells(link, ours, dense(run), ours_in(run, Variant.INT8_STATIC, openvino=True), passes)


def _cells(name: str, record: Record, whole: Record | None, there: Record | None, passes: str = "") -> tuple[str, ...]:
    count = record.encoder_nonzero or record.encoder_params
    times = f" ({1 / left(record, whole):.1f} ×)" if whole is not None else ""
    all_times = ""
    if whole is not None and whole.params and record.params:
        zeros = (record.encoder_params or 0) - (record.encoder_nonzero or record.encoder_params or 0)
        all_times = f"{whole.params / (record.params - zeros):.1f} ×"
    return (
        name,
        f"{record.score:.4f}",
        interval(record),
        f"{count / 1e6:.2f} M{times}" if count else "",
        all_times,
        mb_text(record.size_bytes),
        mb_text(record.weights_bytes) if whole is not None else "",
        row_times(record, 32),
        row_times(record, 1),
        row_times(there, 32) if there else "",
        passes,
        minutes(record),
    )


# -- Aims ----------------------------------------------------------------------------------------------------------------------


def _aims(found: dict[str, Run]) -> list[str]:
    """Our aims, and whether the runs that were named for them meet them."""
    rows = [
        *(_sparse_aim(found, percent) for percent in (20, 10, 5)),
        _aim(found, "SST-2: 80 % zeros in 1x4 blocks, int8, at most 1.0 point", "sst2/sparse-1x4-20-quantization", 1.0),
        _aim(found, "SST-2: int8 at least 2 times as fast, at most 0.3 points", "sst2/quantization-8", 0.3, faster=2.0),
        _aim(
            found,
            "SST-2: an int8 file at most a quarter of the fp32 file plus 5 %",
            "sst2/static-least_squares",
            0.3,
            share=0.25 * 1.05,
        ),
        _kronecker_aim(found),
        _aim(found, "SST-2: a whole file below 6 MB within 1.0 point", "sst2/kronecker-7.7x", 1.0, megabytes=6.0),
        _aim(
            found,
            "SQuAD v1.1: a whole file below 6 MB within 1.0 F1",
            "squad1-20k/fisher-35-table-text-more-quantization",
            1.0,
            megabytes=6.0,
        ),
    ]
    return ["## What we set out to show", "", *table(("aim", "run", "there", "met"), rows), ""]


def _aim(
    found: dict[str, Run],
    what: str,
    name: str,
    allowed: float,
    *,
    faster: float = 0.0,
    megabytes: float = float("inf"),
    share: float = float("inf"),
) -> tuple[str, ...]:
    """What the int8 file of one run, for ONNX Runtime with fused operators, shows of an aim."""
    ours = ours_in(found[name], Variant.INT8_FUSED) if name in found else None
    if ours is None or ours.size_bytes is None:
        return (what, name, "not run yet", "")
    times, whole = ours.times_faster(32), dense(found[name]).size_bytes
    speed = times.median if times else 0.0
    small = ours.size_bytes <= megabytes * 1e6 and (whole is None or ours.size_bytes <= share * whole)
    return (
        what,
        name,
        f"{interval(ours)} points, {speed:.2f} ×, {mb_text(ours.size_bytes)} MB",
        met(ours, allowed, faster, small),
    )


def _sparse_aim(found: dict[str, Run], percent: int) -> tuple[str, ...]:
    """The mean over the tasks whose dense model is better than chance."""
    what, way = f"{100 // percent} × fewer encoder weights: at most 1.4 points lost on average", f"sparse-ours-{percent}"
    runs = [found[f"{task}/{way}"] for task in STRONG if f"{task}/{way}" in found]
    losses = [file.loss for run in runs if (file := ours_in(run, Variant.FLOAT)) and file.loss is not None]
    if len(losses) < len(STRONG):
        return (what, way, f"{len(losses)} of {len(STRONG)} tasks run", "")
    mean = fmean(loss.value for loss in losses)
    half = hypot(*((loss.high - loss.low) / 2 for loss in losses)) / len(losses)  # the tasks' examples are independent
    lost = Interval(mean, mean - half, mean + half)
    text = f"{signed(lost.value)} ({interval_text(lost)}) points"
    return (what, f"{way} on {', '.join(STRONG)}", text, within(lost.low, lost.high, 1.4))


def _kronecker_aim(found: dict[str, Run]) -> tuple[str, ...]:
    what = "Kronecker, the 7.7x shapes: 97 % of the teacher's metric on three of four tasks"
    shares, answers = {}, []
    for task in STRONG:
        run = found.get(f"{task}/kronecker-7.7x")
        file = ours_in(run, Variant.FLOAT) if run is not None else None
        if run is not None and file is not None:
            shares[task] = file.score / dense(run).score
            answers.append(met(file, 3.0 * dense(run).score))
    said = ", ".join(f"{task} {100 * share:.1f} %" for task, share in shares.items())
    if len(shares) < len(STRONG):
        return (what, "kronecker-7.7x", f"{len(shares)} of {len(STRONG)} tasks run: {said}", "")
    third = sorted(answers, key=[Conclusion.YES, Conclusion.OPEN, Conclusion.NO].index)[2]  # what three tasks say
    return (what, "kronecker-7.7x", said, third)


def draw() -> None:
    """Writes the page."""
    write(pages())


if __name__ == "__main__":
    if "--draw" not in sys.argv:  # a page is drawn without data
        more_ids()
    sys.exit(main(jobs(), draw, sys.argv[1:]))
