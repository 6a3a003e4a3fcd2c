"""Models whose lower layers attend within each of two segments: who belongs to which, where it stands, and whom it may attend to.

The embeddings tell the segments of an input, and give each its own positions. The layers below the junction then narrow the mask that
transformers hands them. Both do so by a class that goes before their own, so that no hook stays on the model. Nothing here changes a
shape, and no parameter is added.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy
from slimformer.core.apart import Apart
from slimformer.core.passing import Line, go_before, step_back
from slimformer.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Encoders with a module `embeddings` that takes ids, positions and, where a model has them, the segments.
TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
SEGMENTS, MET = (
    "apart.segments",
    "apart.met",
)  # what an exporter sees: (batch, seq), and (batch, seq, hidden) or (seq, batch, hidden)


def segments_of(junction: Apart, ids: Tensor, token_types: Tensor | None, padding: int | None) -> Tensor:
    """The segment of each token, 0 or 1: (batch, seq). Behind the end of a text padding counts as the first one.

    >>> ids = torch.tensor([[0, 7, 2, 2, 8, 9, 2, 1]])
    >>> segments_of(Apart(separator=2), ids, None, padding=1)
    tensor([[0, 0, 0, 1, 1, 1, 1, 0]])
    """
    if junction.separator is None:
        return torch.zeros_like(ids) if token_types is None else (token_types > 0).to(ids.dtype)
    ends = (ids == junction.separator).to(ids.dtype)
    second = ends.cumsum(1) - ends > 0
    return (second if padding is None else second & (ids != padding)).to(ids.dtype)


def segment_positions(junction: Apart, segments: Tensor, last: int) -> Tensor:
    """The position of each token, none of which is above `last`: (batch, seq).

    >>> segment_positions(Apart(start=16), torch.tensor([[0, 0, 0, 1, 1, 0]]), 511)
    tensor([[ 0,  1,  2, 16, 17,  5]])
    """
    usual = torch.arange(segments.shape[1], device=segments.device)[None]
    counted = torch.where(segments > 0, segments.cumsum(1) - 1 + junction.start, usual)
    return (counted + junction.first_position).clamp(max=last)


def narrowed_mask(mask: Tensor | None, segments: Tensor, dtype: torch.dtype, *, bools: bool) -> Tensor:
    """The mask of an attention, narrowed to pairs of tokens of one segment.

    `mask`: as transformers hands it to a layer: none; true where a token may attend; to be added to the scores; or (batch, seq), 1 for
    tokens that are no padding, which then becomes (batch, seq, seq). `bools`: whether a mask of booleans will do where there is none.
    """
    same = segments[:, :, None] == segments[:, None, :]  # (batch, seq, seq)
    if mask is not None and mask.ndim == 2:
        return mask[:, None, :] * same.to(mask.dtype)
    same = same[:, None]  # (batch, 1, seq, seq)
    if mask is None and bools:
        return same
    if mask is not None and mask.dtype == torch.bool:
        return mask & same
    never = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=segments.device)
    return torch.where(same, torch.zeros_like(never) if mask is None else mask, never)


# -- Modules ---------------------------------------------------------------------------------------------------------------------


class _Line(Line):
    """Carries the segments of an input from the embeddings to the layers."""

    segments: Tensor  # of the tokens that the embeddings saw last: (batch, seq)
    known: tuple[Tensor | None, Tensor] | None = None  # a mask as transformers made it, and narrowed
    seen: dict[str, Tensor] | None = None  # where an exporter that traces the model finds SEGMENTS and MET

    def begin(self, segments: Tensor) -> None:
        """Notes the segments of another input."""
        self.segments, self.known = segments, None
        if self.seen is not None:
            self.seen[SEGMENTS] = segments

    def narrowed(self, mask: Tensor | None, dtype: torch.dtype, *, bools: bool) -> Tensor:
        """`narrowed_mask`, once for all layers that get the same mask."""
        if self.known is None or self.known[0] is not mask:
            self.known = (mask, narrowed_mask(mask, self.segments, dtype, bools=bools))
        return self.known[1]

    def end(self, hidden: Tensor) -> None:
        """Notes the hidden states in which the segments meet, and forgets the mask, which is large."""
        self.known = None
        if self.seen is not None:
            self.seen[MET] = hidden


class _Dividing:
    """Goes before the class of the embeddings: tells segments, and gives each its own positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = cast(Any, self)
        given = dict(zip(own.names, args, strict=False)) | kwargs
        ids, junction = given.get("input_ids"), own.junction
        if ids is None:
            raise PlanError(
                "a model whose lower layers attend to each segment apart reads token ids, and was given embeddings.",
                help="give input_ids.",
            )
        segments = segments_of(junction, ids, given.get("token_type_ids"), own.settings.pad_token_id)
        own.line.begin(segments)
        if given.get("position_ids") is None:
            given["position_ids"] = segment_positions(junction, segments, own.settings.max_position_embeddings - 1)
        return super().forward(**given)  # type: ignore[misc]


class _Within:
    """Goes before the class of a layer below the junction: its tokens attend to their own segment."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        own = cast(Any, self)
        bools = own.settings._attn_implementation == "sdpa"
        mask = own.line.narrowed(attention_mask, hidden.dtype, bools=bools)
        output = super().forward(hidden, mask, *args, **kwargs)  # type: ignore[misc]
        if own.junction is not None:
            own.line.end(output if isinstance(output, Tensor) else output[0])
        return output


def divide(model: PreTrainedModel, anatomy: Anatomy, layer: str, junction: Apart) -> None:
    """Lets the segments attend apart up to `layer`, and within it; PlanError for a model that cannot."""
    if model.config.model_type not in TYPES:
        raise PlanError(
            f"the segments of a {model.config.model_type} cannot attend apart.",
            help=f"take a model of one of these types: {', '.join(TYPES)}.",
        )
    line, embeddings = _Line(), cast(Any, model.base_model).embeddings
    names = tuple(inspect.signature(type(embeddings).forward).parameters)[1:]
    if junction.separator is None and ("token_type_ids" not in names or model.config.type_vocab_size < 2):
        raise PlanError(
            f"this {model.config.model_type} reads no segments, and the plan names no separator that tells them.",
            help="the plan was made for another model.",
        )
    embeddings.names, embeddings.junction, embeddings.line, embeddings.settings = names, junction, line, model.config
    go_before(embeddings, _Dividing)
    for name, path in anatomy.layer_modules.items():
        module: Any = model.get_submodule(path)
        module.junction, module.line, module.settings = junction if name == layer else None, line, model.config
        go_before(module, _Within)
        if name == layer:
            break


def unite(model: nn.Module) -> None:
    """Takes away what `divide` did."""
    for module in model.modules():
        for first in (_Dividing, _Within):
            step_back(module, first, "names", "junction", "line", "settings")


def apart_of(module: nn.Module) -> Apart | None:
    """The junction behind a layer, at which segments that attended apart meet."""
    return cast("Apart | None", cast(Any, module).junction) if isinstance(module, _Within) else None


@contextmanager
def meeting_seen(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While it lasts a pass of a divided model leaves here its SEGMENTS and what they MET in; nothing, if the model is not divided."""
    line = next((cast(Any, module).line for module in model.modules() if isinstance(module, _Dividing)), None)
    seen: dict[str, Tensor] = {}
    if line is None:
        yield seen
        return
    line.seen = seen
    try:
        yield seen
    finally:
        line.seen = None
