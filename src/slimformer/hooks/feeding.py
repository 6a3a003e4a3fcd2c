"""Runs a model again and again on the same batches, each time from the layer that the work has reached.

A method that looks at one layer after another computes what enters a layer once (`Feed.reach`) and starts later passes
there (`Feed.run`). `watching` shows what a sublayer reads and gives, and may end the pass once that was seen. Layers
that are passed over are replaced by modules that give what the last of them in their stack gave; they stand in their
places again when the pass is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Site, Tokens

Given = Mapping[str, Any]  # layer -> what it gives, of the last layer that is passed over in each stack


class Feed:
    """A model and its batches, with what enters the layer that was reached last; at first that is layer 0.

    `batches` hold the model's inputs and nothing else. What lies before the reached layer must not change from then on:
    neither its weights nor its gates.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.anatomy, self.batches = model, anatomy, batches
        self.layer = 0
        self.given: list[Given] = [{}] * len(batches)

    def reach(self, layer: int) -> None:
        """Computes what enters `layer` in each batch, from what enters the layer reached before; never goes back."""
        if layer > self.layer:
            self.given = [self._before(index, layer) for index in range(len(self.batches))]
            self.layer = layer

    def run(self, index: int) -> Any:
        """The model's output for one batch, computed from the reached layer on."""
        with starting(self.model, self.anatomy, self.given[index]):
            return self.model(**self.batches[index])

    def _before(self, index: int, layer: int) -> Given:
        ends = _ends(self.anatomy, layer)
        seen = {name: output for name, output in self.given[index].items() if name in ends}

        def catch(name: str, _: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            seen[name] = output
            if name == ends[-1]:
                raise _Stop

        handles = [
            self.model.get_submodule(name).register_forward_hook(partial(catch, name)) for name in ends if name not in seen
        ]
        try:
            with suppress(_Stop):
                self.run(index)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _ends(anatomy: Anatomy, layer: int) -> list[str]:
    """The last layer before `layer` in each stack that has any there."""
    ends = {anatomy.stack_of(index).name: name for index, name in enumerate(anatomy.layers[:layer])}
    return list(ends.values())


def unpadded(batch: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    """True at the tokens of a batch that are no padding: (batch, seq). Without a mask, labels tell it of a decoder's tokens."""
    if tokens.mask in batch:
        return batch[tokens.mask].bool()
    if tokens is Tokens.TARGET and "labels" in batch:
        return batch["labels"] >= 0
    return torch.ones_like(batch[tokens.ids], dtype=torch.bool)


@contextmanager
def starting(model: nn.Module, anatomy: Anatomy, given: Given) -> Iterator[None]:
    """Lets forward passes begin behind the layers whose outputs are `given`; without any, from the start."""
    outputs: dict[str, Any] = {}
    for stack in anatomy.stacks:
        for end in set(stack.layers) & set(given):
            outputs |= dict.fromkeys(stack.layers[: stack.layers.index(end) + 1], given[end])
    real = {name: model.get_submodule(name) for name in outputs}
    try:
        for name, output in outputs.items():
            model.set_submodule(name, _Given(output, real[name]))
        yield
    finally:
        for name, module in real.items():
            model.set_submodule(name, module)


@contextmanager
def watching(model: nn.Module, anatomy: Anatomy, site: Site, seen: dict[str, Tensor], *, stop: bool = False) -> Iterator[None]:
    """Puts a sublayer's residual, and its output matrix's input and output, into `seen` under site.id + /r, /x, /y.

    `stop` ends the pass there: it then returns nothing, and the context ends with it.
    """
    assert site.sublayer is not None
    end = anatomy.sites[site.sublayer].taps[0]
    assert end.residual is not None

    def residual(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[f"{site.id}/r"] = args[end.place]

    def output(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        seen[f"{site.id}/x"], seen[f"{site.id}/y"] = args[0], result
        if stop:
            raise _Stop

    handles = [
        model.get_submodule(end.residual).register_forward_pre_hook(residual),
        model.get_submodule(site.taps[0].module).register_forward_hook(output),
    ]
    try:
        with suppress(_Stop):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Ends a forward pass once all that is needed was seen."""


class _Given(nn.Module):
    """Stands for a layer that has been computed already, and has what a model reads from that: whom it attends to, say."""

    def __init__(self, output: Any, layer: nn.Module) -> None:
        super().__init__()
        self.output, self._layer = output, (layer,)  # a tuple, so that the layer is no part of this module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.output
