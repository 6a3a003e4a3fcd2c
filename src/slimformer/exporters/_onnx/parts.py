"""Three graphs of a model whose lower layers keep two texts apart: of the passage, of the question, and of what both meet in.

`split` cuts a finished graph at the place where the segments meet, so that the three compute what the whole one does, in its precision
and with its operators. The lower part is there twice, for a text that is the second segment and for one that is the first. Each file
names the whole one by a digest in its metadata: hidden states that one model made are of no use to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from slimformer.core.dividing import MET, SEGMENTS, segments_of
from slimformer.errors import ExportError
from slimformer.exporters._onnx.graph import Editor, required, turned_values
from slimformer.exporters._onnx.parity import REPORT, fill_inputs, run_graph
from slimformer.exporters._onnx.storing import ONE_FILE_BYTES, open_model, save_graph, weights_name
from slimformer.exporters.base import MODEL_DIGEST, PARTS, Arrays, files_of, part_path
from slimformer.families.base import Subject
from slimformer.files import whole_group

HIDDEN = "hidden"  # the output of the lower two: (batch, seq, hidden)
IDS, MASK = "input_ids", "attention_mask"


def can_split(program: ir.Model) -> bool:
    """Whether the segments of a graph's inputs meet at a known place."""
    return _found(program.graph, MET) is not None


def split(program: ir.Model) -> dict[str, ir.Model]:
    """The three graphs, by name; the one that is given stays as it is.

    `passage` and `question`: (input_ids, attention_mask) -> hidden. `joint`: (question_hidden, passage_hidden, question_mask,
    passage_mask) -> the outputs of the whole graph; an output with a number for each token has those of the question first.
    """
    if not can_split(program):
        raise ExportError(
            "the segments of this file's inputs attend to each other in all layers: it has no part that a passage alone decides.",
            help="train with decomposed_attention, then export again.",
        )
    return {"passage": _lower(program.clone(), 1), "question": _lower(program.clone(), 0), "joint": _joint(program.clone())}


def _lower(program: ir.Model, segment: int) -> ir.Model:
    """The layers below, for texts that are this segment alone."""
    graph = program.graph
    editor, first, met = Editor(graph), next(iter(graph)), _value(graph, MET)
    ids = _input(graph, IDS)
    whole = editor.one(first, "Expand", [editor.constant(segment, np.int64), editor.one(first, "Shape", [ids])])
    for value in (_value(graph, SEGMENTS), _found(graph, "token_type_ids")):
        if value is not None:
            value.replace_all_uses_with(whole)
    last = list(graph)[-1]
    end = ir.node("Transpose", [met], {"perm": [1, 0, 2]}) if met in turned_values(graph) else ir.node("Identity", [met])
    graph.insert_after(last, end)
    (output,) = end.outputs
    output.name, output.type, output.shape = HIDDEN, ir.TensorType(ir.DataType.FLOAT), _shape("seq", _width(met))
    graph.outputs.clear()
    graph.outputs.append(output)
    return _finished(program, [IDS, MASK])


def _joint(program: ir.Model) -> ir.Model:
    """The layers above, for the hidden states of a question and of a passage."""
    graph = program.graph
    met = _value(graph, MET)
    turned, width = met in turned_values(graph), _width(met)
    texts = ("question", "passage")
    hidden = [_new_input(graph, f"{text}_hidden", ir.DataType.FLOAT, _shape(text, width)) for text in texts]
    masks = [_new_input(graph, f"{text}_mask", ir.DataType.INT64, ir.Shape(["batch", text])) for text in texts]
    editor, first = Editor(graph), next(iter(graph))
    both, mask = editor.one(first, "Concat", hidden, axis=1), editor.one(first, "Concat", masks, axis=1)
    both = editor.one(first, "Transpose", [both], perm=[1, 0, 2]) if turned else both
    both.type, both.shape = met.type, met.shape
    mask.type, mask.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch", None])
    met.replace_all_uses_with(both)
    for name in (MASK, IDS):  # of the ids only the shape is read above
        _input(graph, name).replace_all_uses_with(mask)
    return _finished(program, [str(value.name) for value in (*hidden, *masks)])


def _finished(program: ir.Model, inputs: Sequence[str]) -> ir.Model:
    """The program without what its outputs do not need, with these inputs; ExportError if they do not suffice."""
    graph = program.graph
    common.RemoveUnusedNodesPass()(program)
    common.RemoveUnusedOpsetsPass()(program)
    graph.sort()
    others = [value for value in graph.inputs if value.name not in inputs]
    if any(value.uses() for value in others):
        raise ExportError(f"a part of the graph reads {others[0].name}, which it should not.", help=REPORT)
    order = {name: value for name in inputs for value in graph.inputs if value.name == name}
    graph.inputs.clear()
    graph.inputs.extend(order.values())
    return program


def _found(graph: ir.Graph, name: str) -> ir.Value | None:
    values = (*graph.inputs, *(value for node in graph for value in node.outputs))
    return next((value for value in values if value.name == name), None)


def _value(graph: ir.Graph, name: str) -> ir.Value:
    return required(_found(graph, name))


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _width(met: ir.Value) -> int:
    assert met.shape is not None, "the trace knows the shape of each hidden state"
    return int(met.shape[-1])  # type: ignore[arg-type]


def _shape(seq: str, width: int) -> ir.Shape:
    return ir.Shape(["batch", seq, width])


def _new_input(graph: ir.Graph, name: str, kind: ir.DataType, shape: ir.Shape) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=shape)
    graph.inputs.append(value)
    return value


# -- Files -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartFiles:
    """The three files of a whole one, and how far they are from it on the inputs that they were proved with."""

    paths: Mapping[str, Path]
    digest: str
    max_difference: float
    rows: int


def write_parts(
    whole: Path,
    subject: Subject,
    batches: Sequence[Arrays],
    outputs: Sequence[str],
    tolerance: float,
    one_file_bytes: int = ONE_FILE_BYTES,
) -> PartFiles:
    """Writes the three files of an exported one beside it, and compares them with it on every pair in `batches`.

    `tolerance`: as a share of the largest output; `one_file_bytes`: as in `Onnx`. ExportError if they disagree; no file is left behind
    then.
    """
    program, name = ir.load(whole), digest_of(whole)
    paths, made = {part: part_path(whole, part) for part in PARTS}, split(program)
    try:
        for part, piece in made.items():
            piece.metadata_props[MODEL_DIGEST] = name
            with whole_group(paths[part], [weights_name(paths[part].name)]) as file:
                save_graph(piece, file, one_file_bytes)
        sessions = {part: open_model(path) for part, path in paths.items()}
        worst, rows = check_parts(sessions, open_model(whole), subject, batches, outputs, tolerance)
    except BaseException:
        for path in paths.values():
            for file in files_of(path):
                file.unlink(missing_ok=True)
        raise
    return PartFiles(paths, name, worst, rows)


def digest_of(whole: Path) -> str:
    """Sixteen hexadecimal digits that name a model file by its bytes and those of its weights."""
    found = hashlib.sha256()
    for path in files_of(whole):
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:16]


def check_same_model(sessions: Mapping[str, Any]) -> str:
    """The digest of the model that three sessions are parts of; ExportError if they are not of one."""
    found = {part: session.get_modelmeta().custom_metadata_map.get(MODEL_DIGEST, "none") for part, session in sessions.items()}
    if len(set(found.values())) != 1 or "none" in found.values():
        raise ExportError(
            "these files are not parts of one model: hidden states of one would mean nothing to another.",
            facts=[f"{part}: {name}" for part, name in found.items()],
            help="take the three files that were written together, and compute kept passages again.",
        )
    return next(iter(found.values()))


def check_parts(
    sessions: Mapping[str, Any],
    whole: Any,
    subject: Subject,
    batches: Sequence[Arrays],
    outputs: Sequence[str],
    tolerance: float,
) -> tuple[float, int]:
    """The largest difference between the three graphs and the whole one, and how many pairs were compared; ExportError beyond
    `tolerance` of the largest output."""
    check_same_model(sessions)
    (junction,) = subject.anatomy.meeting.values()
    padding = subject.model.config.pad_token_id
    worst, top, rows = 0.0, 1.0, 0
    for batch in batches:
        inputs = fill_inputs(subject.inputs, batch)
        ids, real = inputs[IDS], inputs[MASK] == 1
        types = torch.from_numpy(inputs["token_type_ids"]) if "token_type_ids" in inputs else None
        segments = segments_of(junction, torch.from_numpy(ids), types, padding).numpy()
        pairs = np.flatnonzero(((segments == 1) & real).any(1))
        if not len(pairs):
            continue
        where = [real[pairs] & (segments[pairs] == segment) for segment in (0, 1)]  # of the question, of the passage
        alone = [_alone(ids[pairs], chosen) for chosen in where]
        hidden = [
            run_graph(sessions[part], (IDS, MASK), text, (HIDDEN,))[HIDDEN]
            for part, text in zip(("question", "passage"), alone, strict=True)
        ]
        feeds = {"question_hidden": hidden[0], "passage_hidden": hidden[1]}
        feeds |= {"question_mask": alone[0][MASK], "passage_mask": alone[1][MASK]}
        got = dict(zip(outputs, sessions["joint"].run(list(outputs), feeds), strict=True))
        expected = run_graph(whole, subject.inputs, batch, outputs)
        joined = np.concatenate([alone[0][MASK], alone[1][MASK]], 1) == 1
        for name in outputs:
            one, other = got[name], expected[name][pairs]
            if expected[name].shape == ids.shape:  # a number for each token
                one, other = one[joined], other[where[0] | where[1]]
            worst, top = max(worst, float(np.abs(one - other).max())), max(top, float(np.abs(other).max()))
        rows += len(pairs)
    if not rows:
        raise ExportError("no input to prove the parts with holds two texts.", help="give some real pairs.")
    if worst > tolerance * top:
        raise ExportError(
            f"the parts of the graph differ from the whole by {worst:.2g}.", facts=[f"largest output: {top:.3g}"], help=REPORT
        )
    return worst, rows


def _alone(ids: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The chosen tokens of each row, from the left, with padding behind: ids and mask."""
    longest = int(chosen.sum(1).max())
    made = {IDS: np.zeros((len(ids), longest), np.int64), MASK: np.zeros((len(ids), longest), np.int64)}
    for row, (tokens, kept) in enumerate(zip(ids, chosen, strict=True)):
        count = int(kept.sum())
        made[IDS][row, :count], made[MASK][row, :count] = tokens[kept], 1
    return made
