"""The trainings of a compression: the tuning of a model that came without a head, and the distillation of one that was cut.

Their rates and losses were chosen by measurements (decisions 0009 and 0013); how long they last is planned elsewhere (`outline.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimformer import registry
from slimformer.data.material import spaced_rows
from slimformer.families.base import family_of
from slimformer.running.bundle import Bundle
from slimformer.running.schedule import PASSES, Diet, Sizes, copies_of, rounded_passes
from slimformer.running.wanted import Wanted
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.training.stage import Stage, Train
from slimformer.training.teacher import cached_bytes

DISTIL_TOKENS = 3_000_000  # the distillation sees so many by default: minutes on two cores for a small model
TUNE_TOKENS = 1_000_000
CACHED_BYTES = 8 << 30  # disk limit for a teacher's scores and hidden states; above it, attention scores are not distilled
BLOCK_PATTERN = "4x4"  # weights that the kernels skip together (decision 0020)
BLOCKS_LEFT = (0.5, 0.2)  # shares of a matrix's blocks that may be left, for the kernels
SPARSE = "knowledge_sparse"  # the method that takes blocks out


def _hidden_size(source: Path) -> int:
    config = checkpoint.read_config(source)
    return family_of(checkpoint.base_type(config)).width(config) or 768


def tune_lr(source: Path) -> float:
    """4e-5 for a width of 768, more for narrower models: 8e-5 for 384."""
    return float(f"{4e-5 * 768 / _hidden_size(source):.2g}")


def fast_lr(source: Path) -> float:
    """8e-4 up to a width of 384, for which it was measured; it falls with the square of the width: 2e-4 for 768, which we chose."""
    return float(f"{8e-4 * min(1.0, 384 / _hidden_size(source)) ** 2:.2g}")


def tuning(source: Path, diet: Diet, sizes: Sizes, wanted: Wanted) -> Train:
    """The tuning of a model that came without a head. The fewer tokens it sees, the higher the rate (decision 0013)."""
    seen = diet.tune_passes * sizes.train_tokens
    faster = min(4.0, max(1.0, (TUNE_TOKENS / 2 / seen) ** 0.75))
    lr, passes = float(f"{tune_lr(source) * faster:.2g}"), rounded_passes(diet.tune_passes, 2)
    return Train(lr=lr, epochs=passes, batch_size=wanted.batch_size)


def distillation(bundle: Bundle, wanted: Wanted, passes: float, left: float = 1.0) -> Train:
    """The distillation that a budget gets; of each matrix, a share of its blocks is `left`.

    Small data is augmented, for as many steps; its copies have no labels of their own. With attention scores the student may learn
    five times as fast, and loses less (decision 0009). They grow with the square of a text's length; if they do not fit on disk, the
    student learns outputs and hidden states alone.
    """
    source, features = bundle.material.source, bundle.material.features[Split.TRAIN]
    if bundle.subject.beams is not None:
        return _word_level(bundle, wanted, passes)
    copies = copies_of(passes)
    rows = None if passes >= PASSES else max(1, round(len(features) * passes / PASSES))
    distillation = registry.find("methods", "distillation")
    method, lr, weight = distillation(), 2 * tune_lr(source), 0.0 if copies else 0.1
    lengths = spaced_rows(features, rows).lengths() if rows else features.lengths()
    scored = distillation(temperature=1.0, hidden=6.0, scores=6.0, relative=False)
    if (1 + copies) * cached_bytes(bundle.teacher.anatomy, lengths, scored.effects().needs) <= CACHED_BYTES:
        method, lr, weight = scored, max(lr, fast_lr(source)), 0.0
    zeros = () if left == 1.0 else (registry.find("methods", SPARSE)(keep=left, pattern=BLOCK_PATTERN),)
    return Train(
        methods=(*zeros, method),
        epochs=round((PASSES if rows else passes) / (1 + copies), 2),
        lr=wanted.lr or lr,
        batch_size=wanted.batch_size,
        task_weight=weight,
        dropout=False,
        freeze="embeddings",
        rows=rows,
        augment=copies,
    )


def fewest_blocks(wanted: Wanted, bundle: Bundle) -> tuple[float, ...]:
    """The shares of a matrix's blocks that may be left: none for an engine that skips no zeros."""
    return BLOCKS_LEFT if wanted.engine == "kernels" and bundle.subject.beams is None else ()


def blocks_left(stages: Sequence[Stage]) -> float:
    """The share of each matrix's blocks that these stages leave."""
    trained = [method for stage in stages if isinstance(stage, Train) for method in stage.methods]
    shares = [method.keep for method in trained if isinstance(method, registry.find("methods", SPARSE))]
    return shares[-1] if shares else 1.0


def _word_level(bundle: Bundle, wanted: Wanted, passes: float) -> Train:
    """The distillation of a model that writes texts: the next word after the right ones (Kim and Rush 2016), and hidden states.

    Nothing is augmented: another word in what is read asks for another text. The teacher runs beside the student, because what it says
    of a whole vocabulary at each token would fill the disk.
    """
    rows = None if passes >= PASSES else max(1, round(len(bundle.material.features[Split.TRAIN]) * passes / PASSES))
    method = registry.find("methods", "distillation")(temperature=1.0)
    return Train(
        methods=(method,),
        epochs=round(PASSES if rows else passes, 2),
        lr=wanted.lr or max(2 * tune_lr(bundle.material.source), 0.5 * fast_lr(bundle.material.source)),
        batch_size=wanted.batch_size,
        task_weight=0.1,
        dropout=False,
        rows=rows,
    )
