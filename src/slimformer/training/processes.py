"""Several processes at one run: the first carries it out, the others help it to train and do nothing else.

A launcher (torchrun, accelerate) starts one program several times. The first process alone claims the folder, reads, writes,
measures, exports and speaks. At each training it sends the others all that a training is made of; from there `loop.train` runs in
all of them alike. Between trainings they wait. If one process dies, the others notice at their next exchange and end.
"""

from __future__ import annotations

import atexit
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch

from slimformer.errors import ProcessError, SlimformerError
from slimformer.log import Log
from slimformer.training.devices import accelerator_for
from slimformer.training.launching import launched
from slimformer.training.loop import Evaluate, Trained, train
from slimformer.training.stage import Training

AT_LEAVE = 0.5  # seconds in which the threads of gloo end

P = ParamSpec("P")
R = TypeVar("R")

_leading: list[bool] = []  # whether this process is at work in a function that others share: one entry for each that is open


@dataclass(frozen=True)
class _Job:
    """A training, as it is sent."""

    training: Training
    generator: torch.Tensor  # the state of the context's generator, which cannot be sent itself
    folder: Path
    cache: Path | None
    evaluates: bool


@dataclass(frozen=True)
class _End:
    """The result of the function that the first process has finished."""

    result: Any


def shared(work: Callable[P, R]) -> Callable[P, R]:
    """Lets several processes call a function alike: the first does its work, the others help to train and return what it returns.

    The first process raises what the work raises. Then, or if the first process is gone, the others raise ProcessError.
    """

    @wraps(work)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if _leading or not launched():
            return work(*args, **options)
        atexit.register(_leave)
        if not accelerator_for((), None).is_main_process:
            return cast(R, join())
        _leading.append(True)
        try:
            result = work(*args, **options)
            _send_result(result)
        except BaseException as error:
            _hang_up()
            if _is_lost(error):
                raise _gone("another process of this run is gone") from None
            raise
        finally:
            _leading.pop()
        return result

    return call


def train_together(
    training: Training,
    folder: Path,
    log: Log,
    *,
    evaluate: Evaluate | None = None,
    cache: Path | None = None,
    tracked: Path | None = None,
) -> Trained:
    """`train`, with the help of the other processes if there are any."""
    if _leading:
        context = training.context
        cost = replace(context.cost, matrix=None, narrow=None)
        sent = replace(context, generator=cast(torch.Generator, None), memo={}, cost=cost, held=None)  # the first one decides
        _send(_Job(replace(training, context=sent), context.generator.get_state(), folder, cache, evaluate is not None))
    return train(training, folder, log, evaluate=evaluate, cache=cache, tracked=tracked)


def join() -> Any:
    """Helps the first process with each training until its work is done; the result of that work. ProcessError if it failed."""
    try:
        accelerator_for((), None)
        while True:
            message = _receive()
            if isinstance(message, _End):
                return message.result
            _help(message)
    except Exception as error:
        if _is_lost(error):
            raise _gone("the first process of this run has ended, and said why") from None
        raise


def _help(job: _Job) -> None:
    context = replace(job.training.context, generator=torch.Generator().set_state(job.generator))
    training = replace(job.training, context=context)
    with suppress(SlimformerError):  # the first process meets the same mistake, and says it
        train(training, job.folder, Log(None, quiet=True), evaluate=_never if job.evaluates else None, cache=job.cache)


def _never(_: object) -> float:
    raise AssertionError("the first process alone evaluates")


def _send(message: object) -> None:
    from accelerate.utils import broadcast_object_list

    broadcast_object_list([message])


def _send_result(result: object) -> None:
    try:
        _send(_End(result))
    except (TypeError, AttributeError, ValueError):  # it cannot be sent
        _send(_End(None))


def _receive() -> Any:
    from accelerate.utils import broadcast_object_list

    messages: list[Any] = [None]
    broadcast_object_list(messages)
    return messages[0]


def _hang_up() -> None:
    """Closes the connections, so that no other process waits for this one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _leave() -> None:
    """Closes the connections at the end of the program: one that ends while a thread of gloo still runs is aborted."""
    if torch.distributed.is_initialized():
        gc.collect()  # models in cycles hold on to their connections
        _hang_up()
        gc.collect()
        time.sleep(AT_LEAVE)


def _is_lost(error: BaseException) -> bool:
    """Whether an exchange failed because a process at the other end is gone."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
    )


def _gone(what: str) -> ProcessError:
    return ProcessError(f"{what}.", help="start the same command again: it goes on from the last state that was written.")
