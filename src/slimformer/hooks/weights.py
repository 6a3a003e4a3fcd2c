"""Masks weights, changes them or lets a module compute in another way, while a context lasts; after it all is as before.

Parameters keep their names, objects and places in `state_dict`, so that optimisers, saved states and digests see
nothing. Therefore the tensor is swapped inside `forward`; a torch parametrisation would rename it. Gradients reach
weight and mask. One rule for shapes: each axis of a mask divides the weight's, and one entry covers a block; (rows, 1)
masks rows, (1, 1) all. Blocks that do not divide a matrix are refused, not padded. Units are masked in `gating.py`,
shapes change in `shrink.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Role, Site, Slice
from slimformer.errors import PlanError, RecipeError, nearest

Mask = Tensor | Callable[[], Tensor]
Change = Callable[[Tensor], Tensor]  # a tensor in, one of the same shape out

# A unit without these rows and their biases gives 0: GELU, ReLU, SiLU and tanh map 0 to 0.
FEEDS = (Role.VALUE, Role.QUERY_KEY_VALUE, Role.FFN_IN)


@contextmanager
def masked_weights(model: nn.Module, masks: Mapping[str, Mask]) -> Iterator[None]:
    """Multiplies each named parameter, weight or bias, by its mask in every forward pass while the context lasts.

    A mask is a tensor or a function that returns one: it is then asked in every forward pass. Contexts may overlap, also on
    one parameter, and end in any order. Raises PlanError for a parameter that does not exist or a mask that does not fit it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def change(name: str, mask: Mask) -> Change:
        if isinstance(mask, Tensor) and name in parameters:
            _check(mask.shape, parameters[name].shape, name)
        return lambda weight: masked(weight, mask() if callable(mask) else mask)

    with changed_weights(model, {name: change(name, mask) for name, mask in masks.items()}):
        yield


@contextmanager
def changed_weights(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Passes each named parameter through a function in every forward pass while the context lasts; as `masked_weights`."""
    handles: list[tuple[_Forward, tuple[str, Change]]] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones under each of their names
    try:
        for name, change in changes.items():
            if name not in parameters:
                raise PlanError(f"no parameter '{name}' to change.", help=nearest(name, parameters))
            path, _, parameter = name.rpartition(".")
            forward = _Forward.on(model.get_submodule(path))
            entry = (parameter, change)
            forward.changes.append(entry)
            handles.append((forward, entry))
        yield
    finally:
        for forward, entry in handles:
            forward.remove(entry)


@contextmanager
def computing(model: nn.Module, ways: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Lets each named module compute in another way while the context lasts: by a function of the module and its arguments."""
    handles: list[_Forward] = []
    try:
        for name, way in ways.items():
            forward = _Forward.on(model.get_submodule(name))
            assert forward.way is None, f"{name} computes in another way already"
            forward.way = way
            handles.append(forward)
        yield
    finally:
        for forward in handles:
            forward.way = None
            forward.leave()


class _Forward:
    """Stands in for a module's `forward` and swaps changed tensors in around it; gone with its last change."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.changes: list[tuple[str, Change]] = []
        self.way: Callable[..., Any] | None = None

    @staticmethod
    def on(module: nn.Module) -> _Forward:
        forward = vars(module).get("forward")
        if forward is None:
            forward = _Forward(module)
            module.forward = forward
        assert isinstance(forward, _Forward), f"{type(module).__name__}.forward is replaced already"
        return forward

    def remove(self, entry: tuple[str, Change]) -> None:
        self.changes = [other for other in self.changes if other is not entry]
        self.leave()

    def leave(self) -> None:
        """Gives the module its own `forward` back if nothing is left to do."""
        if not self.changes and self.way is None:
            del self.module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters: dict[str, Any] = self.module._parameters
        plain = dict(parameters)
        try:
            for name, change in self.changes:
                parameters[name] = change(parameters[name])
            return (self.way or type(self.module).forward)(self.module, *args, **kwargs)
        finally:
            parameters.update(plain)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """weight * mask; each entry of the mask covers a block of the weight."""
    if mask.shape == weight.shape:
        return weight * mask
    return (_split(weight, mask.shape) * _spread(mask)).reshape(weight.shape)


def expand(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask in the shape of its weight."""
    sizes = [size for count, axis in zip(mask.shape, shape, strict=True) for size in (count, axis // count)]
    return _spread(mask).expand(sizes).reshape(tuple(shape))


def grid_of(shape: Sequence[int], block: Sequence[int], name: str) -> tuple[int, int]:
    """How many blocks a matrix has along each axis; RecipeError if they do not divide it."""
    rows, columns = shape
    if rows % block[0] or columns % block[1]:
        raise RecipeError(
            f"blocks of {block[0]} x {block[1]} do not divide {name}, which is {rows} x {columns}.",
            help="choose a block that divides every matrix, such as the size of a head.",
        )
    return rows // block[0], columns // block[1]


def liveliness(anatomy: Anatomy, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each unit the largest bar that it survives, when all entries of `values` at or below a bar count as zero.

    `values`: parameter -> an entry per weight or per block, not negative. A weight that is not named survives every
    bar, a bias that is not named goes with its row. A unit can go without changing the output when all that reads it is
    zero (columns of the output projection), or all that feeds it (rows of the value projection or of the first FFN
    matrix, *with* their biases); zero queries or keys only make a head average. So with `values` = |weights|, biases
    included, a unit at 0 is free to cut. Gives site -> (size,).
    """
    roles = {matrix.module: matrix.role for matrix in anatomy.matrices.values()}
    bars = {}
    for site in anatomy.units:
        feeds = [piece for piece in site.slices if piece.dim == 0 and roles.get(piece.param.rpartition(".")[0]) in FEEDS]
        reads = [piece for piece in site.slices if piece.dim == 1]
        first = 2 if any(roles.get(piece.param.rpartition(".")[0]) is Role.QUERY_KEY_VALUE for piece in feeds) else 0
        bars[site.id] = torch.minimum(_largest(site, feeds, values, first), _largest(site, reads, values))  # (size,)
    return bars


def _largest(site: Site, pieces: Sequence[Slice], values: Mapping[str, Tensor], first: int = 0) -> Tensor:
    """Per unit the largest value in its part of any of these slices, of whose stacked blocks those from `first` on count: (size,)."""
    tops = []
    for piece in pieces:
        if piece.param in values:
            value = values[piece.param].detach()
            along = value.amax(1 - piece.dim) if value.ndim == 2 else value
            rows = site.size * piece.unit * piece.parts
            units = along.repeat_interleave(rows // len(along)).reshape(piece.parts, site.size, piece.unit)
            tops.append(units[first:].amax(2).amax(0))
        elif piece.param.endswith(".weight"):
            return torch.full((site.size,), torch.inf)
    return torch.stack(tops).amax(0) if tops else torch.full((site.size,), torch.inf)


def _split(weight: Tensor, grid: Sequence[int]) -> Tensor:
    """Each axis split into (blocks, rows of a block): (rows, columns) -> (blocks, rows, blocks, columns)."""
    return weight.reshape([size for count, axis in zip(grid, weight.shape, strict=True) for size in (count, axis // count)])


def _spread(mask: Tensor) -> Tensor:
    """(rows, columns) -> (rows, 1, columns, 1), so that it multiplies what `_split` makes."""
    return mask.reshape([size for count in mask.shape for size in (count, 1)])


def _check(mask: Sequence[int], weight: Sequence[int], name: str) -> None:
    fits = len(mask) == len(weight) and all(axis % count == 0 for count, axis in zip(mask, weight, strict=True))
    if not fits:
        raise PlanError(
            f"the mask {tuple(mask)} does not fit '{name}', which is {tuple(weight)}.",
            help="each axis of a mask divides the weight's.",
        )
