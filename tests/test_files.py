"""Files appear whole or not at all; a folder belongs to one run; the disk's refusals become words."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import multiprocessing
import subprocess
import sys
import threading

import pytest

from slimformer.errors import OutputError, output_errors
from slimformer.files import claim, in_turn, remembered, remove_folder, whole, whole_folder, whole_group, write_text


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), whole(file) as part:
        part.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert file.read_text(encoding="utf-8") == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_folder_leaves_what_was_there(tmp_path):
    with whole_folder(tmp_path / "model") as part:
        write_text(part / "a", "old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "model") as part:
        write_text(part / "a", "new")
        raise RuntimeError
    assert (tmp_path / "model" / "a").read_text(encoding="utf-8") == "old"
    with whole_folder(tmp_path / "model") as part:
        write_text(part / "b", "new")
    assert [item.name for item in (tmp_path / "model").iterdir()] == ["b"]
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_a_file_and_those_beside_it_change_together(tmp_path):
    file, beside = tmp_path / "model.onnx", ["model.onnx_data"]
    with whole_group(file, beside) as part:
        write_text(part, "old")
        write_text(part.with_name("model.onnx_data"), "old weights")
    with pytest.raises(RuntimeError), whole_group(file, beside) as part:
        write_text(part, "new")
        raise RuntimeError
    assert {item.name: item.read_text(encoding="utf-8") for item in tmp_path.iterdir()} == {
        "model.onnx": "old",
        "model.onnx_data": "old weights",
    }
    with whole_group(file, beside) as part:
        write_text(part, "new, with its weights inside")
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_a_full_disk_is_told_in_words(tmp_path):
    with pytest.raises(OutputError, match=r"the disk is full[\s\S]*free some space"), output_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="odd"), output_errors(tmp_path):
        raise OSError(errno.EIO, "odd")


def test_a_disk_that_fills_up_while_writing_leaves_nothing_half(tmp_path):
    with pytest.raises(OutputError, match="full"), whole(tmp_path / "model.onnx") as part:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="holds something else already"), claim(tmp_path, "x"):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match="is a file"), claim(tmp_path / "thesis.tex", "x"):
        pass


def test_the_same_run_comes_back_another_does_not(tmp_path):
    out = tmp_path / "out"
    with claim(out, "this"):
        (out / ".part-left").write_text("half", encoding="utf-8")
    with claim(out, "this"):
        assert not (out / ".part-left").exists()
    with pytest.raises(OutputError, match="belongs to another run"), claim(out, "that"):
        pass


def test_what_another_run_differs_in_is_said_alone(tmp_path):
    def purpose(**options):
        return f"compress {json.dumps(options)}"

    with claim(tmp_path, purpose(epochs=2, task="Classification(data='a', text=None, labels=('x', 'y'))")):
        pass
    other = purpose(epochs=3, task="Classification(data='b', text=None, labels=('x', 'y'))")
    with pytest.raises(OutputError) as refused, claim(tmp_path, other):
        pass
    assert refused.value.facts == ("epochs: 2 there, 3 now", "task: data='a' there, data='b' now")


def test_a_run_killed_before_it_left_its_mark_may_come_back(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".part-x").touch()
    with claim(tmp_path, "x"):
        assert not (tmp_path / ".part-x").exists()


def test_one_folder_is_used_in_turn(tmp_path):
    order, waits = [], threading.Event()

    def second():
        with in_turn(tmp_path / "made", waits.set):
            order.append("second")

    with in_turn(tmp_path / "made", lambda: order.append("told, with nobody there")):
        other = threading.Thread(target=second)
        other.start()
        assert waits.wait(30)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]


def _hold(folder, ready, done):
    with claim(folder, "x"):
        ready.set()
        done.wait(30)


def test_two_runs_in_one_folder_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(OutputError, match="another run is at work"), claim(tmp_path / "out", "x"):
            pass
    finally:
        done.set()
        other.join(30)
    with claim(tmp_path / "out", "x"):
        pass


@pytest.mark.parametrize("value", [1.5, 0.1 + 0.2, math.inf, -math.inf, math.nan])
def test_what_is_made_once_is_read_as_it_was(tmp_path, value):
    """A score may be no number, and a loss without bound; neither is made again for that."""
    remembered(tmp_path / "loss.json", lambda: [value], list[float])
    assert repr(remembered(tmp_path / "loss.json", lambda: pytest.fail("made again"), list[float])) == repr([value])


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}', b"\xff", b"null"])
def test_what_cannot_be_read_is_made_again(tmp_path, content):
    file = tmp_path / "loss.json"
    file.write_bytes(content)
    assert remembered(file, lambda: 2.0, float) == 2.0
    assert remembered(file, lambda: pytest.fail("made again"), float) == 2.0


def test_a_folder_whose_removal_is_killed_is_gone_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    write_text(tmp_path / "work" / "a", "old")

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", kill)
        remove_folder(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    remove_folder(tmp_path / "work")  # nothing but what the kill left
    assert not (tmp_path / ".part-work").exists()
    with claim(tmp_path, "x"):
        assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".part-")] == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_has_one_run_at_work_and_a_killed_one_is_forgotten(tmp_path, monkeypatch, code):
    def without(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", without)
    with claim(tmp_path, "x"), pytest.raises(OutputError, match="another run is at work"), claim(tmp_path, "x"):
        pass
    with claim(tmp_path, "x"):
        pass
    command = "import fcntl, os, errno\ndef without(*_): raise OSError(errno.ENOLCK, '')\nfcntl.flock = without\n"
    command += (
        f"from slimformer.files import claim\nwith claim(__import__('pathlib').Path({str(tmp_path)!r}), 'x'): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 9
    with claim(tmp_path, "x"):
        pass


@pytest.mark.parametrize("content", ["{" * 10, '{"a":' * 10_000, "", "\x00"])
def test_a_mark_that_cannot_be_read_is_that_of_another_run(tmp_path, content):
    (tmp_path / ".slimformer").write_text(content, encoding="utf-8")
    with pytest.raises(OutputError, match="belongs to another run"), claim(tmp_path, "x"):
        pass


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"(cannot write|is a file)"), claim(tmp_path / name, "x"):
        pass
