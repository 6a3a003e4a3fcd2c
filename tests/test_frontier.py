"""`frontier`: who dominates whom, what is asked for, and one family of a tiny trained BERT from end to end, stopped and gone on with.

One family is shared by most tests. The speeds that decide are made up, so that the same models are trained on any machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_compression import events, said
from test_report import BASE, check, record
from tiny_folder import write_data, write_model
from tiny_hurry import count_speeds

import slimformer
from slimformer import Result, cli
from slimformer.errors import ModelError, RecipeError
from slimformer.exporters.base import SLIM, Variant
from slimformer.families.base import anatomy_of
from slimformer.kernels.library import installed
from slimformer.measuring.latency import Levels
from slimformer.measuring.records import Interval, Record, Standing
from slimformer.registry import name_of
from slimformer.reporting.family import FamilyPoint, HeldResult, ModelFamily, draw_family, read_family
from slimformer.reporting.ledger import read_records
from slimformer.reporting.verdicts import dominator
from slimformer.running import candidate, frontier
from slimformer.running.frontier import compress_family, rising
from slimformer.running.levels import write_levels
from slimformer.running.reader import read_levels, read_recipe
from slimformer.running.scale import Scale
from slimformer.running.schedule import Pace, Part, cut_step
from slimformer.running.trials import Judge, Trial
from slimformer.saving import checkpoint
from slimformer.training.estimate import estimate
from slimformer.training.stage import Calibrate, Train

# -- Who dominates whom ----------------------------------------------------------------------------------------------------------

SAME, BETTER, MAYBE = Interval(0.0, -0.5, 0.5), Interval(1.0, 0.1, 1.9), Interval(1.0, -0.2, 2.2)


@pytest.mark.parametrize(
    ("score", "speed", "below", "needless"),
    [
        (0.90, 4.0, SAME, True),  # surely faster, and as good
        (0.91, 4.0, MAYBE, True),  # surely faster, and measured to be better
        (0.91, 3.0, BETTER, True),  # as fast, and surely better
        (0.91, 3.0, MAYBE, False),  # as fast, and perhaps better: neither is sure
        (0.90, 3.0, SAME, False),  # level
        (0.895, 4.0, Interval(-0.5, -1.2, 0.2), False),  # surely faster, and measured to be a little worse
        (0.99, 2.9, Interval(9.0, 8.0, 10.0), False),  # surely better, and slower
        (0.91, 4.0, None, False),  # they were not compared
    ],
)
def test_a_model_is_needless_if_another_is_nowhere_worse_and_surely_better(
    score: float, speed: float, below: Interval | None, needless: bool
) -> None:
    other = record("other", score, speed)
    own = record("own", 0.90, 3.0, versus={"other": below} if below else {})
    assert (dominator(own, [own, other]) is other) is needless


def test_less_may_be_better_and_the_fastest_reason_is_named() -> None:
    less: dict[str, Any] = {"metric": "loss", "higher_is_better": False}
    own = record("own", 1.0, 2.0, scores={"loss": 1.0}, versus={"a": BETTER, "b": BETTER}, **less)
    slow, fast = (record(name, 0.9, speed, scores={"loss": 0.9}, **less) for name, speed in (("a", 3.0), ("b", 4.0)))
    assert dominator(own, [slow, fast]) is fast
    assert dominator(own, [replace(fast, scores={"loss": 1.1})]) is None


def family(*points: tuple[str, float, float, float, int, str], max_loss: float = 1.0) -> ModelFamily:
    """Points of a name, loss and speeds at batch 32 and 1 on held examples, bytes, and what beats them."""
    made = [
        FamilyPoint(name, name, None, "", HeldResult(loss, *pair), size, None, None, why)
        for name, loss, *pair, size, why in points
    ]
    rows = [BASE, *(record(point.name, 0.9, point.held.speed_32, versus={"a": MAYBE}) for point in made)]
    return ModelFamily(Path("out"), tuple(made), (), max_loss, tuple(rows))


def test_what_to_take_is_chosen_on_held_examples_among_what_is_kept() -> None:
    points = (
        ("a", 0.5, 4.0, 2.0, 30, ""),
        ("b", 0.9, 3.0, 3.0, 20, ""),
        ("c", 1.1, 9.0, 9.0, 1, ""),
        ("d", 0.0, 8.0, 8.0, 2, "a"),
    )
    found = family(*points)
    assert found.picks == {"fastest at batch 32": "a", "fastest at batch 1": "b", "smallest file": "b"}
    assert (
        found.advice() == "Within 1.0 point on held examples: fastest at batch 32: a; fastest at batch 1: b; smallest file: b."
    )
    assert found.dropped() == ["d is dropped: a is 0.50 times as fast and 1.0 point better."]
    assert (
        family(*points, max_loss=0.1).advice()
        == "No model loses at most 0.1 points on held examples; a loses least, 0.5 points."
    )
    assert family(points[-1]).advice().startswith("No model of this family is worth its loss")


def test_the_error_is_that_of_the_time() -> None:
    point = FamilyPoint("4x", "4x int8", 4.0, "points/4x", HeldResult(0.0, 4.0, 2.0), 1, measured=3.0, predicted=4.0)
    assert point.error == pytest.approx(-25.0)  # 1/4 was predicted of the dense time, 1/3 measured
    assert replace(point, predicted=None).error is None


# -- What is asked for -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "flag", "unit"),
    [("2,3.5", "--speedups", "x"), ("2X, 3.5x", "--speedups", "x"), ("2MB 3.5mb", "--megabytes", "MB")],
)
def test_numbers_may_be_said_as_the_models_are_called(text: str, flag: str, unit: str) -> None:
    assert cli._numbers(text, flag, unit) == (2.0, 3.5)


@pytest.mark.parametrize(
    ("speedups", "words"),
    [
        ("2MB", "--speedups must be numbers with commas between them, not '2MB'."),
        ("4,2", "the speeds must rise, and 2 comes after 4."),
        ("2,2", "the speeds must rise, and 2 comes after 2."),
        ("0.5,2", "a speed must be above 1 and at most 100, not 0.5."),
        ("2 --megabytes 5,8", "the sizes must fall, and 8 comes after 5."),
        ("2 --megabytes 0", "a file must have from 0.001 to 1,000,000 megabytes, not 0."),
        ("2 --megabytes small", "--megabytes must be numbers with commas between them, not 'small'."),
        ("2,nan", "a speed must be above 1 and at most 100, not nan."),
        ("2,many", "--speedups must be numbers with commas between them, not '2,many'."),
        (",", "no speeds are named."),
    ],
)
def test_bad_speeds_and_sizes_are_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, speedups: str, words: str
) -> None:
    write_model(tmp_path / "model", trained=False)
    status, _, errors = call(
        "frontier", tmp_path / "model", "--data", tmp_path, "--speedups", *speedups.split(), "--out", tmp_path / "out"
    )
    assert status == 2
    assert errors.splitlines()[0] == f"RecipeError: {words}"
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_machine_says_how_fast_models_are_there(tmp_path: Path) -> None:
    file = tmp_path / "phone.yaml"
    write_levels(LEVELS, file, "my-bert", 1)
    assert read_levels(file) == LEVELS
    with pytest.raises(RecipeError, match=r"gone.yaml holds no latency table\.\n.*cannot read the table"):
        read_levels(tmp_path / "gone.yaml")
    file.write_text("fixed_ms: fast", encoding="utf-8")
    with pytest.raises(RecipeError, match="holds no latency table"):
        read_levels(file)


def test_speeds_that_rise_are_taken() -> None:
    assert rising((2, 4.5)) == (2.0, 4.5)
    with pytest.raises(RecipeError, match="no speeds"):
        rising("24")


def test_a_table_of_another_machine_says_nothing_of_zeros(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model", trained=False), write_data(tmp_path / "data")
    task = {"use": "classification", "data": str(data)}
    with pytest.raises(RecipeError, match="does not tell what zeros take"):
        compress_family(model, task, tmp_path / "out", engine="kernels", latency=LEVELS)


def test_a_training_is_expected_to_go_on_as_those_before(tmp_path: Path) -> None:
    pace, levels = Pace(step=1.0, read=0.2), frontier._levels_of((2.0, 4.0, 8.0), ())
    for level, epochs in zip(levels, (2.0, 1.0), strict=False):
        (tmp_path / level.name).mkdir()
        (tmp_path / level.name / "passes.json").write_text(json.dumps(epochs), encoding="utf-8")
    known: Any = SimpleNamespace(
        outline=SimpleNamespace(pace=pace),
        asked=levels,
        _trained=lambda level: frontier._Levels._trained(known, level),
        _noted=lambda level: tmp_path / level.name / "passes.json",
        schedule=SimpleNamespace(taken=lambda part: 520.0 if part is Part.DISTILLING else 0.0),
    )
    seconds = frontier._Levels._token_seconds
    assert seconds(known, 100, 0) is None  # nothing was trained before
    lasted = 500.0 / (
        100 * (2 * cut_step(pace, 2.0) + cut_step(pace, 4.0))
    )  # seconds of a token of the uncut model; 20 for the teacher
    assert seconds(known, 100, 2) == pytest.approx(lasted * cut_step(pace, 8.0))
    assert not (tmp_path / "8x").exists()  # to ask for a level's epochs does not note any


def test_steps_for_a_size_are_planned_as_those_of_the_model_that_it_is_made_from() -> None:
    found: Any = [SimpleNamespace(aim=aim) for aim in (None, 2.0, 4.0)]
    chosen = {8.0: found[1], 5.0: found[0], 3.0: found[2]}
    known: Any = SimpleNamespace(
        asked=frontier._levels_of((2.0, 4.0), (8.0, 5.0, 3.0)),
        whole=None,
        speed=lambda _: 2.4,
        _small_enough=lambda level, _: chosen[level.megabytes],
    )
    assert [level.pace for level in known.asked] == [2.0, 4.0, 4.0, 4.0, 4.0]  # nothing is known of them yet
    frontier._Levels._pace_sizes(known, found)
    assert [level.pace for level in known.asked] == [2.0, 4.0, 2.0, 2.4, 4.0]


# -- A family from end to end ----------------------------------------------------------------------------------------------------

LEVELS = Levels(
    fixed_ms=0.05,
    dense_fp32_ms=0.2,
    heads={1: 0.004, 2: 0.005, 4: 0.01},
    neurons={16: 0.004, 32: 0.006, 64: 0.012},
    single=Levels(fixed_ms=0.1, dense_fp32_ms=0.4, heads={1: 0.02, 2: 0.02, 4: 0.025}, neurons={16: 0.02, 32: 0.02, 64: 0.025}),
)
SIZES = "9,0.04,0.027,0.001"  # megabytes
SPEEDS = {Variant.INT8_FUSED: 2.1, Variant.INT8_STATIC: 1.3, Variant.INT8_DYNAMIC: 1.4}  # on held examples, of any model
COMMAND = (
    *(
        "slimformer",
        "frontier",
        "model",
        "--data",
        "data",
        "--speedups",
        "1.5,2.5,3.2,50",
        "--megabytes",
        SIZES,
        "--max-loss",
        "100",
        "--epochs",
        "1",
    ),
    *("--minutes", "60", "--threads", "1", "--wait", "0", "--out", "out"),
)


def quickly(patch: pytest.MonkeyPatch) -> None:
    """No clock decides what is trained, what is best, and what is dropped."""
    tried = Judge.try_out

    def try_out(self: Any, files: Mapping[str, Path], *kinds: Any, **_: Any) -> list[Trial]:
        trials = tried(self, files, *kinds, seconds=0.1)
        return [replace(trial, speed_32=SPEEDS.get(Variant(trial.variant), 1.0)) for trial in trials]

    def uncut_is_needless(row: Record, others: tuple[Record, ...]) -> Record | None:
        int8 = (
            other for other in others if other.role == Standing.TEACHER_INT8
        )  # too large to make a model for a size needless
        return next(int8, None) if row.name.startswith(("uncut", "0.027MB")) else None

    patch.setattr(Judge, "try_out", try_out)
    patch.setattr(frontier, "dominator", uncut_is_needless)
    count_speeds(patch, LEVELS)
    patch.setattr("slimformer.running.outline.PROBES", 1)
    for place in ("outline", "frontier"):
        patch.setattr(f"slimformer.running.{place}.estimate", lambda training, **_: estimate(training, seconds=0.1))
    patch.setattr("slimformer.running.recipe.RIVALS", ("teacher-int8", "small-dense"))


@dataclass(frozen=True)
class Made:
    out: Path
    status: int  # of the command that was stopped
    at_the_stop: frozenset[str]
    shown: str

    @property
    def table(self) -> str:
        """What is shown when all is done."""
        return self.shown[self.shown.index(" " * 40) :]


def command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(arguments))
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """The command, stopped when the second level is trained and not yet exported, and the same command once more."""
    home, threads = tmp_path_factory.mktemp("family"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_data(home / "data", train=160, dev=40)
    write_model(home / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("COLUMNS", "80")
        quickly(patch)
        with pytest.MonkeyPatch.context() as stop:
            real = candidate.candidate_of

            def stopped(made: Any, stages: Any, folder: Path, *args: Any, **options: Any) -> Any:
                if folder.name == "3.2x":
                    raise KeyboardInterrupt
                return real(made, stages, folder, *args, **options)

            stop.setattr(candidate, "candidate_of", stopped)
            status = command(*COMMAND)
        names = frozenset(item.name for item in (home / "out").iterdir())
        with redirect_stdout(StringIO()) as shown:
            assert command(*COMMAND) == 0
        yield Made(home / "out", status, names, shown.getvalue())
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_stopped_family_goes_on_at_its_level(made: Made) -> None:
    assert made.status == 130
    assert made.at_the_stop == {".lock", ".slimformer", "log.jsonl", "work"}
    lines = said(made.out)
    weighed = "measuring how much each head and neuron matters."
    assert lines.count(weighed) == 3  # once for each model that is cut, though the second was stopped
    assert lines.count("stage 1 (calibrate) is done already; going on from it.") == 2
    assert lines.count("stage 1 (train) is done already; going on from it.") == 2
    assert len(events(made.out, "augmenting")) == 0
    plan = "plan: cut to 1.5, 2.5, 3.2 and 50 times the speed, and to 9, 0.04, 0.027 and 0.001 megabytes, distil each for"
    assert sum(line.startswith(plan) for line in lines) == 1
    assert not (made.out / "work").exists()


@pytest.mark.slow
def test_each_level_is_cut_from_the_one_before(made: Made) -> None:
    first, second = (made.out / "points" / name for name in ("2.5x", "3.2x"))
    before, after = (read_recipe(folder / "recipe.yaml") for folder in (first, second))
    assert [type(stage) for stage in after.stages] == [Calibrate, Train, Calibrate, Train]
    assert after.stages[:2] == before.stages
    assert before.latency == after.latency == LEVELS
    plans = [checkpoint.load_plan(folder) for folder in (first, second)]
    assert plans[0] != plans[1]
    for site, kept in plans[0].keep.items():
        assert set(plans[1].keep.get(site, ())) <= set(kept)
    sizes = [sum(tensor.numel() for tensor in slimformer.load(folder).parameters()) for folder in (first, second)]
    assert sizes[0] > sizes[1]


@pytest.mark.slow
def test_every_model_lies_whole_in_its_folder(made: Made) -> None:
    own = {"2.5x": {"small-dense"}, "3.2x": {"small-dense"}, "0.027MB": {"small-dense"}, "2-layers": {"cut"}}
    for name, rivals in own.items():
        result = Result.read(made.out / "points" / name)
        assert result.best.is_file()
        assert result.record.name == f"{name} int8"
        assert [row.role for row in result.records].count("ours") == 1
        assert {row.role for row in result.records} == {"teacher-fp32", "teacher-int8", "ours", *rivals}
        assert set(result.record.versus) == {row.name for row in result.records} - {result.record.name}
        assert result.model.config.num_labels == 2
        card = (result.out / "README.md").read_text(encoding="utf-8")
        assert f"# {name} int8" in card
    assert {item.name for item in (made.out / "points").iterdir()} == set(own)  # uncut is needless


@pytest.mark.slow
def test_a_size_is_had_by_codes_and_by_a_cut_of_the_smallest_model(made: Made) -> None:
    fast, small = (Result.read(made.out / "points" / name) for name in ("3.2x", "0.027MB"))
    assert small.best.stat().st_size <= 27_000 < fast.best.stat().st_size
    before, after = (read_recipe(result.out / "recipe.yaml").stages for result in (fast, small))
    assert after[: len(before)] == before
    cut, codes, lesson = after[len(before) :]
    assert (cut.method.cost, name_of(codes.method)) == ("parameters", "codebook")  # type: ignore[attr-defined]
    assert lesson == replace(before[-1], freeze="nothing")
    lines = said(made.out)
    assert "there is no model for 9MB: uncut has 61 kB already." in lines
    assert "there is no model for 0.04MB: 3.2x has 28 kB already." in lines
    assert "there is no model for 0.001MB: with every layer cut, the file would have 24 kB." in lines


@pytest.mark.slow
def test_the_page_shows_every_model_and_leads_to_each(made: Made) -> None:
    page = made.out / "report.html"
    found = check(page)
    text = " ".join(found.text.split())
    for name in ("dense fp32", "dense int8", "uncut int8", "2.5x int8", "3.2x int8", "2-layers int8"):
        assert name in text
    links, names = {link.removeprefix("href=") for link in found.outside}, ("2.5x", "3.2x", "0.027MB", "2-layers")
    assert links == {f"points/{name}/{file}" for name in names for file in ("report.html", "README.md")}
    assert all((made.out / link).is_file() for link in links)
    html = page.read_text(encoding="utf-8")
    assert html.count('class="m-beaten"') == 2  # uncut, wide and narrow
    assert html.count("<polyline") == 8  # what heads and neurons cost at both batches, wide and narrow
    assert html.count('class="m-chosen"') == 12  # three models, against speed and against size
    assert "uncut is dropped: dense int8 is" in text
    assert "There is no model for 1.5 times: int8 alone is 2.10 times as fast, and nothing needs to be cut." in text
    assert "There is no model for 50 times: with every layer cut, 4.0 would be the speed." in text


@pytest.mark.slow
def test_the_terminal_has_eighty_columns_and_every_row(made: Made) -> None:
    lines = made.table.splitlines()
    assert max(map(len, lines)) <= 80
    table = lines[: next(index for index, line in enumerate(lines) if line.startswith("models: "))]
    for name in ("dense fp32", "dense int8", "uncut int8", "2.5x int8", "3.2x int8", "2-layers int8"):
        assert sum(line.startswith(name) for line in table) == 1
    assert next(line for line in table if line.startswith("2.5x int8")).rstrip().endswith("%")
    assert "models: out/points   page: out/report.html" in lines


@pytest.mark.slow
def test_the_family_is_read_back_from_its_folder(made: Made) -> None:
    found = read_family(made.out)
    assert [(point.name, point.aim, bool(point.beaten_by)) for point in found.points] == [
        ("uncut", None, True),
        ("2.5x", 2.5, False),
        ("3.2x", 3.2, False),
        ("0.027MB", None, False),
        ("2-layers", None, False),
    ]
    assert all(point.predicted and point.error is not None for point in found.kept)
    assert all(point.predicted_1 and point.error_1 is not None for point in found.kept)
    narrow = found.points[2]
    assert narrow.predicted_1 < narrow.predicted  # by LEVELS a cut saves less of a single text
    assert found.points[1].predicted == pytest.approx(2.5, rel=0.2)
    assert found.levels == LEVELS
    assert found.records == tuple(read_records([made.out / "ledger.jsonl"]))
    for row in found.records:
        assert set(row.versus) == {other.name for other in found.records if other is not row}
    data = json.loads((made.out / "frontier.json").read_text(encoding="utf-8"))
    assert data["picks"] == found.picks
    assert data["points"][1]["speed_32"]["median"] == found.points[1].measured
    assert found.points[3].megabytes == 0.027
    assert draw_family(found).row_count == 7
    (made.out / "frontier.json").with_name("broken").mkdir(exist_ok=True)
    with pytest.raises(ModelError, match="holds no family that can be read"):
        read_family(made.out / "broken")


@pytest.mark.slow
def test_the_same_command_again_changes_nothing_and_another_is_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quickly(monkeypatch)
    before = (made.out / "frontier.json").stat().st_mtime_ns
    assert command(*COMMAND) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith(made.table)
    assert "out is finished already, and this is its result" in shown.out
    assert (made.out / "frontier.json").stat().st_mtime_ns == before
    assert command(*("2,3" if word == "1.5,2.5,3.2,50" else word for word in COMMAND)) == 2
    errors = capsys.readouterr().err
    assert "out belongs to another run." in errors
    assert "speedups: [1.5, 2.5, 3.2, 50.0] there, [2.0, 3.0] now" in errors


@pytest.mark.skipif(not installed(), reason="slimformer-kernels is not installed: `make kernels` builds it")
@pytest.mark.slow
def test_a_family_for_the_kernels_has_fewer_and_fewer_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quickly(monkeypatch)
    monkeypatch.setattr(Scale, "with_blocks", lambda _, left: {0.5: 2.4, 0.2: 2.8}[left])
    write_data(Path("data"))
    write_model(Path("model"))
    task = {"use": "classification", "data": "data"}
    options: dict[str, Any] = {"speedups": (2.2, 3.5), "megabytes": (0.04,), "max_loss": 100, "epochs": 1, "rivals": ()}
    made = compress_family("model", task, "out", engine="kernels", **options, threads=1, wait_seconds=0)
    assert [point.name for point in made.points] == ["uncut", "2.2x", "3.5x", "0.04MB"]
    folders = {point.name: made.out / point.folder for point in made.points if point.folder}
    shares = {}
    for name, folder in folders.items():
        model = checkpoint.load(folder / "model")
        inside = [matrix for matrix in anatomy_of(model).matrices.values() if not matrix.table]
        weights = [model.get_submodule(matrix.module).weight.detach() for matrix in inside]
        blocks = [weight.reshape(weight.shape[0] // 4, 4, weight.shape[1] // 4, 4).abs().sum(dim=(1, 3)) for weight in weights]
        shares[name] = float(sum((block > 0).sum() for block in blocks) / sum(block.numel() for block in blocks))
    assert shares.pop("uncut", 1.0) == 1.0
    assert shares.pop("0.04MB") < 0.4  # of what heads and neurons were left, fewer blocks were zero
    assert {name: round(share, 1) for name, share in shares.items()} == {"2.2x": 0.5, "3.5x": 0.2}
    cuts = {name: [type(stage) for stage in read_recipe(folder / "recipe.yaml").stages] for name, folder in folders.items()}
    assert cuts["2.2x"] == [Train]
    assert cuts["3.5x"] == [Train, Calibrate, Train]
    assert cuts["0.04MB"] == [*cuts["3.5x"], Calibrate, Calibrate, Train]
    assert made.points[-1].size_bytes <= 40_000
    assert all(point.predicted is None for point in made.points[1:])
    assert all((folder / SLIM.place).is_file() for name, folder in folders.items() if name != "uncut")
