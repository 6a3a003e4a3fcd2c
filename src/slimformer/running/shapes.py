"""Shapes of students for a model: several depths and widths, timed on this machine, and of them those that are worth a try.

AdaBERT (Chen et al., IJCAI 2020) searches a student's structure with its efficiency in the loss. Here the structure is that of the
teacher, smaller, which any runtime knows: each shape is timed as an int8 file with random weights, and one that is slower than another
with more weights is left out. `compare` then trains each of the others a little, and goes on with those that are good.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slimformer import registry
from slimformer.data.batching import collate
from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.errors import RecipeError
from slimformer.exporters.base import Variant
from slimformer.families.base import family_of, subject_of
from slimformer.log import Log
from slimformer.measuring.machine import Quiet, cores
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import Rounds, compare, model_inputs, workloads
from slimformer.saving import checkpoint
from slimformer.saving.building import without_bars
from slimformer.saving.heads import auto_class_named
from slimformer.tasks.base import Split, Task

DEPTHS = (1 / 6, 1 / 3, 1 / 2, 2 / 3)  # of the teacher's layers
WIDTHS = (1 / 4, 1 / 2, 3 / 4, 1.0)  # of its hidden states
TIMED_ROWS = 320  # texts of dev, evenly spread, whose lengths count: those of training may be much shorter
TIMED_SECONDS = 8.0  # for all shapes together, after a first round


@dataclass(frozen=True)
class StudentShape:
    """One shape: the fields of its config, its weights within the layers, and its milliseconds a text at batch 32 in int8."""

    name: str
    config: Mapping[str, int]
    weights: int
    ms: float = 0.0


def shapes_of(config: Any) -> list[StudentShape]:
    """All shapes for a teacher of this config, with whole heads of its size, and feed-forwards as wide in proportion.

    >>> from slimformer.testing.tiny import tiny_config
    >>> [shape.name for shape in shapes_of(tiny_config("bert"))]
    ['bert-1x8', 'bert-1x16', 'bert-1x24', 'bert-1x32', 'bert-2x8', 'bert-2x16', 'bert-2x24', 'bert-2x32']
    """
    names = getattr(type(config), "attribute_map", {})
    fields = {key: names.get(key, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    inner = next((name for name in ("intermediate_size", "hidden_dim") if hasattr(config, name)), None)
    own = (family_of(config.model_type).skeleton,) if hasattr(family_of(config.model_type), "skeleton") else ()
    wide_inside = any(skeleton.inner_width for skeleton in own)
    if wide_inside or inner is None or not all(hasattr(config, name) for name in fields.values()):
        raise RecipeError(
            f"a {config.model_type} has no depth and width that students could have less of.", help="leave students out."
        )
    depth, width, heads = (int(getattr(config, name)) for name in fields.values())
    size, ratio = width // heads, getattr(config, inner) / width
    depths = sorted({max(1, round(share * depth)) for share in DEPTHS})
    widths = sorted({size * max(1, round(share * heads)) for share in WIDTHS})
    found = []
    for layers in depths:
        for hidden in widths:
            wide = round(ratio * hidden)
            sizes = dict(zip(fields.values(), (layers, hidden, hidden // size), strict=True)) | {inner: wide}
            found.append(
                StudentShape(f"{config.model_type}-{layers}x{hidden}", sizes, layers * hidden * (4 * hidden + 2 * wide))
            )
    return found


def worth_trying(shapes: Sequence[StudentShape], count: int) -> list[StudentShape]:
    """Of the shapes that none with as many weights is faster than, `count` at most, evenly from the fastest to the slowest.

    >>> timed = [StudentShape(name, {}, size, ms) for name, size, ms in (("a", 10, 1.0), ("b", 9, 2.0), ("c", 30, 3.0), ("d", 40, 9.0))]
    >>> [shape.name for shape in worth_trying(timed, 2)]
    ['a', 'd']
    """
    front = [
        shape
        for shape in shapes
        if not any(
            (other.ms <= shape.ms and other.weights > shape.weights) or (other.ms < shape.ms and other.weights >= shape.weights)
            for other in shapes
        )
    ]
    front.sort(key=lambda shape: shape.ms)
    places = {round((number + 0.5) * len(front) / count - 0.5) for number in range(count)}
    return [shape for place, shape in enumerate(front) if place in places or len(front) <= count]


def timed_shapes(teacher: Path, task: Task, log: Log, *, threads: int | None = None) -> list[StudentShape]:
    """All shapes for a teacher, each with its time: exported with random weights, and run in turn on texts of dev.

    RecipeError if students of the teacher's type cannot be built.
    """
    import torch
    import transformers

    given = checkpoint.read_config(teacher)
    kind = checkpoint.base_type(given)
    family = family_of(kind)
    if family.classes != "transformers" or family.decodes:
        raise RecipeError(f"students are made for encoders, and {teacher} is a {kind}.", help="leave students out.")
    family.model_class("")
    usual = {name: value for name, value in given.items() if name not in ("model_type", "architectures", "slimformer")}
    config = transformers.AutoConfig.for_model(kind, **usual)
    shapes = shapes_of(config)
    examples = task.split(Split.DEV)
    rows = examples[:: max(1, len(examples) // TIMED_ROWS)][:TIMED_ROWS]
    features = task.encode(rows, load_tokenizer(teacher), min(task.max_length, max_length_of(teacher)))
    exporter = registry.find("exporters", "onnx")(agreement=0.0)  # the answers of random weights are of no interest
    batch = collate(features, range(min(8, len(rows))), model_inputs(features))
    with tempfile.TemporaryDirectory(prefix="slimformer-shapes-") as place:
        sessions = {}
        with log.track("timing shapes of students", len(shapes)) as advance:
            for done, shape in enumerate(shapes):
                shared = {name: value for name, value in usual.items() if name not in family.per_layer}
                sizes = transformers.AutoConfig.for_model(kind, **(shared | dict(shape.config)))
                with torch.random.fork_rng(devices=[]), without_bars():
                    torch.manual_seed(0)
                    model = auto_class_named(task.auto_class).from_config(sizes).eval()
                file = Path(place) / f"{shape.name}.onnx"
                subject = subject_of(model)
                inputs = {name: batch[name] for name in batch if name in subject.inputs}
                exporter.export(model, [inputs], file, Variant.INT8_FUSED, task.outputs)
                sessions[shape.name] = open_session(file, threads or cores())
                advance(done + 1)
        timings = compare(sessions, workloads(features, limit=4)[1], Rounds(20, seconds=TIMED_SECONDS), Quiet(0.0).load())
    return [
        replace(shape, ms=float(np.median(timings[shape.name].round_ms())) / sum(timings[shape.name].sizes)) for shape in shapes
    ]
