"""Sequence-level distillation: a student learns from what its teacher writes, which is written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pairs import END, PAD, write_pairs, write_speaker

from slimformer.core.plan import Plan
from slimformer.data.material import prepare
from slimformer.errors import RecipeError
from slimformer.families.base import subject_of
from slimformer.log import Log
from slimformer.methods.distillation import Distillation
from slimformer.running.bundle import Bundle, Run
from slimformer.running.preflight import preflight
from slimformer.running.reader import parse_recipe
from slimformer.running.stages import run_stage, training_rows
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.tasks.translation import Translation
from slimformer.training import written
from slimformer.training.stage import Train


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    home = tmp_path_factory.mktemp("written")
    write_pairs(home / "data", train=60, dev=12)
    write_speaker(home / "marian", steps=30)
    subject, teacher = (subject_of(checkpoint.load(home / "marian")) for _ in range(2))
    task = Translation(data=str(home / "data"), source="en", target="de").bind(subject.model.config.to_dict())
    return Bundle(subject, Plan(), prepare(task, home / "marian"), teacher)


def run_in(folder: Path) -> Run:
    return Run(folder, folder, Log(None, quiet=True))


@pytest.mark.slow
def test_rows_hold_what_the_teachers_beams_find(bundle: Bundle, tmp_path: Path) -> None:
    """Each row alone through transformers' own generate gives the same text, and the decoder reads it a place later."""
    rows = training_rows(Train(targets="teacher", rows=12), bundle, run_in(tmp_path))
    plain = training_rows(Train(rows=12), bundle, run_in(tmp_path))
    model = bundle.teacher.model
    for ids, text, said in zip(*(rows.columns[name] for name in ("input_ids", "labels", "decoder_input_ids")), strict=True):
        with torch.no_grad():
            alone = model.generate(torch.tensor([ids.tolist()]), num_beams=2, max_length=129)[0, 1:].tolist()
        assert text.tolist() == alone
        assert alone[-1] == END
        assert said.tolist() == [PAD, *alone[:-1]]
    assert [ids.tolist() for ids in rows.columns["input_ids"]] == [ids.tolist() for ids in plain.columns["input_ids"]]
    own, theirs = ([text.tolist() for text in made.columns["labels"]] for made in (plain, rows))
    assert own != theirs  # so short a training leaves faults, and these are learnt


def test_texts_are_written_once_and_a_killed_run_goes_on(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "AT_ONCE", 8)
    monkeypatch.setattr(written, "FILE_BATCHES", 1)
    features, log = bundle.material.features[Split.TRAIN], Log(None, quiet=True)
    first = written.written_by(bundle.teacher, features, 16, tmp_path, log)
    files = sorted(tmp_path.glob("written-*/*.json"))
    assert len(files) == -(-len(features) // 8)
    times = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    again = written.written_by(bundle.teacher, features, 16, tmp_path, log)
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)].count(False) == 1
    assert [text.tolist() for text in again.columns["labels"]] == [text.tolist() for text in first.columns["labels"]]
    short = written.written_by(bundle.teacher, features, 4, tmp_path, log)
    assert all(len(text) <= 4 and text[-1] == END for text in short.columns["labels"])
    assert len(list(tmp_path.glob("written-*"))) == 2


def test_a_student_learns_whole_texts_and_words_together(bundle: Bundle, tmp_path: Path) -> None:
    stage = Train((Distillation(hidden=0.0),), targets="teacher", steps=2, lr=1e-3, precision="fp32")
    made = run_stage(stage, bundle, run_in(tmp_path))
    before, after = (dict(one.subject.model.named_parameters()) for one in (bundle, made))
    assert any((before[name] != after[name]).any() for name in before)


def test_it_is_no_leading_stage_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert not Train(targets="teacher").leading
    with pytest.raises(RecipeError, match="leave out text"):
        Train(targets="teacher", text="task")
    with pytest.raises(RecipeError, match="leave out augment"):
        Train(targets="teacher", augment=2)
    with pytest.raises(RecipeError, match="targets"):
        Train(targets="me")  # type: ignore[arg-type]
    from slimformer.demo import encoder

    data = {"model": str(encoder()), "task": {"use": "intents"}, "stages": [{"train": {}}, {"train": {"targets": "teacher"}}]}
    with pytest.raises(RecipeError, match="the task intents writes no texts"):
        preflight(parse_recipe(data))
