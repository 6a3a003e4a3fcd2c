"""Recipes: round trip through YAML, all mistakes at once with their places, paths relative to the file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_folder import write_data, write_model

from slimformer import registry
from slimformer.core.plan import Plan
from slimformer.core.ranges import Range, Ranges
from slimformer.core.shrink import shrink
from slimformer.errors import ExtraError, ModelError, OutputError, PlanError, RecipeError, TargetError
from slimformer.families.base import anatomy_of
from slimformer.log import Log
from slimformer.running.bundle import Run
from slimformer.running.places import read_in, seen_from
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.reader import _Reader, parse_recipe, read_recipe
from slimformer.running.recipe import Bench, Export, Recipe
from slimformer.running.runner import run, train_stages
from slimformer.running.search import compress
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification
from slimformer.tasks.intents import Intents
from slimformer.training.stage import Calibrate, Train

WHOLE = """
model: ./x
task: {use: intents, examples: 500}
seed: 3
stages:
  - train: {epochs: 2}
  - calibrate: {method: {use: fisher, keep: 0.4}}
  - train: {epochs: 5, lr: 0.0001, methods: [{use: gates, keep: 0.4}, {use: distillation, temperature: 3}]}
  - export: {choose_within: 0.5}
  - bench: {seconds: 5, rivals: [teacher-int8]}
"""


def test_a_recipe_is_what_it_says_and_round_trips():
    recipe = parse_recipe(yaml.safe_load(WHOLE))
    fisher, gates, distillation = (registry.find("methods", name) for name in ("fisher", "gates", "distillation"))
    assert recipe.stages == (
        Train(epochs=2),
        Calibrate(fisher(keep=0.4)),
        Train(epochs=5, lr=1e-4, methods=(gates(keep=0.4), distillation(temperature=3))),
    )
    assert recipe.task == Intents(examples=500)
    assert recipe.bench == Bench(seconds=5, rivals=("teacher-int8",))
    assert (recipe.seed, recipe.export.choose_within) == (3, 0.5)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_all_mistakes_are_shown_together_each_with_its_place():
    text = """
modle: ./x
task: {use: intent}
seed: -1
stages:
  - train: {epoch: 2}
  - calibrate: {method: {use: gates}}
  - train: {lr: -1, methods: [{use: fisher}, {use: distilation}, {use: gates, kep: 1}, {use: distillation, temperature: hot}]}
  - train: {methods: [{use: distillation, temperature: -1}]}
  - exprt: {}
  - bench: {rivals: [nobody]}
"""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(yaml.safe_load(text))
    facts = "\n".join(caught.value.facts)
    for expected in (
        "modle: unknown key; did you mean 'model'?",
        "model: missing",
        "task.use: there is no 'intent'; did you mean 'intents'?",
        "seed: must be a whole number from 0",
        "stages[0].train.epoch: unknown option; did you mean 'epochs'?",
        "stages[1].calibrate.method: 'gates' has to train",
        "stages[2].train.lr must be from 0 to a billion, got -1.0",
        "stages[2].train.methods[0]: 'fisher' looks once",
        "stages[2].train.methods[1].use: there is no 'distilation'; did you mean 'distillation'?",
        "stages[2].train.methods[2].kep: unknown option; did you mean 'keep'?",
        "stages[2].train.methods[3].temperature: Input should be a valid number",
        "stages[3].train.methods[0]: temperature must be above 0",
        "stages[4].exprt: unknown stage; did you mean 'export'?",
        "stages[5].bench.rivals.0",
    ):
        assert expected in facts


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        *(({"train": {"methods": [{"use": "distillation", name: value}]}}, name)
          for name in ("hidden", "logits", "scores", "embedding", "temperature") for value in (NAN, INF, -1)),
        *(({"train": {name: value}}, name) for name, value in (
            ("epochs", INF), ("lr", 1e300), ("weight_decay", INF), ("steps", 10**30), ("clip", NAN), ("trackers", ["nope"]))),
        *(({"train": {"methods": [{"use": "gates", name: value}]}}, name) for name, value in (("start", 1e300), ("keep", 1e-300))),
        *(({"calibrate": {"method": {"use": "fisher", name: value}}}, name) for name, value in (
            ("ridge", NAN), ("examples", -1), ("repair_tokens", 0), ("neuron_multiple", 0), ("keep", 1e-300))),
        ({"export": {"choose_within": NAN}}, "choose_within"),
        *(({"bench": {"seconds": value}}, "seconds") for value in (NAN, INF, -1)),
    ],
)  # fmt: skip
def test_a_value_that_breaks_a_run_late_is_a_mistake_when_it_is_read(stage, place):
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"model": "x", "task": "intents", "stages": [stage]})
    assert any(place in fact for fact in caught.value.facts)


@pytest.mark.parametrize("seed", [-1, 10**30, NAN, True, "7"])
def test_a_seed_that_is_none_is_a_mistake(seed):
    with pytest.raises(RecipeError, match="seed: must be a whole number from 0 to 4294967295"):
        parse_recipe({"model": "x", "task": "intents", "stages": [], "seed": seed})


def test_two_methods_that_decide_are_refused():
    stage = {"train": {"methods": [{"use": "gates"}, {"use": "gates"}]}}
    with pytest.raises(RecipeError, match="gates and gates both decide what to cut"):
        parse_recipe({"model": "x", "task": "intents", "stages": [stage]})


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "data.tsv").write_text("text\tlabel\n", encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text("model: bert\ntask: {use: classification, data: data.tsv}\nstages: []\n", encoding="utf-8")
    recipe = read_recipe(file)
    assert recipe.model == str(tmp_path / "bert")
    assert recipe.task.data == str(tmp_path / "data.tsv")
    for name in ("a.en", "b.de"):
        (tmp_path / name).write_text("one\n", encoding="utf-8")
    file.write_text("model: bert\ntask: {use: translation, data: [a.en, b.de]}\nstages: []\n", encoding="utf-8")
    task = read_recipe(file).task
    assert (task.data, task.target_data) == (str(tmp_path / "a.en"), str(tmp_path / "b.de"))


NINE_TO_THE_NINTH = b"a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (number, number, b",".join([b"*a%d" % (number - 1)] * 9)) for number in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "cannot read"),
        (b"a: [", "line 1 is not YAML"),
        (b"- 1", "must be a mapping"),
        (b"model: m\nseed: 2024-13-01", "is not YAML: month must be in 1..12"),
        (b"seed: !!int x", "is not YAML"),
        (b"seed: " + b"9" * 5000, "is not YAML"),
        (b"[" * 2000 + b"]" * 2000, "nested too deeply"),
        (b"model: a\nmodel: b", "line 1 is not YAML: the key 'model' stands twice"),
        (b"a: &a [*a]", "expands to inf values"),
        (NINE_TO_THE_NINTH, "by its aliases"),
        (b"x: 1\n" + b"#" * (1 << 20), "it has 1,048,581 bytes"),
        (b"model: !!python/object/apply:os.system [id]", "is not YAML"),
    ],
)
@pytest.mark.slow
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_recipe(file)


def test_an_anchor_that_two_stages_share_is_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: m\ntask: intents\nstages: [train: &t {epochs: 2, methods: [distillation]}, train: {<<: *t, lr: 1e-4}]\n"
    )
    first, second = read_recipe(file).stages
    assert (first.epochs, second.epochs, second.lr, second.methods) == (2, 2, 1e-4, first.methods)


@pytest.mark.parametrize("name", ["/dev/zero", ".", "missing.yaml", "a" * 5000, "nul\0.yaml"])
def test_a_recipe_that_is_no_file_is_refused_before_it_is_read(name):
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe(name)


def test_a_method_written_like_a_stage_and_a_missing_model_are_told_with_the_other_mistakes(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: ../my-bertt\ntask: intents\nstages: [train: {methods: [gates: {keep: 0.5}]}]\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert caught.value.facts == (
        "stages[0].train.methods[0]: needs use, the name of one of the methods; write {use: gates, keep: 0.5}",
        "model: '../my-bertt' does not exist",
    )


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["fisher", "gates", "intents"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "task", "stages", "use", "train", "calibrate", "method", "methods", "epochs", "bench"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(PLAIN)
@pytest.mark.slow
def test_anything_gives_a_recipe_or_a_recipe_error(data):
    try:
        recipe = parse_recipe(data)
    except RecipeError as error:
        assert error.facts
    else:
        assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_an_untuned_student_takes_its_classes_in_the_order_of_its_teacher(tmp_path):
    source = write_model(tmp_path / "encoder", trained=False, bare=True)
    turned = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    teacher = write_model(tmp_path / "teacher", trained=False, seed=5, **turned)
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    stages = (Train(task_weight=0.0, methods=(registry.find("methods", "distillation")(),)),)
    recipe = Recipe(str(source), task, stages, teacher=str(teacher))
    bundle, left = prepare_bundle(preflight(recipe), Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True)))
    assert left == stages
    assert bundle.material.task.labels == ("good", "bad")
    assert bundle.subject.model.config.id2label == bundle.teacher.model.config.id2label == {0: "good", 1: "bad"}
    before, given = bundle.subject.model.state_dict(), load_file(source / "model.safetensors")
    assert all(torch.equal(before[f"bert.{name}"], tensor) for name, tensor in given.items())
    words = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(before[words], bundle.teacher.model.state_dict()[words])


@pytest.mark.slow
def test_runs_share_what_their_teacher_gives(tmp_path: Path) -> None:
    source = write_model(tmp_path / "dense")
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    for name, lr in (("first", 1e-3), ("second", 2e-3)):
        stage = Train((registry.find("methods", "distillation")(),), epochs=1, lr=lr, task_weight=0.0)
        train_stages(Recipe(str(source), task, (stage,)), tmp_path / name, log=Log(None, quiet=True), cache=tmp_path / "shared")
        facts = list((tmp_path / "shared").glob("teacher/*/facts.json"))
        assert len(facts) == 1
        if name == "first":
            made = facts[0].stat().st_mtime_ns
        assert not (tmp_path / name / "work" / "teacher").exists()
    assert facts[0].stat().st_mtime_ns == made, "made again"
    with pytest.raises(OutputError, match=r"config\.json is a file"):
        train_stages(Recipe(str(source), task, (stage,)), tmp_path / "third", cache=source / "config.json")
    assert not (tmp_path / "third").exists()


def test_export_options_reach_the_exporter_and_come_back() -> None:
    from slimformer.exporters.onnx import Onnx

    export = {"calibration": "entropy", "reduce_range": True, "values": "int8", "floats": ["encoder.0.ffn_out.input"]}
    recipe = parse_recipe({"model": "x", "task": "intents", "stages": [{"export": export}]})
    floats = ("encoder.0.ffn_out.input",)
    assert recipe.export.exporter() == Onnx(weight_bits=7, agreement=0.0, calibration="entropy", floats=floats)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"calibration": "mean"}, "export.calibration"),
        ({"values": "int4"}, "export.values"),
        ({"percentile": 10}, "percentile must be above 50 and at most 100, got 10"),
    ],
)
def test_export_options_that_cannot_be_are_mistakes(options: dict[str, object], place: str) -> None:
    with pytest.raises(RecipeError, match=place):
        parse_recipe({"model": "x", "task": "intents", "stages": [{"export": options}]})


def test_a_wrong_calibration_is_told_before_anything_starts_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"calibration: there is no 'minmax'; did you mean 'min_max'\?"):
        Export(calibration="minmax")  # type: ignore[arg-type]


SPARSE = {"train": {"methods": ["knowledge_sparse", "distillation"]}}
BLOCKS = {"train": {"methods": [{"use": "group_lasso", "groups": "block_rows"}]}}
UNITS = {"train": {"methods": ["group_lasso"]}}
MOVED = {"train": {"methods": ["movement"]}}
FILLED = {"train": {"methods": [{"use": "movement", "fill": True}]}}
INTEGERS = {"train": {"methods": ["quantization", "distillation"]}}
KEEPS = {"train": {"methods": ["keep_zeros", "distillation"]}}
PLAIN_TRAIN = {"train": {"methods": ["distillation"]}}
FACTORS = {"calibrate": {"method": "kronecker"}}
THIN = {"calibrate": {"method": "low_rank"}}
SHARED = {"train": {"methods": ["shared_layers"]}}
TABLE = {"calibrate": {"method": {"use": "kronecker", "keep": 1.0, "embedding": 8}}}
CUT = {"calibrate": {"method": "fisher"}}
EXITS = {"train": {"methods": ["early_exit"]}}
FEWER_WORDS = {"train": {"methods": ["word_elimination"]}}
WORD_CODES = {"calibrate": {"method": "codebook"}}
FROZEN = {"train": {"freeze": "everything", "methods": ["gates"]}}


@pytest.mark.parametrize(
    ("stages", "mistake"),
    [
        (
            [INTEGERS, PLAIN_TRAIN],
            "quantization has learned grids and ranges, which this stage would lose: make quantization the",
        ),
        ([INTEGERS, CUT], "quantization has learned grids and ranges"),
        ([INTEGERS, FACTORS], "quantization has learned grids and ranges"),
        ([INTEGERS, INTEGERS], None),  # fewer bits in a second step
        (
            [SPARSE, FACTORS],
            "kronecker gives matrices new values, and the zeros that knowledge_sparse left would be gone: leave",
        ),
        ([BLOCKS, FACTORS], "the zeros that group_lasso left"),
        ([MOVED, FACTORS], "the zeros that movement left"),
        ([MOVED, PLAIN_TRAIN, FACTORS], None),
        ([FILLED, FACTORS], None),
        ([UNITS, FACTORS], None),
        ([SPARSE, TABLE], None),  # the word table alone
        ([SPARSE, THIN], "low_rank gives matrices new values, and the zeros that knowledge_sparse left would be gone"),
        ([SHARED, THIN], "low_rank would store layers differently that shared_layers has made one: leave out one of the two"),
        ([SHARED, {"calibrate": {"method": {"use": "low_rank", "rank": 8}}}], "factor first, share after"),
        (
            [CUT, PLAIN_TRAIN, SHARED],
            "shared_layers cannot make one of layers that fisher has cut, or stored, each in its own way",
        ),
        ([THIN, SHARED], "shared_layers cannot make one of layers that low_rank has cut, or stored, each in its own way"),
        ([{"calibrate": {"method": "layers"}}, SHARED, SHARED], None),
        ([TABLE, WORD_CODES], "codebook stores the word table in another form, as kronecker may have done before"),
        ([THIN, WORD_CODES], None),
        ([EXITS, FEWER_WORDS], "this stage would change it: leave out one of the two"),
        ([FEWER_WORDS, EXITS], "which words stay: leave out one of the two"),
        ([FEWER_WORDS, CUT], "which words stay: first fisher, then word_elimination"),
        ([{"calibrate": {"method": "fixed_attention"}}, FEWER_WORDS], "has set: leave out one of the two"),
        ([THIN, CUT], "fisher cannot cut what low_rank has factored before: cut first, factor after"),
        ([SPARSE, KEEPS, FACTORS], "the zeros that knowledge_sparse left"),
        (
            [SPARSE, PLAIN_TRAIN],
            "training would fill the zeros that knowledge_sparse left: add keep_zeros to the methods of this",
        ),
        ([BLOCKS, PLAIN_TRAIN], "training would fill the zeros that group_lasso left"),
        ([SPARSE, KEEPS, PLAIN_TRAIN], "training would fill the zeros that knowledge_sparse left"),
        ([SPARSE, INTEGERS], "training would fill the zeros that knowledge_sparse left"),
        ([SPARSE, {"train": {"methods": ["keep_zeros", "quantization"]}}], None),
        (
            [SPARSE, {"train": {"methods": ["keep_zeros", {"use": "quantization", "grid": "affine", "exact_zero": False}]}}],
            "quantization gives matrices new values, and the zeros that knowledge_sparse left would be gone",
        ),
        ([SPARSE, SPARSE], None),
        ([SPARSE, KEEPS, CUT], "fisher gives matrices new values, and the zeros that knowledge_sparse left would be gone"),
        ([SPARSE, KEEPS, {"calibrate": {"method": {"use": "fisher", "repair": False}}}, KEEPS], None),
        ([SPARSE, FROZEN], None),
        ([MOVED, PLAIN_TRAIN], None),  # a choice: the zeros may be filled
        ([UNITS, PLAIN_TRAIN], None),
        ([CUT, PLAIN_TRAIN, FACTORS, PLAIN_TRAIN, PLAIN_TRAIN, INTEGERS], None),
    ],
)
def test_orders_that_make_no_sense_are_mistakes(stages: list[dict[str, object]], mistake: str | None) -> None:
    data = {"model": "x", "task": "intents", "stages": stages}
    if mistake is None:
        parse_recipe(data)
        return
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data)
    (fact,) = caught.value.facts
    assert fact.startswith(f"stages[{len(stages) - 1}]")
    assert mistake in fact


def test_a_recipe_built_in_python_is_held_to_the_same_order(tmp_path):
    sparse, kronecker = (registry.find("methods", name) for name in ("knowledge_sparse", "kronecker"))
    stages = (Train(methods=(sparse(keep=0.5),)), Calibrate(kronecker()))
    with pytest.raises(RecipeError, match="undo each other") as caught:
        run(Recipe(str(tmp_path), Intents(), stages), tmp_path / "out")
    assert "the zeros that knowledge_sparse left" in caught.value.facts[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as runs deliver them: sparse, stored as int8, with ranges; and ones whose zeros and ranges do not count."""
    root = tmp_path_factory.mktemp("delivered")
    source = write_model(root / "dense")
    model = checkpoint.load(source)
    wide = write_model(root / "wide", trained=False, hidden_size=64, intermediate_size=128)
    checkpoint.save(checkpoint.load(wide), Plan(), root / "int8", tokenizer_from=wide, values="int8")
    assert any(name.endswith("sparse.values") for name in load_file(root / "int8" / "model.safetensors"))
    learned = Ranges({"encoder.0.ffn_in.input": Range(-1.0, 1.0)}, 8, 8, 8)
    checkpoint.save(model, Plan(), root / "ranges", tokenizer_from=source, ranges=learned)
    with torch.no_grad():
        model.get_submodule("bert.embeddings.token_type_embeddings").weight.zero_()
    checkpoint.save(model, Plan(), root / "no segments", tokenizer_from=source)
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.1.output.dense").weight[:, ::2] = 0.0
    checkpoint.save(model, Plan(), root / "sparse", tokenizer_from=source)
    checkpoint.save(model, Plan(), root / "given up", tokenizer_from=source, sparse=False)
    write_data(root / "data", train=80, dev=20)
    return root


FILLS = "it was saved without its zeros, which training would fill: add keep_zeros to the methods of each stage"
LOSES = "it has learned grids and ranges, which the first stage would lose: begin with quantization"


@pytest.mark.parametrize(
    ("folder", "stages", "fact"),
    [
        ("sparse", [{"train": {}}], FILLS),
        ("sparse", [KEEPS, PLAIN_TRAIN], FILLS),
        ("sparse", [INTEGERS], FILLS),
        ("sparse", [CUT], "it was saved without its zeros, and fisher gives matrices new values: leave out fisher"),
        ("sparse", [KEEPS], None),
        ("sparse", [SPARSE, KEEPS], None),
        ("sparse", [{"train": {"methods": ["keep_zeros", "quantization"]}}], None),
        ("sparse", [], None),
        ("given up", [PLAIN_TRAIN], None),
        ("no segments", [PLAIN_TRAIN], None),  # a table of zeros is no sparse encoder
        ("int8", [PLAIN_TRAIN], None),
        ("ranges", [{"train": {}}], LOSES),
        ("ranges", [CUT, INTEGERS], LOSES),
        ("ranges", [INTEGERS], None),
        ("ranges", [], None),
        ("dense", [PLAIN_TRAIN], None),
    ],
)
@pytest.mark.slow
def test_what_a_delivered_model_holds_is_not_lost_without_a_word(
    delivered: Path, folder: str, stages: list[dict[str, object]], fact: str | None
) -> None:
    data = {
        "model": str(delivered / folder),
        "task": {"use": "classification", "data": str(delivered / "data")},
        "stages": stages,
    }
    recipe = parse_recipe(data)
    if fact is None:
        preflight(recipe)
        return
    with pytest.raises(RecipeError, match="the stages would undo what was made of") as caught:
        preflight(recipe)
    assert caught.value.facts == (fact,)


def test_compress_does_not_fill_zeros_either(delivered: Path, tmp_path: Path) -> None:
    task = Classification(data=str(delivered / "data"))
    with pytest.raises(RecipeError, match="undo what was made") as caught:
        compress(delivered / "sparse", task, tmp_path / "out")
    assert caught.value.facts == (FILLS,)
    assert not (tmp_path / "out").exists()


HOPELESS = {
    "a block of movement": ("movement", {"block": 5}, "blocks of 5 x 5 do not divide encoder.0.query, which is 32 x 32"),
    "a share of movement": ("movement", {"keep": 0.01}, "keep of 0.01 cannot be reached: .*% of the MACs remain"),
    "of parameters": ("movement", {"keep": 0.01, "cost": "parameters"}, "% of the parameters remain"),
    "a block of group_lasso": (
        "group_lasso",
        {"groups": "blocks", "block": 7},
        "blocks of 7 x 7 do not divide encoder.0.query",
    ),
    "units of group_lasso": ("group_lasso", {"keep": 0.01}, "the budget of .* MACs cannot be reached"),
    "a share of group_lasso": ("group_lasso", {"keep": 0.01, "groups": "blocks", "block": 8}, "keep is 0.01, and one group"),
    "a pattern": ("knowledge_sparse", {"pattern": "1x5"}, "blocks of 1 x 5 do not divide encoder.0.query"),
    "gates": ("gates", {"keep": 0.01}, "nothing of the encoder would be left"),
    "importance": ("importance", {"keep": 0.01}, "the budget of .* MACs cannot be reached"),
    "a share of kronecker": ("kronecker", {"keep": 0.01}, r"1.0% of the parameters cannot be reached: [\d.]+% remain"),
    "a factor": ("kronecker", {"embedding": 5}, "a factor of 1 x 5 does not divide"),
    "a share of low_rank": ("low_rank", {"keep": 0.01}, r"1.0% of the MACs cannot be reached: [\d.]+% remain"),
    "a rank": ("low_rank", {"rank": 500}, "rank 500 pays for no matrix"),
    "numbers of a word": ("low_rank", {"embedding": 32}, "rank 32 is no fewer numbers than its .* only ranks up to"),
    "layers": ("layers", {"keep": 0.01}, "even one layer costs 33%"),
    "fisher without sublayers": ("fisher", {"keep": 0.01, "sublayers": False}, "the budget of .* MACs cannot be reached"),
}


@pytest.mark.parametrize(("name", "options", "message"), HOPELESS.values(), ids=HOPELESS)
def test_what_cannot_be_is_told_before_a_leading_stage_tunes(tmp_path, name, options, message):
    """An untuned encoder: its names and sizes are enough to know, so nothing is trained and no folder is made."""
    source = write_model(tmp_path / "encoder", trained=False, bare=True)
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    method = registry.find("methods", name)(**options)
    cutting = Train(methods=(method,)) if not method.effects().one_shot else Calibrate(method)
    with pytest.raises((RecipeError, TargetError, PlanError), match=message):
        run(Recipe(str(source), task, (Train(), cutting)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_can_be_is_let_through_and_latency_is_left_to_be_measured(tmp_path):
    source = write_model(tmp_path / "encoder", trained=False, bare=True)
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    movement, layers = (registry.find("methods", name) for name in ("movement", "layers"))
    for cutting in (movement(block=8), movement(block=8, keep=0.01, cost="latency")):
        preflight(Recipe(str(source), task, (Train(), Train(methods=(cutting,)))))
    later = Train(methods=(movement(keep=0.01),))  # whether it can be, only what is left then tells
    preflight(Recipe(str(source), task, (Train(), Calibrate(layers(which="chosen")), later)))


LATER = {
    "no layers for exits": ([{"layers": {"keep": 0.34}}], {"early_exit": {}}, TargetError, "it has 1 layer left"),
    "an exit behind the last": (
        [{"layers": {"keep": 0.67}}],
        {"early_exit": {"layers": [2]}},
        TargetError,
        "no exit behind layer 2",
    ),
    "layers of theseus": ([{"theseus": {"keep": 0.34}}], {"early_exit": {}}, TargetError, "it has 1 layer left"),
    "a share of one layer": ([{"layers": {"keep": 0.34}}], {"importance": {"keep": 0.01}}, TargetError, "cannot be reached"),
    "a rank of a narrow model": (
        [{"hidden_width": {"keep_hidden": 0.5, "multiple": 4}}, {"distillation": {}}],
        {"low_rank": {"rank": 12}},
        PlanError,
        "rank 12 pays for no matrix",
    ),
    "matrices that are thin already": (
        [{"low_rank": {"rank": 4}}],
        {"outliers": {"embedding": None}},
        PlanError,
        "another form already",
    ),
    "an order of fixed heads": ([{"fixed_attention": {}}], {"elastic": {}}, TargetError, "no other order"),
    "sets of weights for layers": (
        [{"layers": {"keep": 0.67}}],
        {"shared_layers": {"distinct": 2}},
        TargetError,
        "the model has 2 layers",
    ),
    "zeros in between": ([{"knowledge_sparse": {}}], {"knowledge_sparse": {"pattern": "1x5"}}, RecipeError, "blocks of 1 x 5"),
}


@pytest.mark.parametrize(("before", "last", "error", "message"), LATER.values(), ids=LATER)
def test_what_a_later_stage_cannot_do_is_told_before_anything_runs(small_task, before, last, error, message):
    """The stages before leave sizes and forms that are known without looking at data."""
    source, task = small_task
    stages = [_stage(*each) for item in (*before, last) for each in item.items()]
    with pytest.raises(error, match=message) as caught:
        preflight(Recipe(str(source), task, (Train(), *stages)))
    changed = next(iter(before[0])) != "knowledge_sparse"
    where = f"in stages[{len(stages)}], on the model as the stages before leave it"
    assert (where in caught.value.facts) == changed


def test_nothing_is_foreseen_behind_a_method_that_looks_at_data(small_task):
    source, task = small_task
    stages = (_stage("fisher", {"keep": 0.5}), _stage("low_rank", {"rank": 15}), _stage("outliers", {"embedding": None}))
    preflight(Recipe(str(source), task, (Train(), *stages)))
    for name, options, message in (
        ("early_exit", {"layers": [9]}, "behind layer 9"),
        ("fixed_attention", {"fixed": 40, "learned": None}, "fix"),
    ):
        with pytest.raises(TargetError, match=message):
            preflight(Recipe(str(source), task, (Train(), stages[0], _stage(name, options))))


def test_relations_that_cannot_be_compared_are_told_before_the_teacher_is_tuned(small_task):
    source, task = small_task
    distillation = registry.find("methods", "distillation")
    with pytest.raises(RecipeError, match="does not suit its teacher") as caught:
        preflight(Recipe(str(source), task, (Train(), Train(methods=(distillation(relations=1.0),)))))
    assert "relation_heads 12 does not divide the teacher's last attention, which is 32 wide" in caught.value.facts[0]
    preflight(Recipe(str(source), task, (Train(), Train(methods=(distillation(relations=1.0, relation_heads=8),)))))


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    """An encoder that is not tuned yet, and a task for it."""
    home = tmp_path_factory.mktemp("small")
    source = write_model(home / "encoder", trained=False, bare=True)
    return source, Classification(data=str(write_data(home / "data", train=80, dev=20)))


def _stage(name, options):
    """A stage of one method."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    method = registry.find("methods", name)(**options)
    return Calibrate(method) if method.effects().one_shot else Train(methods=(method,))


def test_a_model_that_was_cut_before_is_looked_at_as_it_is(tmp_path):
    source = write_model(tmp_path / "model", trained=False)
    dense = checkpoint.load(source)
    plan = Plan({"encoder.0.heads": (1,), "encoder.1.attention": ()})
    checkpoint.save(shrink(dense, anatomy_of(dense), plan), plan, tmp_path / "small", tokenizer_from=source)
    skeleton = checkpoint.skeleton(tmp_path / "small", "AutoModelForSequenceClassification")
    assert anatomy_of(skeleton) == anatomy_of(dense).after(plan)
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    lasso, movement = (registry.find("methods", name) for name in ("group_lasso", "movement"))
    preflight(Recipe(str(tmp_path / "small"), task, (Train(), Train(methods=(movement(block=8),)))))
    with pytest.raises(RecipeError, match="blocks of 16 x 16 do not divide encoder.0.query, which is 8 x 32"):
        preflight(Recipe(str(tmp_path / "small"), task, (Train(), Train(methods=(lasso(groups="blocks", block=16),)))))


def test_a_teacher_that_is_refused_once_it_is_loaded_leaves_no_scratch_behind(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", trained=False)
    teacher = write_model(tmp_path / "teacher", trained=False, vocab_size=77)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).unlink()
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    recipe = Recipe(str(source), task, (Train(methods=(registry.find("methods", "distillation")(),)),), teacher=str(teacher))
    with pytest.raises(ModelError, match="another vocabulary"):
        train_stages(recipe, tmp_path / "out", log=Log(None, quiet=True))
    assert not (tmp_path / "out" / "work").exists()


def test_a_refusal_without_facts_is_a_mistake_in_its_place() -> None:
    @dataclass(frozen=True)
    class Refusing:
        def __post_init__(self) -> None:
            raise RecipeError("no such thing.", help="leave it out.")

    reader = _Reader(Path())
    assert reader.build(Refusing, {}, "task") is None
    assert reader.mistakes == ["task: no such thing."]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"stages": (Train(trackers=("comet_ml",)),)}, ExtraError, "not installed: comet_ml"),
        ({"export": Export(floats=("encoder.0.nope",))}, RecipeError, r"no point 'encoder.0.nope'.\n  help: did you mean"),
    ],
)
def test_what_only_the_end_of_a_run_would_meet_is_told_before_it_begins(tmp_path, changes, kind, message):
    task = Classification(data=str(write_data(tmp_path / "data", 60, 20)))
    recipe = replace(Recipe(str(write_model(tmp_path / "model", trained=False)), task, ()), **changes)
    with pytest.raises(kind, match=message):
        preflight(recipe)


def test_a_tracker_that_accelerate_does_not_know_is_a_mistake():
    with pytest.raises(RecipeError, match="trackers must be some of aim"):
        Train(trackers=("nope",))


def test_a_path_through_a_link_keeps_the_links_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "deep" / "model").mkdir(parents=True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "deep" / "model")
    (tmp_path / "near" / "deep").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path / "near")
    assert seen_from(tmp_path / "out" / "run", "link") == "../../near/link"
    # `deep/..` is the folder that holds the real one
    assert seen_from(tmp_path / "out" / "run", "deep/../deep/model") == "../../near/deep/model"
    assert seen_from(tmp_path / "out" / "run", "deep/..") == "../../far"
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "near" / "there").symlink_to(tmp_path / "out" / "run")
    assert (Path("there") / seen_from(Path("there"), "link")).samefile("link")
    monkeypatch.chdir(tmp_path)
    for name in ("../../near/link", "../../far"):  # read by a process elsewhere, and written again: the same name
        assert seen_from(tmp_path / "out" / "run", read_in(tmp_path / "out" / "run", name)) == name
