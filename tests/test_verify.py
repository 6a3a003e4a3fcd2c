"""`verify`: bounds are judged by measured values, and with `sure` by their intervals; a pipeline reads the answer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_export import data, export

from slimformer import cli
from slimformer.errors import RecipeError
from slimformer.measuring.machine import environment
from slimformer.measuring.records import Interval, Record
from slimformer.measuring.scoring import Measurement
from slimformer.measuring.timing import SINGLE, SORTED, Ratio
from slimformer.reporting.verdicts import Conclusion
from slimformer.running import verify as module
from slimformer.running.verify import verify

ABOUT = ("my-bert", "reviews", "dev", "accuracy")
BASE = Record("dense", "other", *ABOUT, {"accuracy": 0.9}, "2026-01-02", environment(), examples=1000, size_bytes=80_000_000)
SMALL = replace(
    BASE,
    name="small|1",
    scores={"accuracy": 0.892},
    loss=Interval(0.8, -0.4, 2.0),
    speed={SORTED: Ratio(3.1, 3.05, 3.15), SINGLE: Ratio(2.0, 1.9, 2.1)},
    size_bytes=12_500_000,
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `bench` was asked; it answers with rows of known figures, each speed from thirty rounds."""
    asked: list[Any] = []

    def bench(paths: Any, task: Any, **options: Any) -> Measurement:
        asked.append((paths, options))
        return Measurement((BASE, SMALL), {})

    monkeypatch.setattr(module, "bench", bench)
    monkeypatch.setattr(module, "rounds_of", lambda _: 30)
    return asked


def test_values_decide_and_intervals_say_how_sure_that_is(measured: list[Any]) -> None:
    found = verify("small", "dense", max_loss=1.0, min_speedup=3.0, max_mb=12.5, seconds=5)
    assert measured == [(["dense", "small"], {"seconds": 5})]
    assert [(check.what, check.met, check.sure) for check in found.checks] == [
        ("points lost", True, Conclusion.OPEN),
        ("times as fast, batch 32", True, Conclusion.YES),
        ("MB", True, Conclusion.YES),
    ]
    assert found.met
    assert not verify("small", "dense", max_loss=1.0, sure=True).met
    assert verify("small", "dense", max_loss=2.0, sure=True).met
    assert not verify("small", "dense", max_loss=0.5).met
    assert not verify("small", "dense", max_loss=1.0, max_mb=12.4).met
    assert not verify("small", "dense", min_speedup=2.05, batch=1).met
    assert verify("small", "dense", min_speedup=2.0, batch=1).met


def test_the_verdict_is_read_by_programs_and_by_people(measured: list[Any]) -> None:
    found = verify("small", "dense", max_loss=0.5, min_speedup=3.0)
    told = json.loads(found.as_json())
    assert (told["met"], told["metric"], told["examples"]) == (False, "accuracy", 1000)
    assert told["checks"][0] == {
        "what": "points lost", "asked": 0.5, "measured": 0.8, "low": -0.4, "high": 2.0, "met": False, "sure": "open"
    }  # fmt: skip
    assert [model["times_as_fast"] for model in told["models"]] == [{}, {"batch 1": 2.0, "batch 32": 3.1}]
    table = found.as_markdown().splitlines()
    assert table[0] == "**Not met**: small\\|1 against dense, accuracy on 1,000 examples."
    assert table[4] == "| points lost | 0.5 | 0.8 | -0.4 to 2 | no | too close to call |"
    base, small = found.records
    assert found.lines()[0] == f"{small.name} against {base.name}, {base.metric} on {base.examples:,} examples:"
    assert found.lines()[1] == "points lost 0.8, asked 0.5: not met (interval -0.4 to 2: too close to call)"
    assert found.lines()[-1] == "not met"


@pytest.mark.parametrize(
    ("bounds", "said"),
    [({}, "nothing is asked of the model"), ({"min_speedup": 0.0, "max_mb": -1.0}, "these bounds cannot be kept")],
)
def test_bounds_that_ask_nothing_are_refused(measured: list[Any], bounds: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        verify("small", "dense", **bounds)
    assert not measured


@pytest.mark.parametrize(("bound", "status"), [("5", 0), ("-1", 1)])
@pytest.mark.slow
def test_the_exit_status_is_the_answer(
    tmp_path: Path, bound: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("small", "dense"):
        export(tmp_path / name)
    data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    command = ["slimformer", "verify", "small", "--against", "dense", "--data", "data", "--max-loss", bound]
    more = ["--seconds", "0", "--wait", "0", "--threads", "1", "--json", "verdict.json", "--markdown", "verdict.md"]
    monkeypatch.setattr(sys, "argv", [*command, *more])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == status
    assert json.loads(Path("verdict.json").read_text(encoding="utf-8"))["met"] is (status == 0)
    assert Path("verdict.md").read_text(encoding="utf-8").startswith("**Met**" if status == 0 else "**Not met**")
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == ("met" if status == 0 else "not met")
