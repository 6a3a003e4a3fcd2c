"""Packs an encoder of the BERT kind for the kernels: one array of bytes that holds all tables and matrices.

kernels/src/encoder_file.cc gives the layout, byte by byte. Weights become int8 with a scale for each output, words and positions int8
with a scale for each of them; all else stays in float. Layers that were cut to nothing take no bytes and no time.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from slimformer.core.anatomy import Kind
from slimformer.errors import ExportError
from slimformer.exporters._onnx.int8 import WeightCoding, quantize_weight
from slimformer.families.base import Subject, subject_of
from slimformer.families.bert import OFFSET
from slimformer.forms.codebook import CodebookTable
from slimformer.kernels.library import ALIGNMENT, aligned, encoder_digest, pack_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION_PACKED = 2  # 1 had neither codes nor positions in int8
FLAG_FIRST_ONLY, FLAG_POSITIONS_BY_ID, FLAG_CODES, FLAG_INT8_POSITIONS = 1, 2, 4, 8
CODES_OF_ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "gelu_fast": 3}
# What a product costs for each weight that is stored, against a dense one, measured on AVX-512 VNNI (docs/decisions/0020-kernels.md):
# a block of one output loads as much as it computes, and a tile of many inputs does not fit the first cache.
COSTS: dict[int, tuple[float, float]] = {0: (1.0, 1.0), 1: (1.35, 1.7), 2: (1.1, 1.15), 4: (1.05, 1.05)}
WIDE_INPUTS = 512
KERNEL_TYPES = ("bert", "electra", "distilbert", *OFFSET)


def pack_encoder(model: PreTrainedModel, *, first_only: bool, block_rows: int | Literal["auto"] = "auto") -> np.ndarray:
    """The encoder of a model, cut or not, as bytes; without its head.

    first_only: only the hidden states of first tokens are wanted, as classifiers read them. block_rows: the blocks that matrices are
    stored in (0: dense); "auto" takes what is expected to be fastest for each. ExportError if the model is of another kind.
    """
    subject = subject_of(model)
    config = model.config
    if config.model_type not in KERNEL_TYPES:
        raise ExportError(
            f"the kernels compute post-norm encoders; {config.model_type} is none.", help="export standard files."
        )
    modules = dict(model.named_modules())
    if subject.anatomy.junctions:
        anatomy = subject.anatomy
        what = "exits behind" if anatomy.exits else "sieves for words in" if anatomy.sieves else "segments that attend apart in"
        raise ExportError(
            f"the kernels compute all words in all layers, and this model has {what} some.", help="export standard files."
        )
    if subject.anatomy.meeting:
        raise ExportError(
            "the kernels let each token attend to all others, and in this model segments attend apart.",
            help="export standard files.",
        )
    if subject.anatomy.patterns:
        raise ExportError(
            "the kernels compute all heads from queries and keys, and some of this model attend by position or within a span.",
            help="export standard files.",
        )
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    if f"{prefix}embeddings_project" in modules:
        raise ExportError("the kernels do not project embeddings, as this model does.", help="export standard files.")
    skeleton = subject.family.skeleton
    words = _words(modules, f"{prefix}{skeleton.words[0]}")
    positions = _float(modules, f"{prefix}embeddings.position_embeddings", "weight")
    has_types = f"{prefix}embeddings.token_type_embeddings" in modules
    types = (
        _float(modules, f"{prefix}embeddings.token_type_embeddings", "weight") if has_types else np.zeros((0, 0), np.float32)
    )
    norm = f"{prefix}{skeleton.embedding_norm}"
    tables = (*words.sections, _scaled(positions), types if has_types else None)
    sections: list[np.ndarray | None] = [*tables, _norm(modules, norm)]
    head_dim = next((site.slices[0].unit for site in subject.anatomy.sites.values() if site.kind is Kind.HEADS), 1)
    stack = subject.anatomy.stacks[0]
    for index in range(len(stack.layers)):
        sections += _layer(subject, modules, index, head_dim, block_rows)
    activation = CODES_OF_ACTIVATIONS.get(str(getattr(config, "hidden_act", None) or getattr(config, "activation", "")))
    if activation is None:
        raise ExportError("the kernels know GELU and ReLU; the model has another activation.", help="export standard files.")
    offset = config.model_type in OFFSET
    return _file(
        sections,
        activation=activation,
        layers=len(stack.layers),
        hidden=positions.shape[1],
        head_dim=head_dim,
        vocabulary=words.size,
        positions=len(positions),
        types=len(types),
        epsilon=modules[norm].eps,
        first_position=config.pad_token_id + 1 if offset else 0,
        flags=FLAG_FIRST_ONLY * first_only | FLAG_POSITIONS_BY_ID * offset | FLAG_CODES * words.coded | FLAG_INT8_POSITIONS,
    )


class _Words(NamedTuple):
    """The two sections of a word table: int8 numbers and scales, or codes and the pieces that they name."""

    sections: tuple[np.ndarray, np.ndarray]
    size: int
    coded: bool


def _words(modules: dict[str, Any], name: str) -> _Words:
    table = modules[name]
    if isinstance(table, CodebookTable):
        codes = np.ascontiguousarray(table.codes.cpu().numpy())
        return _Words((codes, _scaled(table.book.detach().float().cpu().numpy())), len(codes), True)
    numbers, scales = quantize_weight(_float(modules, name, "weight"), 0, WeightCoding())
    return _Words((numbers, scales), len(numbers), False)


def _scaled(numbers: np.ndarray) -> np.ndarray:
    """The bytes of the scale of each row, and then those of the rows in int8."""
    values, scales = quantize_weight(numbers, 0, WeightCoding())
    return np.concatenate(
        [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in (scales.astype(np.float32), values)]
    )


def best_block_rows(values: np.ndarray) -> int:
    """The blocks in which a matrix of int8 values, (outputs, inputs), is expected to be multiplied fastest; 0: dense."""
    outputs, inputs = values.shape
    wide = inputs > WIDE_INPUTS
    times = {}
    for rows, cost in COSTS.items():
        share = 1.0
        if rows:
            grid = np.zeros((-(-outputs // rows) * rows, -(-inputs // 4) * 4), bool)
            grid[:outputs, :inputs] = values != 0
            share = float(grid.reshape(-1, rows, grid.shape[1] // 4, 4).any(axis=(1, 3)).mean())
        times[rows] = share * cost[wide]
    return min(times, key=times.__getitem__)


def _layer(
    subject: Subject, modules: dict[str, Any], index: int, head_dim: int, block_rows: int | Literal["auto"]
) -> list[np.ndarray | None]:
    """The sections of one layer; None in the place of those of a sublayer that is gone."""
    matrices, skeleton = subject.anatomy.matrices, subject.family.skeleton
    layer = subject.anatomy.stacks[0].layers[index]

    def packed(names: tuple[str, ...], factor: float = 1.0) -> np.ndarray:
        found = [matrices[f"encoder.{index}.{name}"].module for name in names]
        weight = np.concatenate([_float(modules, name, "weight") for name in found])
        bias = np.concatenate([_float(modules, name, "bias") for name in found])
        values, scales = quantize_weight(weight, 0, WeightCoding())
        rows = best_block_rows(values) if block_rows == "auto" else block_rows
        return pack_weights(values, scales * np.float32(factor), bias * np.float32(factor), rows)

    sections: list[np.ndarray | None] = [None] * 7
    if f"encoder.{index}.query" in matrices:
        scale = math.log2(math.e) / math.sqrt(head_dim)
        sections[:3] = [packed(("query",), scale), packed(("key", "value")), packed(("attention_out",))]
        sections[3] = _norm(modules, f"{layer}.{skeleton.attention.norm}")
    if f"encoder.{index}.ffn_in" in matrices:
        sections[4:] = [packed(("ffn_in",)), packed(("ffn_out",)), _norm(modules, f"{layer}.{skeleton.ffn.norm}")]
    return sections


def _float(modules: dict[str, Any], name: str, part: str) -> np.ndarray:
    """A parameter of a plain Linear, Embedding or norm."""
    from torch import nn

    module = modules[name]
    if not isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
        raise ExportError(f"{name} is no plain matrix, and the kernels know no other form.", help="export standard files.")
    return np.ascontiguousarray(getattr(module, part).detach().float().cpu().numpy())


def _norm(modules: dict[str, Any], name: str) -> np.ndarray:
    return np.stack([_float(modules, name, "weight"), _float(modules, name, "bias")])


def _file(sections: list[np.ndarray | None], **numbers: Any) -> np.ndarray:
    """Header, directory and sections."""
    start = _up(64 + 16 * len(sections))
    directory: list[tuple[int, int]] = []
    for section in sections:
        directory.append((start, section.nbytes) if section is not None else (0, 0))
        start += _up(section.nbytes) if section is not None else 0
    packed = aligned(start)
    header = struct.pack(
        "<8sHH6If2I",
        b"SLIMENCO",
        VERSION_PACKED,
        *(numbers[name] for name in ("activation", "layers", "hidden", "head_dim", "vocabulary", "positions", "types")),
        *(numbers[name] for name in ("epsilon", "first_position", "flags")),
    )
    packed[:64] = np.frombuffer(header + struct.pack("<QQ", start, 0), np.uint8)
    packed[64 : 64 + 16 * len(sections)] = np.asarray(directory, "<u8").reshape(-1).view(np.uint8)
    for section, (at, size) in zip(sections, directory, strict=True):
        if section is not None:
            packed[at : at + size] = np.ascontiguousarray(section).reshape(-1).view(np.uint8)
    packed[56:64] = np.frombuffer(struct.pack("<Q", encoder_digest(packed)), np.uint8)
    return packed


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
