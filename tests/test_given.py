"""What people bring from Python: models in memory, tasks and recipes as names, paths and plain data, and a folder that is finished."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny
from tiny_export import data
from tiny_folder import write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, pipeline
from transformers.utils.logging import is_progress_bar_enabled

import slimformer
from slimformer import Recipe, Record, Train
from slimformer.errors import DataError, ModelError, OutputError, RecipeError, SlimformerError
from slimformer.files import claim, mark_finished
from slimformer.measuring.machine import environment
from slimformer.measuring.records import Facts
from slimformer.reporting.ledger import append_record, write_facts
from slimformer.running.given import given_model, given_recipe, given_task, moved, refuse_gone
from slimformer.running.runner import finished_result, recipe_purpose, wish_of
from slimformer.saving import checkpoint
from slimformer.tasks import Classification, Intents, QuestionAnswering


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("home") / "my-bert", trained=False)


@pytest.fixture
def model(home: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(home)


@pytest.fixture
def tokenizer(home: Path) -> Any:
    return AutoTokenizer.from_pretrained(home)


def test_a_model_in_memory_is_written_once(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with given_model(model, tokenizer, out) as name, claim(out, "compress"):
        assert Path(name) == out / "given" / "my-bert"
    loaded = checkpoint.load(Path(name))
    assert all((one == other).all() for one, other in zip(model.parameters(), loaded.parameters(), strict=True))
    written = (Path(name) / "model.safetensors").stat().st_mtime_ns
    tokenizer(["a film"], truncation=True, max_length=8)  # leaves its mark on the tokenizer
    with given_model(copy.deepcopy(model), tokenizer, out) as again:
        assert again == name
    assert (Path(name) / "model.safetensors").stat().st_mtime_ns == written
    model.classifier.bias.data += 1
    with pytest.raises(OutputError, match="holds another model that was given in memory"), given_model(model, tokenizer, out):
        pass


def test_nothing_is_left_of_a_request_that_never_began(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        slimformer.compress(model, Classification(data=tmp_path / "nowhere"), tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"), given_model(model, tokenizer, tmp_path / "other"):
        pass
    assert [item.name for item in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_what_wraps_a_model_is_taken_off(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    import torch

    names = []
    for number, item in enumerate(
        (pipeline("text-classification", model=model, tokenizer=tokenizer), torch.nn.DataParallel(model))
    ):
        with given_model(item, tokenizer if number else None, tmp_path / "out") as name:
            names.append(name)
    assert len(set(names)) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cross_encoder_brings_model_and_tokenizer(home: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    with given_model(sentence_transformers.CrossEncoder(str(home), device="cpu"), None, tmp_path / "out") as name:
        assert checkpoint.is_tuned(Path(name), Classification.auto_class)
    from sentence_transformers import SentenceTransformer

    with (
        pytest.raises(ModelError, match=r"sentence_transformers SentenceTransformer.*\n.*model\[0\].auto_model"),
        given_model(SentenceTransformer(str(home), device="cpu"), None, tmp_path / "other"),
    ):
        pass


class Slow:
    """A tokenizer of somebody's own."""


@pytest.mark.parametrize(
    ("item", "reads", "said"),
    [
        (lambda model: model, None, "the BertForSequenceClassification comes without its tokenizer"),
        (lambda model: model, "bert-base-uncased", "a str is no tokenizer of transformers"),
        (lambda model: model, Slow(), "Slow is no tokenizer of transformers"),
        (type, None, "BertForSequenceClassification is a class"),
        (lambda model: model.state_dict(), None, "OrderedDict is no model that can be cut"),
        (lambda model: model.classifier, None, "torch Linear is no model that can be cut"),
        (lambda _: None, None, "a NoneType is no model that can be cut"),
        (lambda _: 3, None, "a int is no model that can be cut"),
        (lambda model: model.to("meta"), "own", "has weights that are not in memory"),
        (lambda model: _with(model, hf_quantizer=1), "own", "the weights of the BertForSequenceClassification are quantized"),
        (lambda model: _with(model, _hf_peft_config_loaded=True), "own", "has adapters beside its weights"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_other_objects_are_refused_by_name(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path, item: Any, reads: Any, said: str
) -> None:
    with (
        pytest.raises(SlimformerError, match=said),
        given_model(item(model), tokenizer if reads == "own" else reads, tmp_path / "out"),
    ):
        pass
    assert not (tmp_path / "out").exists()


def _with(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def test_a_tokenizer_of_another_model_is_refused_before_anything_begins(model: PreTrainedModel, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(5000)} | {"[UNK]": 5000}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]")
    with (
        pytest.raises(ModelError, match="PreTrainedTokenizerFast|TokenizersBackend"),
        given_model(model, other, tmp_path / "out"),
    ):
        pass


def test_a_tokenizer_beside_a_folder_is_refused(home: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is read from its folder"), given_model(home, tokenizer, tmp_path):
        pass
    with given_model(home, None, tmp_path) as name:
        assert name == str(home)


@pytest.mark.parametrize(
    ("task", "taken"),
    [
        ({"use": "classification", "data": "reviews", "text": "review"}, Classification(data="reviews", text="review")),
        ("glue/sst2", Classification(data="glue/sst2", glue="sst2")),
        ("squad_v2", QuestionAnswering(data="rajpurkar/squad_v2", version="v2")),
        ("intents", Intents()),
        (Intents(), Intents()),
    ],
    ids=str,
)
def test_a_task_may_be_named(task: Any, taken: Any) -> None:
    assert given_task(task) == taken


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            "classification",
            r"the task 'classification' names no data.\n.*give a task object: slimformer.tasks.Classification\(data=",
        ),
        ("./reviews", "there is no task './reviews'"),
        ("glue/sst3", "did you mean 'glue/sst2'"),
        (Classification, "Classification is a class"),
        ({"use": "classification", "dat": "x"}, "did you mean 'data'"),
        ({"data": "reviews"}, "needs use"),
        (None, "a NoneType is no task"),
        ([{"text": "good", "label": 1}], "a list is no task"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_task_is_refused(task: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        given_task(task)


def test_a_model_in_memory_is_written_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "my-bert", trained=False)
    model, reader = AutoModelForSequenceClassification.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    bars = is_progress_bar_enabled()
    capfd.readouterr()
    with given_model(model, reader, tmp_path / "out") as folder:
        assert (Path(folder) / "model.safetensors").is_file()
    assert capfd.readouterr() == ("", "")
    assert is_progress_bar_enabled() == bars


def test_a_recipe_may_be_a_path_or_plain_data(tmp_path: Path) -> None:
    text = f"{{model: {tmp_path}/my-bert, task: {{use: intents}}, stages: [train: {{epochs: 2}}]}}"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = given_recipe(tmp_path / "recipe.yaml")
    assert given_recipe(str(tmp_path / "recipe.yaml")) == recipe == given_recipe(recipe)
    assert given_recipe({"model": f"{tmp_path}/my-bert", "task": "intents", "stages": [{"train": {"epochs": 2}}]}) == recipe
    for wrong, said in ((3, "a int is no recipe"), ([recipe], "a list is no recipe"), ("recipe", "cannot read the recipe")):
        with pytest.raises(RecipeError, match=said):
            given_recipe(wrong)  # type: ignore[arg-type]


# -- A folder that is finished -------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder as a finished run of `compress` leaves it."""
    data(tmp_path / "data")
    out = tmp_path / "small"
    task = Classification(data=tmp_path / "data")
    with claim(out, 'compress {"model": "a", "epochs": 3.0}'):
        (out / "report.html").write_text("page")
        row = Record("int8", "ours", "a", "t", "dev", "accuracy", {"accuracy": 0.5}, "2026-01-02", environment())
        append_record(out / "ledger.jsonl", row)
        write_facts(out, Facts("onnx/model.onnx", {"use": "classification", "data": "../data"}, 64, "accuracy"))
        mark_finished(out, wish_of(task, {"speedup": 3.0, "max_loss": 1.0}))
    return out


def asked(out: Path, speedup: float = 3.0, model: str = "a", epochs: float = 3.0) -> Any:
    purpose = f'compress {{"model": "{model}", "epochs": {epochs}}}'
    return finished_result(
        out, purpose, {"speedup": speedup, "max_loss": 1.0}, Classification(data=out.parent / "data"), slimformer.log.Log(None)
    )


def test_the_same_wish_gives_the_result_again(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "slimformer")
    result = asked(finished)
    assert result == slimformer.Result.read(finished)
    assert [record.name for record in result.records] == ["int8"]
    assert "small is finished already" in caplog.text
    assert asked(finished.parent / "fresh") is None


def test_another_wish_is_told_as_what_it_is(finished: Path) -> None:
    with pytest.raises(OutputError, match=r"(?s)finished run of another wish.*--speedup 3, you ask 4.*choose another --out"):
        asked(finished, speedup=4.0)
    with pytest.raises(OutputError, match=r"(?s)belongs to another run.*model: a there, b now\n  epochs: 3.0 there, 2.0 now"):
        asked(finished, model="b", epochs=2.0)
    (finished.parent / "data" / "dev.tsv").write_text("sentence\tlabel\na film\tgood\nno\tbad\n", encoding="utf-8")
    with pytest.raises(OutputError, match="the data was changed since"):
        asked(finished)


def test_a_recipe_runs_on_another_machine_with_its_model_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    (small / "recipe.yaml").write_text(
        "{model: ../my-bert, task: {use: classification, data: ../reviews, text: sentence}, stages: []}", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    facts = rf"model: {tmp_path}/my-bert\n  data: {tmp_path}/reviews\n  help: say where it is now: --model \./folder"
    with pytest.raises(RecipeError, match=rf"(?s)what this recipe names is not here\.\n  {facts}"):
        slimformer.run("small/recipe.yaml", "out")
    assert not Path("out").exists()
    write_model(tmp_path / "elsewhere" / "bert", trained=False)
    recipe = moved(slimformer.read_recipe("small/recipe.yaml"), Path("elsewhere/bert"), [{"sentence": "fine", "label": "good"}])
    refuse_gone(recipe)
    assert recipe.model == "elsewhere/bert"
    assert (recipe.task.text, Path(recipe.task.data).is_dir()) == ("sentence", True)  # type: ignore[attr-defined]
    refuse_gone(Recipe("owner/name", Classification(data="owner/data"), ()))  # the hub may have them
    with pytest.raises(RecipeError, match="the task intents of this recipe takes no data"):
        moved(Recipe("model", Intents(), ()), None, "reviews")


def test_a_run_may_resume_with_another_way_to_measure_it_but_not_with_other_stages(tmp_path: Path) -> None:
    recipe = Recipe("my-bert", Intents(), (Train(epochs=2),), bench=slimformer.Bench(seconds=9))
    purpose = recipe_purpose(recipe, tmp_path)
    assert recipe_purpose(replace(recipe, bench=slimformer.Bench(rivals=())), tmp_path) == purpose
    assert recipe_purpose(replace(recipe, stages=(Train(epochs=3),)), tmp_path) != purpose


@pytest.mark.slow
def test_a_recipe_with_a_model_in_memory_runs_and_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "my-bert")
    data(tmp_path / "data")
    model, reader = AutoModelForSequenceClassification.from_pretrained("my-bert"), AutoTokenizer.from_pretrained("my-bert")
    bench = slimformer.Bench(rivals=(), seconds=0.5)
    recipe = Recipe(model, Classification(data="data"), (), bench=bench)  # type: ignore[arg-type]
    result = slimformer.run(recipe, "small", tokenizer=reader, threads=1, wait_seconds=0)
    assert Path(slimformer.read_recipe("small/recipe.yaml").model).resolve() == Path("small/given/my-bert").resolve()
    again = slimformer.run(recipe, "small", tokenizer=reader)
    assert [record.name for record in again.records] == [record.name for record in result.records]
    with pytest.raises(OutputError, match=r'(?s)another wish.*stage bench: {.*"seconds": 0.5}, you ask {"seconds": 9}'):
        slimformer.run(replace(recipe, bench=slimformer.Bench(seconds=9)), "small", tokenizer=reader)
    with pytest.raises(OutputError, match="given in memory"):
        slimformer.run(Recipe(tiny("bert", vocab_size=99), Classification(data="data"), ()), "small", tokenizer=reader)  # type: ignore[arg-type]
