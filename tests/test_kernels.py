"""The compiled kernels, called through ctypes, against numpy. `make kernels-check` runs 10,000 more cases under sanitizers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from slimformer.errors import ExtraError, ModelError
from slimformer.kernels import library

PATHS = ("scalar", "avx2", "avxvnni", "avx512vnni256", "avx512vnni", "neon")

built = pytest.mark.skipif(not library.installed(), reason="slimformer-kernels is not installed: `make kernels` builds it")


@pytest.fixture
def paths() -> Iterator[list[str]]:
    """The processor paths that run here; the one in use comes back afterwards."""
    before = library.processor_path()
    yield [name for name in PATHS if library.set_processor_path(name)]
    library.set_processor_path(before)


def sparse_weights(rng: np.random.Generator, outputs: int, inputs: int, block_rows: int, zeros: float) -> np.ndarray:
    """int8 weights with that share of empty blocks."""
    height = max(1, block_rows)
    grid = rng.random((-(-outputs // height), -(-inputs // 4))) >= zeros
    mask = np.kron(grid, np.ones((height, 4)))[:outputs, :inputs]
    return (rng.integers(-128, 128, (outputs, inputs)) * mask).astype(np.int8)


def test_a_missing_package_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed", lambda: False)
    with pytest.raises(ExtraError, match=r"kernels are not installed") as caught:
        library.library_path()
    assert "slimformer[kernels]" in str(caught.value)


@built
def test_sums_are_those_of_numpy_on_every_path(paths: list[str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        outputs, inputs, rows = int(rng.integers(1, 70)), int(rng.integers(1, 130)), int(rng.integers(1, 100))
        block_rows = library.BLOCK_ROWS[number % 5]
        weights = sparse_weights(rng, outputs, inputs, block_rows, float(rng.choice([0.0, 0.5, 0.9, 1.0])))
        packed = library.pack_weights(weights, rng.random(outputs), block_rows=block_rows)
        linear = library.Linear(packed)
        codes = rng.integers(0, 256, (rows, inputs)).astype(np.uint8)
        zero = rng.integers(0, 256, rows).astype(np.uint8)
        expected = (codes.astype(np.int32) - zero[:, None]) @ weights.astype(np.int32).T
        for path in paths:
            library.set_processor_path(path)
            out = np.empty((rows, outputs), np.int32)
            assert np.array_equal(linear(codes, np.ones(rows), zero, out=out), expected), (path, block_rows, weights.shape)


@built
def test_rows_get_their_own_grid_so_that_no_answer_depends_on_its_neighbours(paths: list[str]) -> None:
    rng = np.random.default_rng(1)
    weights = sparse_weights(rng, 50, 90, 1, 0.7)
    linear = library.Linear(library.pack_weights(weights, np.full(50, 0.01), rng.normal(size=50), block_rows=1))
    x = rng.normal(size=(130, 90)).astype(np.float32)
    x[77] *= 1000  # an odd neighbour
    for path in paths:
        library.set_processor_path(path)
        together = linear(x, activation="gelu")
        alone = np.concatenate([linear(x[i : i + 1], activation="gelu") for i in range(len(x))])
        assert np.array_equal(together, alone)
        order = rng.permutation(len(x))
        assert np.array_equal(linear(x[order], activation="gelu"), together[order])


@built
def test_a_product_is_close_to_the_float_one() -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(-127, 128, (40, 64)).astype(np.int8)
    scales = rng.uniform(0.001, 0.01, 40).astype(np.float32)
    bias, gain, shift = (rng.normal(size=40).astype(np.float32) for _ in range(3))
    x = rng.normal(size=(33, 64)).astype(np.float32)
    residual = rng.normal(size=(33, 40)).astype(np.float32)
    linear = library.Linear(library.pack_weights(weights, scales, bias))
    exact = x @ (weights * scales[:, None]).T + bias
    step = (x.max(axis=1) - x.min(axis=1)) / 255  # each input is off by half a step at most
    allowed = step[:, None] / 2 * np.abs(weights * scales[:, None]).sum(axis=1) + 1e-4
    assert (np.abs(linear(x) - exact) <= allowed).all()
    assert (np.abs(linear(x, activation="relu") - np.maximum(exact, 0)) <= allowed).all()
    summed = linear(x) + residual
    norm = (summed - summed.mean(axis=1, keepdims=True)) / np.sqrt(summed.var(axis=1, keepdims=True) + 1e-5) * gain + shift
    np.testing.assert_allclose(linear(x, residual=residual, norm=(gain, shift, 1e-5)), norm, atol=2e-5)
    codes = linear(x, out=np.empty((33, 40), np.uint8), out_scale=0.1, out_zero=100)
    assert np.array_equal(codes, np.clip(np.rint(linear(x) / np.float32(0.1) + 100), 0, 255))


@built
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_is_within_its_stated_error(activation: library.Activation) -> None:
    from scipy.special import erfc

    points = np.linspace(-9, 9, 40_001).astype(np.float32)
    linear = library.Linear(library.pack_weights(np.zeros((len(points), 4), np.int8), np.ones(len(points)), points))
    got = linear(np.zeros((1, 4), np.float32), activation=activation)[0]
    x = points.astype(np.float64)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * erfc(-x / np.sqrt(2)) if activation == "gelu" else tanh
    assert np.abs(got - exact).max() < 5e-5


@built
def test_only_blocks_that_hold_weights_are_stored() -> None:
    weights = np.zeros((8, 16), np.int8)
    weights[0, 0] = weights[3, 5] = weights[3, 6] = weights[4, 15] = 1
    counts = {rows: library.Linear(library.pack_weights(weights, np.ones(8), block_rows=rows)).blocks for rows in (1, 2, 4, 16)}
    # 1x4: one block each at (0, 0), (3, 1), (4, 3); rows 0 and 3 share a block of four only where their columns agree
    assert counts == {1: 3, 2: 3, 4: 3, 16: 3}
    weights[1, 2] = 1
    counts = {rows: library.Linear(library.pack_weights(weights, np.ones(8), block_rows=rows)).blocks for rows in (1, 2, 4, 16)}
    assert counts == {1: 4, 2: 3, 4: 3, 16: 3}


@built
def test_damaged_bytes_end_in_one_line() -> None:
    rng = np.random.default_rng(3)
    packed = library.pack_weights(sparse_weights(rng, 20, 24, 1, 0.5), np.ones(20), block_rows=1)
    for cut in (0, 10, 64, len(packed) - 64, len(packed) - 1):
        with pytest.raises(ModelError, match=r"bytes|has"):
            library.Linear(packed[:cut])
    for at in (9, 12, 20, 30, 64, 500, len(packed) - 64):
        changed = packed.copy()
        changed[at] ^= 0x55
        with pytest.raises(ModelError):
            library.Linear(changed)
    newer = packed.copy()
    newer[8] = 2
    with pytest.raises(ModelError, match="newer slimformer-kernels"):
        library.Linear(newer)


@built
def test_what_cannot_be_packed_or_multiplied_is_refused() -> None:
    weights = np.ones((4, 8), np.int8)
    with pytest.raises(ModelError, match="blocks have"):
        library.pack_weights(weights, np.ones(4), block_rows=3)
    with pytest.raises(ModelError, match="finite"):
        library.pack_weights(weights, np.array([1, np.nan, 1, 1]))
    linear = library.Linear(library.pack_weights(weights, np.ones(4)))
    with pytest.raises(ModelError, match="8 values a row"):
        linear(np.ones((2, 7), np.float32))
    with pytest.raises(ModelError, match="one scale"):
        linear(np.ones((2, 8), np.float32), np.ones(3), np.zeros(3, np.uint8))
    with pytest.raises(ModelError, match="go together"):
        linear(np.ones((2, 8), np.float32), np.ones(1))
