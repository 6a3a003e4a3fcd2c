"""Models that decide input by input: the modules of exits, and how a model with exits gives its answer.

An exit is a module within its layer, so that it has a name among the parameters. In eval mode the layer notes what its exit says, and
the model's last Linear picks, for each input, the answer of the first exit that is sure enough. In PyTorch all layers are computed for
all inputs; exported files stop (`exporters/_onnx/exits.py`). While training, exits take no part: the method that trains them reads
the hidden states. Nothing here changes a shape: `shrink.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, PointRole
from slimformer.core.junction import EXIT, Exit
from slimformer.core.passing import Line, go_before
from slimformer.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# -- The decision ----------------------------------------------------------------------------------------------------------------


def choose(exits: Sequence[Exit], said: Sequence[Tensor], last: Tensor) -> tuple[Tensor, Tensor]:
    """The answer of each input, and the place of the exit that gave it; `len(exits)` is the end of the model.

    `said`: what each exit says, in the order of layers: (batch, outputs). `last`: what the whole model says, in the same shape. Each
    row depends on nothing but itself.

    >>> sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    >>> choose([Exit(2, "entropy", 0.1)] * 2, [unsure, sure], -sure)
    (tensor([[9., 0.]]), tensor([1]))
    """
    answer, place = last, torch.full((len(last),), len(exits), device=last.device)
    decided = torch.zeros(len(last), dtype=torch.bool, device=last.device)
    before, agreed = None, torch.zeros(len(last), dtype=torch.long, device=last.device)
    for number, (junction, logits) in enumerate(zip(exits, said, strict=True)):
        agreed = torch.where(agrees(junction, logits, before), agreed + 1, 0)
        leaves = is_sure(junction, logits, agreed) & ~decided
        answer = torch.where(leaves[:, None], logits, answer)
        place = torch.where(leaves, number, place)
        decided, before = decided | leaves, logits
    return answer, place


def agrees(junction: Exit, logits: Tensor, before: Tensor | None) -> Tensor:
    """Which inputs get the answer that the exit before gave; none at the first exit: (batch,)."""
    if before is None:
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if junction.outputs == 1:
        return (logits - before).abs()[:, 0] <= junction.threshold
    return logits.argmax(-1) == before.argmax(-1)


def is_sure(junction: Exit, logits: Tensor, agreed: Tensor) -> Tensor:
    """Which inputs leave at an exit: (batch,). `agreed`: how many exits in a row have agreed with the one before."""
    if junction.confidence == "patience":
        return agreed >= junction.patience
    value = doubt(junction, logits)
    return value <= junction.threshold if junction.confidence == "entropy" else value >= junction.threshold


def doubt(junction: Exit, logits: Tensor) -> Tensor:
    """What is held against the threshold: the entropy of the classes in nats, or the largest probability: (batch,)."""
    if junction.confidence == "entropy":
        log_shares = logits.float().log_softmax(-1)
        return -(log_shares.exp() * log_shares).sum(-1)
    return logits.float().softmax(-1).amax(-1)


# -- Modules ---------------------------------------------------------------------------------------------------------------------


class ExitHead(nn.Module):
    """The classifier of an exit: hidden states (batch, seq, hidden) -> (batch, outputs), from the first token."""

    def __init__(self, junction: Exit, width: int, like: Tensor | None = None) -> None:
        super().__init__()
        place: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.junction = junction
        self.dense = nn.Linear(width, width, **place) if junction.pooler else None
        self.out = nn.Linear(width, junction.outputs, **place)

    def forward(self, hidden: Tensor) -> Tensor:
        first = hidden[:, 0]  # (batch, hidden)
        return cast(Tensor, self.out(first if self.dense is None else torch.tanh(self.dense(first))))


class _Line(Line):
    """Carries what exits say from their layers to the model's end."""

    apart: str = ""  # "apart" while `answers_apart` lasts, "turned" if hidden states come as (seq, batch, hidden) then

    def __init__(self) -> None:
        self.said: dict[str, tuple[Exit, Tensor]] = {}  # layer -> its exit and what that says, in the order of the layers


class _WithExit:
    """Goes before the class of a layer: notes what the layer's exit says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        own = cast(Any, self)
        if not own.training:
            hidden = output if isinstance(output, Tensor) else output[0]
            line: _Line = own.line
            hidden = hidden.transpose(0, 1) if line.apart == "turned" else hidden
            line.said.pop(own.layer_id, None)
            line.said[own.layer_id] = own.exit.junction, own.exit(hidden)
        return output


class _Choosing:
    """Goes before the class of a model's last Linear: gives the answers that inputs leave with."""

    def forward(self, states: Tensor) -> Tensor:
        last: Tensor = super().forward(states)  # type: ignore[misc]
        line: _Line = cast(Any, self).line
        if cast(Any, self).training or line.apart:
            return last
        said = list(line.said.values())
        line.said.clear()
        return choose([junction for junction, _ in said], [logits for _, logits in said], last)[0]


def put_exits(model: PreTrainedModel, anatomy: Anatomy, exits: Mapping[str, Exit], weights: Mapping[str, Tensor]) -> None:
    """Puts exits into layers, and lets the model's last Linear pick the answers.

    `weights`: by their names in the model; those that are left out are 0. PlanError if the model does not end in one Linear with as
    many outputs, or a weight has another shape.
    """
    head = last_linear(model, anatomy)
    line = getattr(head, "line", None) or _Line()
    for layer, junction in exits.items():
        if junction.outputs != head.out_features:
            raise PlanError(
                f"the exit behind layer '{layer}' has {junction.outputs} outputs, and the model has {head.out_features}.",
                help="exits give the answers that the model gives: make them for this model and task.",
            )
        module: Any = model.get_submodule(anatomy.layer_modules[layer])
        exit = ExitHead(junction, anatomy.hidden_size, head.weight)
        for name, slot in exit.named_parameters():
            value = weights.get(f"{anatomy.layer_modules[layer]}.{EXIT}.{name}")
            if value is not None and value.shape != slot.shape:
                raise PlanError(
                    f"the exit behind layer '{layer}' has a {name} of {tuple(slot.shape)}, got {tuple(value.shape)}."
                )
            if not slot.is_meta:
                slot.zero_() if value is None else slot.copy_(value)
        module.exit, module.line, module.layer_id = exit.train(module.training), line, layer
        go_before(module, _WithExit)
    head.line = line  # type: ignore[assignment]
    go_before(head, _Choosing)


def last_linear(model: PreTrainedModel, anatomy: Anatomy) -> nn.Linear:
    """The one Linear that gives a model's outputs, one row for each input; PlanError if there is none such."""
    heads = [module for point in anatomy.points.values() if point.role is PointRole.HEAD for module in point.modules]
    if not type(model).__name__.endswith("ForSequenceClassification") or len(anatomy.stacks) != 1 or len(heads) != 1:
        raise PlanError(
            f"a {type(model).__name__} gives no one answer for a text that an exit could give before the end.",
            help="exits are for classifiers and scores of whole texts.",
        )
    return cast(nn.Linear, model.get_submodule(heads[0]))


def exit_of(module: nn.Module) -> Exit | None:
    """The exit that stands behind a layer."""
    return cast(Exit, cast(Any, module).exit.junction) if isinstance(module, _WithExit) else None


@contextmanager
def answers_apart(model: nn.Module, *, turned: bool = False) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """While it lasts the model gives what its end says; the function that is given tells what each exit said since it was last asked.

    `turned`: the layers compute in (seq, batch, hidden). Without exits nothing is changed, and nobody says anything.
    """
    line = next((cast(Any, module).line for module in model.modules() if isinstance(module, _WithExit)), None)
    if line is None:
        yield dict
        return
    before, line.apart = line.apart, "turned" if turned else "apart"

    def said() -> dict[str, Tensor]:
        found = {layer: logits for layer, (_, logits) in line.said.items()}
        line.said.clear()
        return found

    try:
        yield said
    finally:
        line.apart = before
        line.said.clear()
