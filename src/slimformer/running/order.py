"""Which stages may follow which: what a stage would lose of those before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from slimformer import registry
from slimformer.methods.base import Method, Zeros
from slimformer.running.stages import Calibrate, Stage, Train

if TYPE_CHECKING:
    pass


def _methods(stage: Stage) -> tuple[Method, ...]:
    """What takes part in a stage; methods that could not be read are None and left out."""
    found = (stage.method,) if isinstance(stage, Calibrate) else stage.methods if isinstance(stage, Train) else ()
    return tuple(method for method in found if method is not None)


def disorder(stage: Stage, before: Sequence[Stage]) -> Iterator[str]:
    """Why a stage makes no sense after the stages `before` it: what it would lose of them, and what to do."""
    methods, earlier = _methods(stage), [method for item in before for method in _methods(item)]
    factoring = next((registry.name_of(method) for method in earlier if method.effects().factors), None)
    closing = next((registry.name_of(method) for method in earlier if method.effects().learns_grids), None)
    zeros = _zeros_after(before)
    for method in methods:
        name = registry.name_of(method)
        if factoring and method.effects().cuts:
            yield f"{name} cannot cut what {factoring} has factored before: cut first, factor after"
        if zeros and method.effects().refills:
            yield (
                f"{name} gives matrices new values, and the zeros that {registry.name_of(zeros)} left would be gone: leave out "
                "one of the two"
            )
    if closing and not any(method.effects().learns_grids for method in methods):
        yield f"{closing} has learned grids and ranges, which this stage would lose: make {closing} the last stage"
    if zeros and zeros.effects().zeros is Zeros.RESULT and _fills(stage):
        yield f"training would fill the zeros that {registry.name_of(zeros)} left: add keep_zeros to the methods of this stage"


def _zeros_after(stages: Sequence[Stage]) -> Method | None:
    """The method whose zeros are in the matrices after these stages."""
    found: Method | None = None
    for stage in stages:
        methods = _methods(stage)
        if _fills(stage) or any(method.effects().refills for method in methods):
            found = None
        found = next((method for method in methods if method.effects().zeros is not Zeros.NONE), found)
    return found


def _fills(stage: Stage) -> bool:
    """Whether training in a stage makes zeros in the encoder's matrices other numbers for good."""
    if not isinstance(stage, Train) or stage.freeze in ("encoder", "everything"):
        return False
    return not any(method.effects().holds_zeros or method.effects().zeros is Zeros.RESULT for method in _methods(stage))


def _lead(stages: Sequence[Stage]) -> int:
    """How many plain `train` stages a recipe begins with."""
    count = 0
    while count < len(stages) and isinstance(stages[count], Train) and not cast(Train, stages[count]).methods:
        count += 1
    return count
