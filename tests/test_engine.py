"""`compress` for the compiled kernels: zeros in blocks are a part of the budget, and the best file may be one that only they run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_compression import python
from tiny import tiny
from tiny_folder import write_data, write_model
from tiny_hurry import count_speeds, hurry

from slimformer import compress
from slimformer.core.plan import Plan
from slimformer.errors import ExportError, ExtraError, RecipeError
from slimformer.exporters.base import SLIM, Variant
from slimformer.exporters.kernels import Kernels
from slimformer.families.base import anatomy_of, subject_of
from slimformer.kernels.library import installed
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.reporting.ledger import read_facts
from slimformer.running import scale, search
from slimformer.running.bundle import Bundle
from slimformer.running.lessons import BLOCKS_LEFT, blocks_left, fewest_blocks
from slimformer.running.reader import parse_recipe, read_recipe
from slimformer.running.runner import run
from slimformer.running.trials import Judge, Trial
from slimformer.running.wanted import Wanted
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification
from slimformer.training.stage import Calibrate, Train

built = pytest.mark.skipif(not installed(), reason="slimformer-kernels is not installed: `make kernels` builds it")


class KnownScale(scale.Scale):
    """Speeds that are known: 2 with all blocks, 3 with half of them, 5 with a fifth."""

    def __init__(self) -> None:
        pass

    def with_blocks(self, left: float) -> float:
        return {0.5: 3.0, 0.2: 5.0}[left]

    def keep(self, speedup: float) -> float:
        return 1 / speedup


@pytest.mark.parametrize(
    ("fewer", "now", "left", "aim", "budget"),
    [
        (BLOCKS_LEFT, 2.0, 1.0, 2.5, (1.0, 0.5)),
        (BLOCKS_LEFT, 2.0, 1.0, 3.0, (1.0, 0.5)),
        (BLOCKS_LEFT, 2.0, 1.0, 5.0, (1.0, 0.2)),
        (BLOCKS_LEFT, 2.0, 1.0, 10.0, (0.25, 0.2)),  # a fifth gives 2.5 times the speed of 2; the cut gives the rest: 4
        (BLOCKS_LEFT, 3.0, 0.5, 5.0, (1.0, 0.2)),
        (BLOCKS_LEFT, 3.0, 0.5, 10.0, (1 / 6, 0.2)),  # now 3 times as fast with half of them: a fifth gives 5 / 3
        (BLOCKS_LEFT, 5.0, 0.2, 10.0, (0.1, 0.2)),
        ((), 2.0, 1.0, 4.0, (0.25, 1.0)),
    ],
)
def test_blocks_go_before_heads_and_neurons(
    fewer: tuple[float, ...], now: float, left: float, aim: float, budget: tuple[float, float]
) -> None:
    assert KnownScale().budget(aim, now, left=left, fewer=fewer) == pytest.approx(budget)


def test_blocks_may_go_only_for_the_kernels_and_where_nothing_is_written() -> None:
    reads, writes = (Bundle(subject_of(tiny(kind)), Plan(), *[None] * 2) for kind in ("bert", "bart"))  # type: ignore[arg-type]
    wanted = Wanted(engine="kernels")
    assert fewest_blocks(wanted, reads) == BLOCKS_LEFT
    assert fewest_blocks(wanted, writes) == fewest_blocks(Wanted(), reads) == ()


def test_stages_tell_how_many_blocks_they_leave() -> None:
    half, fifth = (Train(methods=(KnowledgeSparse(keep=share, pattern="4x4"), Distillation())) for share in (0.5, 0.2))
    assert blocks_left(()) == blocks_left([Calibrate(Fisher())]) == blocks_left([Train(methods=(Distillation(),))]) == 1.0
    assert blocks_left([half, Calibrate(Fisher())]) == 0.5
    assert blocks_left([half, fifth]) == 0.2


@built
@pytest.mark.slow
def test_a_model_of_blocks_is_searched_trained_and_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    count_speeds(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"))
    write_data(Path("data"))
    timed: list[float] = []
    real = scale.Scale.with_blocks

    def with_blocks(self: Any, left: float) -> float:
        timed.append(real(self, left))
        return 21.0 if left == 0.5 else 22.0

    def try_out(self: Any, *given: Any, **more: Any) -> list[Trial]:
        return [
            replace(trial, speed_32=9.0 if trial.variant == Variant.INT8_KERNELS else 1.0)
            for trial in tried(self, *given, **more)
        ]

    tried = Judge.try_out
    monkeypatch.setattr(Judge, "try_out", try_out)
    monkeypatch.setattr(scale.Scale, "with_blocks", with_blocks)
    monkeypatch.setattr(search, "CLOSE", 0.0)
    options: dict[str, Any] = {"speedup": 20.0, "max_loss": 100, "epochs": 1, "tries": 1, "rivals": ()}
    result = compress("model", Classification(data="data"), "out", engine="kernels", **options, threads=1, wait_seconds=0)
    assert all(speed > 0 for speed in timed)
    assert len(timed) == 2
    recipe = read_recipe(Path("out/recipe.yaml"))
    assert recipe.export.to == "kernels"
    assert not any(isinstance(stage, Calibrate) for stage in recipe.stages)
    (method, _) = next(stage.methods for stage in recipe.stages if isinstance(stage, Train) and len(stage.methods) == 2)
    assert (method.keep, method.pattern) == (0.5, "4x4")  # type: ignore[attr-defined]
    facts = read_facts(Path("out"))
    assert facts is not None
    assert facts.best == SLIM.place
    code = re.search(r"```python\n(.*?)```", Path("out/README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    assert "model_slim.onnx" in code[1]
    ran = python(code[1], Path("out"))
    assert ran.returncode == 0, ran.stderr
    files = [item.name for item in read_facts(Path("out")).files]  # type: ignore[union-attr]
    assert SLIM.place in files
    assert (Path("out") / SLIM.place).is_file()
    assert [record.precision for record in result.records].count(Variant.INT8_KERNELS) == 1
    model = checkpoint.load(Path("out/model"))
    for matrix in anatomy_of(model).matrices.values():
        if not matrix.table:
            weight = model.get_submodule(matrix.module).weight
            assert isinstance(weight, object)
            blocks = weight.detach().reshape(weight.shape[0] // 4, 4, weight.shape[1] // 4, 4)  # type: ignore[operator, index]
            assert abs(float((blocks.abs().sum(dim=(1, 3)) > 0).float().mean()) - 0.5) < 0.1
    again = compress("model", Classification(data="data"), "out", engine="kernels", **options, threads=1, wait_seconds=0)
    assert [record.name for record in again.records] == [record.name for record in result.records]


@pytest.mark.slow
def test_without_the_library_its_install_line_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimformer.kernels.library.find_spec", lambda _: None)
    write_model(tmp_path / "model")
    task = {"use": "classification", "data": str(write_data(tmp_path / "data"))}
    with pytest.raises(ExtraError, match=r"pip install 'slimformer\[kernels\]'"):
        compress(tmp_path / "model", task, tmp_path / "out", engine="kernels")
    recipe = parse_recipe({"model": str(tmp_path / "model"), "task": task, "stages": [{"export": {"to": "kernels"}}]})
    with pytest.raises(ExtraError, match=r"make kernels"):
        run(recipe, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="these options cannot be used"):
        compress("model", Classification(data="data"), tmp_path, engine="tensorrt")  # type: ignore[arg-type]


@built
def test_what_the_kernels_cannot_compute_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ExportError, match="do not compute models of the type marian"):
        Kernels().check("marian", branches=False)
    with pytest.raises(ExportError, match="all words in all layers alike"):
        Kernels().check("bert", branches=True)
    Kernels().check("camembert", branches=False)
