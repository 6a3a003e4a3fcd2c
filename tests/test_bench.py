"""The bench: who runs when, what is counted, and that an exported folder is benched without torch. Time is a fake clock."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import data, export
from tiny_folder import refusing

from slimformer.errors import DataError, ExtraError, ModelError, RecipeError
from slimformer.measuring.machine import FLAGS, Load, Quiet, environment, saturates
from slimformer.measuring.records import Facts, FileFacts
from slimformer.measuring.scoring import Measurement, evaluate, shipped_bytes
from slimformer.measuring.sessions import Engine, Session, open_session
from slimformer.measuring.timing import SINGLE, SORTED, Lengths, Rounds, Timing, Workload, compare, ratio, workloads
from slimformer.reporting.ledger import write_facts
from slimformer.running.bench import bench
from slimformer.tasks.base import Features
from slimformer.tasks.classification import Classification

ENGINE = Engine("fake", "1.0", 2)
LOAD = Load(0.0, 0.0, 0.0, True)


@dataclass
class Clock:
    """Time that passes only when a runner works; `log` keeps who worked on which batch."""

    now: float = 0.0
    log: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def session(self, name: str, cost: Callable[[int], float]) -> Session:
        """A session whose runner takes cost(calls so far) seconds."""
        calls = 0

        def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            nonlocal calls
            if len(self.log) % 2 == 0:  # each turn begins with a text that is not timed
                self.log.append((name, -len(batch["input_ids"])))
                return {}
            self.log.append((name, int(batch["input_ids"][0, 0])))
            self.now += cost(calls)
            calls += 1
            return {}

        return Session(run, ENGINE)


def workload(sizes: tuple[int, ...] = (4, 4, 2)) -> Workload:
    batches = tuple({"input_ids": np.full((size, 3), number)} for number, size in enumerate(sizes))
    return Workload("w", 4, "in order", batches, sum(sizes), 3 * sum(sizes), Lengths(3, 3, 3, 3))


def features(lengths: list[int]) -> Features:
    ids = [[row + 1] * length for row, length in enumerate(lengths)]
    return Features({"input_ids": ids, "labels": [0] * len(ids)}, list(range(len(ids))), 0, 0)


def test_runners_take_turns_and_the_first_rotates() -> None:
    clock = Clock()
    sessions = {name: clock.session(name, lambda _: 1.0) for name in "ABC"}
    compare(sessions, workload((1, 1)), Rounds(2), LOAD, clock)
    timed = clock.log[1::2]
    turns = ["".join(name for name, _ in timed[start : start + 3]) for start in range(0, len(timed), 3)]
    # One warm-up round and two that count, of two batches each: all three run a batch before the next one comes.
    assert turns == ["ABC", "BCA", "ABC", "BCA", "CAB", "ABC"]
    assert [number for _, number in timed] == [0, 0, 0, 1, 1, 1] * 3


def test_each_turn_begins_with_a_text_that_is_not_timed() -> None:
    clock = Clock()
    sessions = {name: clock.session(name, lambda _: 1.0) for name in "AB"}
    timings = compare(sessions, workload((4, 2)), Rounds(2, warmup=0), LOAD, clock)
    assert [name for name, _ in clock.log] == [name for name, _ in clock.log[1::2] for _ in range(2)]  # its own batch follows
    assert {number for _, number in clock.log[::2]} == {-1}  # of one text
    assert {(timing.lead, timing.samples_ms) for timing in timings.values()} == {(1, ((1000.0, 1000.0),) * 2)}


def test_warm_up_is_dropped_and_samples_are_milliseconds() -> None:
    clock = Clock()
    # Three batches of warm-up at 9 s each, then 0.1 s, 0.2 s, ...
    slow_start = clock.session("A", lambda call: 9.0 if call < 3 else 0.1 * (call - 2))
    timing = compare({"A": slow_start}, workload(), Rounds(2), LOAD, clock)["A"]
    np.testing.assert_allclose(timing.samples_ms, [[100, 200, 300], [400, 500, 600]], atol=1e-3)
    np.testing.assert_allclose(timing.per_example_ms(), [[25, 50, 150], [100, 125, 300]], atol=1e-3)
    assert timing.p50_ms == pytest.approx(112.5)
    assert timing.p95_ms == pytest.approx(np.percentile([25, 50, 150, 100, 125, 300], 95))
    assert (timing.warmup, timing.threads, timing.rounds, timing.sizes) == (1, 2, 2, (4, 4, 2))


def test_a_drift_of_the_machine_leaves_the_ratio_alone() -> None:
    clock = Clock()
    # The machine slows down fourfold over the run; the candidate is always exactly twice as fast.
    drift = lambda call: 1.0 + 3.0 * call / 30  # noqa: E731
    sessions = {"base": clock.session("base", drift), "ours": clock.session("ours", lambda call: drift(call) / 2)}
    timings = compare(sessions, workload(), Rounds(10, warmup=0), LOAD, clock)
    found = ratio(timings["base"], timings["ours"])
    assert (found.median, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0), rel=1e-4)
    assert timings["base"].round_ms()[-1] > 3 * timings["base"].round_ms()[0]


@pytest.mark.slow
def test_long_batches_are_sampled_so_that_the_budget_is_kept() -> None:
    def timing(budget: float, count: int, clock: Clock | None = None) -> Timing:
        clock = clock or Clock()
        sorted_32 = workloads(features([1 + row % 40 for row in range(32 * count)]))[1]
        sessions = {name: clock.session(name, lambda _: 1.0) for name in "AB"}
        return compare(sessions, sorted_32, Rounds(seconds=budget), LOAD, clock)["B"]

    def spent(budget: float, count: int) -> float:
        clock = Clock()
        timing(budget, count, clock)
        return clock()

    # Forty batches at two seconds a round of both: ten rounds would take 800 seconds.
    assert timing(800.0, 40).sizes == (32,) * 40
    half = timing(400.0, 40)
    assert (half.sizes, half.rounds, half.examples) == ((32,) * 20, 10, 640)
    assert (half.lengths.max, half.lengths.p50) == (40, pytest.approx(20.5, abs=1.0))  # the lengths of the whole
    assert half.tokens == pytest.approx(640 * 20.5, rel=0.05)
    assert timing(1.0, 40).sizes == (32,) * 4  # never fewer, however short the budget
    assert spent(1.0, 40) == 2 * 4 * (1 + 1 + 3)  # a look, the warm-up and three rounds: never all of the batches
    assert spent(800.0, 40) == 2 * (4 + 40 * (1 + 10))
    assert timing(1.0, 3).sizes == (32,) * 3


def test_the_ratio_is_the_median_over_rounds_with_its_spread() -> None:
    blank = compare({"A": Session(lambda _: {}, ENGINE)}, workload((1, 1)), Rounds(1), LOAD)["A"]
    # Rounds of 10 ms against 5, 4 and 2: ratios 2, 2.5 and 5. One hiccup of ours does not move the median.
    base = replace(blank, samples_ms=((4.0, 6.0),) * 3)
    ours = replace(blank, samples_ms=((2.0, 3.0), (1.0, 3.0), (1.0, 1.0)))
    found = ratio(base, ours)
    assert found.median == pytest.approx(2.5)
    assert (found.low, found.high) == pytest.approx((2.1, 4.5))  # 10 % and 90 % between the sorted three
    with pytest.raises(ValueError, match="not timed in one run"):
        ratio(base, replace(ours, samples_ms=ours.samples_ms[:2]))


@pytest.mark.slow
def test_a_budget_stops_it_but_never_before_the_least_rounds() -> None:
    def rounds(budget: float) -> int:
        clock = Clock()
        sessions = {"A": clock.session("A", lambda _: 1.0)}
        return compare(sessions, workload((1,)), Rounds(9, warmup=0, seconds=budget), LOAD, clock)["A"].rounds

    assert rounds(0.0) == 3
    assert rounds(5.0) == 5
    assert rounds(100.0) == 9


def test_workloads_that_do_not_match_are_refused() -> None:
    both = {"A": workload((2, 2)), "B": workload((2, 1))}
    with pytest.raises(ValueError, match="same examples"):
        compare(dict.fromkeys(both, Session(lambda _: {}, ENGINE)), both, Rounds(), LOAD)


def test_workloads_hold_the_examples_at_their_own_lengths() -> None:
    lengths = [5, 2, 9, 4, 7]
    single, batched = workloads(features(lengths), batch_size=2)
    assert [batch["input_ids"].shape for batch in single.batches] == [(1, length) for length in lengths]
    assert [int(batch["input_ids"][0, 0]) for batch in single.batches] == [1, 2, 3, 4, 5]
    assert [batch["input_ids"].shape for batch in batched.batches] == [(2, 4), (2, 7), (1, 9)]
    assert (single.name, batched.name) == ("batch 1, in order", "batch 2, sorted by length")
    assert (batched.tokens, batched.examples, batched.lengths.max, batched.lengths.p50) == (27, 5, 9, 5)
    assert set(single.batches[0]) == {"input_ids", "attention_mask"}  # no labels: they are not an input


def test_a_sample_of_batches_is_spread_over_the_split() -> None:
    single, batched = workloads(features(list(range(1, 101))), limit=4, batch_size=10)
    assert [batch["input_ids"].shape[1] for batch in single.batches] == [1, 34, 67, 100]
    assert [batch["input_ids"].shape[1] for batch in batched.batches] == [10, 40, 70, 100]
    assert single.examples == 4
    assert batched.examples == 40
    with pytest.raises(DataError, match="no examples to time"):
        workloads(features([]))


def test_evaluate_gives_rows_in_their_own_order_and_pads_token_axes() -> None:
    given = features([3, 1, 2, 3])

    def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": batch["input_ids"][:, :1].astype(np.float32), "start": batch["input_ids"].astype(np.float32)}

    found = evaluate(run, given, batch_size=2)
    assert found["logits"].tolist() == [[1], [2], [3], [4]]
    lowest = np.finfo(np.float32).min
    # Rows of one batch carry the collated padding (0); the second batch is longer, so the first one is filled up.
    assert found["start"].tolist() == [[1, 1, 1], [2, 0, lowest], [3, 3, lowest], [4, 4, 4]]


def test_a_run_waits_once_for_a_quiet_machine_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    def waiting(seconds: float, *busy: float) -> Quiet:
        looks = iter(busy)
        return Quiet(seconds, 0.25, busy=lambda: next(looks), clock=clock, sleep=sleep)

    caplog.set_level(logging.INFO)
    quiet = waiting(60, 2.0, 1.0, 0.1, 0.1, 1.5, 0.2)
    load = quiet.load()
    assert (load.quiet, load.busy_cores, load.waited_seconds, quiet.left) == (True, 0.1, 10.0, 50.0)
    assert "Waiting at most 60 s" in caplog.text
    assert "--wait 0" in caplog.text
    assert quiet.load().waited_seconds == 0
    assert (quiet.load().waited_seconds, quiet.waited) == (5.0, 15.0)
    assert not [entry for entry in caplog.records if entry.levelno == logging.WARNING]

    caplog.clear()
    quiet = waiting(12, *[1.5] * 4, 2.0, 0.1)
    load = quiet.load()
    assert (load.quiet, load.waited_seconds, quiet.left) == (False, 12.0, 0.0)
    assert (quiet.load().quiet, quiet.load().quiet) == (False, True)  # later looks do not wait, and say nothing more
    assert [entry.levelno for entry in caplog.records] == [logging.INFO, logging.WARNING]
    assert "the machine is busy still after 12 s: other work takes 1.5 of" in caplog.text

    caplog.clear()
    quiet = waiting(0, 1.5, 1.5)
    assert [quiet.load().waited_seconds, quiet.load().waited_seconds] == [0.0, 0.0]
    assert len(caplog.records) == 1


def test_int8_sums_overflow_on_x86_without_vnni() -> None:
    assert saturates(("avx2", "fma", "avx512f"))
    assert not saturates(("avx2", "avx512f", "avx512_vnni"))
    assert not saturates(("avx2", "avx_vnni"))
    assert not saturates(("asimd", "i8mm"))
    assert not saturates(())


def test_the_environment_names_this_machine() -> None:
    found = environment()
    assert found.cores >= 1
    assert found.cpu
    assert found.memory_bytes > 2**28
    assert set(found.flags) <= set(FLAGS)
    assert found.packages["numpy"] == np.__version__


def test_size_counts_what_ships(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"12345")
    (tmp_path / "a.onnx.data").write_bytes(b"123")
    (tmp_path / "b.xml").write_bytes(b"1")
    (tmp_path / "b.bin").write_bytes(b"1234")
    assert shipped_bytes(tmp_path / "a.onnx") == 8
    assert shipped_bytes(tmp_path / "b.xml") == 5


# -- slimformer bench, on an exported folder ---------------------------------------------------------------------------------


def run_bench(*paths: Path, folder: Path) -> Measurement:
    return bench(paths, Classification(data=str(data(folder))), rounds=3, load=LOAD, threads=1)


@pytest.mark.slow
def test_folders_are_benched_side_by_side(tmp_path: Path) -> None:
    first = export(tmp_path / "first")
    # The second one has learnt nothing of "dull": it gets three of five right.
    second = export(tmp_path / "second", weights={"dull": (0.0, 1.0)})
    result = run_bench(first, second, folder=tmp_path / "data")
    one, two = result.records
    assert (one.name, one.role, two.name) == ("first", "teacher-fp32", "second")
    assert (one.score, two.score) == (0.8, 0.6)
    assert two.loss is not None
    assert two.loss.value == pytest.approx(20.0)
    assert two.loss.low <= 20.0 <= two.loss.high
    assert one.loss is None
    assert one.times_faster(32).median == 1.0
    assert {timing.workload for timing in two.timings} == set(two.speed) == {SINGLE, SORTED}
    assert two.size_bytes == (tmp_path / "second" / "model.onnx").stat().st_size
    assert two.timings[0].runtime == "onnxruntime"
    assert result.scored["first"].answers == ("good", "bad", "bad", "good", "bad")


def test_a_file_that_no_runtime_takes_is_not_left_out(tmp_path: Path) -> None:
    first = export(tmp_path / "first")
    second = export(tmp_path / "second") / "second.xml"
    second.write_text("<net/>", encoding="utf-8")
    with pytest.raises(ModelError, match=r"second.xml cannot be run by onnxruntime.\s+help: say --runtime openvino"):
        run_bench(first, second, folder=tmp_path / "data")


@pytest.mark.parametrize("spelt", [("0", "1"), ("BAD", "Good"), ("LABEL_0", "label_1")])
@pytest.mark.slow
def test_data_may_spell_the_labels_otherwise_than_the_model(tmp_path: Path, spelt: tuple[str, str]) -> None:
    for file in data(tmp_path / "data").iterdir():
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("\tbad", f"\t{spelt[0]}").replace("\tgood", f"\t{spelt[1]}"), encoding="utf-8")
    task = Classification(data=str(tmp_path / "data"))
    (record,) = bench([export(tmp_path / "model")], task, rounds=3, load=LOAD, threads=1).records
    assert record.score == 0.8


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"vocab_size": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="ids up to 5, and the model has 4 rows"):
        run_bench(folder, folder=tmp_path / "data")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            {"dull": (0.0, 2.0), "fine": (1.0, 0.0), "great": (3.0, 0.0)},
            "its classes stand in another order than those of the data",
        ),
        ({"dull": (0.0, 0.0), "fine": (0.0, 0.0), "great": (0.0, 0.0)}, "worse than chance|no better than chance"),
    ],
)
@pytest.mark.slow
def test_answers_that_cannot_be_right_are_told(
    tmp_path: Path, weights: dict[str, tuple[float, float]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = export(tmp_path / "first"), export(tmp_path / "other", weights=weights)
    home = data(tmp_path / "data")
    shutil.copyfile(home / "train.tsv", home / "dev.tsv")
    bench([first, other], Classification(data=str(home)), rounds=3, load=LOAD, threads=1)
    told = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(told) == 1
    assert re.search(f"^other: .*({said})", told[0])


@pytest.mark.slow
def test_of_a_single_folder_all_files_are_benched(tmp_path: Path) -> None:
    folder = export(tmp_path / "model", ("model.onnx", "model_quantized.onnx"))
    result = run_bench(folder, folder=tmp_path / "data")
    assert [record.name for record in result.records] == ["model.onnx", "model_quantized.onnx"]
    assert [record.precision for record in result.records] == ["float", "int8_fused"]


@pytest.mark.slow
def test_a_folder_knows_what_it_was_made_for(tmp_path: Path) -> None:
    folder = export(tmp_path / "model", ("model.onnx", "model_int8.onnx"))
    options = {"use": "classification", "data": str(data(tmp_path / "data"))}
    with pytest.raises(RecipeError, match="no data to bench on"):
        bench([folder], load=LOAD)
    write_facts(folder, Facts("model_int8.onnx", options, 16, "accuracy", params=12, seed=3))
    other = export(tmp_path / "other")
    ours, plain = bench([folder, other], rounds=3, load=LOAD, threads=1).records
    assert (ours.file, ours.params, ours.seed, plain.params) == ("model_int8.onnx", 12, 3, None)
    (folder / "model_int8.onnx").unlink()
    with pytest.raises(ModelError, match=r"names 'model_int8\.onnx' as the best file, which is not there"):
        bench([folder, other], load=LOAD)


def plain_folder(folder: Path, *files: str, home: str = "") -> Path:
    """ONNX files as other tools leave them: config and tokenizer in `home`, files anywhere."""
    made = export(folder / "made", ("model.onnx",))
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / "model.onnx", folder / name)
    for name in ("config.json", "tokenizer.json"):
        (folder / home).mkdir(exist_ok=True)
        shutil.copyfile(made / name, folder / home / name)
    shutil.rmtree(made)
    return folder


@pytest.mark.parametrize(
    ("files", "home", "taken"),
    [
        (["model_quantized.onnx"], "", "model_quantized.onnx"),  # as optimum's quantizer leaves it
        (["onnx/model.onnx"], "", "model.onnx"),  # as on the hub
        (["onnx/model.onnx", "onnx/model_quantized.onnx"], "onnx", "model_quantized.onnx"),
        (["onnx/model_qint8_avx512.onnx"], "", "model_qint8_avx512.onnx"),  # as sentence-transformers names one
        (["own.onnx"], "", "own.onnx"),
        (["model.onnx", "model_optimized.onnx"], "", "model.onnx"),
    ],
)
@pytest.mark.slow
def test_files_of_other_tools_are_found(tmp_path: Path, files: list[str], home: str, taken: str) -> None:
    other = plain_folder(tmp_path / "other", *files, home=home)
    records = run_bench(export(tmp_path / "base"), other, folder=tmp_path / "data").records
    assert [(record.name, record.file) for record in records] == [("base", "model.onnx"), ("other", taken)]
    assert records[1].score == 0.8


@pytest.mark.slow
def test_of_several_unknown_files_one_must_be_named(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "other", "a.onnx", "onnx/b.onnx")
    with pytest.raises(ModelError, match=r"holds 2 ONNX files[\s\S]*there: a\.onnx, onnx/b\.onnx[\s\S]*name one of them"):
        run_bench(folder, folder=tmp_path / "data")
    assert run_bench(folder / "onnx" / "b.onnx", folder=tmp_path / "data").records[0].score == 0.8


def test_a_bare_file_wants_its_config_and_tokenizer(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "other", "a.onnx")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json beside .*a\.onnx[\s\S]*put the model's config\.json and tokenizer"):
        run_bench(folder / "a.onnx", folder=tmp_path / "data")


def delivered(home: Path, **changes: Any) -> Path:
    """A folder as a run leaves it, with files in onnx/, made for data that lie beside it."""
    folder = export(home / "small")
    shutil.copytree(export(home / "made", ("model.onnx", "model_int8.onnx")), folder / "onnx")
    (folder / "model.onnx").unlink()
    data(home / "data")
    files = (FileFacts("onnx/model.onnx", "float"), FileFacts("onnx/model_int8.onnx", "int8_static", int8=True))
    task = {"use": "classification", "data": "../data"}
    write_facts(folder, replace(Facts("onnx/model_int8.onnx", task, 16, "accuracy", params=12, files=files), **changes))
    return folder


@pytest.mark.slow
def test_a_delivered_folder_is_benched_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = delivered(tmp_path / "home")
    for where, name in ((folder, "."), (folder.parent, "small"), (tmp_path, "home/small"), (folder / "onnx", "..")):
        monkeypatch.chdir(where)
        records = bench([name], rounds=1, load=LOAD, threads=1).records
        assert [record.file for record in records] == ["onnx/model.onnx", "onnx/model_int8.onnx"]
    (one,) = bench([folder / "onnx" / "model_int8.onnx"], rounds=1, load=LOAD, threads=1).records
    assert (one.file, one.params, one.precision) == ("onnx/model_int8.onnx", 12, "int8_static")


@pytest.mark.slow
def test_a_moved_folder_asks_for_its_data_and_takes_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = delivered(tmp_path / "home")
    away = tmp_path / "away" / "small"
    shutil.copytree(folder, away)
    data(tmp_path / "other" / "here" / "data")
    (tmp_path / "other" / "here" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "other" / "here" / "inner")  # there is a ../data
    with pytest.raises(DataError, match=r"the data that .*small was made with are gone: .*away/data[\s\S]*--data"):
        bench([away], load=LOAD)
    assert run_bench(away, folder=tmp_path / "data").records[0].score == 0.8


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"use": "classification", "data": "../data", "colour": "red"}, "the task classification has no option colour"),
        ({"use": "parsing", "data": "../data"}, "names the task 'parsing', which is not installed"),
        ({"use": "classification", "data": "../data", "max_length": "many"}, "max_length: .*, not 'many'"),
        ({"use": "classification", "data": "../data", "labels": 5}, "labels: .*, not 5"),
        ({"use": "classification", "data": "../data", "kind": "none"}, "kind"),
    ],
)
def test_facts_of_another_version_are_told(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    folder = delivered(tmp_path, task=task)
    with pytest.raises(ModelError, match=rf"slimformer\.json.*{message}[\s\S]*another version"):
        bench([folder], load=LOAD)


@pytest.mark.parametrize("length", [-1, 0])
def test_a_length_that_leaves_no_tokens_is_told(tmp_path: Path, length: int) -> None:
    folder = delivered(tmp_path, max_length=length)
    with pytest.raises(ModelError, match=f"at most {length} tokens"):
        bench([folder], load=LOAD)


def test_a_folder_that_is_no_model_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        run_bench(tmp_path / "nothing", folder=tmp_path / "data")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        run_bench(tmp_path, folder=tmp_path / "data")


@pytest.mark.slow
def test_a_metric_that_is_no_mean_is_resampled_itself(tmp_path: Path) -> None:
    task = Classification(data=str(data(tmp_path / "data")), metric="f1")
    first, second = export(tmp_path / "a"), export(tmp_path / "b", weights={"dull": (0.0, 1.0)})
    one, two = bench([first, second], task, rounds=3, load=LOAD, threads=1).records
    assert two.loss is not None
    # Worked by hand: F1 of "good" is 4/5 for the first (2 of 3 found, none wrong) and 6/8 for the second (3 found, 2 wrong).
    assert (one.score, two.score) == pytest.approx((0.8, 0.75))
    assert two.loss.value == pytest.approx(5.0)
    assert two.loss.low < 5.0 < two.loss.high


@pytest.mark.slow
def test_runs_on_the_same_examples_are_compared_in_pairs(tmp_path: Path) -> None:
    task = Classification(data=str(data(tmp_path / "data")))
    first, second = export(tmp_path / "a"), export(tmp_path / "b", weights={"dull": (0.0, 1.0)})
    both = bench([first, second], task, rounds=3, load=LOAD, threads=1).records
    (alone,) = bench([first], task, rounds=3, load=LOAD, threads=1, seed=5).records
    other = bench([second, first], task, rounds=3, load=LOAD, threads=1, seed=9).records[0]
    assert both[0].resampled == alone.resampled != other.resampled == both[1].resampled
    assert np.mean(alone.resampled) == pytest.approx(alone.score, abs=0.05)
    gap = np.subtract(alone.resampled, other.resampled) * 100
    assert both[1].loss is not None
    assert np.percentile(gap, [2.5, 97.5]) == pytest.approx([both[1].loss.low, both[1].loss.high], abs=3)


@pytest.mark.slow
def test_an_exported_folder_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    export(tmp_path / "model", ("model.onnx", "model_fused.onnx"))
    data(tmp_path / "data")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    script = """
        from pathlib import Path
        from slimformer.running.bench import bench
        from slimformer.errors import ExtraError
        from slimformer.reporting.terminal import draw_table
        from slimformer.tasks.classification import Classification
        from rich.console import Console
        task = Classification(data="data")
        result = bench([Path("model")], task, rounds=3, wait_seconds=0, threads=1)
        Console(width=80).print(draw_table(result.records))
        try:
            bench([Path("plain")], task, wait_seconds=0)
        except ExtraError as error:
            print(error)
        assert not {"torch", "transformers"} & set(sys.modules)
    """
    guarded = refusing("torch", "transformers") + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", guarded],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "model_fused.onnx" in done.stdout
    assert "0.8000" in done.stdout
    assert "exporting it needs torch and transformers" in done.stdout


def test_a_missing_runtime_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from slimformer import registry

    runtime = registry.find("runtimes", "openvino")
    monkeypatch.setattr(runtime, "available", lambda _: False)
    with pytest.raises(ExtraError, match=r"pip install 'slimformer\[openvino\]'"):
        open_session(tmp_path / "model.onnx", 1, "openvino")


def test_timing_is_what_its_samples_say() -> None:
    timing = Timing("w", 2, "o", 4, 8, Lengths(2, 2, 2, 2), "r", "1", "cpu", 1, 0, LOAD, (2, 2), ((2.0, 4.0), (4.0, 8.0)))
    assert timing.p50_ms == 2.0
    assert timing.round_ms().tolist() == [6.0, 12.0]
