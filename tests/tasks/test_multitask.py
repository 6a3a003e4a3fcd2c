"""Several classifications at once: what is read, what counts, what is refused, and one model of two tasks from files to a service."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from tiny_folder import sentences, write_model, write_pieces
from torch.nn import functional

from slimformer import cli
from slimformer.core.answers import answer_slices
from slimformer.errors import DataError, ModelError, OutputError, RecipeError
from slimformer.running.joining import join_classifiers
from slimformer.running.reader import parse_recipe, read_recipe
from slimformer.running.recipe import Bench, Recipe
from slimformer.running.runner import run
from slimformer.saving import checkpoint
from slimformer.serving.answering import Classes
from slimformer.tasks._several import ClassOfEach
from slimformer.tasks.base import IGNORED, Split
from slimformer.tasks.multitask import Multitask
from slimformer.training.stage import Train

SCREEN = ("film", "story", "phone", "show", "song")
NAMES = {"mood": ("bad", "good"), "topic": ("house", "screen")}


def topic_of(text: str) -> str:
    return "screen" if set(text.split()) & set(SCREEN) else "house"


def write_rows(folder: Path, train: int = 240, dev: int = 60) -> Path:
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate((("train", train), ("dev", dev))):
        rows = [f"{text}\t{mood}\t{topic_of(text)}" for text, mood in dict(sentences(count, seed)).items()]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tmood\ttopic", *rows]) + "\n", encoding="utf-8")
    return folder


def write_head(source: Path, folder: Path, names: tuple[str, ...], seed: int, **changes: Any) -> Path:
    """A classifier with the encoder of `source` and a random head."""
    model = checkpoint.load(source)
    config = copy.deepcopy(model.config)
    config.id2label, config.label2id = dict(enumerate(names)), {name: place for place, name in enumerate(names)}
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    other = type(model)(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    other.load_state_dict(state, strict=False)
    other.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


# -- What counts ---------------------------------------------------------------------------------------------------------------

LOGITS = np.array(
    [[2.0, 1.0, 0.0, 0.0, 3.0], [0.0, 1.0, 5.0, 0.0, 0.0], [0.0, 3.0, 0.0, 1.0, 0.0], [4.0, 0.0, 0.0, 0.0, 1.0]],
    dtype=np.float32,
)
WANTED = np.array([[0, 2], [0, IGNORED], [IGNORED, 0], [0, 2]])
READING = ClassOfEach({"mood": ("bad", "good"), "topic": ("film", "food", "room")})


def test_each_task_is_judged_on_its_own_labels() -> None:
    found = READING.metrics(LOGITS, WANTED)
    assert found["accuracy of mood"] == pytest.approx(2 / 3)
    assert found["accuracy of topic"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert READING.credit(LOGITS, WANTED).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert READING.answers(LOGITS)[:2] == ["mood: bad, topic: room", "mood: good, topic: film"]
    draws = [np.array([0, 1, 1, 3]), np.array([2, 2, 0, 0])]
    by_hand = [READING.metrics(LOGITS[draw], WANTED[draw])["accuracy"] for draw in draws]
    quick = READING.resampled(LOGITS, WANTED, "accuracy", draws)
    assert quick is not None
    assert quick.tolist() == pytest.approx(by_hand)


def test_the_loss_is_the_mean_over_all_labels_that_are_known() -> None:
    logits, wanted = torch.from_numpy(LOGITS), torch.from_numpy(WANTED)
    known = [(row, column) for row in range(4) for column in range(2) if WANTED[row, column] != IGNORED]
    parts = (slice(0, 2), slice(2, 5))
    by_hand = [functional.cross_entropy(logits[row, parts[column]], wanted[row, column]) for row, column in known]
    assert float(READING.loss(logits, wanted)) == pytest.approx(float(torch.stack(by_hand).mean()))
    nothing = torch.full_like(wanted, IGNORED)
    assert float(READING.loss(logits, nothing)) == 0.0


def test_a_teacher_is_followed_in_every_task() -> None:
    ours, theirs = torch.from_numpy(LOGITS), torch.from_numpy(LOGITS[::-1].copy())
    shares = [(torch.log_softmax(x[:, part] / 2, -1)) for x in (ours, theirs) for part in (slice(0, 2), slice(2, 5))]
    apart = [(theirs.exp() * (theirs - ours)).sum(-1).mean() * 4 for ours, theirs in zip(shares[:2], shares[2:], strict=True)]
    assert float(READING.divergence(ours, theirs, 2.0)) == pytest.approx(float(sum(apart) / 2), rel=1e-5)


def test_drawn_labels_are_classes_of_each_task() -> None:
    drawn = READING.drawn(torch.from_numpy(LOGITS), torch.rand(4, 5))
    assert drawn.shape == (4, 2)
    assert int(drawn[:, 0].max()) < 2
    assert int(drawn[:, 1].max()) < 3


# -- What is read --------------------------------------------------------------------------------------------------------------


def test_columns_of_common_data_are_tasks_and_a_text_is_in_one_split(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    (rows / "dev.tsv").unlink()  # each task draws its own dev rows
    task = Multitask(data=str(rows), label="mood,topic")
    texts = {split: {item.texts for item in task.split(split)} for split in Split}
    assert not texts[Split.TRAIN] & texts[Split.VALIDATION]
    assert not texts[Split.DEV] & (texts[Split.TRAIN] | texts[Split.VALIDATION])
    every = [item for split in Split for item in task.split(split)]
    assert len(every) == len(dict(sentences(240, 0)))
    assert all({name.partition(": ")[0] for name in item.answer} == {"mood", "topic"} for item in every)
    assert all(f"topic: {topic_of(item.texts[0])}" in item.answer for item in every)


def test_dev_texts_of_a_task_are_in_no_training_data(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "first"), write_rows(tmp_path / "second")
    shutil.copyfile(first / "dev.tsv", second / "train.tsv")  # all of it stands in the first one's dev data
    shutil.copyfile(first / "train.tsv", second / "dev.tsv")
    task = Multitask(data={"mood": str(first), "topic": str(second)}, label={"mood": "mood", "topic": "topic"})
    dev = {item.texts for item in task.split(Split.DEV)}
    assert not dev & {item.texts for split in (Split.TRAIN, Split.VALIDATION) for item in task.split(split)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "./reviews"}, "name it for each of two tasks"),
        ({"data": "mood=./reviews"}, "name it for each of two tasks"),
        ({"data": "a b=./x,c=./y"}, "no name for a task"),
        ({"data": "mood=./x,topic=./y", "label": "mod=stars"}, "there is no task 'mod'; did you mean 'mood'"),
        ({"data": "mood=./x,topic=./y", "metric": "f1_macr"}, "did you mean 'f1_macro'"),
        ({"data": "mood=./x,topic=./y", "max_length": 2}, "mood: max_length"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        Multitask(**options)


def test_a_task_that_gives_no_class_is_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    scores = [f"text {n}\t{n / 7:.3f}" for n in range(60)]
    (tmp_path / "scores.tsv").write_text("\n".join(["sentence\tlabel", *scores]), encoding="utf-8")
    task = Multitask(data={"mood": str(rows), "grade": str(tmp_path / "scores.tsv")}, label={"mood": "mood"})
    with pytest.raises(DataError, match="the task grade gives a row a score"):
        task.split(Split.TRAIN)


def test_a_recipe_names_the_data_of_each_task_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows")
    write_model(tmp_path / "model", trained=False)
    data = {"use": "multitask", "data": {"mood": "rows", "topic": "./rows"}, "label": {"mood": "mood", "topic": "topic"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "model", "task": data, "stages": []}), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert isinstance(recipe.task, Multitask)
    assert {Path(place).resolve() for place in recipe.task.data.values()} == {tmp_path / "rows"}
    again = recipe.seen_from(tmp_path / "elsewhere").to_data()
    assert again["task"]["data"] == {"mood": "../rows", "topic": "../rows"}
    assert parse_recipe(json.loads(json.dumps(again)), base=tmp_path / "elsewhere").task.settings == recipe.task.settings


def test_a_model_of_other_tasks_is_refused(tmp_path: Path) -> None:
    task = Multitask(data=str(write_rows(tmp_path / "rows")), label="mood,topic")
    with pytest.raises(DataError, match="the model gives one answer"):
        task.bind({"id2label": {0: "bad", 1: "good"}})
    config = dict(task.configure())
    assert task.bind(config).labels == NAMES
    other = config | {"slimformer_answers": [["mood", 2], ["theme", 2]]}
    with pytest.raises(DataError, match="the model's tasks are mood, theme"):
        task.bind(other)
    with pytest.raises(ModelError, match="does not fit its labels"):
        answer_slices(config | {"slimformer_answers": [["mood", 3], ["topic", 2]]})


# -- Joined models -------------------------------------------------------------------------------------------------------------


def test_heads_of_one_encoder_are_joined_and_answer_as_before(tmp_path: Path) -> None:
    mood = write_model(tmp_path / "mood", trained=False)
    topic = write_head(mood, tmp_path / "topic", ("house", "screen", "other"), 3)
    joined = checkpoint.load(join_classifiers({"mood": mood, "topic": topic}, tmp_path / "both"))
    ids = torch.randint(4, 40, (5, 9))
    with torch.no_grad():
        apart = torch.cat([checkpoint.load(folder)(input_ids=ids).logits for folder in (mood, topic)], dim=1)
        torch.testing.assert_close(joined(input_ids=ids).logits, apart)
    assert answer_slices(joined.config) == {"mood": slice(0, 2), "topic": slice(2, 5)}
    assert joined.config.id2label[3] == "topic: screen"
    assert cli._task_of_model(cli._tasks(), str(tmp_path / "both"), "rows") == "multitask"
    assert cli._task_of_model(cli._tasks(), str(mood), "rows") == "classification"


@pytest.mark.slow
def test_models_that_share_no_encoder_are_refused(tmp_path: Path) -> None:
    mood = write_model(tmp_path / "mood", trained=False)
    other = write_model(tmp_path / "other", trained=True)
    with pytest.raises(ModelError, match="have other encoders"):
        join_classifiers({"mood": mood, "other": other}, tmp_path / "both")
    words = write_model(tmp_path / "words", trained=False, words=write_pieces)
    with pytest.raises(ModelError, match="reads other word pieces"):
        join_classifiers({"mood": mood, "words": words}, tmp_path / "both")
    score = write_head(mood, tmp_path / "score", ("score",), 3)
    with pytest.raises(ModelError, match="gives a score"):
        join_classifiers({"mood": mood, "score": score}, tmp_path / "both")
    bare = write_model(tmp_path / "bare", bare=True)
    with pytest.raises(ModelError, match="no classifier with one answer"):
        join_classifiers({"mood": mood, "bare": bare}, tmp_path / "both")
    with pytest.raises(RecipeError, match="cannot be joined"):
        join_classifiers({"my mood": mood}, tmp_path / "both")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="holds something else"):
        join_classifiers({"mood": mood, "again": mood}, tmp_path / "taken")
    assert not (tmp_path / "both").exists()
    before = {file.name: file.read_bytes() for file in mood.iterdir()}
    with pytest.raises(OutputError, match="holds something else"):
        join_classifiers({"mood": mood, "again": mood}, mood)  # a model of the user's is not replaced
    assert {file.name: file.read_bytes() for file in mood.iterdir()} == before
    twin = {"mood": mood, "again": mood}
    assert join_classifiers(twin, tmp_path / "both") == join_classifiers(twin, tmp_path / "both")
    with pytest.raises(OutputError, match="belongs to another run"):
        join_classifiers({"mood": mood, "twin": mood}, tmp_path / "both")


@pytest.mark.slow
def test_a_model_of_two_tasks_goes_from_an_encoder_to_files_and_a_service(tmp_path: Path) -> None:
    encoder, rows = write_model(tmp_path / "encoder", bare=True), write_rows(tmp_path / "rows")
    task = Multitask(data=str(rows), label="mood,topic")
    recipe = Recipe(str(encoder), task, (Train(epochs=40.0, lr=5e-3),), bench=Bench(rivals=(), seconds=0.3))
    result = run(recipe, tmp_path / "out", wait_seconds=0)
    assert result.record.scores["accuracy of mood"] > 0.8
    assert result.record.scores["accuracy of topic"] > 0.8
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    slices = answer_slices(config)
    feeds = {"input_ids": np.array([[2, 5, 11, 19, 3]]), "attention_mask": np.ones((1, 5), np.int64)}
    for file in (tmp_path / "out" / "onnx").glob("model*.onnx"):
        if "slim" in file.name:
            continue
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = {item.name for item in session.get_inputs()}
        fed = {name: feeds.get(name, np.zeros((1, 5), np.int64)) for name in names}
        logits, mood, topic = session.run(["logits", "logits_mood", "logits_topic"], fed)
        assert np.array_equal(mood, logits[:, slices["mood"]])
        assert np.array_equal(topic, logits[:, slices["topic"]])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert "mood: " in said.stdout.splitlines()[0]
    assert "topic: " in said.stdout.splitlines()[1]
    served = Classes(tmp_path / "out", config, 64)
    shares = served.shares(np.array([0.0, 1.0, 2.0, 0.0]))
    assert [item["label"] for item in shares] == ["mood: good", "mood: bad", "topic: house", "topic: screen"]
    assert sum(item["score"] for item in shares) == pytest.approx(2.0)
    assert served.facts()["tasks"] == {"mood": ["mood: bad", "mood: good"], "topic": ["topic: house", "topic: screen"]}
    assert read_recipe(tmp_path / "out" / "recipe.yaml").task.settings == task.settings
