"""ONNX files of other tools: other names, number types and fixed shapes are taken with a word, and what cannot be right is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_export import WEIGHTS, data, export

from slimformer.errors import ModelError
from slimformer.running.bench import bench
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.tasks.classification import Classification

INPUTS = {
    "input_ids": np.array([[4, 5, 0], [2, 5, 3], [2, 3, 0]]),  # great film [PAD]; dull film fine; dull fine [PAD]
    "attention_mask": np.array([[1, 1, 0], [1, 1, 1], [1, 1, 0]]),
    "token_type_ids": np.zeros((3, 3), dtype=np.int64),
}
LOGITS = np.array([[0.0, 3.0], [2.0, 1.0], [2.0, 1.0]])
INT32, INT64, FLOAT = TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT


def bag(
    folder: Path,
    *,
    names: tuple[str, ...] = ("input_ids", "attention_mask"),
    shape: tuple[Any, ...] = ("batch", "seq"),
    kind: int = INT64,
    out: str = "logits",
    out_kind: int = FLOAT,
    table: np.ndarray | None = None,
    more: tuple[str, ...] = (),
    version: tuple[int, int] = (17, 8),
) -> Path:
    """The folder of `tiny_export` with a model.onnx of another kind: `names` of token ids and mask, `more` inputs that are added up."""
    export(folder)
    table = np.array(list(WEIGHTS.values()), dtype=np.float32) if table is None else table
    nodes = [
        helper.make_node("Gather", ["table", names[0]], ["words"]),
        helper.make_node("Cast", [names[1]] if len(names) > 1 else [names[0]], ["mask_"], to=FLOAT),
        helper.make_node("Unsqueeze", ["mask_", "last"], ["wide"]),
        helper.make_node("Mul", ["words", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
    ]
    last = "sum"
    for name in more:  # adds the sum of an input to the logits
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_"], to=FLOAT),
            helper.make_node("ReduceSum", [f"{name}_", "middle"], [f"{name}_sum"], keepdims=1),
            helper.make_node("Add", [last, f"{name}_sum"], [f"{name}_added"]),
        ]
        last = f"{name}_added"
    nodes.append(helper.make_node("Cast", [last], [out], to=out_kind))
    graph = helper.make_graph(
        nodes,
        "bag",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name in (*names, *more)],
        [helper.make_tensor_value_info(out, out_kind, [shape[0], 2])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([2]), "last"),
            numpy_helper.from_array(np.array([1]), "middle"),
        ],
    )
    opset, ir = version
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"kind": INT32}, ""),
        ({"out_kind": TensorProto.FLOAT16}, ""),
        ({"out_kind": TensorProto.DOUBLE}, ""),
        ({"more": ("token_type_ids",)}, ""),
        ({"names": ("ids", "mask")}, "ids for input_ids, mask for attention_mask"),
        ({"names": ("input_word_ids:0", "input_mask:0"), "kind": INT32}, "input_word_ids:0 for input_ids"),
        ({"out": "output_0"}, "its output 'output_0' of shape [batch, 2] is taken for logits"),
        ({"shape": (1, 16)}, "the fixed length of 16 tokens"),
        ({"shape": (2, "seq")}, "the fixed batch size 2"),
        ({"shape": ("batch", 3)}, "the fixed length of 3 tokens"),
        ({"shape": (8, 4), "kind": INT32, "names": ("input_ids", "input_mask")}, "the fixed batch size 8"),
    ],
)
def test_a_file_of_another_tool_gives_its_logits(
    changes: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = OnnxRuntime().load(bag(tmp_path, **changes), 1)
    for rows in (slice(None), slice(1), slice(1, None)):
        outputs = run({name: array[rows] for name, array in INPUTS.items()})
        assert {name: array.dtype for name, array in outputs.items()} == {"logits": np.float32}
        np.testing.assert_allclose(outputs["logits"], LOGITS[rows], atol=1e-6)
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)
    assert caplog.text.count(told) == 1 or not told


def test_answers_for_words_that_were_filled_up_are_cut_off(tmp_path: Path) -> None:
    export(tmp_path)
    table = np.array(list(WEIGHTS.values()), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "tagger",
        [helper.make_tensor_value_info(name, INT64, ["batch", 8]) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 8, 2])],
        [numpy_helper.from_array(table, "table")],
    )
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    np.testing.assert_allclose(OnnxRuntime().load(file, 1)(INPUTS)["logits"], table[INPUTS["input_ids"]])


@pytest.mark.parametrize(
    ("model_type", "expected"), [("bert", [[3, 6], [5, 4], [5, 4]]), ("roberta", [[3 + 3, 9], [8, 7], [5, 4]])]
)
def test_positions_are_counted(model_type: str, expected: list, tmp_path: Path) -> None:
    path = bag(tmp_path, more=("position_ids",))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    got = OnnxRuntime().load(path, 1)(INPUTS)["logits"]
    pad_rows = [3 if model_type == "bert" else 1 + 2, 3 if model_type == "bert" else 1 + 2 + 3]
    np.testing.assert_allclose(got[:2], LOGITS[:2] + np.array(pad_rows)[:, None])


@pytest.mark.parametrize(
    ("changes", "what", "facts"),
    [
        (
            {"more": ("pixel_values",)},
            "has an input that nothing is known to give: 'pixel_values'",
            "input_ids, attention_mask",
        ),
        ({"names": ("input_ids",), "shape": (1, 16)}, r"fixed shape, \[1, 16\], and no attention mask", ""),
        ({"shape": (1, 2)}, r"has the fixed shape \[1, 2\], and an input has 3 tokens", ""),
        ({"shape": (16, 10**9)}, "fixed shape .16, 1000000000., which no batch can be filled up to", ""),
        ({"shape": (10**9, "seq")}, "which no batch can be filled up to", ""),
        ({"table": np.ones((4, 2), dtype=np.float32)}, r"cannot run .*model\.onnx", "indices element out of data bounds"),
        ({"version": (17, 99)}, r"cannot load .*model\.onnx", "IR version"),
        ({"version": (99, 8)}, r"cannot load .*model\.onnx", "opset"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_file_and_the_cause(
    changes: dict, what: str, facts: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        OnnxRuntime().load(bag(tmp_path, **changes), 1)(INPUTS)
    assert "model.onnx" in caught.value.what
    assert facts in str(caught.value)
    assert caught.value.help


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = bag(tmp_path, shape=("batch", "tokens"))
    path.write_bytes(path.read_bytes().replace(b"tokens", b"toke\xe8s"))
    with pytest.raises(ModelError, match=r"cannot load .*model\.onnx"):
        OnnxRuntime().load(path, 1)


def test_weights_that_were_not_copied_along_are_named(tmp_path: Path) -> None:
    path = bag(tmp_path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=60)
    assert OnnxRuntime().load(path, 1)(INPUTS)["logits"].shape == (3, 2)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"cannot load .*model\.onnx") as caught:
        OnnxRuntime().load(path, 1)
    assert "copy the files of its weights" in caught.value.help


def test_operators_of_another_domain_are_told(tmp_path: Path) -> None:
    path = bag(tmp_path)
    model = onnx.load(path)
    model.graph.node[0].domain = "my.company"
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"cannot load .*model\.onnx") as caught:
        OnnxRuntime().load(path, 1)
    assert "my.company" in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_no_numbers_are_never_scored(bad: float, tmp_path: Path) -> None:
    table = np.array(list(WEIGHTS.values()), dtype=np.float32)
    table[list(WEIGHTS).index("great")] = bad
    bag(tmp_path / "broken", table=table)
    with pytest.raises(ModelError, match=r"gives no finite outputs: 1 of 5 rows of 'logits'[\s\S]*the first: 'great film'"):
        bench([tmp_path / "broken"], Classification(data=data(tmp_path / "data")), seconds=0.01, wait_seconds=0)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"out": "other", "out_kind": INT64}, "has no output 'logits'"),
        ({"table": np.ones((6, 3), dtype=np.float32)}, "gives 'logits' of another shape"),
    ],
)
def test_outputs_that_the_task_cannot_read_are_told(changes: dict, what: str, tmp_path: Path) -> None:
    bag(tmp_path / "broken", **changes)
    with pytest.raises(ModelError, match=what) as caught:
        bench([tmp_path / "broken"], Classification(data=data(tmp_path / "data")), seconds=0.01, wait_seconds=0)
    assert "its outputs:" in str(caught.value)
