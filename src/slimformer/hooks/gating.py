"""The only code that masks units: hooks on taps, inside a context manager, gone when it ends.

A gate of 1 changes nothing, a gate of 0 does what `shrink` does for good (law 1). Gates keep their gradients, and a
gate of shape (batch, units) gives the gradient of each example in one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Tap
from slimformer.core.plan import Plan
from slimformer.errors import PlanError, nearest


@contextmanager
def gated(model: nn.Module, anatomy: Anatomy, gates: Mapping[str, Tensor | Callable[[], Tensor]]) -> Iterator[None]:
    """Multiplies each named site's units by its gate while the context lasts.

    Args:
        model: The model to gate.
        anatomy: The anatomy of `model` as it stands.
        gates: Site -> gate. A gate has shape (units,) or (batch, units), or is a function that returns one: it is then asked in
            every forward pass.

    Returns:
        A context manager; the hooks are gone when it ends.

    Raises:
        PlanError: A site does not exist, or a gate has another width.

    Example:
        >>> import torch
        >>> from slimformer import Plan, anatomy_of, gated, shrink
        >>> from slimformer.testing.tiny import batch, tiny
        >>> model = tiny("bert")
        >>> anatomy, inputs = anatomy_of(model), batch(model)
        >>> with torch.no_grad(), gated(model, anatomy, {"encoder.0.heads": torch.tensor([0.0, 1.0, 0.0, 1.0])}):
        ...     masked = model(**inputs).logits
        >>> with torch.no_grad():
        ...     cut = shrink(model, anatomy, Plan({"encoder.0.heads": (1, 3)}))(**inputs).logits
        >>> torch.allclose(masked, cut, atol=1e-5)
        True
    """
    handles: list[Any] = []
    try:
        for name, gate in gates.items():
            site = anatomy.sites.get(name)
            if site is None:
                raise PlanError(f"no site '{name}' to gate.", help=nearest(name, anatomy.sites))
            if isinstance(gate, Tensor) and gate.shape[-1] != site.size:
                raise PlanError(f"site '{name}' has {site.size} units, the gate has {gate.shape[-1]}.")
            for tap in site.taps:
                read = gate if callable(gate) else (lambda value=gate: value)
                handles += _hang(model, tap, read)
        yield
    finally:
        for handle in handles:
            handle.remove()


def gates_of(plan: Plan, anatomy: Anatomy, device: torch.device) -> dict[str, Tensor]:
    """Gates that mask what `plan` cuts: for each site that it names 1 for units that stay, and 0 for the others."""
    gates = {}
    for name, kept in plan.keep.items():
        gates[name] = torch.zeros(anatomy.sites[name].size, device=device)
        gates[name][list(kept)] = 1.0
    return gates


def _hang(model: nn.Module, tap: Tap, read: Callable[[], Tensor]) -> list[Any]:
    module = model.get_submodule(tap.module)
    if tap.residual is not None and not tap.branch:
        return _hang_residual(model, tap, read)
    if tap.side == "norm":
        masked = lambda norm, args, _output: _masked_norm(norm, args[0], read())  # noqa: E731
        return [module.register_forward_hook(masked, prepend=True)]  # a sublayer's gate mixes what this gives
    if tap.side == "input":
        return [module.register_forward_pre_hook(lambda _module, args: (_times(args[0], read(), tap.unit), *args[1:]))]
    return [module.register_forward_hook(lambda _module, _args, output: _times(output, read(), tap.unit))]


def _hang_residual(model: nn.Module, tap: Tap, read: Callable[[], Tensor]) -> list[Any]:
    assert tap.residual is not None
    seen: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[tap.place]]

    def mix(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        past = seen.pop()
        gate = read()
        return past + _spread(gate, output) * (output - past)

    return [
        model.get_submodule(tap.residual).register_forward_pre_hook(remember),
        model.get_submodule(tap.module).register_forward_hook(mix),
    ]


def _masked_norm(norm: Any, value: Tensor, gate: Tensor) -> Tensor:
    """What the norm gives if each unit of `value` (..., units) counts as much as its gate says, times the gate."""
    share = _spread(gate, value)
    share = share / share.sum(-1, keepdim=True)
    if isinstance(norm, nn.LayerNorm):
        value = value - (value * share).sum(-1, keepdim=True)
        epsilon, bias = norm.eps, norm.bias
    else:
        epsilon, bias = norm.variance_epsilon, None
    value = value * torch.rsqrt((value.square() * share).sum(-1, keepdim=True) + epsilon) * norm.weight
    return (value if bias is None else value + bias) * _spread(gate, value)


def _spread(gate: Tensor, like: Tensor) -> Tensor:
    """(units,) stays; (batch, units) becomes (batch, 1, ..., units) to broadcast over the positions of `like`."""
    if gate.ndim == 1:
        return gate
    return gate.reshape(gate.shape[0], *([1] * (like.ndim - 2)), gate.shape[-1])


def _times(value: Tensor, gate: Tensor, unit: int) -> Tensor:
    return value * _spread(gate.repeat_interleave(unit, dim=-1), value)
