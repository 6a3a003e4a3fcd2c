"""The components of a model: which part each module, and each parameter by its name, belongs to.

As in section 2 of Ganesh et al. (2021): embedding, linear layers before the attention core (queries, keys, values), the core, the linear
layer after it, the feed-forward block. Norms, heads, sieves and quantization are told apart here, and so is the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from slimformer.core.anatomy import SHARED_BIAS, Anatomy, Kind, PointRole, Role
from slimformer.core.junction import EXIT, SIEVE, junction_named

if TYPE_CHECKING:
    from slimformer.families.base import Subject


class Component(StrEnum):
    """A part of a model that costs time and bytes."""

    EMBEDDING = "embedding"
    LINEAR_BEFORE = "linear before"  # queries, keys and values
    CORE = "attention core"  # scores, softmax, their product with the values
    LINEAR_AFTER = "linear after"
    FFN = "FFN"  # its matrices and what stands between them
    NORMS = "norms"  # with the residuals that are added in front of them
    HEAD = "head"  # the pooler too; and exits, with what they take to decide and to let inputs go
    SIEVES = "sieves"  # which words stay, and gathering them
    QUANTIZE = "quantize"  # and dequantize, where they are operators of their own
    REST = "rest"  # masks, shapes, and what lies between the parts
    BOTTLENECK = "bottlenecks"  # between the hidden states and narrower ones that a layer computes in


@dataclass(frozen=True)
class Spot:
    """A component of a layer; `layer` counts over all stacks, and is None outside of them."""

    component: Component
    layer: int | None = None


REST = Spot(Component.REST)
_OF_ROLE = {
    Role.QUERY: Component.LINEAR_BEFORE,
    Role.KEY: Component.LINEAR_BEFORE,
    Role.VALUE: Component.LINEAR_BEFORE,
    Role.QUERY_KEY_VALUE: Component.LINEAR_BEFORE,
    Role.ATTENTION_OUT: Component.LINEAR_AFTER,
    Role.FFN_IN: Component.FFN,
    Role.FFN_OUT: Component.FFN,
    Role.FILTERS: Component.FFN,
    Role.BOTTLENECK: Component.BOTTLENECK,
    Role.EMBEDDING: Component.EMBEDDING,
    Role.CLASSIFIER: Component.HEAD,
}

_OF_JUNCTION = {EXIT: Component.HEAD, SIEVE: Component.SIEVES}


@dataclass(frozen=True)
class Components:
    """The place of each module that has one of its own; what lies in it belongs there too. `ends`: matrices that end a sublayer.

    `layers`: the ids of the layers.
    """

    places: Mapping[str, Spot]
    ends: frozenset[str] = frozenset()
    layers: tuple[str, ...] = ()

    def of(self, name: str) -> Spot | None:
        """The place of a module or parameter; None if no module above it has one."""
        path = self.path_of(name)
        return None if path is None else self.places[path]

    def path_of(self, name: str) -> str | None:
        """The module with a place that a name lies in; it may have an exporter's words around it.

        >>> Components({"bert.embeddings": Spot(Component.EMBEDDING)}).path_of("model.bert.embeddings.word.weight.int8")
        'bert.embeddings'
        """
        words = name.split(".")
        spans = ((start, end) for end in range(len(words), 0, -1) for start in range(min(2, end)))
        paths = (".".join(words[start:end]) for start, end in spans)
        return next((path for path in paths if path in self.places), None)

    def of_junction(self, operator: str) -> Spot | None:
        """The place of an operator that only an exit or a sieve needs, by its name; None for any other.

        >>> Components({}, layers=("encoder.0",)).of_junction("sieve/encoder.0/3")
        Spot(component=<Component.SIEVES: 'sieves'>, layer=0)
        """
        found = junction_named(operator)
        if found is None:
            return None
        use, layer = found
        return Spot(_OF_JUNCTION[use], self.layers.index(layer) if layer in self.layers else None)


def components_of(subject: Subject) -> Components:
    """The components of a model, from its anatomy."""
    model, anatomy = subject.model, subject.anatomy
    base = "" if model.base_model is model else model.base_model_prefix
    places = {name: Spot(Component.HEAD) for name, _ in model.named_children() if base and name != base}
    beside = (
        name for name, _ in model.named_modules() if name.endswith(f".{SHARED_BIAS}") and not name.startswith(anatomy.layers)
    )
    read = (name for stack in anatomy.stacks for name in stack.beside)
    places |= dict.fromkeys((*beside, *read), Spot(Component.CORE)) | _of_layers(anatomy)
    for point in anatomy.points.values():
        layer = _layer_of(anatomy, point.sublayer)
        if point.role is PointRole.NORM:
            places |= dict.fromkeys(point.modules, Spot(Component.NORMS, layer))
        elif point.sublayer is None and point.side == "input" and point.role in (PointRole.MATRIX, PointRole.HEAD):
            places |= dict.fromkeys(point.modules, Spot(Component.HEAD))
    around = {stack.embedding for stack in anatomy.stacks} | {
        matrix.module.rpartition(".")[0] for matrix in anatomy.matrices.values() if matrix.table
    }
    norms = {path for path, place in places.items() if place.component is Component.NORMS and place.layer is None}
    places |= {name: Spot(Component.EMBEDDING) for name in around if name and name != base and name not in norms}
    for matrix in anatomy.matrices.values():
        places[matrix.module] = Spot(_OF_ROLE[matrix.role], _layer_of(anatomy, matrix.sublayer))
    ends = (matrix.module for matrix in anatomy.matrices.values() if matrix.role in (Role.ATTENTION_OUT, Role.FFN_OUT))
    return Components(places, frozenset(ends), tuple(anatomy.layer_modules))


def _of_layers(anatomy: Anatomy) -> dict[str, Spot]:
    """Layers with their exits, the modules of their sublayers, and attentions.

    What a layer computes itself are residuals, or, if it has a sieve, which words stay.
    """
    sifted = {anatomy.layer_modules[layer] for layer in anatomy.sieves}
    places = {
        name: Spot(Component.SIEVES if name in sifted else Component.NORMS, layer) for layer, name in enumerate(anatomy.layers)
    }
    places |= {f"{name}.{EXIT}": Spot(Component.HEAD, layer) for layer, name in enumerate(anatomy.layers)}
    for site in anatomy.of_kind(Kind.SUBLAYER):
        feeds = any(matrix.sublayer == site.id and matrix.role is Role.FFN_IN for matrix in anatomy.matrices.values())
        for skip in site.skips:
            inner = feeds and skip.gives != "residual"
            places[skip.module] = Spot(Component.FFN if inner else Component.NORMS, site.layer)
    for name, module in anatomy.attentions.items():
        places[module] = Spot(Component.CORE, anatomy.sites[name].layer)
    return places


def _layer_of(anatomy: Anatomy, sublayer: str | None) -> int | None:
    return None if sublayer is None else anatomy.sites[sublayer].layer
