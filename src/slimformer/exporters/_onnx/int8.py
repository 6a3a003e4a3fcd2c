"""Int8 in the graph: weights as integers, outliers moved from activations into weights, integer products in the place of matrices.

Everything here is arithmetic on one graph and its constants; the ranges of activations come from `calibrate` or from training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from slimformer.core.anatomy import SHARED_BIAS
from slimformer.exporters._onnx.graph import MICROSOFT, Editor, Product, classifiers, constant_of, products, required
from slimformer.quantizing.calibration import TABLE_ROWS

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the published default is 0.5; the best one differs from product to product
# One more multiplication must take 60 % of the squared error away: on MiniLM with SST-2 this smooths 18 of 26 inputs and leaves the
# error of the logits where smoothing all of them does (0.069 and 0.066, without 0.146); 0.2 smooths 7 and leaves 0.128.
WORTH = 0.4
ERROR_ROWS = 512  # rows of a sample that the error is measured on


@dataclass(frozen=True)
class WeightCoding:
    """How weights are stored: the number of bits, and whether all of a matrix has one scale (`whole`) or each output its own.

    7 bits leave room on processors whose int8 sums saturate.
    """

    bits: int = 8
    whole: bool = False


@dataclass(frozen=True)
class Coding:
    """How an activation is stored: (integer - zero) * step, with integers from 0 to `top`."""

    step: np.float32
    zero: int
    top: int = 255


@dataclass(frozen=True)
class Sample:
    """A sample of one activation: some of its rows, and the extremes of each column over all rows."""

    rows: np.ndarray  # (rows, in)
    low: np.ndarray  # (in,)
    high: np.ndarray  # (in,)


def quantizable(graph: ir.Graph, floats: Collection[str] = ()) -> list[Product]:
    """The products that become int8: all but the classifier and those whose weights `floats` names."""
    last = classifiers(graph)
    return [product for product in products(graph) if product.node not in last and product.name not in floats]


def quantize_weight(weight: np.ndarray, axis: int, coding: WeightCoding) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 values and fp32 scales, one scale for each index of `axis`; with `coding.whole` all scales are equal."""
    top = float(2 ** (coding.bits - 1) - 1)
    scale = np.abs(weight).max(axis=1 - axis) / top
    if coding.whole:
        scale = np.full_like(scale, scale.max())
    scale = np.where(scale == 0, 1.0, scale).astype(np.float32)
    spread = scale[None, :] if axis == 1 else scale[:, None]
    return np.clip(np.rint(weight / spread), -top, top).astype(np.int8), scale


def smooth(graph: ir.Graph, samples: Mapping[str, Sample], bits: int, floats: Collection[str] = ()) -> dict[str, Sample]:
    """Moves outliers of activations into weights if that brings the int8 products closer to the fp32 ones.

    SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438, eq. 3 and 4): input channel j is divided by
    s_j = max|X_j|^a / max|W_j|^(1-a), row j of the weight multiplied by it. Differences: the strength a is chosen per input by the
    squared error on `samples` (by the name of a product's input), and inputs that gain little are left alone. This is exact in fp32.
    Gives the samples of the new inputs.
    """
    editor = Editor(graph)
    groups: dict[ir.Value, list[Product]] = {}
    for item in quantizable(graph, floats):
        groups.setdefault(item.source, []).append(item)
    eased_samples = {}
    for source, items in groups.items():
        sample = samples[str(source.name)]
        factor = _best_factor(sample, [item.weight for item in items], bits)
        if factor is None:
            continue
        small = editor.constant(1 / factor, np.float32, f"{source.name}.smooth")
        eased = editor.one(items[0].node, "Mul", [source, small])
        eased.type, eased.shape = source.type, source.shape
        eased_samples[str(eased.name)] = Sample(sample.rows / factor, sample.low / factor, sample.high / factor)
        for item in items:
            weight = item.weight * factor[:, None]
            item.node.replace_input_with(0, eased)
            item.node.replace_input_with(1, editor.constant(weight, np.float32, f"{item.name}.smooth"))
    return eased_samples


def _best_factor(sample: Sample, weights: Sequence[np.ndarray], bits: int) -> np.ndarray | None:
    """The divisors of an activation's columns, (in,), or None if smoothing is not worth it."""
    rows = sample.rows[:: max(1, len(sample.rows) // ERROR_ROWS)]
    tops = np.maximum(np.maximum(-sample.low, sample.high), 1e-5)
    heavy = np.maximum(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0), 1e-5)
    exact = [rows @ weight for weight in weights]

    def error(factor: np.ndarray) -> float:
        low, high = min(0.0, float((sample.low / factor).min())), max(0.0, float((sample.high / factor).max()))
        step = np.float32((high - low) / 255 or 1.0)
        coarse = np.rint(rows / (factor * step)) * step
        total = 0.0
        for weight, product in zip(weights, exact, strict=True):
            values, scales = quantize_weight(weight * factor[:, None], 1, WeightCoding(bits))
            total += float(((coarse @ (values * scales) - product) ** 2).sum() / max(float((product**2).sum()), 1e-12))
        return total

    best, factor = WORTH * error(np.ones(rows.shape[1], dtype=np.float32)), None
    for strength in STRENGTHS:
        tried = (tops**strength / heavy ** (1 - strength)).astype(np.float32)
        now = error(tried)
        if now < best:
            best, factor = now, tried
    return factor


def int8_dynamic(graph: ir.Graph, weights: WeightCoding, floats: Collection[str] = ()) -> int:
    """Puts int8 products in the place of all `quantizable` ones; gives their number.

    Weights have a scale per output; activations are quantized by their own extremes, once for all products that read them.
    """
    editor = Editor(graph)
    chosen = quantizable(graph, floats)
    # by name, which the result of a swap takes over: one product may read what another gives
    readers = Counter(str(item.source.name) for item in chosen)
    shared: dict[ir.Value, list[ir.Value]] = {}
    for item in chosen:
        node, source, name = item.node, item.source, item.name
        values, scales = quantize_weight(item.weight, 1, weights)
        weight = editor.constant(values, np.int8, f"{name}.int8")
        scale = editor.constant(scales, np.float32, f"{name}.scale")
        if readers[str(source.name)] == 1:
            inputs = [source, weight, scale, None, item.bias]
            result = editor.one(node, "DynamicQuantizeMatMul", inputs, MICROSOFT)
        else:
            if source not in shared:
                shared[source] = editor.node(node, "DynamicQuantizeLinear", [source], outputs=3)
            value, step, zero = shared[source]
            inputs = [value, weight, step, scale, zero, None, item.bias]
            result = editor.one(node, "MatMulIntegerToFloat", inputs, MICROSOFT)
        _swap(editor, item, result)
    return len(chosen)


def int8_static(
    graph: ir.Graph, codings: Mapping[str, Coding], weights: WeightCoding, fused: bool, floats: Collection[str] = ()
) -> int:
    """Puts int8 products with known ranges in the place of all `quantizable` ones; gives their number.

    `codings`: of each product's input, by its name. `fused` uses ONNX Runtime's own integer product; otherwise standard operators
    quantize and dequantize around a MatMul, and runtimes fuse those by themselves.
    """
    editor = Editor(graph)
    chosen = quantizable(graph, floats)
    shared: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for item in chosen:
        node, source, name = item.node, item.source, item.name
        if source not in shared:
            coding = codings[str(source.name)]
            scale = editor.constant(coding.step, np.float32, f"{source.name}.scale")
            zero = editor.constant(coding.zero, np.uint8, f"{source.name}.zero")
            inside = source
            if coding.top < 255:  # fewer bits than the byte that holds them: the byte would not clamp
                ends = ((whole - coding.zero) * coding.step for whole in (0, coding.top))
                inside = editor.one(node, "Clip", [source, *(editor.constant(end, np.float32) for end in ends)])
            small = editor.one(node, "QuantizeLinear", [inside, scale, zero])
            wide = small if fused else editor.one(node, "DequantizeLinear", [small, scale, zero])
            shared[source] = (wide, scale, zero)
        values, scales = quantize_weight(item.weight, 1, weights)
        weight = editor.constant(values, np.int8, f"{name}.int8")
        factors = editor.constant(scales, np.float32, f"{name}.scale")
        value, scale, zero = shared[source]
        if fused:
            result = editor.one(node, "MatMulIntegerToFloat", [value, weight, scale, factors, zero, None, item.bias], MICROSOFT)
        else:
            zeros = editor.constant(np.zeros(len(scales)), np.int8, f"{name}.zero")
            result = editor.one(node, "MatMul", [value, editor.one(node, "DequantizeLinear", [weight, factors, zeros], axis=1)])
            if item.bias is not None:
                result = editor.one(node, "Add", [result, item.bias])
        _swap(editor, item, result)
    return len(chosen)


def quantizable_inputs(graph: ir.Graph, floats: Collection[str] = ()) -> dict[str, ir.Value]:
    """Inputs of the quantizable products, by name."""
    return {str(item.source.name): item.source for item in quantizable(graph, floats)}


def int8_embeddings(graph: ir.Graph, coding: WeightCoding = WeightCoding(), rows: int = TABLE_ROWS) -> int:
    """Stores embedding tables of at least `rows` rows in int8 with a scale per row; gives their number.

    Biases for distances stay in float: they are few, and what is added to scores decides.
    """
    editor = Editor(graph)
    count = 0
    for node in list(graph):
        table = constant_of(node.inputs[0]) if node.op_type == "Gather" else None
        if table is None or table.ndim != 2 or table.dtype != np.float32 or len(table) < rows:
            continue
        name = str(required(node.inputs[0]).name)
        if name.endswith(SHARED_BIAS):
            continue
        values, scales = quantize_weight(table, 0, coding)
        small = editor.constant(values, np.int8, f"{name}.int8")
        scale = editor.constant(scales[:, None], np.float32, f"{name}.scale")
        got = editor.one(node, "Cast", [editor.one(node, "Gather", [small, node.inputs[1]])], to=int(ir.DataType.FLOAT))
        factor = editor.one(node, "Gather", [scale, node.inputs[1]])  # (batch, seq, 1)
        editor.replace(node.outputs[0], editor.one(node, "Mul", [got, factor]))
        editor.remove(node)
        count += 1
    return count


def int8_recurrences(graph: ir.Graph, coding: WeightCoding = WeightCoding()) -> int:
    """Stores the matrices of LSTMs in int8 with a scale per row; gives their number.

    Runtimes multiply the scales in when they load the file, and compute in float: no LSTM with integer products has fixed ranges.
    """
    editor = Editor(graph)
    count = 0
    for node in [node for node in graph if node.op_type == "LSTM"]:
        for index in (1, 2):
            weight = constant_of(node.inputs[index])
            if weight is None or weight.dtype != np.float32:
                continue
            name, rows = required(node.inputs[index]).name, weight.reshape(-1, weight.shape[-1])  # (2 * 4 units, in)
            values, scales = quantize_weight(rows, 0, coding)
            small = editor.constant(values.reshape(weight.shape), np.int8, f"{name}.int8")
            scale = editor.constant(scales.reshape(*weight.shape[:2], 1), np.float32, f"{name}.scale")
            wide = editor.one(node, "Cast", [small], to=int(ir.DataType.FLOAT))
            node.replace_input_with(index, editor.one(node, "Mul", [wide, scale]))
            count += 1
    return count


def quantized_matrices(path: Path) -> int:
    """Number of Linears in a file with int8 weights; embeddings are not counted."""
    count = 0
    for node in ir.load(path).graph:
        if node.op_type in {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"}:
            count += 1
        elif node.op_type == "MatMul" and node.inputs[1] is not None:
            source = node.inputs[1].producer()
            count += source is not None and source.op_type == "DequantizeLinear"
    return count


def _swap(editor: Editor, product: Product, result: ir.Value) -> None:
    """Puts `result` in the place of a product and its bias."""
    editor.replace(product.output, result)
    if product.add is not None:
        editor.remove(product.add)
    editor.remove(product.node)
