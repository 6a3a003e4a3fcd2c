"""The docs are true: recipes parse and pass all checks, shown plug-ins keep their contracts, links and tables are right."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_hub import cached
from tiny_pairs import pairs, speaker, write_joint_tokenizer, write_pairs

from slimformer import registry
from slimformer.data.memory import data_source
from slimformer.errors import ModelError
from slimformer.measuring.machine import Environment, Load
from slimformer.measuring.records import Interval, Record, Standing
from slimformer.measuring.timing import SINGLE, SORTED, Lengths, Ratio, Timing
from slimformer.reporting.ledger import append_record
from slimformer.running.fresh import Fresh
from slimformer.running.given import given_models
from slimformer.running.order import conflicts
from slimformer.running.preflight import preflight
from slimformer.running.reader import parse_recipe, read_recipe
from slimformer.running.recipe import Recipe
from slimformer.saving.hub import HUB_MODEL
from slimformer.tasks.classification import Classification
from slimformer.tasks.embedding import Embedding
from slimformer.tasks.question_answering import QuestionAnswering
from slimformer.tasks.reranking import Reranking
from slimformer.tasks.summarization import Summarization
from slimformer.tasks.tagging import Tagging
from slimformer.tasks.text import Text
from slimformer.tasks.translation import Translation

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# -- Recipes -------------------------------------------------------------------------------------------------------------------


def shown_recipes() -> list[tuple[str, str]]:
    found = [(file.name, file.read_text(encoding="utf-8")) for file in sorted(ROOT.glob("recipes/*.yaml"))]
    for page in PAGES:
        found += [
            (page.name, block) for block in blocks(page.read_text(encoding="utf-8"), "yaml") if block.startswith("model:")
        ]
    return found


@pytest.mark.parametrize(("name", "text"), shown_recipes(), ids=lambda value: value if len(value) < 40 else "")
def test_a_recipe_that_is_shown_parses(name: str, text: str) -> None:
    recipe = parse_recipe(yaml.safe_load(text), where=name)
    assert recipe.stages
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_parts_of_recipes_that_are_shown_parse() -> None:
    shown = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), "yaml")]
    stages = [yaml.safe_load(block) for block in shown if re.match(r"- (train|calibrate|trim_vocabulary|export|bench):", block)]
    tasks = [yaml.safe_load(block)["task"] for block in shown if block.startswith("task:")]
    assert stages
    assert tasks
    for some in stages:
        parse_recipe({"model": "x", "task": "intents", "stages": some})
    for task in tasks:
        parse_recipe({"model": "x", "task": task, "stages": []})


def test_the_options_of_question_answering_are_told() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    part = text.split("## Question answering")[1].split("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \|\s*`?([^|`]*?)`?\s*\|", part, re.MULTILINE))
    assert told == {item.name: "" if item.default in (None, "") else str(item.default) for item in fields(QuestionAnswering)}


def test_the_options_of_plain_text_are_told() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    part = text.split("## Plain text")[1].split("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \|\s*`?([^|`]*?)`?\s*\|", part, re.MULTILINE))
    assert told == {item.name: "" if item.default in (None, "") else str(item.default).lower() for item in fields(Text)}


def test_the_options_of_tagging_are_told() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    part = text.split("## Tagging")[1].split("\n## ")[0]
    told = {name for cell in re.findall(r"^\| (`[^|]+`) \|", part, re.MULTILINE) for name in re.findall(r"\w+", cell)}
    assert told == {item.name for item in fields(Tagging)}


def test_the_options_of_embedding_are_told() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    part = text.split("## Embedding")[1].split("\n## ")[0]
    told = {name for cell in re.findall(r"^\| (`[^|]+`) \|", part, re.MULTILINE) for name in re.findall(r"\w+", cell)}
    assert told == {item.name for item in fields(Embedding)}


def test_the_options_of_reranking_are_told() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    part = text.split("## Reranking")[1].split("\n## ")[0]
    told = {name for cell in re.findall(r"^\| (`[^|]+`) \|", part, re.MULTILINE) for name in re.findall(r"\w+", cell)}
    assert told == {item.name for item in fields(Reranking)}


def test_the_options_of_tasks_that_write_are_told() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    part = text.split("## Translation and summarization")[1].split("\n## ")[0]
    told = {name for cell in re.findall(r"^\| (`[^|]+`) \|", part, re.MULTILINE) for name in re.findall(r"\w+", cell)}
    assert told == {item.name for task in (Translation, Summarization) for item in fields(task)}


def test_the_example_of_squads_form_and_of_natural_questions_can_be_read(tmp_path: Path) -> None:
    from slimformer.data.squad import read_questions

    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    (shown,) = blocks(text, "json")
    (tmp_path / "train.json").write_text(shown, encoding="utf-8")
    first, second = read_questions([tmp_path / "train.json"]).examples
    assert (first.answer.texts, first.answer.start, second.answer.texts) == (("1932",), 25, ())

    scope: dict[str, Any] = {}
    (code,) = (block for block in blocks(text, "python") if "def paragraph" in block)
    exec(code, scope)
    words = "<H1> A film </H1> <P> It was made by <b> Ann Lee </b> and Bo Berg . </P> The end"
    note = {
        "long_answer": {"start_token": 4, "end_token": 17},
        "short_answers": [{"start_token": 10, "end_token": 12}, {"start_token": 14, "end_token": 17}],
    }
    row = {"document_text": words, "annotations": [note], "example_id": 7, "question_text": "who made it"}
    made = scope["paragraph"](row)
    (tmp_path / "nq.json").write_text(json.dumps({"data": [{"paragraphs": [made]}]}), encoding="utf-8")
    (found,) = read_questions([tmp_path / "nq.json"]).examples
    assert found.texts == ("who made it", "It was made by Ann Lee and Bo Berg . ")
    assert (found.answer.texts, found.answer.start) == (("Ann Lee", "Bo Berg ."), 15)
    assert scope["paragraph"](row | {"annotations": [note | {"short_answers": []}]}) is None


def test_concepts_show_a_recipe_with_every_stage() -> None:
    (text,) = (text for name, text in shown_recipes() if name == "concepts.md")
    assert {next(iter(stage)) for stage in yaml.safe_load(text)["stages"]} == {
        "train",
        "calibrate",
        "trim_vocabulary",
        "export",
        "bench",
    }


def test_the_stages_of_the_tables_are_in_an_order_that_makes_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    structured, numerics = (importlib.import_module(name) for name in ("structured", "numerics"))
    made = [getattr(structured, name)(0.5, 4.0, structured.DISTIL) for name in ("methods", "ablations", "five_times")]
    made += [numerics.quantized(), numerics.sparse("mrpc", 0.1), numerics.patterns("sst2"), numerics.together("mrpc")]
    made += [
        numerics.sparse_ablations(0.1),
        numerics.sparse_ours("mrpc", 0.1),
        numerics.factored("mrpc", "7.7x"),
        numerics.small_and_dense("mrpc", 0.2),
    ]
    for name, stages in (pair for some in made for pair in some.items()):
        for number, stage in enumerate(stages):
            assert list(conflicts(stage, stages[:number])) == [], name


def test_jobs_train_side_by_side_after_the_one_that_makes_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = importlib.import_module("sweep")
    recipe = Recipe("model", Classification("data"), ())
    jobs = [sweep.Job(name, recipe, needs=needs) for name, needs in (("a", ""), ("b", "a"), ("c", "a"), ("d", ""))]
    assert [[job.folder for job in some] for some in sweep.rounds(jobs, 2)] == [["a"], ["b", "c"], ["d"]]
    assert [len(some) for some in sweep.rounds(jobs, 1)] == [1] * 4
    assert [len(some) for some in sweep.rounds(jobs[1:], 3)] == [3]


def test_a_job_brings_those_that_make_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = importlib.import_module("sweep")
    monkeypatch.setattr(sweep, "HOME", tmp_path / "results")
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    recipe = Recipe("model", Classification("data"), ())
    jobs = [sweep.Job(name, recipe, needs=needs) for name, needs in (("a", ""), ("b", "a"), ("c", "b"), ("d", ""))]
    for name in "abd":
        (tmp_path / "results" / "methods" / name).mkdir(parents=True)
        (tmp_path / "results" / "methods" / name / "ledger.jsonl").touch()
    assert [job.folder for job in sweep.due(jobs)] == ["a", "b", "c"]
    (tmp_path / "runs" / "sweep" / "b").mkdir(parents=True)
    (tmp_path / "runs" / "sweep" / "b" / "config.json").touch()
    assert [job.folder for job in sweep.due(jobs)] == ["c"]


def test_to_train_a_job_makes_the_model_that_it_starts_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A maker runs to its end, so that its model is there; what starts from it is trained alone, and left out without it."""
    sweep = importlib.import_module("sweep")
    monkeypatch.setattr(sweep, "HOME", tmp_path / "results")
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    scratch, done = tmp_path / "runs" / "sweep", []

    def run(recipe: Recipe, folder: Path, **_: object) -> None:
        if folder.name == "bad":
            raise ModelError("it cannot be made.")
        folder.mkdir(parents=True)
        (folder / "ledger.jsonl").touch()
        (folder / "config.json").touch()
        done.append(folder.name)

    def train_stages(recipe: Recipe, folder: Path, **_: object) -> None:
        assert (Path(recipe.model) / "config.json").is_file()
        done.append(f"{folder.name} alone")

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "train_stages", train_stages)
    recipe = Recipe(str(scratch / "teacher"), Classification("data"), ())
    needed = {"teacher": "", "row": "teacher", "bad": "", "its": "bad"}
    jobs = [sweep.Job(name, recipe, needs=needs) for name, needs in needed.items()]
    assert sweep.train_alone(jobs[:2]) == 0
    assert done == ["teacher", "row alone"]
    assert sweep.train_alone(jobs[2:]) == 1
    assert done == ["teacher", "row alone"]


RECIPES = sorted(ROOT.glob("recipes/*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_a_recipe_of_the_clone_names_nothing_outside_of_it(file: Path) -> None:
    """Models and data come from the hub, are built in, or are what another recipe leaves under runs/."""
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    named = [data[name] for name in ("model", "teacher") if isinstance(data.get(name), str)]
    assert isinstance(data["model"], dict) or named
    made = [name for name in named if not HUB_MODEL.fullmatch(name)]
    assert f"slimformer run recipes/{file.name} --out runs/{file.stem}" in file.read_text(encoding="utf-8")
    for name in made:
        made_by = (file.parent / name).resolve().relative_to(ROOT / "runs")
        assert (ROOT / "recipes" / f"{made_by}.yaml").is_file()
    assert data["task"] == {"use": "intents"} or re.fullmatch(
        r"glue/\w+|squad|squad_v2|bentrevett/multi30k|allenai/scitldr:Abstract|leondz/wnut_17@refs/convert/parquet"
        r"|sentence-transformers/wikipedia-en-sentences|rajpurkar/squad",
        data["task"]["data"],
    )
    assert not any(
        isinstance(value, str) and "/" in value for key, value in data["task"].items() if key not in ("data", "pairs")
    )
    assert {stage["train"].get("text", "task") for stage in data["stages"] if "train" in stage} <= {"task"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub's cache with the encoder that the recipes name, and beside it a few rows of each data set that they name."""
    from slimformer.demo import encoder

    home = tmp_path_factory.mktemp("hub")
    texts = [f"the film number {number} was {'good' if number % 2 else 'bad'} ." for number in range(400)]
    for name, head, cells in (
        ("sst2", "sentence\tlabel", lambda text, label: f"{text}\t{label}"),
        ("mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", lambda text, label: f"{label}\t1\t2\t{text}\t{text}"),
    ):
        (home / name).mkdir()
        rows = "\n".join([head, *(cells(text, number % 2) for number, text in enumerate(texts))])
        for split in ("train", "dev"):
            (home / name / f"{split}.tsv").write_text(rows, encoding="utf-8")
    for version in ("v1", "v2"):
        paragraphs = []
        for number, text in enumerate(texts):
            answers = [{"text": "film", "answer_start": 4}] if version == "v1" or number % 3 else []
            paragraphs.append({"context": text, "qas": [{"id": str(number), "question": "what ?", "answers": answers}]})
        (home / version).mkdir()
        for split in ("train", "dev"):
            (home / version / f"{split}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    write_pairs(home / "parallel")
    words = write_joint_tokenizer(home / "translator")  # what recipes/multi30k-train.yaml leaves
    speaker("marian", words.get_vocab_size(), activation_function="relu").save_pretrained(home / "translator")
    snapshot = cached(home, "sentence-transformers/all-MiniLM-L6-v2", encoder())
    teacher = home / "teacher"  # what recipes/mrpc-tune.yaml leaves, as far as the checks look at it
    teacher.mkdir()
    config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    names = {"id2label": {"0": "not_equivalent", "1": "equivalent"}, "label2id": {"not_equivalent": 0, "equivalent": 1}}
    config |= {"architectures": ["BertForSequenceClassification"], **names}
    (teacher / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (teacher / "tokenizer.json").symlink_to(snapshot / "tokenizer.json")
    head = {"classifier.weight": torch.zeros(2, config["hidden_size"]), "classifier.bias": torch.zeros(2)}
    weights = {f"bert.{name}": value for name, value in load_file(snapshot / "model.safetensors").items()}
    save_file(weights | head, teacher / "model.safetensors", metadata={"format": "pt"})
    shallow = home / "shallow"  # the same with its first layer alone: it reads all words for a student without layers
    shallow.mkdir()
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    (shallow / "tokenizer.json").symlink_to(snapshot / "tokenizer.json")
    first = {name: value for name, value in weights.items() if ".layer." not in name or ".layer.0." in name}
    save_file(first | head, shallow / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
        yield home


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_a_recipe_of_the_clone_passes_all_checks_that_come_before_a_run(file: Path, hub: Path, tmp_path: Path) -> None:
    recipe = read_recipe(file)
    task = recipe.task
    if isinstance(recipe.model, Fresh) and recipe.model.use == "static":
        recipe = replace(recipe, model=Fresh("cnn"))  # of a static one the teacher reads 30,000 pieces, which takes minutes
    if isinstance(task, Classification):
        task = replace(task, data=str(hub / str(task.glue)), train_rows=None)
    elif isinstance(task, QuestionAnswering):
        task = replace(task, data=str(hub / task.version), train_ids=None)
    elif isinstance(task, Tagging):
        task = replace(
            task,
            data=[{"tokens": text.split(), "tags": ["O", "B-X", *["O"] * 9][: len(text.split())]} for text, _ in pairs(60, 1)],
        )
    elif isinstance(task, Embedding):
        rows = [
            {"sentence1": text, "sentence2": other, "score": place % 7 / 2} for place, (text, other) in enumerate(pairs(60, 1))
        ]
        kept = data_source(rows)
        task = replace(task, data=[{"text": f"{text} {place}"} for place, (text, _) in enumerate(pairs(60, 1))], pairs=kept)
    elif isinstance(task, Reranking):
        rows = [{"query": text, "positive": other, "negative": "no"} for text, other in pairs(60, 1)]
        task = replace(task, data=rows)
    elif isinstance(task, Translation):
        task = replace(task, data=str(hub / "parallel"))
        fresh = isinstance(recipe.model, Fresh)
        recipe = replace(recipe, model=replace(recipe.model, vocabulary=300) if fresh else str(hub / "translator"))
    elif isinstance(task, Summarization):
        texts = {
            "source": [f"{text}. It is a long one." for text, _ in pairs(60, 1)],
            "target": [text for _, text in pairs(60, 1)],
        }
        task = replace(task, data=texts)
        recipe = replace(recipe, model=replace(recipe.model, vocabulary=290))
    own = isinstance(recipe.model, Fresh) and recipe.model.use == "bert"
    if own:
        recipe = replace(recipe, model=replace(recipe.model, vocabulary=130))
    teacher = "shallow" if isinstance(recipe.model, Fresh) and not own else "teacher"
    recipe = replace(recipe, task=task, teacher=str(hub / teacher) if recipe.teacher else None)
    with given_models(recipe, None, tmp_path) as given:
        preflight(given)


# -- Pages ---------------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page: Path) -> None:
    """Files of the package are named from its root, others from the clone's."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"(?<![\w./-])((?:[a-z]\w*/)+\w+\.py|recipes/[\w-]+\.yaml)\b", text):
        if not name.startswith("yourpackage/") and name != "tests/test_magnitude.py":
            assert (ROOT / name).exists() or (ROOT / "src" / "slimformer" / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_options_exist(page: Path) -> None:
    from typer.main import get_command

    from slimformer.cli import app

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    params = {name: made.get_params(made.context_class(made)) for name, made in commands.items()}
    options = {name: {flag for item in some for flag in (*item.opts, *item.secondary_opts)} for name, some in params.items()}
    text = page.read_text(encoding="utf-8")
    code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^    (.+)$", text, re.MULTILINE)]
    for line in code:
        for name, rest in re.findall(r"\bslimformer ([a-z]+)\b([^|`]*)", line):
            assert name in commands, f"{page.name} shows `slimformer {name}`"
            for flag in re.findall(r"(?<=\s)--[a-z-]+", rest):
                assert flag in options[name], f"{page.name} shows `slimformer {name} {flag}`"
    everything = set().union(*options.values()) | {"--check"}
    for line in code:
        for flag in re.findall(r"^--[a-z-]+", line):
            assert flag in everything, f"{page.name} shows the option {flag}"


def test_the_quick_start_names_every_command() -> None:
    from typer.main import get_command

    from slimformer.cli import app

    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`slimformer {name}" in text


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for name in re.findall(r"(?:`|^    )make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert name in targets, f"{page.name} shows `make {name}`"


def test_every_method_has_its_paragraph() -> None:
    heads = anchors(ROOT / "docs" / "methods.md")
    assert set(registry.names("methods")) <= heads


def test_every_delivered_file_is_told() -> None:
    from slimformer.exporters.base import FILES, SHIPPED
    from slimformer.reporting.ledger import FACTS_FILE, LEDGER

    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for name in (*(FILES[variant].place for variant in SHIPPED), FACTS_FILE, LEDGER, "plan.json", "recipe.yaml", "report.html"):
        assert f"`{name}`" in text


def test_every_supported_model_is_told() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").lower()
    for family in registry.names("families"):
        for model_type in registry.find("families", family).model_types:
            assert model_type in text, f"README does not name {model_type}"


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert listed == {file.name for file in folder.glob("[0-9]*.md")}


# -- Tables --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of results/ can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "results"))


def tables() -> ModuleType:
    return importlib.import_module("tables")


def row(name: str, role: Standing, speed: float, **fields: Any) -> Record:
    given: dict[str, Any] = {
        "name": name,
        "role": role,
        "model": "bert",
        "task": "glue/sst2",
        "split": "dev",
        "metric": "accuracy",
        "scores": {"accuracy": 0.9},
        "date": "2026-01-02T03:04:05+00:00",
        "environment": Environment("Some CPU", 2, ("avx2",), 2**33, "Linux 6", "3.11.7", {"slimformer": "0.1.0"}),
        "examples": 872,
        "baseline": "dense fp32",
        "size_bytes": 90_000_000,
        "speed": {SORTED: Ratio(speed, 0.9 * speed, 1.1 * speed), SINGLE: Ratio(1.5, 1.4, 1.6)},
        "macs": 4_000_000,
        "params": 1000,
    }
    return Record(**{**given, **fields})


def write_run(folder: Path, *, score: float, seed: int) -> None:
    dense = row("dense fp32", Standing.TEACHER_FP32, 1.0)
    ours = row(
        "slimformer int8",
        Standing.OURS,
        3.2,
        chosen=True,
        scores={"accuracy": score},
        loss=Interval(0.8, -0.3, 1.9),
        size_bytes=15_300_000,
        minutes=12.4,
        macs=1_000_000,
        seed=seed,
    )
    static = replace(ours, name="slimformer int8 static", chosen=False, scores={"accuracy": 0.7})
    for record in (dense, ours, static):
        append_record(folder / "ledger.jsonl", record)


@pytest.mark.slow
def test_the_pages_are_what_the_ledgers_give() -> None:
    assert tables().main(["--check"]) == 0, "run python results/tables.py"


def test_the_figures_of_sentences_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    work = importlib.import_module("work")
    dense = row("dense fp32", Standing.TEACHER_FP32, 1.0, encoder_params=1000, encoder_nonzero=1000)
    plain = row(
        "fp32", Standing.OURS, 2.44, precision="fused", loss=Interval(1.26, 0.4, 2.1), encoder_params=400, encoder_nonzero=240
    )
    integers = replace(plain, name="int8", precision="int8_fused", loss=Interval(-0.3, -1.0, 0.4))
    found = {"mrpc/fisher-35": work.Run(Path("methods/structured/mrpc/fisher-35"), (dense, plain, integers))}
    figures = (
        "lost {mrpc/fisher-35:lost}, {mrpc/fisher-35:int8} in int8, {mrpc/fisher-35:faster} times, {mrpc/fisher-35:left} %"
    )
    said = work.notes([figures, "no figure", "{mrpc/fisher-50:lost} of a run that is not there"], found)
    assert said[5:] == ["- lost 1.3 (+0.4 to +2.1), −0.3 (−1.0 to +0.4) in int8, 2.4 times, 24 %", "- no figure", ""]
    with pytest.raises(ValueError, match=r"says gained of mrpc/fisher-35: it is -1\.3"):
        work.notes(["{mrpc/fisher-35:gained}"], found)
    with pytest.raises(ValueError, match="has no colour"):
        work.notes(["{mrpc/fisher-35:colour}"], found)


def test_a_verdict_on_a_table_is_open_unless_the_intervals_say_it() -> None:
    work = importlib.import_module("work")
    lengths, load = Lengths(20.0, 18.0, 40.0, 50), Load(0.0, 0.0, 0.0, True)
    engine = ("onnxruntime", "1.31", "cpu", 2, 1)
    timing = Timing(SORTED, 32, "in order", 32, 600, lengths, *engine, load, (32,), ((1.0,),) * 30)
    plain = row("fp32", Standing.OURS, 2.4, loss=Interval(0.5, 0.1, 0.9), timings=(timing,))  # 2.13 to 2.67 times as fast
    aims = ((1.0, 2.0), (0.6, 2.0), (0.0, 2.0), (1.0, 2.4), (1.0, 3.0), (1.0, 0.0))
    assert [work.met(plain, *aim) for aim in aims] == ["yes", "open", "no", "open", "no", "yes"]
    assert work.met(plain, 1.0, small=False) == "no"
    worse, same, better = (
        replace(plain, scores={"accuracy": score}, loss=Interval(lost, lost - 1, lost + 1))
        for score, lost in ((0.90, 5.0), (0.91, 4.0), (0.93, 2.0))
    )
    orders = ((worse, better), (better, worse), (worse, same), (worse, same, better))
    assert [work.rising([[file] for file in order]) for order in orders] == ["yes", "no", "open", "open"]


def test_two_models_are_compared_over_examples_and_seeds() -> None:
    work = importlib.import_module("work")
    about = {"examples": 100, "teacher": "a1", "loss": Interval(1.0, -4.0, 6.0)}
    good, bad = (
        replace(row("fp32", Standing.OURS, 2.0), scores={"accuracy": score}, resampled=resampled, **about)
        for score, resampled in ((0.90, (0.88, 0.90, 0.92)), (0.85, (0.83, 0.85, 0.87)))
    )
    # The same draws move both alike: five points apart on each, though each alone is not sure within four.
    gap = work.gained([good], [bad])
    assert (gap.value, gap.low, gap.high) == pytest.approx((5.0, 5.0, 5.0))
    assert work.rising([[bad], [good]]) == "yes"
    other = replace(bad, teacher="b2")
    apart = work.gained([good], [other])  # of another teacher: the half-widths of both losses in squares, 5 and 5
    assert apart.high - apart.value == pytest.approx(50**0.5)
    # Three seeds, 85, 86 and 87: their mean is 86, its standard error 1 / sqrt(3).
    seeds = [replace(bad, scores={"accuracy": 0.85 + step / 100}, seed=17 + step) for step in range(3)]
    gap = work.gained([good], seeds)
    assert gap.value == pytest.approx(4.0)
    assert gap.high - gap.value == pytest.approx(((5.0 - 4.0) ** 2 + (1.96 / 3**0.5) ** 2) ** 0.5)
    assert gap.value - gap.low == pytest.approx(1.96 / 3**0.5)


def test_runs_that_were_made_again_stand_beside_their_first_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    again = importlib.import_module("again")
    plain = row("fp32", Standing.OURS, 2.0, precision="float", loss=Interval(1.0, -0.5, 2.5))
    near, far = (replace(plain, loss=Interval(value, value - 1, value + 1)) for value in (2.4, 2.6))
    runs = {
        "methods/numbers/a/x": (plain,),
        "methods/numbers/a/y": (plain,),
        "methods/numbers/a/z": (plain,),
        "methods/again/numbers/a/x": (near,),
        "methods/again/numbers/a/y": (far,),
    }
    monkeypatch.setattr(again, "runs_of", lambda *_: [again.Run(Path(name), records) for name, records in runs.items()])
    monkeypatch.setattr(again, "DRAWN", tmp_path / "again.json")
    assert again.part() == []
    monkeypatch.setattr(again, "_can_run", lambda folder: folder.name != "z")
    again.draw(seed=3, count=10)
    lines = again.part()
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))["of"] == 2
    assert " ".join(lines).startswith(
        "## Run again  2 of the 2 runs that can be repeated here, drawn with the seed 3, were run again"
    )
    assert [line.rsplit("|", 2)[1].strip() for line in lines if line.startswith("| numbers")] == ["yes", "no"]


def test_minutes_say_with_how_many_threads_where_some_were_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    work = importlib.import_module("work")
    ours = row("fp32", Standing.OURS, 2.0, minutes=20.26)
    assert [work.minutes(replace(ours, threads=threads)) for threads in (None, 1, 2)] == ["20.3", "20.3 (1 thread)", "20.3"]
    assert work.minutes(replace(ours, minutes=None)) == work.minutes(replace(ours, minutes=0.0)) == ""


def test_a_page_says_where_runs_learned_from_different_models(monkeypatch: pytest.MonkeyPatch) -> None:
    work = importlib.import_module("work")
    dense = row("dense fp32", Standing.TEACHER_FP32, 1.0)
    first, second = (
        work.Run(Path(name), (replace(dense, scores={"accuracy": score}), row("fp32", Standing.OURS, 2.0)))
        for name, score in (("a", 0.8), ("b", 0.9))
    )
    assert "0.8000 to 0.9000" in "\n".join(work.heading("sst2", {"sst2/a": first, "sst2/b": second}))
    assert "more than once" not in "\n".join(work.heading("sst2", {"sst2/a": first, "sst2/b": first}))


def test_without_a_ledger_the_pages_say_so(tmp_path: Path) -> None:
    drawn = tables()
    assert drawn.runs(tmp_path) == []
    assert "No run has been recorded yet" in drawn.results_page([])
    assert "No run has been recorded yet" in drawn.readme_table([])


def test_rows_are_drawn_as_measured(tmp_path: Path) -> None:
    drawn = tables()
    write_run(tmp_path / "sst2" / "minilm", score=0.5, seed=17)
    write_run(tmp_path / "sst2" / "minilm", score=0.892, seed=17)  # measured again: the last row of a name counts
    write_run(tmp_path / "sst2" / "minilm-seed18", score=0.9, seed=18)
    found = drawn.runs(tmp_path)
    assert [run.name for run in found] == ["sst2/minilm", "sst2/minilm-seed18"]
    assert [run.claim for run in found] == ["sst2/minilm", "sst2/minilm"]
    page, short = drawn.results_page(found), drawn.readme_table(found)
    cells = ("accuracy 0.8920", "+0.8 (−0.3 to +1.9)", "15.3", "3.20 (2.88 to 3.52)", "1.50 (1.40 to 1.60)", "12")
    expected = f"| glue/sst2 | **slimformer int8** | {' | '.join(cells)} |"
    assert expected in page
    assert expected.replace("| glue/sst2 ", "") in short
    assert "0.5000" not in page
    assert "slimformer int8 static" in page
    assert "slimformer int8 static" not in short
    assert short.count("**slimformer int8**") == 1  # the second seed is in the spread, not here
    assert "| sst2/minilm | 17, 18 | 0.8960 (0.8920 to 0.9000) | +0.8 (+0.8 to +0.8) |" in page
    assert "(../results/sst2/minilm/recipe.yaml)" in page


def test_theory_and_measured_speed_share_no_table(tmp_path: Path) -> None:
    write_run(tmp_path / "sst2" / "minilm", score=0.89, seed=17)
    drawn = tables()
    page = drawn.results_page(drawn.runs(tmp_path))
    parts = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert sum("MACs" in part for part in parts) == 1
    assert not any("MACs" in part and "batch 32" in part for part in parts)
    assert "| slimformer int8 | 1.0 M | 25 % |" in page


def test_the_table_is_put_between_its_markers() -> None:
    drawn = tables()
    begin, end = (marker.format(part="results") for marker in (drawn.BEGIN, drawn.END))
    text = f"above\n{begin}\nold\n{end}\nbelow\n"
    once = drawn.placed(text, "| new |")
    assert once == f"above\n{begin}\n| new |\n{end}\nbelow\n"
    assert drawn.placed(once, "| new |") == once
    with pytest.raises(ValueError, match="must hold"):
        drawn.placed("no markers", "| new |")
    with pytest.raises(ValueError, match="lead:begin"):
        drawn.placed(text, "| new |", "lead")


def test_the_first_sentence_is_what_a_row_says(tmp_path: Path) -> None:
    drawn = tables()
    write_run(tmp_path / "sst2" / "minilm", score=0.892, seed=17)
    write_run(tmp_path / "cola" / "minilm", score=0.892, seed=17)
    lead = " ".join(drawn.readme_lead(drawn.runs(tmp_path)).split())
    assert "**3.2 times as fast** and its file **15.3 instead of 90.0 MB**, within 12.4 minutes" in lead
    assert "a loss too close to call: +0.8 points lost, 95 % interval −0.3 to +1.9" in lead


def test_the_python_of_the_readme_calls_what_there_is() -> None:
    import inspect

    (code,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    tree = ast.parse(code)
    scope: dict[str, Any] = {}
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "README.md", "exec"), scope)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("compress", "load"):
            arguments = [eval(ast.unparse(argument), scope) for argument in node.args]
            inspect.signature(scope[ast.unparse(node.func)]).bind(*arguments)
