"""A cut model in shapes that a plain class of transformers has: all layers alike, so that it loads without slimformer.

Layers that are gone are left out, neurons are filled up with zeros to the widest layer's, heads to as many as the hidden states have room
for, other forms are multiplied out. The answers are the same; the model is smaller than the dense one, and larger than the cut one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.plan import Plan
from slimformer.core.pooling import SENTENCE_VECTOR, vector_head
from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of, family_of
from slimformer.saving.building import empty_model
from slimformer.saving.folders import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = {  # of sizes in the configs of encoders
    "layers": ("num_hidden_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_heads"),
    "hidden": ("hidden_size", "dim"),
    "neurons": ("intermediate_size", "hidden_dim"),
}


def uniform(small: PreTrainedModel) -> PreTrainedModel:
    """A copy of an encoder with these answers and a plain config; PlanError if no plain class computes them.

    >>> import torch
    >>> from slimformer import Plan, anatomy_of, shrink
    >>> from slimformer.testing.tiny import batch, tiny
    >>> model = tiny("bert")
    >>> plan = Plan({"encoder.0.attention": (), "encoder.0.ffn": (), "encoder.1.neurons": (0, 2), "encoder.2.neurons": (1,)})
    >>> small = shrink(model, anatomy_of(model), plan)
    >>> plain = uniform(small)
    >>> plain.config.num_hidden_layers, plain.config.intermediate_size
    (2, 2)
    >>> torch.allclose(plain(**batch(model)).logits, small(**batch(model)).logits, atol=1e-5)
    True
    """
    from slimformer.core.shrink import unshrink  # needs torch
    from slimformer.core.standing import own_heads  # needs torch

    anatomy = anatomy_of(small)
    if anatomy.junctions or anatomy.patterns:
        what = "heads that attend by a rule, layers that attend apart, exits or sieves"
        raise PlanError(f"no plain class has {what}.", help="use the files that were exported.")
    alive = sorted({site.layer for site in anatomy.units})
    packed, empty = _packed(small, anatomy, alive)
    if packed.state_dict().keys() - empty.state_dict().keys():  # the first layer is unlike the others, and cannot be left out
        packed, empty = _packed(small, anatomy, sorted({0, *alive}))
    anatomy, wide = anatomy_of(packed), anatomy_of(empty)
    keep: dict[str, tuple[int, ...]] = {}
    for site in wide.units:
        own = anatomy.sites.get(site.id)
        if own is None:
            assert site.sublayer is not None
            keep[site.sublayer] = ()
        elif own.size < site.size:
            kept = range(own.size) if own.bias is None else own_heads(packed.get_submodule(own.bias))
            keep[site.id] = tuple(kept)
    return unshrink(packed, empty, wide, Plan(keep))


def _packed(small: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """`_whole_layers`, and a model of a plain class into which they fit, without weights."""
    packed = _whole_layers(small, anatomy, layers)
    config = copy.deepcopy(packed.config)
    for part, size in _sizes(packed, anatomy_of(packed)).items():
        setattr(config, _name(config, part), size)
    if vector_head(config) is not None:
        from slimformer.families._embedder import sized_head  # needs torch

        setattr(config, SENTENCE_VECTOR, sized_head(packed).to_config())
    return packed, empty_model(_class_of(packed), config, Path(CONFIG), buffers=True)


def _whole_layers(small: PreTrainedModel, anatomy: Anatomy, alive: Sequence[int]) -> PreTrainedModel:
    """A copy with these layers alone, and with plain matrices in the place of other forms."""
    from torch import nn

    from slimformer.forms.base import Formed  # needs torch

    model = copy.deepcopy(small)
    for name, module in list(model.named_modules()):
        if isinstance(module, Formed):
            weight = cast(Any, module).matrix().detach()
            plain: Any = (
                nn.Embedding(*weight.shape) if module.table else nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            )
            plain.weight = nn.Parameter(weight)
            bias = dict(module.named_parameters()).get("bias")
            if bias is not None:
                plain.bias = nn.Parameter(bias.detach().clone())
            model.set_submodule(name, plain)
    (stack,) = anatomy.stacks
    layers = [model.get_submodule(stack.layers[place]) for place in alive]
    if len(layers) < len(stack.layers):
        model.set_submodule(stack.layers[0].rpartition(".")[0], nn.ModuleList(layers))
        setattr(model.config, _name(model.config, "layers"), len(layers))
        for name in family_of(model.config.model_type).per_layer:
            setattr(model.config, name, [getattr(model.config, name)[place] for place in alive])
    return model


def _sizes(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, int]:
    """The sizes of the smallest plain config in which the model fits; PlanError if there is none."""
    heads, width = anatomy.of_kind(Kind.HEADS), anatomy.hidden_size
    neurons = max((site.size for site in anatomy.of_kind(Kind.NEURONS)), default=1)
    config = model.config
    inner = family_of(config.model_type).skeleton.inner_width
    shared = getattr(config, inner or _name(config, "hidden"))
    dim, room = shared // getattr(config, _name(config, "heads")), shared if inner else width
    most = max((site.size for site in heads), default=1)
    if room % dim or room // dim < most:
        raise PlanError(
            f"no plain class holds hidden states of {room} units with {most} heads of {dim}: heads share the hidden states there.",
            help="use the files that were exported.",
        )
    return {"layers": len(anatomy.layers), "heads": room // dim, "hidden": width, "neurons": neurons}


def _name(config: Any, part: str) -> str:
    known = config.to_dict()
    return next(name for name in _NAMES[part] if name in known)


def _class_of(model: PreTrainedModel) -> Any:
    """The class of transformers, without our own before it."""
    from slimformer.saving.resaving import SavesItself

    return type(model).__mro__[2] if isinstance(model, SavesItself) else type(model)
