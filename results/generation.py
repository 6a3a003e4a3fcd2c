"""Translation by a small Marian on Multi30k: the jobs behind docs/methods/generation.md, and the page itself.

    python results/generation.py --plan           # the jobs, which of them are done, how many hours
    python results/generation.py --only de/       # run them; stop and start at will
    python results/generation.py --draw           # only draw the page from the rows that stand

The dense models are trained from scratch, one for each pair of languages; all other rows start from them. Jobs stand in the order of
what a reader would doubt first: that 8 bits lose nothing, that a cut model in int8 is fast and good, and then the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pages import Run, bullets, row_times, table, turns, wrapped
from sweep import AROUND, Job, main
from tokenizers import Tokenizer
from work import (
    DATA,
    EXPORT,
    ROOT,
    Runner,
    as_trained,
    dense,
    folder_of,
    found_in,
    interval_of,
    left,
    lost,
    met,
    minutes,
    ours_in,
    plain_in,
    recipe_link,
    series,
    simulated,
    still_to_run,
    write,
)

from slimformer.errors import RecipeError
from slimformer.exporters.base import Variant
from slimformer.families.base import Subject
from slimformer.files import whole_folder, write_text
from slimformer.measuring.records import Record, Standing
from slimformer.methods.base import Method
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.gates import Gates
from slimformer.methods.group_lasso import GroupLasso
from slimformer.methods.layers import Layers
from slimformer.methods.movement import Movement
from slimformer.methods.peaks import Peaks
from slimformer.methods.quantization import Quantization
from slimformer.reporting.words import mb_text
from slimformer.running.fresh import Fresh
from slimformer.running.recipe import Bench, Recipe
from slimformer.running.runner import train_stages
from slimformer.tasks.base import Task
from slimformer.tasks.translation import Translation
from slimformer.training.stage import Calibrate, Stage, Train

TABLE = "generation"
COMMAND = "python results/generation.py"
PAIRS = {"de": "English to German", "fr": "English to French"}
BENCH = Bench(rivals=("teacher-int8", "ctranslate2-int8"), seconds=8.0)
SIZES: dict[str, Any] = {
    "d_model": 192,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "dropout": 0.2,
    "activation_function": "relu",
    "scale_embedding": True,
    "max_position_embeddings": 256,
}
NARROW = SIZES | {"d_model": 128, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "decoder_layers": 2}
TUNING = Train(epochs=14.0, lr=1e-3, batch_size=64, precision="fp32")
LEARN = Train(lr=5e-4, batch_size=64, dropout=False, precision="fp32")
TAUGHT = replace(LEARN, methods=(Distillation(hidden=0.0),), epochs=5.0, task_weight=0.5, targets="teacher")
INTEGERS = Quantization(roles=("matrix", "head"), start=0.1)  # what an int8 file computes in integers
Stages = tuple[Stage, ...]


@dataclass(frozen=True)
class Translating(Job):
    """A job with the minutes that its training takes on two cores, read from the logs of the first ones or guessed from them."""

    forecast: float = 0.0

    def hours(self) -> float:
        return self.forecast / 60 + AROUND

    @property
    def diverged(self) -> Path:
        return self.home / "diverged.txt"

    @property
    def stands(self) -> bool:
        return self.diverged.is_file() or super().stands


def translation(target: str) -> Translation:
    """Multi30k from English, scored on the test set of 2016."""
    return Translation(data=f"{DATA}/multi30k", dev="test_2016_flickr", source="en", target=target)


@cache
def teacher(target: str) -> Translating:
    """The dense model of a pair of languages, from scratch."""
    recipe = Recipe(Fresh("marian", 8000, SIZES), translation(target), (TUNING,), export=EXPORT, bench=BENCH)
    return Translating(f"{TABLE}/{target}/teacher", recipe, forecast=42.0)


def fully(bits: int, **options: Any) -> Quantization:
    """Prato et al.: every operand on a grid of so many bits, of each feature where files compute in float."""
    return Quantization(
        weights=cast(Any, bits),
        activations=cast(Any, bits),
        embeddings=cast(Any, bits),
        **({"roles": "all", "activation_buckets": "feature"} | options),
    )


def fully_quantized(bits: int) -> Stages:
    """Trained with all of it on grids, the texts of the data alone."""
    return (replace(LEARN, methods=(fully(bits),), lr=3e-4, epochs=3.0),)


def after_training(bits: int) -> Stages:
    """The paper's post-training rows: weights as they are, ranges from some hundred batches."""
    return (replace(LEARN, methods=(fully(bits, start_step=199),), lr=0.0, weight_decay=0.0, steps=200),)


def naive(bits: int) -> Stages:
    """Everything on one grid for a tensor, 0 on each, denominators' too, from the first step: it may diverge, as in the paper."""
    plain = fully(bits, activation_buckets="tensor", buckets="tensor", grid="affine", denominators="from_zero", start=0.0)
    return (replace(LEARN, methods=(plain,), lr=3e-4, epochs=1.0),)


def cut_and_int8(method: Method, learning: Train = TAUGHT) -> Stages:
    """A one-shot cut, distillation on what the teacher writes, then the integers of the file."""
    return (Calibrate(method), learning, replace(TAUGHT, methods=(INTEGERS, Distillation(hidden=0.0)), lr=2e-4, epochs=2.0))


def cut(method: Method) -> Stages:
    """A cut that trains, then as long again without it."""
    half = replace(TAUGHT, epochs=3.0)
    return (replace(half, methods=(*half.methods, method)), half)


@cache
def jobs() -> tuple[Translating, ...]:
    """All jobs, the first pair's before the second's in each group."""
    shallow = Layers(keep=0.6, first="decoder")
    every: tuple[tuple[str, Stages, float], ...] = (
        ("quantization-8", fully_quantized(8), 22.0),
        ("small", cut_and_int8(Fisher(keep=0.5)), 40.0),
        ("shallow", cut_and_int8(shallow), 35.0),
        ("post-8", after_training(8), 3.0),
        ("quantization-6", fully_quantized(6), 22.0),
        ("quantization-4", fully_quantized(4), 22.0),
    )
    german: tuple[tuple[str, Stages, float], ...] = (
        ("naive-8", naive(8), 7.0),
        ("naive-4", naive(4), 7.0),
        ("post-6", after_training(6), 3.0),
        ("post-4", after_training(4), 3.0),
        ("movement-50", cut(Movement(keep=0.5)), 25.0),
        ("peaks", (Calibrate(Peaks(z=2.0)),), 1.0),
        ("fisher-50-data", (Calibrate(Fisher(keep=0.5)), replace(TAUGHT, methods=(), task_weight=1.0, targets="task")), 15.0),
        ("fisher-50-words", (Calibrate(Fisher(keep=0.5)), replace(TAUGHT, targets="task")), 22.0),
        ("fisher-50-texts", (Calibrate(Fisher(keep=0.5)), replace(TAUGHT, methods=(), task_weight=1.0)), 15.0),
        ("fisher-50", (Calibrate(Fisher(keep=0.5)), TAUGHT), 22.0),
        ("gates-50", cut(Gates(keep=0.5)), 25.0),
        ("group_lasso-50", cut(GroupLasso(keep=0.5)), 25.0),
    )
    found = [teacher(target) for target in PAIRS]
    found += [_job(target, *row) for row in every for target in PAIRS]
    found += [_narrow(target) for target in PAIRS]
    return (*found, *(_job("de", *row) for row in german))


def _job(target: str, name: str, stages: Stages, forecast: float) -> Translating:
    start = teacher(target)
    recipe = Recipe(folder_of(start), translation(target), stages, export=EXPORT, bench=BENCH)
    quantized = name.startswith(("quantization", "post", "naive"))
    return Translating(
        f"{TABLE}/{target}/{name}",
        recipe,
        share=0.5,
        needs=start.folder,
        before=(lambda: _try(f"{target}/{name}")) if name.startswith("naive") else None,
        more=partial(simulated, runner=writing) if quantized else None,
        forecast=forecast,
    )


def _narrow(target: str) -> Translating:
    """A smaller dense model from scratch, on the texts that the dense one writes: what a user could do without any cut."""
    start = teacher(target)
    stages = (replace(TUNING, methods=(Distillation(hidden=0.0),), targets="teacher", task_weight=0.5, epochs=12.0),)
    recipe = Recipe(
        Fresh("marian", 8000, NARROW), translation(target), stages, teacher=folder_of(start), export=EXPORT, bench=BENCH
    )
    return Translating(f"{TABLE}/{target}/narrow", recipe, needs=start.folder, forecast=30.0)


def _try(name: str) -> None:
    """Trains a naive run; if its loss stops being a number, that is its row, and RecipeError says so."""
    job = next(job for job in jobs() if job.folder == f"{TABLE}/{name}")
    try:
        train_stages(job.recipe, job.scratch)
    except RecipeError as error:
        if "number" not in error.what:
            raise
        with whole_folder(job.home) as part:
            write_text(part / "recipe.yaml", job.recipe.seen_from(job.home).to_yaml())
            write_text(part / job.diverged.name, f"{error.what}\n")
        raise


def writing(subject: Subject, _: Task, tokenizer: Tokenizer) -> Runner:
    """The texts that the model writes."""

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.as_tensor(batch[name]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            rows = subject.model.generate(**given)  # type: ignore[operator]
        texts = tokenizer.decode_batch(rows.tolist(), skip_special_tokens=True)
        return {"text": np.asarray(texts, dtype=object)}

    return runner


# -- The page ------------------------------------------------------------------------------------------------------------------

READING = (
    "**The dense models** are trained here, from random weights and with a vocabulary of their own: a Marian with four layers on each "
    "side and a width of 192, on 27,550 pairs of Multi30k for 14 passes. Other 1,450 pairs are set aside to choose on. Rows are scored "
    "on the 1,000 pairs of test 2016, by sacrebleu, with five beams.",
    "**Points** are those of BLEU, lost against the dense model in fp32, with the 95 % interval of the paired bootstrap.",
    "**as trained**: the model with everything on its grid that was trained so, simulated in PyTorch while it writes. Files compute "
    "products of matrices in integers, and the rest in float.",
    "**×** is times as fast as the dense model in fp32, both in ONNX Runtime, in texts written to their end. Files that share a run "
    "were timed in turn; **texts a second** tell of the machine too, and are to be compared within a run alone. A few batches are timed, "
    "spread over all lengths: a text that does not end by itself, as some do with one beam, weighs much there.",
)
BESIDE: dict[str, str] = {
    Standing.TEACHER_FP32: "dense, fp32",
    Standing.TEACHER_INT8: "dense, int8",
    Standing.CTRANSLATE2_INT8: "dense, CTranslate2 int8",
}
ROWS = {
    "quantization": "Prato et al.: every operation on a grid of so many bits, trained for 3 passes on the data's texts. In the paper 8 "
    "bits score 26.38 against 26.46 on WMT14 English-German, 6 bits 26.98, 4 bits 18.32. It is trained without dropout: where "
    "the same weights in fp32 lose as much, the training lost it, not the grids.",
    "post": "The same after training: weights as they are, ranges from 200 batches. The paper: 26.44 with 8 bits, 24.84 with 6.",
    "naive": "One grid for a tensor, from the first step, denominators from 0. The paper saw it diverge; its own settings were not to be "
    "had.",
    "small": "`fisher` to half of the multiply-accumulates, distillation of words on the texts that the teacher writes, then the "
    "integers of the file.",
    "shallow": "The same with a decoder of fewer layers instead (`layers` with `first: decoder`).",
    "narrow": "A smaller dense model (width 128, a decoder of two layers) from scratch on the texts that the teacher writes.",
    "fisher": "The cut of `small` without integers; `-data` trains on the data's texts, `-words` learns their words from the teacher, "
    "`-texts` trains on the teacher's texts alone.",
    "peaks": "Neurons whose running maximum is below two standard deviations go, and nothing is trained after it, as in the paper.",
    "movement": "Block pruning of both sides while it is distilled, then as long again.",
    "gates": "The same by `gates`.",
    "group_lasso": "The same by `group_lasso`.",
}


def pages() -> dict[Path, str]:
    """The page, as the ledgers give it."""
    return {ROOT / "docs" / "methods" / f"{TABLE}.md": _page(series(found_in(TABLE)))}


def _page(groups: Mapping[str, list[Run]]) -> str:
    drawn = (
        f"Drawn from the ledgers under [`results/methods/{TABLE}/`](../../results/README.md) by `{COMMAND} --draw`. Without that option "
        "it first runs the jobs that are missing; it can be stopped and started at any time."
    )
    lines = [
        "# Translation",
        "",
        *wrapped(drawn),
        "",
        *bullets((*READING, *turns(chain(*groups.values())))),
        "",
        *still_to_run(jobs(), COMMAND),
        *_aims(groups),
    ]
    for target, title in PAIRS.items():
        lines += _pair(target, title, groups)
    lines += ["## What the rows are", "", *bullets(f"`{name}`: {text}" for name, text in ROWS.items())]
    return "\n".join(lines).rstrip() + "\n"


def _pair(target: str, title: str, groups: Mapping[str, list[Run]]) -> list[str]:
    rows = []
    for job in jobs():
        _, place, name = job.folder.split("/")
        some = groups.get(f"{place}/{name}")
        if place != target:
            continue
        if job.diverged.is_file():
            rows.append((recipe_link(TABLE, f"{place}/{name}"), "diverged", *[""] * 8))
        if some is None:
            continue
        whole, plain, integers = dense(some[0]), plain_in(some[0]), _integers(some[0])
        if name == "teacher":
            rows.append(
                ("dense, fp32", f"{100 * whole.score:.2f}", *[""] * 4, "1", "1", mb_text(whole.size_bytes), minutes(whole))
            )
            continue
        assert plain is not None, f"{job.folder} has no fp32 row"
        best = integers or plain
        rows.append(
            (
                recipe_link(TABLE, f"{place}/{name}"),
                f"{100 * best.score:.2f}",
                interval_of(lost(some, plain_in)),
                interval_of(lost(some, _integers)),
                interval_of(lost(some, as_trained)),
                f"{100 * left(plain, whole):.0f} %",
                row_times(best, 32),
                row_times(best, 1),
                mb_text(best.size_bytes),
                minutes(plain),
            )
        )
    head = (
        "run",
        "BLEU",
        "points lost, fp32 file",
        "int8 file",
        "as trained",
        "weights",
        "× batch 32",
        "× batch 1",
        "MB",
        "minutes",
    )
    return [f"## {title}", "", *(table(head, rows) if rows else ["Not run yet."]), "", *_speeds(target, groups)]


def _speeds(target: str, groups: Mapping[str, list[Run]]) -> list[str]:
    """Texts a second and their waits, each run's file beside the dense ones of the same comparison."""
    rows = []
    for name in ("teacher", "quantization-8", "small", "shallow", "narrow"):
        for run in groups.get(f"{target}/{name}", [])[:1]:
            ours = _integers(run)
            beside = [record for role in BESIDE for record in run.records if record.role == role]
            for record in (*beside, *([ours] if ours else [])):
                told = {(timing.batch_size, timing.beams): timing for timing in record.timings}
                rows.append(
                    (
                        recipe_link(TABLE, f"{target}/{name}") if record is beside[0] else "",
                        BESIDE.get(record.role, "our int8 file"),
                        f"{100 * record.score:.2f}",
                        *(f"{timing.per_second:.0f}" if (timing := told.get((32, beams))) else "" for beams in (5, 1)),
                        *(
                            f"{timing.p50_ms:.0f} / {timing.p95_ms:.0f}" if (timing := told.get((1, beams))) else ""
                            for beams in (5, 1)
                        ),
                        row_times(record, 32),
                        row_times(record, 1),
                        mb_text(record.size_bytes),
                    )
                )
    head = (
        *("run", "file", "BLEU", "texts a second, batch 32, 5 beams", "1 beam"),
        *("ms, batch 1, 5 beams, p50 / p95", "1 beam", "× batch 32", "× batch 1", "MB"),
    )
    return [*table(head, rows), ""] if rows else []


def _integers(run: Run) -> Record | None:
    """Our int8 file: with ranges that were learned, or else those of each batch."""
    return ours_in(run, Variant.INT8_FUSED) or ours_in(run, Variant.INT8_DYNAMIC)


def _aims(groups: Mapping[str, list[Run]]) -> list[str]:
    """What the rows were run for, judged by the run that was named for it before it was scored."""
    rows = []
    for target, title in PAIRS.items():
        for what, name, allowed, times, bytes_left in (
            ("8 bits lose at most 0.1 points, in a quarter of the bytes", "quantization-8", 0.1, 0.0, 0.26),
            ("cut and int8: 3 times as fast at batch 32, at most 0.5 points lost", "small", 0.5, 3.0, 1.0),
            ("a shallow decoder: the same", "shallow", 0.5, 3.0, 1.0),
        ):
            some = groups.get(f"{target}/{name}")
            record = _integers(some[0]) if some else None
            if record is None:
                rows.append((what, title, f"`{name}`", "not run yet", ""))
                continue
            whole = dense(some[0]) if some else record
            small = (record.size_bytes or 0) <= bytes_left * (whole.size_bytes or 0)
            there = f"{interval_of(record.loss)} points, {mb_text(record.size_bytes)} MB, × {row_times(record, 32)}"
            rows.append((what, title, f"`{name}`", there, met(record, allowed, times, small)))
    return ["## What we set out to show", "", *table(("aim", "pair", "run", "there", "met"), rows), ""]


def draw() -> None:
    """Writes the page."""
    write(pages())


if __name__ == "__main__":
    sys.exit(main(jobs(), draw, sys.argv[1:]))
