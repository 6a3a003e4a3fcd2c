"""Decomposed attention: lower layers attend within the question and within the passage, so that a passage is half computed beforehand.

Paper: Cao, Trivedi, Balasubramanian, Balasubramanian: DeFormer (ACL 2020), sections 2 and 3.

Idea: In a pair of texts the second one, a passage, is met again and again with other questions. In the `layers` lower layers each token
attends to its own text alone; the layers above see both. What the lower layers make of a passage then depends on no question, is
computed once, and kept. Two losses beside the task's bring the model back to the undivided one (section 2.2): the divergence of the
outputs, which `distillation` has, and the distance of the hidden states of the upper layers (`similarity`).

Differs: The paper does not say which positions a passage has. Here it always begins at the same one, `start`, so that a kept passage
suits questions of any length; without it, where passages begin on average in training examples. The layer-wise distance is divided
by the teacher's mean square, as everywhere here, and is a mean over layers; the paper's weights of the losses were searched. Training
starts from the tuned model, not from the pre-trained one.

Choose when: many questions meet the same passages (search, reading comprehension) or each new text is compared with known ones, and
something can hold the hidden states: `hidden size` floats for each token of a passage. The whole file, which computes both texts, is
as fast as before. Deeper division is faster and loses more.

Cost: a training run; with `similarity`, a pass of the teacher for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy, Tokens
from slimformer.core.apart import Apart
from slimformer.core.cost import Cost
from slimformer.core.dividing import divide, segments_of, unite
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.capture import Capture
from slimformer.hooks.feeding import unpadded
from slimformer.methods.base import Context, Effects, Method, State, Step
from slimformer.methods.distillation import Pair, hidden_distance
from slimformer.rules import Count, CountOrZero, NotNegative
from slimformer.tasks.base import Task

SEPARATOR_ROWS = 64  # training examples by which the separator is found


@final
@dataclass(frozen=True)
class DecomposedAttention(Method):
    """`layers`: in so many layers, the first ones, the two texts attend apart; without it in three quarters of them, as in the paper.

    `similarity`: weight of the distance between the hidden states of the other layers and the teacher's; 0 leaves it out, which is
    the paper's ablation. The teacher must have as many layers. `distillation` beside it adds the outputs, with `hidden: 0`.

    `start`: the position at which the second text begins, whatever the first one is; without it the mean over some training examples,
    which is closest to what the model knows.

    It stays in the model: later stages may train or cut it further, and its files compute so.

    Example:
        >>> from slimformer import Train
        >>> from slimformer.methods.distillation import Distillation
        >>> Train(methods=(DecomposedAttention(layers=4), Distillation(hidden=0.0)), epochs=2).cuts
        False
    """

    layers: Count | None = None
    similarity: NotNegative = 1.0
    start: CountOrZero | None = None

    def effects(self) -> Effects:
        teaches = self.similarity > 0
        needs = frozenset({Capture.HIDDEN} if teaches else ())
        return Effects(divides=True, neutral=False, encoders_only=True, needs=needs, needs_teacher=teaches)

    def problem(self, task: Task) -> str | None:
        if task.pretraining or task.stand_in or task.row_texts() != 2:
            return "it keeps two texts apart, and an input of this task is one text"
        return None

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if len(anatomy.stacks) > 1 or not anatomy.attentions or anatomy.attends_otherwise:
            why = anatomy.attends_otherwise or "it has no attention"
            why = "it writes texts" if len(anatomy.stacks) > 1 else why
            raise TargetError(
                f"decomposed_attention cannot divide this model: {why}.", help="start from an encoder, such as a BERT."
            )
        if anatomy.junctions:
            why = "its segments attend apart already" if anatomy.meeting else "it has exits or sieves"
            raise TargetError(
                f"decomposed_attention cannot divide this model: {why}.", help="start from the model before that."
            )
        total = len(anatomy.layers)
        if total < 2 or self._depth(anatomy) >= total:
            raise TargetError(
                f"in {self._depth(anatomy)} of {total} layers the texts would attend apart, and none would see both.",
                help=f"choose layers from 1 to {total - 1}." if total > 1 else "start from a model of two layers or more.",
            )

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        if self.similarity:
            assert context.teacher is not None, "training gives a teacher to a method that needs one"
            self._check_teacher(context.anatomy, context.teacher.anatomy)
        state = _State(junction_for(context, self.start), list(context.anatomy.layer_modules)[self._depth(context.anatomy) - 1])
        divide(context.model, context.anatomy, state.layer, state.junction)
        state.on_close(lambda: unite(context.model))
        return state

    def penalty(self, state: State, step: Step) -> Tensor | None:
        if not self.similarity:
            return None
        assert step.teacher is not None
        above = range(cast(_State, state).depth + 1, len(step.student.hidden))
        masks = {Tokens.SOURCE: unpadded(step.batch, Tokens.SOURCE)}
        pairs = [Pair(place, place) for place in above]
        distance = hidden_distance(step.student, step.teacher, masks, pairs, units=None, project=None, relative=True)
        return self.similarity * distance

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        depth, total = state.depth, len(context.anatomy.layers)
        note = f"decomposed_attention: the two texts of an input attend apart in the first {depth} of {total} layers."
        return Decision(Plan(junctions={state.layer: state.junction}), notes=(note,))

    def _depth(self, anatomy: Anatomy) -> int:
        """How many layers are divided."""
        return self.layers or max(1, len(anatomy.layers) * 3 // 4)

    def _check_teacher(self, mine: Anatomy, theirs: Anatomy) -> None:
        own, other = ((len(item.layers), item.hidden_size) for item in (mine, theirs))
        if own != other:
            raise TargetError(
                f"similarity compares layer with layer, and the model has {own[0]} of width {own[1]}, the teacher {other[0]} of width "
                f"{other[1]}.",
                help="set similarity: 0, and let distillation pair the layers: it can.",
            )


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """Where the two texts meet."""

    def __init__(self, junction: Apart, layer: str) -> None:
        super().__init__()
        self.junction, self.layer = junction, layer
        self.depth = int(layer.rpartition(".")[2]) + 1


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def junction_for(context: Context, start: int | None) -> Apart:
    """How the texts of this model's inputs are told apart, and where positions begin.

    They are told apart by the segments if the model reads them, else by the token that all inputs end with. TargetError if they end in
    several, or if the model has no position `start`.
    """
    subject, config = context.subject, context.model.config
    usable = subject.family.positions(config.to_dict())
    first = 0 if usable is None else int(config.max_position_embeddings) - usable
    batches = [subject.feed(batch) for batch in context.batches(SEPARATOR_ROWS)]
    separator = None
    if "token_type_ids" not in subject.inputs:
        ends = sorted({token for batch in batches for token in last_tokens(batch["input_ids"], batch["attention_mask"])})
        if len(ends) != 1:
            raise TargetError(
                f"texts of this model end with {len(ends)} different tokens, so that none tells where a second text begins.",
                help="take a tokenizer that puts the same token behind each text, such as </s> or [SEP].",
            )
        separator = ends[0]
    if start is None:
        start = usual_start(Apart(0, separator, first), batches, config.pad_token_id)
    if usable is not None and start >= usable:
        raise TargetError(
            f"no second text can begin at position {start}: the model has {usable} positions.",
            help="choose a smaller start, or none: it is then the usual one.",
        )
    return Apart(start, separator, first)


def usual_start(junction: Apart, batches: Sequence[Mapping[str, Tensor]], padding: int | None) -> int:
    """How many tokens stand in front of a second text on average; 0 if there is none such."""
    found: list[int] = []
    for batch in batches:
        segments = segments_of(junction, batch["input_ids"], batch.get("token_type_ids"), padding)
        found += [int(row.argmax()) for row in segments if bool(row.any())]
    return round(sum(found) / len(found)) if found else 0


def last_tokens(ids: Tensor, mask: Tensor) -> Iterator[int]:
    """The last token of each row that is no padding.

    >>> list(last_tokens(torch.tensor([[5, 2, 1], [5, 6, 2]]), torch.tensor([[1, 1, 0], [1, 1, 1]])))
    [2, 2]
    """
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1) - 1
    return (int(row[end]) for row, end in zip(ids, ends, strict=True))
