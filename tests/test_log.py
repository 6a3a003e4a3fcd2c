"""Everything said is kept as JSON lines; what a person sees depends on where they look."""

from __future__ import annotations

import io
import json
import logging
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from slimformer import log as module
from slimformer.errors import OutputError
from slimformer.log import Log, show_log


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_events_are_json_lines_with_time_and_kind(tmp_path: Path) -> None:
    log = Log(tmp_path / "new" / "run")
    before = datetime.now(UTC).replace(microsecond=0)
    log.event("step", step=3, loss=0.5, bad=math.nan, path=Path("x"), nested={"a": (1, math.inf)}, none=None, text="größer")
    log.event("end")
    first, second = lines(tmp_path / "new" / "run")
    assert datetime.fromisoformat(str(first.pop("time"))) >= before
    assert first == {
        "kind": "step",
        "step": 3,
        "loss": 0.5,
        "bad": "nan",
        "path": "x",
        "nested": {"a": [1, "inf"]},
        "none": None,
        "text": "größer",
    }
    assert second["kind"] == "end"


def test_half_a_line_of_a_killed_run_does_not_spoil_the_next(tmp_path: Path) -> None:
    Log(tmp_path).event("one")
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"time": "2026')
    Log(tmp_path).event("two")
    whole = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["kind"] for line in whole] == ["one", "two"]


def test_say_prints_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]kept[/bold] 3 of 12 heads in " + "a-long-path/" * 20
    with show_log():
        Log(tmp_path).say(text)
    assert capsys.readouterr().out == text + "\n"  # neither markup nor line breaks of our own
    assert [line["text"] for line in lines(tmp_path)] == [text]


def test_quiet_prints_nothing_but_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, quiet=True)
    with show_log():
        log.say("hello")
        with log.track("training", 10) as advance:
            advance(10, loss=1.0)
    assert capsys.readouterr().out == ""
    assert [line["text"] for line in lines(tmp_path)] == ["hello"]


def test_from_python_lines_are_logged_and_not_printed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with show_log():
        pass
    with caplog.at_level("INFO"):
        Log(None).say("hello")
    assert [(record.name, record.message) for record in caplog.records] == [("slimformer", "hello")]
    assert capsys.readouterr() == ("", "")


def test_what_other_code_of_the_library_says_is_kept_too_and_shown_to_nobody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, stream, inner = logging.getLogger(), io.StringIO(), logging.getLogger("slimformer.measuring.machine")
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    try:
        log = Log(tmp_path)
        with log.keeping():
            log.say("its own line")
            inner.info("waiting for %d cores", 2)
            inner.warning("the machine is busy")
            inner.debug("of no interest")
            logging.getLogger("other").warning("not ours")
        inner.warning("later")
    finally:
        root.removeHandler(handler)
    assert [line["text"] for line in lines(tmp_path)] == ["its own line", "waiting for 2 cores", "the machine is busy"]
    assert stream.getvalue().splitlines() == ["the machine is busy", "not ours", "later"]
    assert not inner.isEnabledFor(logging.INFO)
    assert capsys.readouterr() == ("", "")


def test_without_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Log(None, quiet=True).event("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        Log(tmp_path / "file" / "run").event("x")


def test_away_from_a_terminal_progress_is_a_line_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with show_log(), Log(None).track("training", 1000) as advance:
        for step in range(1, 101):
            clock.now += 1.0
            advance(step, loss=0.125, metric=0.75)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    # at second 30, 29 steps after the first one was told: 1000 - 30 are left
    assert out[0] == "training: 30/1000  1.0 s each, 16 min 43 s left  loss 0.125  metric 0.75"


def test_only_a_terminal_breaks_lines_and_between_words() -> None:
    text = "the smaller dense rival takes as long as the result"
    for terminal, shown in ((True, "the smaller dense rival \ntakes as long as the result\n"), (False, f"{text}\n")):
        screen = io.StringIO()
        with show_log(Console(file=screen, force_terminal=terminal, no_color=True, width=28)):
            Log(None).say(text)
        assert screen.getvalue() == shown


def test_lines_on_data_are_found_however_its_path_is_spelt() -> None:
    module.remark("my reviews/train.tsv: taking text 'sentence', label 'label'")  # no other test has data of this name
    for spelling in ("my reviews", "./my reviews", "my reviews/", "./my reviews/train.tsv"):
        assert module.remarks_on(spelling)[-1].endswith("label 'label'")
    assert module.remarks_on("") == ()


def test_a_resumed_run_is_timed_from_where_it_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with show_log(), Log(None).track("training", 1000) as advance:
        advance(900)
        clock.now += 40.0
        advance(980)
    assert capsys.readouterr().out == "training: 980/1000  2.0/s, 10 s left\n"


def test_on_a_terminal_progress_is_a_bar(tmp_path: Path) -> None:
    log = Log(None)
    with open(tmp_path / "screen", "w+", encoding="utf-8") as screen:
        console = Console(file=screen, force_terminal=True, width=120)
        with show_log(console), log.track("training", 4) as advance:
            for step in range(1, 5):
                advance(step, loss=0.25, tokens_per_second=1500.0)
        screen.seek(0)
        shown = screen.read()
    for part in ("training", "100%", "loss 0.25", "tokens per second 1500"):
        assert part in shown


@pytest.mark.parametrize(("seconds", "text"), [(5.2, "5 s"), (65, "1 min 05 s"), (3599.7, "1 h 00 min"), (7260, "2 h 01 min")])
def test_durations(seconds: float, text: str) -> None:
    assert module._duration(seconds) == text
