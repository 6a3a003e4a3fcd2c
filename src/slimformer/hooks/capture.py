"""Looks into a forward pass: outputs, hidden states, attention scores, queries, keys and values, if a method asks for them.

Hidden states come from forward hooks on the modules that an anatomy names, scores from `attention.py`; both are gone
when the context ends. `output_hidden_states=True` is never used: transformers then leaves its own hooks on the model
for good, and a module that was replaced shifts the list. If no scores are asked for, attention is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Role, Tokens
from slimformer.core.asking import positions_unheard
from slimformer.core.sieving import latest_words
from slimformer.hooks.attention import Slot, attending

RELATED = (Role.QUERY, Role.KEY, Role.VALUE)


class Capture(StrEnum):
    """What a method asks to see of student and teacher in each step."""

    LOGITS = "logits"  # the task's outputs
    HIDDEN = "hidden"  # after the embedding and after each layer
    SCORES = "scores"  # attention logits before the softmax, per attention
    RELATIONS = "relations"  # queries, keys and values of the encoder's last attention


@dataclass(frozen=True)
class Captured:
    """What was seen of one model in one forward pass."""

    output: Mapping[str, Tensor]  # task.outputs -> tensor
    hidden: tuple[Tensor, ...] = ()  # of each stack, layers + 1 of (batch, seq, hidden)
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # heads site -> (batch, heads, seq, seq), scaled, unmasked
    relations: tuple[Tensor, ...] = ()  # queries, keys and values: three of (batch, seq, heads * size of a head)
    words: Mapping[int, Tensor] = field(default_factory=dict)  # a hidden state -> (batch, seq): its words that have not left


class Recorder:
    """What was seen in the latest forward pass of one model. `listening = False` lets passes go by unseen."""

    def __init__(self, states: int, needs: Collection[Capture], words: Callable[[], Mapping[int, Tensor]] = dict) -> None:
        self._words = words
        self.needs = frozenset(needs)
        self.listening = True
        self._hidden: list[Tensor | None] = [None] * states
        self._scores: dict[str, Tensor] = {}
        self._relations: dict[Role, Tensor] = {}

    def take(self, output: Mapping[str, Tensor]) -> Captured:
        """Everything seen since the last call, in float32, together with the task's outputs; the recorder is then empty."""
        hidden = tuple(_float(state) for state in self._hidden if state is not None)
        scores = {name: _float(score) for name, score in self._scores.items()}
        wanted = len(self._hidden) if Capture.HIDDEN in self.needs else 0
        if len(hidden) != wanted:
            raise RuntimeError(f"{len(hidden)} of {wanted} hidden states were seen: no forward pass came before take()")
        relations = tuple(_float(self._relations[role]) for role in RELATED if role in self._relations)
        self._hidden = [None] * len(self._hidden)
        self._scores, self._relations = {}, {}
        outputs = {name: _float(value) for name, value in output.items()}
        words = self._words() if wanted else {}
        return Captured(output=outputs, hidden=hidden, scores=scores, relations=relations, words=words)

    def see_hidden(self, index: int, state: Tensor) -> None:
        if self.listening:
            self._hidden[index] = state

    def see_scores(self, heads: str, scores: Tensor) -> None:
        if self.listening:
            self._scores[heads] = scores

    def see_relation(self, role: Role, values: Tensor) -> None:
        if self.listening:
            self._relations[role] = values


@contextmanager
def capturing(model: nn.Module, anatomy: Anatomy, needs: Collection[Capture]) -> Iterator[Recorder]:
    """Watches `model` while the context lasts: call it, then `recorder.take(output)`. Leaves no trace on it."""
    words = partial(_words_left, model, anatomy) if anatomy.sieves else dict
    recorder = Recorder(state_count(anatomy), needs, words)
    with ExitStack() as context:
        if Capture.HIDDEN in recorder.needs:
            for hook in _hidden_hooks(model, anatomy, recorder):
                context.callback(hook.remove)
        if Capture.RELATIONS in recorder.needs:
            context.enter_context(positions_unheard(model))
            for name, roles in related(anatomy).items():
                context.callback(model.get_submodule(name).register_forward_hook(partial(_see_output, recorder, roles)).remove)
        if Capture.SCORES in recorder.needs:
            attentions = anatomy.attentions.items()
            slots = {module: Slot(see_scores=partial(recorder.see_scores, heads)) for heads, module in attentions}
            context.enter_context(attending(model, slots))
        yield recorder


def _words_left(model: nn.Module, anatomy: Anatomy) -> dict[int, Tensor]:
    """For each hidden state that some words did not reach, those that did; only encoders have sieves, whose states begin at 0."""
    return {1 + place: words for place, words in latest_words(model, anatomy).items()}


def related(anatomy: Anatomy) -> dict[str, tuple[Role, ...]]:
    """The modules that give the queries, keys and values of the encoder's last attention, each with those that it gives, side by side.

    None if all attentions are gone.
    """
    encoder = [site for site in anatomy.of_kind(Kind.HEADS) if anatomy.stack_of(site.layer).tokens is Tokens.SOURCE]
    if not encoder:
        return {}
    inside = [matrix for matrix in anatomy.matrices.values() if matrix.sublayer == encoder[-1].sublayer]
    gives = {**{role: (role,) for role in RELATED}, Role.QUERY_KEY_VALUE: RELATED}
    return {matrix.module: gives[matrix.role] for matrix in inside if matrix.role in gives}


def related_width(anatomy: Anatomy) -> int:
    """The width of the queries of that attention: that of all its heads; 0 if there is none."""
    return next(iter(related_widths(anatomy)), 0)


def related_widths(anatomy: Anatomy) -> tuple[int, ...]:
    """The widths of its queries, keys and values: one for all, unless some of its heads have no queries; none if there is none."""
    gives = related(anatomy)
    inside = (matrix for matrix in anatomy.matrices.values() if matrix.module in gives)
    return tuple(dict.fromkeys(matrix.shape[0] // len(gives[matrix.module]) for matrix in inside))


def state_count(anatomy: Anatomy) -> int:
    """How many hidden states a pass gives: in each stack one before its first layer, and one after each."""
    return sum(1 + len(stack.layers) for stack in anatomy.stacks)


def _hidden_hooks(model: nn.Module, anatomy: Anatomy, recorder: Recorder) -> Iterator[Any]:
    index = 0
    for stack in anatomy.stacks:
        if stack.embedding is None:
            first = model.get_submodule(stack.layers[0])
            yield first.register_forward_pre_hook(partial(_see_input, recorder, index))
        for offset, name in enumerate((stack.embedding, *stack.layers)):
            if name is not None:
                yield model.get_submodule(name).register_forward_hook(_hidden_hook(recorder, index + offset))
        index += 1 + len(stack.layers)


def _see_input(recorder: Recorder, index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    recorder.see_hidden(index, args[0])


def _see_output(recorder: Recorder, roles: Sequence[Role], _: nn.Module, __: Any, output: Tensor) -> None:
    for role, values in zip(roles, output.chunk(len(roles), -1), strict=True):
        recorder.see_relation(role, values)


def _hidden_hook(recorder: Recorder, index: int) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        recorder.see_hidden(index, output if isinstance(output, Tensor) else output[0])

    return hook


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
