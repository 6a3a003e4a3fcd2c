"""DistilBERT: BERT's post-norm skeleton with other names (q_lin, k_lin, v_lin, out_lin, lin1, lin2) and no segments.

The residual is added in the block itself, so a sublayer is taken out by an addend of zero and a norm that does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast, final

from torch import nn

from slimformer.core.anatomy import Anatomy, Counter, Point, Role, Site, told_apart
from slimformer.families.base import (
    ATTENTION,
    SKIPPED,
    Family,
    SkippedBranch,
    SkippedZero,
    attention_points,
    attention_site,
    ffn_points,
    ffn_site,
    matrix_of,
    outer_points,
    sublayer_site,
)
from slimformer.forms.base import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
class DistilBert(Family):
    model_types: ClassVar[tuple[str, ...]] = ("distilbert",)

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        base = cast(Any, model.base_model)
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        head_dim = model.config.dim // model.config.n_heads
        sites: list[Site] = []
        matrices = [matrix_of(model, "embeddings.word", f"{prefix}embeddings.word_embeddings", Role.EMBEDDING)]
        attentions: list[str | None] = []
        points: list[Point] = outer_points(
            model, f"{prefix}embeddings.LayerNorm", ("pre_classifier",), ("classifier", "qa_outputs")
        )

        for index, layer in enumerate(base.transformer.layer):
            path = f"{prefix}transformer.layer.{index}"
            if isinstance(layer.attention, SKIPPED):
                attentions.append(None)
            else:
                own, where = f"{path}.attention", f"encoder.{index}.attention"
                inputs = (f"{own}.q_lin", f"{own}.k_lin", f"{own}.v_lin")
                counters = (Counter(own, "n_heads"), Counter(own, "dim", head_dim))
                heads = shape_of(layer.attention.q_lin)[0] // head_dim
                points += attention_points(index, own, inputs, f"{own}.out_lin", f"{path}.sa_layer_norm")
                attentions.append(own)
                sites.append(
                    sublayer_site(
                        index,
                        "attention",
                        start=own,
                        end=f"{path}.sa_layer_norm",
                        modules=(own, f"{path}.sa_layer_norm"),
                    )
                )
                sites.append(attention_site(index, inputs, f"{own}.out_lin", heads=heads, head_dim=head_dim, counters=counters))
                for role, module in zip(ATTENTION, (*inputs, f"{own}.out_lin"), strict=True):
                    matrices.append(matrix_of(model, f"encoder.{index}.{role}", module, role, where))
            if not isinstance(layer.ffn, SKIPPED):
                own, where = f"{path}.ffn", f"encoder.{index}.ffn"
                points += ffn_points(index, f"{own}.lin1", f"{own}.lin2", f"{path}.output_layer_norm")
                sites.append(
                    sublayer_site(
                        index, "ffn", start=own, end=f"{path}.output_layer_norm", modules=(own, f"{path}.output_layer_norm")
                    )
                )
                sites.append(ffn_site(index, f"{own}.lin1", f"{own}.lin2", width=shape_of(layer.ffn.lin1)[0]))
                for role, module in ((Role.FFN_IN, f"{own}.lin1"), (Role.FFN_OUT, f"{own}.lin2")):
                    matrices.append(matrix_of(model, f"encoder.{index}.{role}", module, role, where))
        return Anatomy(
            sites={site.id: site for site in sites},
            matrices={item.id: item for item in matrices},
            layers=tuple(f"{prefix}transformer.layer.{index}" for index in range(len(base.transformer.layer))),
            embedding=f"{prefix}embeddings",
            attentions=tuple(attentions),
            hidden_size=model.config.dim,
            head_dim=head_dim,
            points=told_apart(points, matrices),
        )

    def skip(self, model: PreTrainedModel, site: Site) -> None:
        layer = cast(Any, model.base_model).transformer.layer[site.layer]
        if site.id.endswith(".attention"):
            layer.attention, layer.sa_layer_norm = SkippedBranch(), nn.Identity()
        else:
            layer.ffn, layer.output_layer_norm = SkippedZero(), nn.Identity()
