"""Tests trace models of one structure once: the tracer takes most of the time of a short run, and reads hardly more than shapes.

A later model of the same structure gets a copy of the graph with its own numbers. Every export then compares its file with the model, so
that a graph that is not the model's ends in an error. Processes share what they traced by files of a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
import torch

SOURCES = "sources"
PLACES = ("_name_or_path", "name_or_path")  # where a model was read from

Trace = Callable[[Any, Any], onnx_ir.Model]


class Source(NamedTuple):
    """Where a number of a graph comes from."""

    tensor: str
    transposed: bool


class Known(NamedTuple):
    graph: onnx_ir.Model
    sources: dict[str, Source]


def traced_once(real: Trace, shared: Path) -> Trace:
    """The tracer `real` with a memory, of which other processes read what lies in the folder `shared`."""
    tracer = torch.onnx.export
    of_values, of_structures = dict[str, onnx_ir.Model](), dict[str, Known]()

    def trace(subject: Any, outputs: Any) -> onnx_ir.Model:
        if torch.onnx.export is not tracer:  # a test has put another in its place
            return real(subject, outputs)
        tensors = dict(tensors_of(subject.model))
        digests = {name: digest(value) for name, value in tensors.items()}
        structure = seen_by_tracer(subject, outputs, digests)
        file = shared / f"{structure}.onnx"
        if structure not in of_structures and file.is_file():
            of_structures[structure] = read(file)
        if structure in of_structures:
            return filled(of_structures[structure], tensors)
        whole = structure + hashlib.sha256(repr(digests).encode()).hexdigest()
        if whole not in of_values:
            graph = real(subject, outputs)
            sources = sources_of(graph, tensors)
            if sources is not None:
                of_structures[structure] = Known(apart(graph), sources)
                write(of_structures[structure], file)
                return graph
            of_values[whole] = apart(graph)
        return apart(of_values[whole])

    return trace


def tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def digest(value: torch.Tensor) -> str:
    bits = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + bits).hexdigest()


def seen_by_tracer(subject: Any, outputs: Any, digests: dict[str, str]) -> str:
    """A digest of all that decides what a graph looks like: classes, settings, hooks, shapes, and which tensors equal each other, because
    the tracer keeps one of these."""
    config = {key: value for key, value in subject.model.config.to_dict().items() if key not in PLACES}
    seen = hashlib.sha256(repr((subject.inputs, tuple(outputs), subject.anatomy, config)).encode())
    first = {digest: name for name, digest in reversed(digests.items())}
    seen.update(repr([(name, first[digest]) for name, digest in digests.items()]).encode())
    for name, module in subject.model.named_modules():
        seen.update(f"{name} {type(module)} {module.training}".encode())
        for key, value in sorted({**vars(module), **module._parameters, **module._buffers}.items()):
            if key in module._parameters or key in module._buffers:
                seen.update(f"{key} {'' if value is None else (value.dtype, tuple(value.shape))}".encode())
            elif isinstance(value, torch.Tensor):
                seen.update(f"{key} {digest(value)}".encode())
            elif key not in ("_parameters", "_buffers", "_modules", "config", *PLACES):
                seen.update(f"{key} {re.sub(r' at 0x[0-9a-f]+', '', repr(value))}".encode())
    return seen.hexdigest()


def sources_of(graph: onnx_ir.Model, tensors: dict[str, torch.Tensor]) -> dict[str, Source] | None:
    """Where each number of a graph comes from, if all of them are a tensor's, or such a one's transposed, or follow from shapes."""
    turned = {digest(value.T): name for name, value in tensors.items() if value.ndim == 2}
    sources = dict[str, Source]()
    for name, value in graph.graph.initializers.items():
        own = name.removeprefix("model.")
        held = value.const_value
        assert held is not None
        if own in tensors:
            sources[name] = Source(own, False)
        elif held.dtype == onnx_ir.DataType.FLOAT and held.size > 1:
            other = turned.get(digest(torch.from_numpy(np.array(held.numpy()))))
            if other is None:
                return None
            sources[name] = Source(other, True)
    return sources


def write(known: Known, file: Path) -> None:
    graph = apart(known.graph)
    graph.metadata_props[SOURCES] = json.dumps(known.sources)
    part = file.with_suffix(f".{os.getpid()}")
    onnx_ir.save(graph, part)
    part.replace(file)


def read(file: Path) -> Known:
    graph = onnx_ir.load(file)
    sources = json.loads(graph.metadata_props.pop(SOURCES))
    return Known(apart(graph), {name: Source(*source) for name, source in sources.items()})


def filled(known: Known, tensors: dict[str, torch.Tensor]) -> onnx_ir.Model:
    graph = apart(known.graph)
    for name, (tensor, transposed) in known.sources.items():
        value = tensors[tensor].detach().cpu().numpy()
        graph.graph.initializers[name].const_value = onnx_ir.tensor((value.T if transposed else value).copy(), name=name)
    return graph


def apart(graph: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of a graph that shares no number with the model, which may be trained on."""
    copied = graph.clone()
    for name, value in copied.graph.initializers.items():
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(value.const_value.numpy().copy(), name=name)
    return copied
