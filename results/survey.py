"""Every branch of the survey by Ganesh et al. side by side: the jobs behind docs/methods/survey.md, and the page itself.

    python results/survey.py --plan           # the jobs, which of them are done, how many hours
    python results/survey.py --only mrpc/     # run them; stop and start at will
    python results/survey.py --draw           # only draw the page from the rows that stand

One encoder, one teacher for each task, as many passes over the rows for each method, one machine: what the survey's own table lacks.
A branch has one row first on each task, and then its ablations, on SST-2 if they need no pairs or long texts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from choosing import choosing_pages
from pages import Run, bullets, row_times, table, turns, wrapped
from sweep import HOME, Job, main
from work import (
    DATA,
    DISTIL,
    EXPORT,
    ROOT,
    SQUAD_TEACHER,
    SST2_TEACHER,
    dense,
    folder_of,
    found_in,
    glue,
    interval_of,
    left,
    lost,
    minutes,
    ours_in,
    plain_in,
    series,
    small_squad,
    still_to_run,
    teacher,
    write,
)

from slimformer.exporters.base import Variant
from slimformer.measuring.records import Interval, Record, Standing
from slimformer.methods.adaptive_span import AdaptiveSpan
from slimformer.methods.codebook import CodebookWords
from slimformer.methods.decomposed_attention import DecomposedAttention
from slimformer.methods.distillation import Distillation
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.elastic import Elastic
from slimformer.methods.fisher import Fisher
from slimformer.methods.fixed_attention import FixedAttention
from slimformer.methods.gates import Gates
from slimformer.methods.hessian_bits import HessianBits
from slimformer.methods.hidden_width import HiddenWidth
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.methods.kronecker import KroneckerFactors
from slimformer.methods.layer_drop import LayerDrop
from slimformer.methods.layers import Layers
from slimformer.methods.leading import Leading
from slimformer.methods.low_rank import LowRankFactors
from slimformer.methods.movement import Movement
from slimformer.methods.outliers import Outliers
from slimformer.methods.quantization import Quantization
from slimformer.methods.reweighted_proximal import ReweightedProximal
from slimformer.methods.shared_layers import SharedLayers
from slimformer.methods.shared_projections import SharedProjections
from slimformer.methods.theseus import Theseus
from slimformer.methods.weight_squeezing import WeightSqueezing
from slimformer.methods.word_elimination import WordElimination
from slimformer.reporting.verdicts import within
from slimformer.reporting.words import mb_text
from slimformer.running.fresh import Fresh
from slimformer.running.recipe import RIVALS, Bench, Recipe
from slimformer.training.stage import Calibrate, Stage, Train, TrimVocabulary

TABLE = "survey"
COMMAND = "python results/survey.py"
BENCH = Bench(rivals=("teacher-int8",), seconds=6.0, fused=True)
BESIDE_ALL = replace(BENCH, rivals=RIVALS)  # for what may be the fastest
EVERY = ("mrpc", "sst2")
ABLATIONS = ("sst2",)
TASKS = (*EVERY, "squad")
LARGE_TABLE = "e5-mrpc"
PASSES = {"mrpc": 8.0, "sst2": 3.0, "squad": 6.0}  # over the rows, all stages together
SUMS = Distillation(temperature=1.0, hidden=6.0, scores=6.0, relative=False)  # as sparse and factored students learn best
HALF = 0.5 + 1e-9
NARROW = {"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}
BOTTLENECKS = {
    "hidden_size": 384,
    "intra_bottleneck_size": 128,
    "num_hidden_layers": 6,
    "num_feedforward_networks": 2,
    "normalization_type": "layer_norm",
}
CLAIMED = {  # points that a paper loses, on average or on the task that the claim names; rows without are no claim on quality
    "q8bert": 0.9,  # 1 % of a score near 90
    "reweighted_proximal-10": 0.0,
    "knowledge_sparse-10": 1.4,
    "fisher-50": 1.0,
    "gates-50": 1.5,
    "movement-50": 1.0,
    "layers-even": 1.8,  # 2 % of a score near 90
    "theseus": 1.8,
    "hidden_width-67": 1.9,
    "logits": 1.7,
    "attention": 0.1,
    "patient": 2.3,
    "bilstm": 3.0,
    "mobilebert": 0.6,
    "kronecker-7.7x": 2.7,  # 3 % of a score near 90
    "low_rank-40": 0.1,
    "outliers": 0.9,
    "hessian_bits": 0.6,
    "shared_layers-2": 0.6,
    "shared_projections": 12.3,
    "early_exit": 0.3,
    "early_exit-patience": 0.0,
    "word_elimination-40": 1.0,
    "word_elimination-threshold-40": 1.0,
    "fixed_attention-50": 0.0,
    "decomposed_attention-3": 0.8,
    "decomposed_attention-4": 0.8,
    "elastic-30": 1.0,
    "edgebert": 1.5,
    "trim_vocabulary": 0.0,
}
PASSAGES = "passages.json"  # what benchmarks/passages.py found, beside the rows of a model whose passages can be kept
Stages = tuple[Stage, ...]


@dataclass(frozen=True)
class Row:
    """A method's row: its branch, what the survey or the paper claims of it, and its stages for a number of passes."""

    branch: str
    name: str
    claim: str
    stages: Callable[[float], Stages]
    share: float = 1.0  # of the cost that is left after the first cut
    ablation: bool = False
    student: Fresh | None = None  # what is trained, if it is no copy of the dense model
    tasks: tuple[str, ...] = ()  # if not all, or of an ablation not the one
    bench: Bench = BENCH

    @property
    def on(self) -> tuple[str, ...]:
        """The tasks on which it is run: an ablation answers one question, for which one task is enough."""
        return self.tasks or (ABLATIONS if self.ablation else EVERY)


def learnt(passes: float, *methods: Any, **changes: Any) -> Train:
    """Distillation beside some methods, as every cut student has it."""
    return replace(DISTIL, methods=(*methods, *DISTIL.methods), epochs=passes, **changes)


def closely(passes: float, *methods: Any, **changes: Any) -> Train:
    """The same by hidden states and attention scores of all layers, at a higher rate: for students as deep as their teacher."""
    return replace(DISTIL, methods=(*methods, SUMS), epochs=passes, lr=8e-4, task_weight=0.0, **changes)


def answered(passes: float, lr: float, *methods: Any) -> Stages:
    """A student that begins by chance, or nearly, and learns from the teacher's answers."""
    return (Train(methods=(*methods, Distillation(hidden=0.0)), lr=lr, epochs=passes, task_weight=0.1, dropout=False),)


def shallow(passes: float, loss: Distillation) -> Stages:
    """Half of the layers, with one way to distil."""
    return (Calibrate(Layers(keep=HALF, which="even")), replace(DISTIL, methods=(loss,), epochs=passes))


def theseus(passes: float) -> Stages:
    """Replacing, then fine-tuning, as in the paper: without a teacher's answers."""
    return (
        Train(methods=(Theseus(keep=HALF),), lr=1.6e-4, epochs=passes * 5 / 8),
        Train(lr=8e-5, epochs=passes * 3 / 8),
    )


def proximal(passes: float) -> Stages:
    """The penalty, then the weights that are left."""
    return (
        Train(methods=(ReweightedProximal(keep=0.1),), lr=1.6e-4, epochs=passes * 3 / 4),
        Train(methods=(KeepZeros(),), lr=8e-5, epochs=passes / 4),
    )


def dropped(passes: float) -> Stages:
    """Structured dropout while it is tuned, then half of the layers without any training."""
    return (Train(methods=(LayerDrop(rate=0.5),), lr=8e-5, epochs=passes), Calibrate(Layers(keep=HALF, which="even")))


def cut_and_blocks(passes: float, copies: int = 0) -> Stages:
    """A cut of heads and neurons, then a fifth of the blocks of what is left."""
    blocks = KnowledgeSparse(keep=0.2, pattern="4x4")
    return (Calibrate(Fisher(keep=0.4, cost="macs")), closely(passes, blocks, augment=copies))


def elastic(passes: float) -> Stages:
    """All widths, then all depths too, learn from the whole model; then one of them is taken, and trained alone."""
    return (
        learnt(passes * 3 / 8, Elastic(depths=(1.0,))),
        replace(DISTIL, methods=(Elastic(sort=False), Distillation(hidden=0.0)), epochs=passes * 3 / 8),
        Calibrate(Leading(keep=0.3)),
        learnt(passes / 4),
    )


def fewer_words(passes: float, method: WordElimination) -> Stages:
    """What stays is learned, then the model learns to do without the rest."""
    return (learnt(passes * 3 / 8, method), learnt(passes * 5 / 8))


def narrow_and_blocks(passes: float) -> Stages:
    """Two thirds of the width, then a fifth of the blocks of what is left."""
    return (
        closely(passes / 2, HiddenWidth(keep_hidden=0.67), freeze="nothing"),
        closely(passes / 2, KnowledgeSparse(keep=0.2, pattern="4x4")),
    )


def apart(passes: float, layers: int) -> Stages:
    """Lower layers that keep two texts apart, with the paper's two losses."""
    methods = (DecomposedAttention(layers=layers), Distillation(hidden=0.0))
    return (replace(DISTIL, methods=methods, epochs=passes),)


def edgebert(passes: float) -> Stages:
    """One set of weights for all layers, half of it zeros, spans for its heads, then exits on the model as it is."""
    return (
        closely(passes / 2, SharedLayers(), KnowledgeSparse(keep=0.5)),
        learnt(passes / 4, SharedLayers(), AdaptiveSpan(alike=True), KeepZeros()),
        Train(methods=(EarlyExit(confidence="entropy", max_loss=0.5, lr=5e-4),), epochs=passes / 4, freeze="everything"),
    )


def smallest(
    passes: float, *last: Any, copies: int = 0, after_cut: Callable[..., Train] = learnt, zeros: Sequence[Any] = ()
) -> Stages:
    """Whatever makes the int8 file smaller: the vocabulary, the width, heads and neurons, and at last the word table as codes.

    `zeros` are methods of the training behind the cut.
    """
    return (
        TrimVocabulary(),
        closely(passes * 3 / 8, HiddenWidth(keep_hidden=0.5), freeze="nothing", augment=copies),
        Calibrate(Fisher(keep=0.3, cost="macs")),
        after_cut(passes / 2, *zeros, freeze="nothing", augment=copies),
        Calibrate(CodebookWords()),
        learnt(passes / 8, *last, freeze="nothing", augment=copies),
    )


ROWS = (
    Row(
        "quantization",
        "q8bert",
        "Q8BERT: a quarter of the bytes, at most 1 % relative lost on GLUE",
        lambda passes: (Train(methods=(Quantization(),), lr=4e-5, epochs=min(2.0, passes), dropout=False),),
    ),
    Row(
        "unstructured pruning",
        "reweighted_proximal-10",
        "RPP: 59 % of the encoder's weights, nothing lost on SQuAD",
        proximal,
    ),
    Row(
        "unstructured pruning",
        "knowledge_sparse-10",
        "SparseBERT with distillation (Xu et al.): 20 × fewer weights, 1.4 points lost",
        lambda passes: (closely(passes, KnowledgeSparse(keep=0.1)),),
    ),
    *(
        Row(
            "pruning of blocks, for kernels that skip them",
            f"knowledge_sparse-{shape}-20",
            "the same with blocks of weights: zeros that are speed",
            lambda passes, shape=shape: (closely(passes, KnowledgeSparse(keep=0.2, pattern=shape)),),  # type: ignore[misc]
            ablation=shape != "4x4",
        )
        for shape in ("4x4", "1x4", "16x4")
    ),
    Row(
        "structured pruning: heads and neurons",
        "fisher-50",
        "DynaBERT with distillation: 12 % of the encoder, 8.7 × on a CPU, 1.0 points lost",
        lambda passes: (Calibrate(Fisher(keep=0.5, cost="macs")), learnt(passes)),
        0.5,
    ),
    Row(
        "structured pruning: heads and neurons",
        "gates-50",
        "McCarley et al.: 1.9 × on a GPU, 1.5 F1 lost on SQuAD",
        lambda passes: (learnt(passes / 2, Gates(keep=0.5)), learnt(passes / 2)),
        0.5,
    ),
    Row(
        "structured pruning: heads and neurons",
        "movement-50",
        "Lagunas et al.: 2.4 × on a GPU, 1.0 F1 lost on SQuAD",
        lambda passes: (learnt(passes * 3 / 4, Movement(keep=0.5)), learnt(passes / 4)),
        0.5,
    ),
    Row(
        "structured pruning: layers",
        "layers-even",
        "Sajjad et al.: half of the layers, up to 2 % of the score lost",
        lambda passes: (Calibrate(Layers(keep=HALF, which="even")), learnt(passes)),
        0.5,
    ),
    Row("structured pruning: layers", "theseus", "BERT-of-Theseus: half of the layers, 98 % of the score", theseus, 0.5),
    Row("structured pruning: layers", "layer_drop", "LayerDrop: any depth from one training", dropped),
    Row(
        "structured pruning: width",
        "hidden_width-67",
        "schuBERT: 39 % of the parameters, 2.8 × on a CPU, 1.9 points lost",
        lambda passes: (closely(passes, HiddenWidth(keep_hidden=0.67), freeze="nothing"),),
        0.67,
    ),
    Row(
        "structured pruning: width",
        "hidden_width-50",
        "the same, half of the width",
        lambda passes: (closely(passes, HiddenWidth(keep_hidden=0.5), freeze="nothing"),),
        0.5,
        ablation=True,
    ),
    Row(
        "distillation",
        "logits",
        "DistilBERT: half of the layers, 1.7 × on a CPU, 1.7 points lost",
        lambda passes: shallow(passes, Distillation(hidden=0.0)),
        0.5,
    ),
    Row(
        "distillation",
        "attention",
        "MiniLM: half of the layers, 1.7 × on a CPU, 0.1 points lost",
        lambda passes: shallow(passes, Distillation(hidden=0.0, relations=1.0)),
        0.5,
    ),
    Row(
        "distillation",
        "patient",
        "PKD: half of the layers, 2.3 points lost",
        lambda passes: shallow(passes, Distillation(hidden=0.0, patient=1.0)),
        0.5,
        ablation=True,
    ),
    Row(
        "distillation",
        "many",
        "BERT-EMD: layers mapped many to many",
        lambda passes: shallow(passes, Distillation(layers="many")),
        0.5,
        ablation=True,
    ),
    *(
        Row(
            "other students",
            kind,
            claim,
            lambda passes: (Train(methods=(Distillation(hidden=0.0),), lr=1e-3, epochs=passes, task_weight=0.5),),
            student=Fresh(kind, config=sizes),
        )
        for kind, claim, sizes in (
            ("static", "model2vec: hundreds of times as fast, many points lost", {"hidden_size": 256, "head_size": 256}),
            ("bilstm", "MKD: 3 % of the encoder, 8.6 × on a CPU, 3.0 points lost", {}),
            ("cnn", "Chia et al.: as good as a BiLSTM, faster", {}),
        )
    ),
    Row(
        "other students",
        "bert-3x192",
        "Turc et al.: pre-trained small models, then distilled",
        lambda passes: answered(passes, 4e-4),
        0.1,
        ablation=True,
        student=Fresh(
            "bert", config={"num_hidden_layers": 3, "hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768}
        ),
    ),
    Row(
        "other students",
        "mobilebert",
        "MobileBERT: 4.3 × smaller, 5.5 × on a phone, 0.6 points lost, pre-trained between bottlenecks",
        lambda passes: answered(passes, 5e-4),
        0.3,
        ablation=True,
        student=Fresh("mobilebert", config=BOTTLENECKS),
    ),
    Row(
        "decomposition of matrices",
        "kronecker-7.7x",
        "KroneckerBERT: 7.7 × smaller, at least 97 % of the score",
        lambda passes: (Calibrate(KroneckerFactors(shapes="7.7x")), closely(passes)),
    ),
    Row(
        "decomposition of matrices",
        "low_rank-40",
        "Noach and Goldberg: 60 % of the parameters, 0.1 points lost",
        lambda passes: (Calibrate(LowRankFactors(keep=0.4)), learnt(passes)),
        0.4,
    ),
    Row(
        "decomposition of matrices",
        "codebook",
        "Prakash et al.: a word table of codes",
        lambda passes: (Calibrate(CodebookWords()), learnt(passes / 3, freeze="nothing")),
    ),
    Row(
        "quantization of other kinds",
        "outliers",
        "GOBO: 5.5 % of the encoder's bytes, 0.9 points lost, nothing trained",
        lambda _: (Calibrate(Outliers(entries=16)),),
    ),
    Row(
        "quantization of other kinds",
        "hessian_bits",
        "Q-BERT: 12.5 % of the encoder's bytes, 0.6 points lost",
        lambda passes: (Calibrate(HessianBits(bits=3.2)), learnt(passes / 3)),
    ),
    Row(
        "sharing",
        "shared_layers-2",
        "ALBERT: a ninth of the parameters, 1.2 × on a CPU, 0.6 points lost",
        lambda passes: (closely(passes, SharedLayers(distinct=2)),),
    ),
    Row(
        "sharing",
        "weight_squeezing-50",
        "weight squeezing: better than distillation alone at small sizes",
        lambda passes: (Calibrate(Fisher(keep=0.5, cost="macs")), learnt(passes, WeightSqueezing())),
        0.5,
    ),
    *(
        Row(
            "sharing",
            f"shared_projections{name}",
            claim,
            lambda passes, methods=methods: answered(passes, 1e-3, *methods),  # type: ignore[misc]
            0.1,
            ablation=bool(name),
            student=Fresh("bert", vocabulary=5000, config=NARROW),
        )
        for name, claim, methods in (
            (
                "",
                "Zhao et al.: 1.6 % of the parameters with embeddings, 22.7 × on a CPU, 12.3 points lost",
                (SharedProjections(),),
            ),
            ("-single", "the same without dual training", (SharedProjections(dual=0.0),)),
            ("-none", "the same student from the teacher's answers alone", ()),
        )
    ),
    Row(
        "dynamic inference",
        "early_exit",
        "DeeBERT: 1.3 × on a CPU, 0.3 points lost",
        lambda passes: (
            Train(methods=(EarlyExit(confidence="entropy", max_loss=0.5, lr=5e-4),), lr=4e-5, epochs=min(3.0, passes)),
        ),
    ),
    Row(
        "dynamic inference",
        "early_exit-patience",
        "PABEE: 1.6 × on a GPU, better than the whole model",
        lambda passes: (
            Train(methods=(EarlyExit(confidence="patience", max_loss=0.5, lr=5e-4),), lr=4e-5, epochs=min(3.0, passes)),
        ),
        ablation=True,
    ),
    *(
        Row(
            "dynamic inference",
            name,
            claim,
            lambda passes, options=options: (  # type: ignore[misc]
                Train(
                    methods=(EarlyExit(**{"max_loss": 0.5, "lr": 5e-4, "layers": (2, 3, 4), **options}),),
                    lr=4e-5,
                    epochs=min(3.0, passes),
                ),
            ),
            ablation=True,
        )
        for name, claim, options in (
            ("early_exit-three", "the same with exits behind three layers alone, each of one matrix", {"head": "linear"}),
            ("early_exit-three-poolers", "the same with poolers, and a threshold for each exit", {"thresholds": "each"}),
            ("early_exit-three-strict", "that, with half of the loss allowed", {"thresholds": "each", "max_loss": 0.25}),
        )
    ),
    Row(
        "dynamic inference",
        "word_elimination-40",
        "PoWER-BERT: 2.4 × on a GPU with SST-2, up to 4.5 × elsewhere, 1 point lost",
        lambda passes: fewer_words(passes, WordElimination(keep=0.4)),
        0.7,
    ),
    Row(
        "dynamic inference",
        "word_elimination-threshold-40",
        "Learned Token Pruning: 2.1 × fewer operations, 1 point lost",
        lambda passes: fewer_words(passes, WordElimination(keep=0.4, by="threshold")),
        0.7,
        ablation=True,
        tasks=("mrpc",),
    ),
    *(
        Row(
            "attention",
            f"decomposed_attention-{layers}",
            "DeFormer: 3.1 × on a GPU with kept passages, 0.8 F1 lost on SQuAD",
            lambda passes, layers=layers: apart(passes, layers),  # type: ignore[misc]
            ablation=layers != 3,
            tasks=("squad", "mrpc") if layers == 3 else ("squad",),
        )
        for layers in (3, 4)
    ),
    Row(
        "attention",
        "fixed_attention-50",
        "Raganato et al.: one learned head in each layer of a translation model's encoder, nothing lost",
        lambda passes: (Calibrate(FixedAttention(learned=0.5)), learnt(passes)),
    ),
    Row(
        "compound",
        "edgebert",
        "EdgeBERT: 1.3 % of the size, 1.8 × on a GPU, 1.5 points lost",
        edgebert,
    ),
    Row(
        "compound",
        "elastic-30",
        "DynaBERT: 12 % of the encoder, 8.7 × on a CPU, 1.0 points lost, any size from one training",
        elastic,
    ),
    Row(
        "compound",
        "fisher-40-blocks-20",
        "for the kernels: heads and neurons cut, then blocks of zeros, int8",
        cut_and_blocks,
        0.4,
    ),
    Row(
        "compound",
        "fisher-40-blocks-20-copies",
        "the same, with twice the training: on copies of the rows too, words replaced",
        lambda passes: cut_and_blocks(passes * 2 / 3, copies=2),
        0.4,
        ablation=True,
        tasks=EVERY,
        bench=BESIDE_ALL,
    ),
    Row(
        "compound",
        "width-67-blocks-20",
        "for the kernels: a narrower model, then blocks of zeros, int8",
        narrow_and_blocks,
        0.67,
        bench=BESIDE_ALL,
    ),
    Row(
        "compound",
        "smallest-longer",
        "the same as `smallest`, with twice the passes",
        lambda passes: smallest(2 * passes),
        0.3,
        ablation=True,
    ),
    Row(
        "compound",
        "smallest-copies",
        "the same as `smallest`, with twice the training: on copies of the rows too, words replaced, and last in int8",
        lambda passes: smallest(passes * 2 / 3, Quantization(), copies=2),
        0.3,
        ablation=True,
        tasks=("mrpc",),
        bench=BESIDE_ALL,
    ),
    Row(
        "compound",
        "smallest-closely",
        "the same as `smallest`, at the rate and with the losses of hidden states and scores behind the cut too",
        lambda passes: smallest(passes, after_cut=closely),
        0.3,
        ablation=True,
        bench=BESIDE_ALL,
    ),
    Row(
        "compound",
        "smallest-longer-int8",
        "the same as `smallest`, with twice the passes, the last of them in int8",
        lambda passes: smallest(2 * passes, Quantization()),
        0.3,
        ablation=True,
        tasks=EVERY,
        bench=BESIDE_ALL,
    ),
    Row(
        "compound",
        "smallest-longer-blocks-50",
        "the same as `smallest-longer-int8`, half of the blocks of what is left zero, for the kernels",
        lambda passes: smallest(2 * passes, Quantization(), KeepZeros(), zeros=(KnowledgeSparse(keep=0.5, pattern="4x4"),)),
        0.3,
        ablation=True,
        tasks=EVERY,
        bench=BESIDE_ALL,
    ),
    Row(
        "compound",
        "smallest",
        "the bytes of every part: words that are needed, their table as codes, half of the width, fewer neurons",
        smallest,
        0.3,
    ),
    Row(
        "vocabulary",
        "trim_vocabulary",
        "Ushio et al.: a vocabulary of one language, nothing lost",
        lambda _: (TrimVocabulary(),),
    ),
)


def teacher_of(task: str) -> tuple[str, str]:
    """The folder of a task's dense model, and the job that makes it, if one does."""
    tuned = {"sst2": SST2_TEACHER, "squad": SQUAD_TEACHER}
    if task in tuned:
        return tuned[task], ""
    job = teacher("minilm", task)
    return folder_of(job), job.folder


@cache
def jobs() -> tuple[Job, ...]:
    """All jobs, those of MRPC first, ablations behind the branches' own rows."""
    found: list[Job] = [teacher("minilm", "mrpc")]
    for task in TASKS:
        folder, needs = teacher_of(task)
        for row in sorted((row for row in ROWS if task in row.on), key=lambda item: item.ablation):
            start = {"model": folder} if row.student is None else {"model": row.student, "teacher": folder}
            at_hand = small_squad() if task == "squad" else glue(task)
            recipe = Recipe(**start, task=at_hand, stages=row.stages(PASSES[task]), export=EXPORT, bench=row.bench)
            job = Job(f"{TABLE}/{task}/{row.name}", recipe, row.share, needs)
            found.append(replace(job, more=keep_passages, files=(PASSAGES,)) if task == "squad" else job)
    large = teacher("e5", "mrpc")  # its word table is 46 % of it
    recipe = Recipe(folder_of(large), glue("mrpc"), (TrimVocabulary(),), export=EXPORT, bench=BENCH)
    return (*found, large, Job(f"{TABLE}/{LARGE_TABLE}/trim_vocabulary", recipe, needs=large.folder))


def keep_passages(job: Job) -> None:
    """Measures a finished model as a service that keeps passages."""
    script, ids = ROOT / "benchmarks" / "passages.py", f"{DATA}/splits/squad-v1.1-small.json"
    given = {"--dense": SQUAD_TEACHER, "--data": f"{DATA}/squad", "--ids": ids, "--out": str(job.scratch / PASSAGES)}
    counts = {"--questions": "200", "--rounds": "2", "--threads": "2"}
    options = [part for pair in (given | counts).items() for part in pair]
    subprocess.run([sys.executable, str(script), str(job.scratch), *options], check=True, cwd=ROOT)


# -- The page ------------------------------------------------------------------------------------------------------------------

READING = (
    "The survey compares figures of papers, which were measured on different devices, tasks and dense models. Here all rows start "
    "from one encoder (all-MiniLM-L6-v2: six layers, distilled already) and see the rows of the task equally often, all stages "
    "together: 8 times on MRPC, 3 times on 20,000 rows of SST-2, 6 times on 3,800 questions of SQuAD 1.1, where only methods for pairs "
    "of texts have rows; `q8bert` twice, `early_exit` three times; `-longer` and `-copies` twice as often as the others. "
    "`e5-mrpc` is MRPC with e5-small, whose word table is nearly "
    "half of it.",
    "**encoder**: the numbers of the encoder's matrices that are not 0, of those of the dense model. **MB**: the int8 file for ONNX "
    "Runtime, whole. **×**: times as fast as the dense model in fp32, both with fused operators, in ONNX Runtime, with 80 % of the "
    "rounds; of our fp32 file, of our int8 file, and of the file for [the compiled kernels](../kernels.md), which skip blocks of zeros. "
    "**lost**: points of the metric, with the 95 % interval of the paired bootstrap. **minutes**, **GiB**: what making it took, and the "
    "peak of its memory, the tuned model at hand; with 1 thread other trainings ran beside it, so that alone it takes fewer minutes.",
    "**as claimed**: whether our int8 file, at the size and speed of this row, loses no more points than the paper says of its own: yes "
    "or no if the interval lies on one side of that, open if it does not, empty if the paper claims nothing that could be compared.",
    "Scattered zeros give small files when they are packed (`model.safetensors`), and no speed.",
    "`mrpc/layer_drop` and `mrpc/reweighted_proximal-10` stood still for 38 minutes while something else was measured: their minutes are "
    "too many by these. `mrpc/shared_projections`, `mrpc/smallest-longer-int8` and `squad/decomposed_attention-4` shared the two cores "
    "with other work for parts of their trainings: their minutes are too many by up to a half.",
)


def pages() -> dict[Path, str]:
    """The table, and the page that says what follows from it, as the ledgers give them."""
    groups = series(found_in(TABLE))
    return {ROOT / "docs" / "methods" / f"{TABLE}.md": _page(groups), **choosing_pages(groups)}


def _page(groups: Mapping[str, list[Run]]) -> str:
    drawn = (
        f"Drawn from the ledgers under [`results/methods/{TABLE}/`](../../results/README.md) by `{COMMAND} --draw`. Without that option "
        "it first runs the jobs that are missing; it can be stopped and started at any time."
    )
    own = [job for job in jobs() if job.folder.startswith(f"{TABLE}/")]
    lines = ["# Every branch of the survey", "", *wrapped(drawn), "", *bullets((*READING, *turns(chain(*groups.values())))), ""]
    lines += still_to_run(own, COMMAND)
    for task in (*TASKS, LARGE_TABLE):
        lines += _task(task, groups)
    return "\n".join(lines).rstrip() + "\n"


def _task(task: str, groups: Mapping[str, list[Run]]) -> list[str]:
    rows = []
    branch = ""
    for row in ROWS:
        some = groups.get(f"{task}/{row.name}")
        if some is None:
            continue
        whole, plain, integers = dense(some[0]), plain_in(some[0]), _integers(some[0])
        slim = _slim(some[0])
        assert plain is not None, f"{task}/{row.name} has no fp32 row"
        rows.append(
            (
                row.branch if row.branch != branch else "",
                f"[{row.name}](../../results/methods/{TABLE}/{task}/{row.name}/recipe.yaml)",
                f"{100 * left(plain, whole):.0f} %",
                mb_text(integers.size_bytes) if integers else "",
                *(row_times(plain, batch) for batch in (32, 1)),
                *(row_times(integers, batch) if integers else "" for batch in (32, 1)),
                *(row_times(slim, batch) if slim else "" for batch in (32, 1)),
                interval_of(lost(some, plain_in)),
                interval_of(lost(some, _integers)),
                interval_of(lost(some, _slim)),
                minutes(plain),
                f"{plain.peak_rss_bytes / 2**30:.1f}" if plain.peak_rss_bytes else "",
                row.claim,
                _as_claimed(row.name, lost(some, _integers) or lost(some, plain_in)),
            )
        )
        branch = row.branch
    if not rows:
        return [f"## {task}", "", "Not run yet.", ""]
    first = next(groups[f"{task}/{row.name}"] for row in ROWS if f"{task}/{row.name}" in groups)[0]
    base = dense(first)
    intro = (
        f"The dense model has {base.metric.replace('_', ' ')} {base.score:.4f} on {base.examples:,} examples, and "
        f"{mb_text(base.size_bytes)} MB in fp32."
    )
    head = (
        *("branch", "run", "encoder", "MB", "× batch 32, fp32", "× batch 1", "× batch 32, int8", "× batch 1"),
        *(
            "× batch 32, kernels",
            "× batch 1",
            "lost, fp32",
            "lost, int8",
            "lost, kernels",
            "minutes",
            "GiB",
            "the paper's claim",
            "as claimed",
        ),
    )
    return [f"## {task}", "", intro, "", *table(head, rows), "", *_kept(task), *_beside(task, groups)]


def _as_claimed(name: str, found: Interval | None) -> str:
    """Whether no more was lost than a paper claims."""
    return str(within(found.low, found.high, CLAIMED[name])) if found and name in CLAIMED else ""


def _kept(task: str) -> Iterator[str]:
    """How fast a service is that keeps passages, for each model of a task that was measured so."""
    for row in ROWS:
        file = HOME / "methods" / TABLE / task / row.name / PASSAGES
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            (
                item["name"],
                "" if item["hits"] is None else f"{item['hits']} %",
                "{:.2f} ({:.2f} to {:.2f})".format(item["times"], *item["spread"]),
                *(f"{item[name]:.1f}" for name in ("p50_ms", "p95_ms")),
                f"{100 * item['f1']:.1f}",
                "{:+.1f} ({:+.1f} to {:+.1f})".format(item["lost"], *item["interval"]),
            )
            for item in found["rows"]
        ]
        yield from wrapped(
            f"`{row.name}` as [a service that keeps passages](../passages.md), {found['questions']} questions one by one on "
            f"{found['threads']} threads (`benchmarks/passages.py`); **kept**: the share of questions whose passage was computed before."
        )
        yield from ("", *table(("file", "kept", "× dense fp32", "p50 ms", "p95 ms", "F1", "lost"), rows), "")


def _beside(task: str, groups: Mapping[str, list[Run]]) -> Iterator[str]:
    """The runs of a task that were measured beside every rival, each with all of its race."""
    raced = {row.name: groups[f"{task}/{row.name}"][0] for row in ROWS if f"{task}/{row.name}" in groups}
    rows = [
        (
            name if place == 0 else "",
            item.name,
            mb_text(item.size_bytes),
            *(row_times(item, batch) for batch in (32, 1)),
            interval_of(item.loss) if item.loss else "",
        )
        for name, run in raced.items()
        if any(item.role == Standing.OPENVINO_INT8 for item in run.records)
        for place, item in enumerate(item for item in run.records if item.speed)
    ]
    if rows:
        yield from wrapped(
            "Beside every rival, each run a race of its own: plain int8 in ONNX Runtime and in OpenVINO, and, if whole units were cut, a "
            "model of fewer layers that saw the same teacher and stages:"
        )
        yield from ("", *table(("run", "model", "MB", "× batch 32", "× batch 1", "lost"), rows), "")


def _integers(run: Run) -> Record | None:
    """Our int8 file with fused operators, or the plainer one."""
    return ours_in(run, Variant.INT8_FUSED) or ours_in(run, Variant.INT8_DYNAMIC)


def _slim(run: Run) -> Record | None:
    """Our file for the compiled kernels, if it was measured."""
    return ours_in(run, Variant.INT8_KERNELS)


def draw() -> None:
    """Writes the page."""
    write(pages())


if __name__ == "__main__":
    sys.exit(main(jobs(), draw, sys.argv[1:]))
