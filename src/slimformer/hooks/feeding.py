"""Runs a model again and again on the same batches, each time from the layer that the work has reached.

A method that looks at one layer after another computes what enters a layer once (`Feed.reach`) and starts later passes
there (`Feed.run`). `watching` shows what a sublayer reads and gives, and may end the pass once that was seen. Layers
that are passed over are replaced by modules that hand on a given state; they stand in their places again when the pass
is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Site


class Feed:
    """A model and its batches, with what enters the layer that was reached last; at first that is layer 0.

    `batches` hold the model's inputs and nothing else. What lies before the reached layer must not change from then on:
    neither its weights nor its gates.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.anatomy, self.batches = model, anatomy, batches
        self.layer = 0
        self.states: list[Tensor | None] = [None] * len(batches)  # (batch, seq, hidden) each, once a layer above 0 is reached

    def reach(self, layer: int) -> None:
        """Computes what enters `layer` in each batch, from what enters the layer reached before; never goes back."""
        if layer > self.layer:
            self.states = [self._entering(index, layer) for index in range(len(self.batches))]
            self.layer = layer

    def run(self, index: int) -> Any:
        """The model's output for one batch, computed from the reached layer on."""
        with starting(self.model, self.anatomy, self.layer, self.states[index]):
            return self.model(**self.batches[index])

    def _entering(self, index: int, layer: int) -> Tensor:
        seen: list[Tensor] = []

        def catch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append(output)
            raise _Stop

        handle = self.model.get_submodule(self.anatomy.layers[layer - 1]).register_forward_hook(catch)
        try:
            with suppress(_Stop):
                self.run(index)
        finally:
            handle.remove()
        return seen[0]


@contextmanager
def starting(model: nn.Module, anatomy: Anatomy, layer: int, state: Tensor | None) -> Iterator[None]:
    """Lets forward passes begin at `layer`, with `state` (batch, seq, hidden) as what enters it; None: from the start."""
    earlier = anatomy.layers[:layer] if state is not None else ()
    real = {name: model.get_submodule(name) for name in earlier}
    try:
        for name in earlier:
            model.set_submodule(name, _Given(state if name == earlier[-1] else None))
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
        seen[f"{site.id}/r"] = args[0]

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
    """Stands for a layer that has been computed already, or passes on what comes if `state` is None."""

    def __init__(self, state: Tensor | None) -> None:
        super().__init__()
        self.state = state

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states if self.state is None else self.state
