"""Profiles: every moment and every operator belongs to one part, and the parts add up."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tiny import ENCODERS, SEPARATE, batch, tiny
from tiny_folder import sentences, write_model

from slimformer.core.anatomy import Kind
from slimformer.core.junction import Sieve
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ModelError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.forms.kronecker import Kronecker
from slimformer.measuring.components import Component, Spot, components_of
from slimformer.measuring.operators import OperatorRun, operator_runs, place_nodes
from slimformer.measuring.profile import (
    Counted,
    Profile,
    Profiled,
    Texts,
    count_parts,
    profile_onnx,
    profile_torch,
)
from slimformer.reporting.profiles import by_component, draw_profiles, draw_stacks, write_profiles
from slimformer.running.profiling import MOST_READ, encode_lines, profile_model
from slimformer.saving import checkpoint

TEXTS = Texts(2, 7)


def nodes_of(file: Path) -> list[tuple[str, Spot]]:
    """The kinds of the operators of a file, with their places."""
    graph = onnx.load(file).graph
    places = place_nodes(graph, components_of(subject_of(tiny("bert", num_hidden_layers=1))))
    return [(node.op_type, places[node.name]) for node in graph.node]


@pytest.mark.parametrize("model_type", ENCODERS)
def test_each_tick_of_the_clock_is_counted_once(model_type: str) -> None:
    """A clock that ticks once each time that it is read: the ticks of the parts are those between the first and the last reading."""
    subject = subject_of(tiny(model_type))
    ticks: list[int] = []
    counter = itertools.count()

    def clock() -> float:
        ticks.append(next(counter))
        return float(ticks[-1])

    found = profile_torch(subject, TEXTS, "tiny", rounds=1, clock=clock)
    assert found.whole_ms == 1000  # two readings of the clock
    assert found.total_ms == 1000 * (len(ticks) - 2 - 1)
    assert found.total_ms == sum(found.of(component) for component in Component)
    assert found.total_ms == sum(found.of_layer(layer) for layer in (None, 0, 1, 2))
    absent = (
        {Component.QUANTIZE, Component.SIEVES}
        if subject.anatomy.has_bottlenecks
        else {Component.QUANTIZE, Component.SIEVES, Component.BOTTLENECK}
    )
    for component in set(Component) - absent:
        assert found.of(component) > 0, component
    for layer in range(3):
        linears = {Component.LINEAR_BEFORE: 3 if model_type in SEPARATE else 1, Component.LINEAR_AFTER: 1}
        for component, count in linears.items():
            assert found.ms[Spot(component, layer)] == 1000 * count  # nothing computes inside of them
    assert not subject.model._forward_hooks
    assert found.peak(Component.FFN) >= TEXTS.batch * TEXTS.length * 24 * 4


@pytest.mark.parametrize("model_type", SEPARATE)
def test_parts_hold_all_parameters(model_type: str) -> None:
    subject = subject_of(tiny(model_type))
    counts = count_parts(subject, 7)
    assert sum(part.parameters for part in counts.values()) == subject.model.num_parameters()
    assert sum(part.bytes for part in counts.values()) == 4 * subject.model.num_parameters()
    wide, blocks = subject.anatomy.matrices["encoder.1.value"].shape[1], len(subject.anatomy.of_kind(Kind.NEURONS)) // 3
    before = 32 * (64 + wide)
    assert counts[Spot(Component.LINEAR_BEFORE, 1)] == Counted(before + 96, 4 * (before + 96), 7 * before)
    assert counts[Spot(Component.LINEAR_AFTER, 1)].macs == 7 * 32 * 32
    assert counts[Spot(Component.FFN, 1)].macs == blocks * 7 * 2 * 32 * 24
    pairs = 6 if model_type == "deberta-v2" else 2  # keys and queries of 14 distances beside those of 7 words
    assert counts[Spot(Component.CORE, 1)] == Counted(0, 0, pairs * 32 * 7 * 7)
    assert {place for place in counts if place.component is Component.REST} == set()


def test_a_model_that_was_cut_and_factored_is_counted_as_it_is() -> None:
    model = tiny("bert")
    plan = Plan(
        {"encoder.0.heads": (0,), "encoder.1.attention": (), "encoder.2.ffn": ()}, {"encoder.0.ffn_in": Kronecker((8, 2), 2)}
    )
    subject = subject_of(shrink(model, anatomy_of(model), plan))
    counts = count_parts(subject, 7)
    assert sum(part.parameters for part in counts.values()) == subject.model.num_parameters()
    assert counts[Spot(Component.CORE, 0)].macs == 2 * 8 * 7 * 7
    assert Spot(Component.CORE, 1) not in counts
    assert counts[Spot(Component.FFN, 0)].macs == 7 * (Kronecker((8, 2), 2).macs((24, 32)) + 32 * 24)
    found = profile_torch(subject, TEXTS, "cut", rounds=1)
    assert found.of_layer(2) > 0
    assert Spot(Component.FFN, 2) not in found.ms


def test_operators_without_a_parameter_follow_their_inputs() -> None:
    """By hand: products whose matrix lost its name belong where their bias does; the core follows queries; sums and norms a matrix."""
    inner = "model.bert.encoder.layer.0."
    steps = [
        ("Gather", ["model.bert.embeddings.word_embeddings.weight", "ids"], "words", Component.EMBEDDING),
        ("Cast", ["mask"], "numbers", Component.REST),
        ("LayerNormalization", ["words", "gain"], "first", Component.NORMS),
        ("DynamicQuantizeLinear", ["first"], "small", Component.QUANTIZE),
        ("MatMulIntegerToFloat", ["small", f"{inner}attention.self.query.weight.int8"], "query", Component.LINEAR_BEFORE),
        ("MatMul", ["first", "nameless"], "product", Component.LINEAR_BEFORE),
        ("Add", ["product", f"{inner}attention.self.value.bias"], "value", Component.LINEAR_BEFORE),
        ("MatMul", ["query", "value"], "scores", Component.CORE),
        ("Add", ["scores", "numbers"], "masked", Component.CORE),
        ("Softmax", ["masked"], "shares", Component.CORE),
        ("MatMul", ["shares", "other"], "mixed", Component.LINEAR_AFTER),
        ("SkipLayerNormalization", ["mixed", "first", f"{inner}attention.output.LayerNorm.weight", f"{inner}attention.output.dense.bias"],
         "second", Component.NORMS),
        ("MatMul", ["second", "wide"], "wider", Component.FFN),
        ("BiasGelu", ["wider", f"{inner}intermediate.dense.bias"], "bent", Component.FFN),
        ("MatMul", ["bent", f"{inner}output.dense.weight"], "narrow", Component.FFN),
        ("Add", ["narrow", "second"], "sum", Component.NORMS),
        ("Gemm", ["sum", "model.classifier.weight"], "logits", Component.HEAD),
    ]  # fmt: skip
    known = {name for _, inputs, _, _ in steps for name in inputs} - {made for _, _, made, _ in steps} - {"ids", "mask"}
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [made], name=made) for kind, inputs, made, _ in steps],
        "by hand",
        [],
        [],
        [helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0]) for name in sorted(known)],
    )
    places = place_nodes(graph, components_of(subject_of(tiny("bert", num_hidden_layers=1))))
    assert {name: place.component for name, place in places.items()} == {made: component for _, _, made, component in steps}
    assert {places[name].layer for name in ("query", "scores", "mixed", "second", "bent", "sum")} == {0}
    assert {places[name].layer for name in ("words", "numbers", "logits")} == {None}


def test_an_if_takes_the_time_that_is_left_without_the_operators_in_it() -> None:
    """By hand: two runs; in the second one If lies within another, and one operator begins as the outer one ends."""
    session = [{"cat": "Session", "name": "model_run", "ts": begin, "dur": dur} for begin, dur in ((0, 9), (10, 90))]
    steps = [("first", "Add", 1, 8), ("first", "Add", 11, 9), ("inner", "Add", 31, 5), ("deepest", "Add", 43, 20), ("if", "If", 41, 25),
             ("outer", "If", 30, 40), ("last", "Add", 70, 3)]  # fmt: skip
    nodes = [
        {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": kind, "output_size": "4"}}
        for name, kind, ts, dur in steps
    ]
    runs = operator_runs([*session, *nodes, {"cat": "Node", "name": "first_fence_before", "ts": 12, "dur": 1, "args": {}}])
    assert runs[0] == (9, [OperatorRun("first", 8, 4)])
    assert runs[1][0] == 90
    assert sorted(runs[1][1], key=lambda item: item.name) == [
        OperatorRun("first", 9, 4),
        OperatorRun("last", 3, 4),
        OperatorRun("outer", 40 - 5 - 25, 0),
        OperatorRun("outer>if", 25 - 20, 0),
        OperatorRun("outer>if>deepest", 20, 4),
        OperatorRun("outer>inner", 5, 4),
    ]


@pytest.mark.slow
def test_operators_of_exported_files_are_told_apart(tmp_path: Path) -> None:
    subject = subject_of(tiny("bert", num_hidden_layers=1))
    texts = {name: values.numpy() for name, values in batch(subject.model).items()}
    texts["token_type_ids"] = 0 * texts["input_ids"]
    file = tmp_path / "int8.onnx"
    Onnx(agreement=0.0).export(subject.model, [texts] * 3, file, Variant.INT8_FUSED, ("logits",))
    found = profile_onnx(file, subject, TEXTS, "int8", threads=1, rounds=2)
    for component in set(Component) - {Component.BOTTLENECK, Component.SIEVES}:
        assert found.of(component) > 0, component
    assert found.whole_ms > 0
    assert found.peak(Component.FFN) > 0
    kinds = Counter(place.component for kind, place in nodes_of(file) if "MatMul" in kind or kind == "QLinearMatMul")
    assert kinds[Component.LINEAR_BEFORE] == 3
    assert kinds[Component.LINEAR_AFTER] == 1
    assert kinds[Component.FFN] == 2
    assert kinds[Component.CORE] == 2
    with pytest.raises(ModelError, match="cannot load"):
        (tmp_path / "none.onnx").write_bytes(b"none")
        profile_onnx(tmp_path / "none.onnx", subject, TEXTS, "none", threads=1, rounds=1)


def test_tables_and_page_hold_every_part(tmp_path: Path) -> None:
    ms = {Spot(component, 0): float(number) for number, component in enumerate(Component, 1)}
    one = Profile("a-long-name-of-a-model", "PyTorch", Texts(32, 128), ms, 66.0, dict.fromkeys(ms, 2_000_000), "3 < 4 texts.")
    head, rows = by_component([one])
    assert head == ("component", "a-long-name-o.. ms", "share", "MB")
    assert rows[0] == ("embedding", "1.00", "1.5 %", "2.0")
    assert rows[-2:] == [("together", "66.00", "100.0 %", ""), ("not watched", "66.00", "100 %", "")]
    found = Profiled("model<1>", 128, {Spot(Component.FFN, 0): Counted(10, 40, 5e6)}, (one,))
    text = write_profiles(found, tmp_path).read_text(encoding="utf-8")
    assert "model&lt;1&gt;" in text
    assert "32 texts of 128 tokens" in text
    assert "PyTorch: 3 &lt; 4 texts." in text
    assert draw_stacks([one]).count("<rect") == len(Component)
    assert len(list(draw_profiles(found))) == 3


def test_inspect_profiles_on_request(tmp_path: Path, call) -> None:  # type: ignore[no-untyped-def]
    tiny("bert").save_pretrained(tmp_path / "model")
    tiny("t5").save_pretrained(tmp_path / "t5")
    status, out, _ = call(
        "inspect", tmp_path / "model", tmp_path / "model", "--profile", "--batch", 1, "--length", 5, "--out", tmp_path
    )
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80 or "page:" in out
    for text in ("attention core", "together", "not watched", "1 text of 5 tokens"):
        assert text in out
    assert (tmp_path / "profile.html").is_file()
    for arguments, message in (
        (("model", "--batch", 1), "add --profile"),
        (("model", "--texts", tmp_path / "few"), "add --profile"),
        (("model", "--profile", "--length", 65), "positions for 64 tokens"),
        (("model", "model/config.json", "--profile"), "no .onnx file"),
        (("t5", "--profile"), "only encoders are profiled"),
    ):
        first, *rest = arguments
        rest = [tmp_path / item if isinstance(item, str) and "/" in item else item for item in rest]
        status, _, err = call("inspect", tmp_path / first, *rest)
        assert (status, message in " ".join(err.split())) == (2, True)


def test_a_profile_reads_the_texts_that_are_given(tmp_path: Path, call) -> None:  # type: ignore[no-untyped-def]
    """Pairs are cut as pairs, batches are whole, and of a model that decides by text it says what becomes of them."""
    model = write_model(tmp_path / "model", trained=False)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"{text}\t{text}" if row % 2 else text for row, (text, _) in enumerate(sentences(70, seed=1))))
    rows = encode_lines(file, model, 12)
    assert len(rows) == MOST_READ
    assert max(map(max, rows.columns["token_type_ids"])) == 1
    assert max(rows.lengths()) == 12
    few = tmp_path / "few.txt"
    few.write_text("\n".join(text for text, _ in sentences(5, seed=1)))
    found = profile_model(model, lengths=(12,), batches=(2, 32, 64), threads=1, rounds=1, texts=few)
    assert [profile.load for profile in found.profiles] == [Texts(2, 12, own=True), Texts(5, 12, own=True)]
    assert found.profiles[0].note.startswith("4 given texts, ")
    subject = subject_of(checkpoint.load(model))
    plan = Plan(junctions={"encoder.0": Sieve(0.5)})
    checkpoint.save(shrink(subject.model, subject.anatomy, plan), plan, tmp_path / "sieved", tokenizer_from=model)
    status, out, _ = call("inspect", tmp_path / "sieved", "--profile", "--batch", 4, "--length", 12, "--texts", few)
    assert status == 0
    text = " ".join(out.split())
    for words in (
        "4 texts of at most 12 tokens",
        "4 given texts",
        "behind the attention of layer 0: 5",
        "M MACs a text",
        "MACs: on",
    ):
        assert words in text
    (tmp_path / "none.txt").write_text("\n")
    status, _, err = call("inspect", model, "--profile", "--texts", tmp_path / "none.txt")
    assert (status, "no texts" in err) == (2, True)
