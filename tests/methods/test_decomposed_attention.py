"""Decomposed attention: whom a token may attend to, where a passage stands, what is kept of it, what is exported and what is refused."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import WEIGHT_BITS, tiny
from tiny_folder import write_data, write_model, write_tokenizer
from toy_task import Toy

from slimformer.core import cost
from slimformer.core.apart import Apart
from slimformer.core.dividing import MET, SEGMENTS, divide, meeting_seen, segment_positions, segments_of, unite
from slimformer.core.junction import Exit, junction_from_data
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.errors import ExportError, PlanError, RecipeError, TargetError
from slimformer.exporters._onnx import parts
from slimformer.exporters.base import PARTS, Variant, part_path
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.attention import quick_attention
from slimformer.hooks.capture import Capture, capturing
from slimformer.log import Log
from slimformer.methods.base import Progress, Step
from slimformer.methods.decomposed_attention import DecomposedAttention
from slimformer.methods.distillation import Distillation
from slimformer.methods.early_exit import EarlyExit
from slimformer.reporting.inspection import inspect
from slimformer.running.bundle import Run
from slimformer.running.order import conflicts
from slimformer.running.preflight import check_kept, preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Export, Recipe
from slimformer.running.rivals import without_cuts
from slimformer.running.stages import advance
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification
from slimformer.testing.checks import tiny_context
from slimformer.training.stage import Train, TrimVocabulary

END, START, PAD = 2, 6, 1
FIRST = {"roberta": 2, "xlm-roberta": 2, "camembert": 2}  # they count positions from there
TYPES = ("bert", "roberta", "electra", "distilbert")
QUESTIONS = "AutoModelForQuestionAnswering"


def junction_of(model_type):
    return Apart(START, None if model_type in ("bert", "electra") else END, FIRST.get(model_type, 0))


def divided(model_type="bert", layers=2, keep=None, **changes):
    """A tiny model whose lower layers are divided, and its plan."""
    model = tiny(model_type, **changes)
    plan = Plan(keep or {}, junctions={f"encoder.{layers - 1}": junction_of(model_type)})
    return shrink(model, anatomy_of(model), plan), plan


def row(model_type, question, passage):
    """Ids and segments of a pair, as the tokenizers of these models write it."""
    between = [END, END] if model_type == "roberta" else [END]
    ids = [3, *question, *between, *passage, END]
    return ids, [0] * (len(question) + 2) + [1] * (len(ids) - len(question) - 2)


def pairs(model_type, shapes=((3, 4, 6), (1, 2, 3), (4, 5, 2)), seed=0):
    """Batches of pairs with padding: rows, most tokens of a question, most of a passage."""
    generator, made = np.random.default_rng(seed), []
    for rows, longest, deepest in shapes:
        found = [
            row(
                model_type,
                *(generator.integers(5, 99, generator.integers(1, most + 1)).tolist() for most in (longest, deepest)),
            )
            for _ in range(rows)
        ]
        width = max(len(ids) for ids, _ in found)
        made.append(
            {
                "input_ids": np.array([ids + [PAD] * (width - len(ids)) for ids, _ in found]),
                "attention_mask": np.array([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in found]),
                "token_type_ids": np.array([types + [0] * (width - len(types)) for _, types in found]),
            }
        )
    return made


def feed(model, inputs):
    return {name: torch.from_numpy(inputs[name]) for name in subject_of(model).inputs}


# -- Whom a token may attend to --------------------------------------------------------------------------------------------------


def alone(model, model_type, ids, segment, layers):
    """The hidden states of one text by itself, at the positions that the rule gives it, by a plain model."""
    places = torch.arange(len(ids))[None] + (START if segment else 0) + FIRST.get(model_type, 0)
    given = {"input_ids": torch.tensor([ids]), "position_ids": places}
    if "token_type_ids" in subject_of(model).inputs:
        given["token_type_ids"] = torch.full((1, len(ids)), segment)
    with capturing(model, anatomy_of(model), {Capture.HIDDEN}) as recorder:
        model(**given)
        return recorder.take({}).hidden[layers][0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", [*TYPES, "xlm-roberta", "camembert"])
def test_each_text_is_computed_as_if_it_stood_alone(model_type, attention):
    plain = tiny(model_type)
    model, _ = divided(model_type)
    model.config._attn_implementation = attention
    for inputs in pairs(model_type):
        with torch.no_grad(), meeting_seen(model) as seen:
            model(**feed(model, inputs))
        for number, (ids, real) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"] == 1, strict=True)):
            for segment in (0, 1):
                chosen = real & (seen[SEGMENTS][number].numpy() == segment)
                assert chosen.sum() == (inputs["token_type_ids"][number][real] == segment).sum()
                with torch.no_grad():
                    expected = alone(plain, model_type, ids[chosen].tolist(), segment, 2)
                torch.testing.assert_close(seen[MET][number][chosen], expected, atol=1e-5, rtol=1e-4)


def test_texts_see_each_other_above_the_junction_and_not_below():
    model, _ = divided()
    first, second = (
        dict(zip(("input_ids", "token_type_ids"), row("bert", question, [30, 31, 32]), strict=True))
        for question in ([10, 11], [40, 41])
    )
    with capturing(model, anatomy_of(model), {Capture.HIDDEN}) as recorder, torch.no_grad():
        states = []
        for given in (first, second):
            model(**{name: torch.tensor([value]) for name, value in given.items()})
            states.append([state[0, 4:] for state in recorder.take({}).hidden])
    gaps = [float((one - other).abs().max()) for one, other in zip(*states, strict=True)]
    assert max(gaps[:3]) < 1e-5
    assert gaps[3] > 1e-2


def test_masks_of_all_kinds_give_the_same_numbers_and_gradients():
    model, _ = divided(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs = feed(model, pairs("bert")[0])
    whole = {name: value[:1] for name, value in inputs.items()}  # the longest row, or one with padding
    for given in (inputs, {**whole, "attention_mask": torch.ones_like(whole["attention_mask"])}):
        outputs, gradients = [], []
        for attention in ("sdpa", "eager", "ours"):
            model.config._attn_implementation = "sdpa" if attention == "ours" else attention
            model.zero_grad()
            with quick_attention(model) if attention == "ours" else torch.enable_grad():
                logits = model(**given).logits
                logits.sum().backward()
            outputs.append(logits.detach())
            gradients.append(model.bert.encoder.layer[0].attention.self.key.weight.grad.clone())
        for values in (outputs, gradients):
            for other in values[1:]:
                torch.testing.assert_close(other, values[0], atol=1e-4, rtol=1e-4)


def test_a_single_text_with_padding_gives_finite_numbers():
    for model_type in TYPES:
        model, _ = divided(model_type)
        inputs = {"input_ids": torch.tensor([[3, 7, 8, END, PAD, PAD]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
        with torch.no_grad():
            assert bool(torch.isfinite(model(**inputs).logits).all())


def test_positions_end_at_the_last_one_of_the_model():
    segments = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert segment_positions(Apart(start=5, first_position=2), segments, 9).tolist() == [[2, 3, 7, 8, 9, 9]]
    assert segments_of(Apart(), torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 2]]), None).tolist() == [[0, 1]]


def test_a_divided_model_asks_for_ids():
    model, _ = divided()
    with pytest.raises(PlanError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


# -- The plan --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
def test_the_junction_is_in_the_plan_the_anatomy_and_the_folder(model_type, tmp_path):
    dense, keep = tiny(model_type), {"encoder.0.heads": (1, 2), "hidden": tuple(range(0, 32, 2))}
    anatomy = anatomy_of(dense)
    model, plan = divided(model_type, keep=keep)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan(keep).then(Plan(junctions=plan.junctions)) == plan == Plan(junctions=plan.junctions).then(Plan(keep))
    assert anatomy_of(model) == anatomy.after(plan)
    assert cost.parameters(dense, anatomy).of(plan, anatomy) == model.num_parameters()
    later = shrink(
        shrink(dense, anatomy, Plan(junctions=plan.junctions)), anatomy.after(Plan(junctions=plan.junctions)), Plan(keep)
    )
    inputs = feed(model, pairs(model_type)[0])
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(later(**inputs).logits, expected)
        assert not torch.allclose(shrink(dense, anatomy, Plan(keep))(**inputs).logits, expected, atol=1e-3)
    checkpoint.save(model, plan, tmp_path / "model", tokenizer_from=tmp_path)
    loaded = checkpoint.load(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")
    for found in (loaded, checkpoint.load(tmp_path / "again"), copy.deepcopy(loaded)):
        with torch.no_grad():
            assert torch.equal(found(**inputs).logits, expected)
    assert checkpoint.load_plan(tmp_path / "again") == plan
    assert inspect(tmp_path / "model").apart == 2


@pytest.mark.parametrize(
    ("model_type", "plan", "problem"),
    [
        ("bert", Plan(junctions={"encoder.9": Apart()}), "encoder.9"),
        ("bert", Plan(junctions={"encoder.2": Apart()}), "end of the model"),
        ("bert", Plan(junctions={"encoder.0": Apart(), "encoder.1": Apart()}), "meet once"),
        ("bert", Plan(junctions={"encoder.0": Apart(), "encoder.1": Exit(3, "maximum", 0.7)}), "has no exits"),
        ("bert", Plan(junctions={"encoder.0": Apart(-1)}), "whole numbers"),
        ("roberta", Plan(junctions={"encoder.0": Apart()}), "no separator that tells them"),
        ("bart", Plan(junctions={"encoder.0": Apart()}), "writes texts"),
    ],
)
def test_a_plan_with_an_impossible_junction_is_refused(model_type, plan, problem):
    model = tiny(model_type)
    with pytest.raises(PlanError, match=problem):
        shrink(model, anatomy_of(model), plan)


def test_a_divided_model_is_divided_once_and_has_no_exits():
    model, plan = divided()
    for junction in (Apart(), Exit(3, "maximum", 0.7)):
        with pytest.raises(PlanError, match="meet once"):
            shrink(model, anatomy_of(model), Plan(junctions={"encoder.0": junction}))
    with pytest.raises(PlanError, match="already"):
        shrink(model, anatomy_of(model), Plan(junctions={"encoder.1": Apart()}))
    with pytest.raises(PlanError, match="attends to both segments"):
        unshrink(model, tiny("bert"), anatomy_of(tiny("bert")), plan)


def test_a_vocabulary_is_cut_before_its_separator_is_known():
    model, _ = divided("roberta")
    with pytest.raises(PlanError, match="cut the vocabulary first"):
        shrink(model, anatomy_of(model), Plan({"vocabulary": tuple(range(50))}))
    model, _ = divided("bert")
    assert shrink(model, anatomy_of(model), Plan({"vocabulary": tuple(range(50))})).config.vocab_size == 50


@pytest.mark.parametrize("change", [{"start": "?"}, {"separator": -1}, {"first_position": None}, {"use": "exit"}, {"more": 1}])
def test_a_junction_of_wrong_values_is_refused(change):
    with pytest.raises(PlanError, match=r"encoder\.0"):
        junction_from_data(Apart().to_data() | change, "encoder.0")


# -- Exported files --------------------------------------------------------------------------------------------------------------


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def parts_of(path):
    return {part: session_of(part_path(path, part)) for part in PARTS}


def asked(sessions, question, passage, outputs):
    """What a service computes for one pair: each text alone, then both."""
    hidden = {}
    for text, ids in (("question", question), ("passage", passage)):
        given = np.array([ids])
        hidden[text] = sessions[text].run(None, {"input_ids": given, "attention_mask": np.ones_like(given)})[0]
    feeds = {f"{text}_hidden": state for text, state in hidden.items()}
    feeds |= {f"{text}_mask": np.ones(state.shape[:2], np.int64) for text, state in hidden.items()}
    return sessions["joint"].run(list(outputs), feeds)


def export(folder, model_type, variants, **changes):
    """A divided model and its files with their parts, by variant, all from one trace."""
    outputs = ("start_logits", "end_logits") if "auto_class" in changes else ("logits",)
    model, _ = divided(model_type, keep={"encoder.0.heads": (1,)}, **changes)
    exporter, paths = (
        Onnx(agreement=0.0, weight_bits=WEIGHT_BITS),
        {variant: folder / f"{variant}.onnx" for variant in variants},
    )
    exporter.export_all(model, pairs(model_type), paths, outputs)
    for variant, path in paths.items():
        made = exporter.export_parts(path, model, pairs(model_type), variant, outputs)
        assert [file.name for file in made] == [f"{variant}_{part}.onnx" for part in PARTS]
    return model, paths, outputs


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    variants = (Variant.FLOAT, Variant.INT8_FUSED)
    return export(tmp_path_factory.mktemp("bert"), "bert", variants, auto_class=QUESTIONS, num_labels=2)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return export(tmp_path_factory.mktemp("roberta"), "roberta", (Variant.FUSED, Variant.INT8_STATIC))


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("questions", Variant.FLOAT),
        ("questions", Variant.INT8_FUSED),
        ("classes", Variant.FUSED),
        ("classes", Variant.INT8_STATIC),
    ],
)
@pytest.mark.slow
def test_the_three_files_give_what_the_whole_one_and_the_model_give(kind, variant, request):
    model, paths, outputs = request.getfixturevalue(kind)
    sessions, whole = parts_of(paths[variant]), session_of(paths[variant])
    (inputs,) = pairs(model.config.model_type, ((6, 5, 9),), seed=4)
    for number in range(6):
        real = inputs["attention_mask"][number] == 1
        given = {name: inputs[name][number : number + 1, real] for name in subject_of(model).inputs}
        segments = inputs["token_type_ids"][number][real]
        ids = given["input_ids"][0]
        got = asked(sessions, ids[segments == 0], ids[segments == 1], outputs)
        for one, other in zip(got, whole.run(list(outputs), given), strict=True):
            code = 0.05 * np.abs(other).max() if variant.int8 else 0.0  # sums in another order may be rounded to the next code
            np.testing.assert_allclose(one, other, atol=1e-4 + code)
        if not variant.int8:
            with torch.no_grad():
                result = model(**{name: torch.from_numpy(value) for name, value in given.items()})
            for one, name in zip(got, outputs, strict=True):
                np.testing.assert_allclose(one, result[name], atol=1e-4)
    assert part_path(paths[variant], "joint").stat().st_size < paths[variant].stat().st_size
    reads = {part: [item.name for item in session.get_inputs()] for part, session in sessions.items()}
    assert reads["passage"] == reads["question"] == ["input_ids", "attention_mask"]


def test_the_service_of_the_docs_answers_and_refuses_what_another_model_made(questions, tmp_path, monkeypatch):
    model, paths, outputs = questions
    home = tmp_path / "small" / "onnx"
    tokenizer = write_tokenizer(home)
    for part in PARTS:
        (home / f"model_quantized_{part}.onnx").write_bytes(part_path(paths[Variant.FLOAT], part).read_bytes())
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "passages.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    question, passage = "the film", "this story was very dull and my song is quite bright"
    names["keep"](passage, "kept.npz")
    answer = names["answer"](question, passage, "kept.npz")
    encoded = tokenizer.encode(question, passage)
    given = {"input_ids": [encoded.ids], "token_type_ids": [encoded.type_ids]}
    with torch.no_grad():
        result = model(**{name: torch.tensor(value) for name, value in given.items()})
    start, end = (result[name][0, 4:-1] for name in outputs)
    spans = {(one, other): float(start[one] + end[other]) for one in range(11) for other in range(one, 11)}
    first, last = max(spans, key=spans.__getitem__)
    assert answer == " ".join(passage.split()[first : last + 1])
    names["models"] = {"0123456789abcdef"}
    with pytest.raises(AssertionError, match="another model made this file"):
        names["answer"](question, passage, "kept.npz")


def test_parts_of_two_models_are_not_mixed(questions):
    _, paths, _ = questions
    sessions = parts_of(paths[Variant.FLOAT])
    assert parts.check_same_model(sessions) == parts.digest_of(paths[Variant.FLOAT])
    with pytest.raises(ExportError, match="not parts of one model"):
        parts.check_same_model(sessions | {"passage": parts_of(paths[Variant.INT8_FUSED])["passage"]})
    other = onnx.load(part_path(paths[Variant.FLOAT], "passage"))
    del other.metadata_props[:]
    strange = onnxruntime.InferenceSession(other.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="not parts of one model") as caught:
        parts.check_same_model(sessions | {"passage": strange})
    assert "passage: none" in caught.value.facts


def test_weights_of_large_parts_lie_beside_them(questions, tmp_path):
    model, paths, outputs = questions
    path = tmp_path / "model.onnx"
    path.write_bytes(paths[Variant.FLOAT].read_bytes())
    made = Onnx(one_file_bytes=1000).export_parts(path, model, pairs("bert"), Variant.FLOAT, outputs)
    assert all(file.with_name(f"{file.name}_data").is_file() for file in made)


def test_parts_that_differ_from_the_whole_are_not_left_behind(questions, tmp_path, monkeypatch):
    model, paths, outputs = questions
    path = tmp_path / "model.onnx"
    path.write_bytes(paths[Variant.FLOAT].read_bytes())
    right = parts._lower
    monkeypatch.setattr(parts, "_lower", lambda program, _: right(program, 0))
    with pytest.raises(ExportError, match="differ from the whole"):
        Onnx().export_parts(path, model, pairs("bert"), Variant.FLOAT, outputs)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_only_pairs_of_a_divided_model_make_parts(questions, tmp_path):
    model, paths, outputs = questions
    path = tmp_path / "model.onnx"
    path.write_bytes(paths[Variant.FLOAT].read_bytes())
    single = [{name: value[:, :2] for name, value in inputs.items() if name != "token_type_ids"} for inputs in pairs("bert")]
    with pytest.raises(ExportError, match="holds two texts"):
        Onnx().export_parts(path, model, single, Variant.FLOAT, outputs)
    assert Onnx().export_parts(path, tiny("bert"), pairs("bert"), Variant.FLOAT) == ()
    path.write_bytes(part_path(paths[Variant.FLOAT], "joint").read_bytes())
    with pytest.raises(ExportError, match="attend to each other in all layers"):
        Onnx().export_parts(path, model, pairs("bert"), Variant.FLOAT, outputs)


# -- The method ------------------------------------------------------------------------------------------------------------------


def test_attaching_divides_the_model_and_closing_leaves_no_trace():
    around = tiny_context()
    before = {name: (type(module), set(module.__dict__)) for name, module in around.model.named_modules()}
    inputs = feed(around.model, pairs("bert")[0])
    with torch.no_grad():
        plain = around.model(**inputs).logits
        method = DecomposedAttention(layers=2, start=START)
        state = method.attach(around)
        apart = around.model(**inputs).logits
        decision = method.decide(state, around)
        state.close()
        assert torch.equal(around.model(**inputs).logits, plain)
        assert torch.equal(shrink(around.model, around.anatomy, decision)(**inputs).logits, apart)
    assert not torch.allclose(apart, plain, atol=1e-3)
    assert decision.plan == Plan(junctions={"encoder.1": Apart(START)})
    assert decision.notes == ("decomposed_attention: the two texts of an input attend apart in the first 2 of 3 layers.",)
    assert {name: (type(module), set(module.__dict__)) for name, module in around.model.named_modules()} == before


def test_the_loss_is_the_distance_of_the_upper_layers():
    around = tiny_context()
    inputs = {name: torch.from_numpy(value) for name, value in pairs("bert")[0].items()}
    method = DecomposedAttention(layers=1, similarity=3.0)
    state = method.attach(around)
    seen = []
    for subject in (around.subject, around.teacher):
        with capturing(subject.model, subject.anatomy, {Capture.HIDDEN}) as recorder, torch.no_grad():
            subject.model(**subject.feed(inputs))
            seen.append(recorder.take({}))
    step = Step(around.model, inputs, *seen, Progress(0, 1), around.task)
    loss = method.penalty(state, step)
    state.close()
    real = inputs["attention_mask"] == 1
    terms = [
        (one[real] - other[real]).square().mean() / other[real].square().mean()
        for one, other in zip(seen[0].hidden[2:], seen[1].hidden[2:], strict=True)
    ]
    assert len(terms) == 2
    torch.testing.assert_close(loss, 3.0 * torch.stack(terms).mean())
    without = DecomposedAttention(similarity=0.0)
    assert not without.effects().needs_teacher
    state = without.attach(replace(around, teacher=None))
    assert without.penalty(state, step) is None
    state.close()


@pytest.mark.parametrize(("model_type", "separator"), [("roberta", END), ("distilbert", END), ("electra", None)])
def test_it_finds_the_separator_and_where_passages_begin(model_type, separator):
    inputs = pairs(model_type, ((40, 9, 6),))[0]
    around = replace(
        tiny_context(model_type),
        batches=lambda _: iter([{name: torch.from_numpy(value) for name, value in inputs.items()}]),
    )
    state = DecomposedAttention(layers=1, similarity=0.0).attach(around)
    state.close()
    starts = [int(types.argmax()) for types in inputs["token_type_ids"]]
    assert state.junction == Apart(round(np.mean(starts)), separator, FIRST.get(model_type, 0))
    assert len(set(starts)) > 3, "the case tells nothing"


def test_without_a_number_three_quarters_of_the_layers_are_divided():
    for layers, expected in ((2, 1), (3, 2), (4, 3), (6, 4), (12, 9)):
        anatomy = anatomy_of(tiny("bert", num_hidden_layers=layers))
        DecomposedAttention().check(anatomy, None)
        assert DecomposedAttention()._depth(anatomy) == expected


def test_models_that_cannot_be_divided_are_refused():
    dense = anatomy_of(tiny("bert"))
    with pytest.raises(TargetError, match="in 3 of 3 layers"):
        DecomposedAttention(layers=3).check(dense, None)
    with pytest.raises(TargetError, match="in 1 of 1 layers"):
        DecomposedAttention().check(anatomy_of(tiny("bert", num_hidden_layers=1)), None)
    with pytest.raises(TargetError, match="writes texts"):
        DecomposedAttention().check(anatomy_of(tiny("t5")), None)
    with pytest.raises(TargetError, match="no attention"):
        DecomposedAttention().check(anatomy_of(tiny("cnn")), None)
    with pytest.raises(TargetError, match="apart already"):
        DecomposedAttention().check(anatomy_of(divided()[0]), None)
    with pytest.raises(TargetError, match="has exits"):
        DecomposedAttention().check(dense.after(Plan(junctions={"encoder.0": Exit(3, "maximum", 0.7)})), None)
    around = tiny_context()
    deep = subject_of(tiny("bert", num_hidden_layers=4))
    with pytest.raises(TargetError, match="let distillation pair the layers"):
        DecomposedAttention().attach(replace(around, teacher=deep))
    with pytest.raises(TargetError, match="no second text can begin at position 64"):
        DecomposedAttention(start=64).attach(around)
    with pytest.raises(TargetError, match="different tokens"):
        DecomposedAttention().attach(tiny_context("distilbert"))  # its rows are random
    other = tiny("bert")
    other.config.model_type = "unknown"
    with pytest.raises(PlanError, match="take a model of one of these types"):
        divide(other, dense, "encoder.0", Apart())
    unite(other)


# -- In a recipe -----------------------------------------------------------------------------------------------------------------

DIVIDED = Train((DecomposedAttention(layers=2),), epochs=0.3, precision="fp32")


@pytest.mark.parametrize(
    ("stages", "fact"),
    [
        ((DIVIDED, DIVIDED), "divided the lower layers before"),
        ((DIVIDED, Train((EarlyExit(),))), "leave out early_exit"),
        ((DIVIDED, TrimVocabulary()), "trim first"),
        ((Train((DecomposedAttention(),), text="task"),), "a line of text is one"),
        ((Train((EarlyExit(),)), DIVIDED), "leave out one of the two"),
    ],
)
def test_stages_that_undo_it_are_refused(stages, fact):
    assert any(fact in found for found in conflicts(stages[-1], stages[:-1]))


def test_stages_that_go_with_it_are_not_refused():
    for before, stage in (([TrimVocabulary()], DIVIDED), ([DIVIDED], Train((Distillation(),)))):
        assert list(conflicts(stage, before)) == []
    assert without_cuts(replace(DIVIDED, methods=(*DIVIDED.methods, Distillation()))).methods == (Distillation(),)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp("recipe")
    source, data = write_model(home / "model"), write_data(home / "data", train=300, dev=40)
    for file in data.glob("*.tsv"):  # the second text is the first one without its opener
        lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
        rows = [f"{text}\t{text.partition(' ')[2]}\t{label}" for text, label in lines]
        file.write_text("\n".join(["first\tsecond\tlabel", *rows]) + "\n", encoding="utf-8")
    return Recipe(str(source), Classification(data=str(data), text="first", text_pair="second"), (DIVIDED,))


@pytest.mark.slow
def test_a_run_saves_the_division_and_goes_on_from_it(recipe, tmp_path):
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    bundle, _ = prepare_bundle(preflight(recipe), run)
    made = advance(recipe.stages, bundle, run).bundle
    again = advance([*recipe.stages, Train((Distillation(),), epochs=0.2, precision="fp32")], bundle, run).bundle
    (junction,) = made.plan.junctions.values()
    assert junction.separator is None
    assert 4 < junction.start < 16, "the first texts have 6 to 14 tokens"
    assert made.plan == again.plan
    assert again.subject.anatomy.meeting == made.subject.anatomy.meeting == dict(made.plan.junctions)
    checkpoint.save(made.subject.model, made.plan, tmp_path / "model", tokenizer_from=recipe.model)
    with pytest.raises(RecipeError, match="undo what was made") as caught:
        check_kept(tmp_path / "model", recipe.stages)
    assert "apart already: leave out decomposed_attention" in caught.value.facts[0]
    check_kept(tmp_path / "model", [Train((Distillation(),))])


def test_bad_input_is_refused_before_anything_runs(recipe):
    with pytest.raises(TargetError, match="in 3 of 3 layers"):
        preflight(replace(recipe, stages=(Train((DecomposedAttention(layers=3),)),)))
    with pytest.raises(RecipeError) as caught:
        preflight(replace(recipe, task=replace(recipe.task, text_pair=None)))
    assert "an input of this task is one text" in caught.value.facts[0]
    with pytest.raises(RecipeError) as caught:
        preflight(replace(recipe, export=Export(dense=True)))
    assert "export.dense: a plain model does not keep apart" in caught.value.facts[0]
    assert DecomposedAttention().problem(type("Writes", (Toy,), {"stand_in": "likelihood"})()) is not None
