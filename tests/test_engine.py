"""`compress` for the compiled kernels: zeros in blocks are a part of the budget, and the best file may be one that only they run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_compression import python
from tiny_folder import write_data, write_model
from tiny_hurry import count_speeds, hurry

from slimformer import compress
from slimformer.errors import ExportError, ExtraError, RecipeError
from slimformer.exporters.base import SLIM, Variant
from slimformer.exporters.kernels import Kernels
from slimformer.families.base import anatomy_of
from slimformer.kernels.library import installed
from slimformer.reporting.ledger import read_facts
from slimformer.running import scale, search
from slimformer.running.reader import parse_recipe, read_recipe
from slimformer.running.runner import run
from slimformer.running.trials import Judge, Trial
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification
from slimformer.training.stage import Calibrate, Train

built = pytest.mark.skipif(not installed(), reason="slimformer-kernels is not installed: `make kernels` builds it")


class KnownScale:
    """Speeds that are known: 2 uncut, 3 with half of the blocks, 5 with a fifth of them."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def with_blocks(self, left: float) -> float:
        return {0.5: 3.0, 0.2: 5.0}[left]

    def keep(self, aim: float) -> float:
        self.asked.append(aim)
        return 1 / aim


@pytest.mark.parametrize(
    ("engine", "beams", "aim", "budget"),
    [
        ("kernels", None, 2.5, (1.0, 0.5)),
        ("kernels", None, 3.0, (1.0, 0.5)),
        ("kernels", None, 5.0, (1.0, 0.2)),
        (
            "kernels",
            None,
            10.0,
            (0.25, 0.2),
        ),  # a fifth of the blocks gives 2.5 times the uncut speed of 2; the cut gives the rest: 4
        ("onnx", None, 4.0, (0.25, 1.0)),
        ("kernels", 5, 4.0, (0.25, 1.0)),
    ],
)
def test_blocks_go_before_heads_and_neurons(engine: str, beams: int | None, aim: float, budget: tuple[float, float]) -> None:
    whole = SimpleNamespace(trials=[Trial(Variant.INT8_KERNELS, 0.9, 0.0, 2.0, 1.0, 1)])
    bundle = SimpleNamespace(subject=SimpleNamespace(beams=beams))
    known: Any = SimpleNamespace(wanted=SimpleNamespace(engine=engine), bundle=bundle, scale=KnownScale(), whole=whole)
    assert search._Search._budget(known, aim) == pytest.approx(budget)


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
