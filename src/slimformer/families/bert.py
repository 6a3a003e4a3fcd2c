"""BERT and the models that share its skeleton under another prefix: RoBERTa, XLM-R, CamemBERT, ELECTRA.

Post-norm: each sublayer ends in LayerNorm(branch + residual). Taking a sublayer out takes its norm too, so that nothing but the
residual is left and an empty layer costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast, final

from slimformer.core.anatomy import Anatomy, Counter, Matrix, Point, Role, Site, told_apart
from slimformer.families.base import (
    ATTENTION,
    SKIPPED,
    Family,
    SkippedAttention,
    SkippedInput,
    SkippedOutput,
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
class Bert(Family):
    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta", "xlm-roberta", "camembert", "electra")

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        base = cast(Any, model.base_model)
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        sites: list[Site] = []
        matrices: list[Matrix] = []
        attentions: list[str | None] = []
        points: list[Point] = outer_points(
            model,
            f"{prefix}embeddings.LayerNorm",
            (f"{prefix}embeddings_project", f"{prefix}pooler.dense", "classifier.dense"),
            ("classifier", "classifier.out_proj", "qa_outputs"),
        )

        embedding = "embeddings_project" if "embeddings_project" in dict(base.named_children()) else "embeddings"
        matrices.append(matrix_of(model, "embeddings.word", f"{prefix}embeddings.word_embeddings", Role.EMBEDDING))
        for index, layer in enumerate(base.encoder.layer):
            path = f"{prefix}encoder.layer.{index}"
            if isinstance(layer.attention, SKIPPED):
                attentions.append(None)
            else:
                own = f"{path}.attention.self"
                inputs = (f"{own}.query", f"{own}.key", f"{own}.value")
                output = f"{path}.attention.output.dense"
                counters = (
                    Counter(own, "num_attention_heads"),
                    Counter(own, "all_head_size", head_dim),
                )
                heads = shape_of(layer.attention.self.query)[0] // head_dim
                points += attention_points(index, own, inputs, output, f"{path}.attention.output.LayerNorm")
                attentions.append(own)
                where = f"encoder.{index}.attention"
                sites.append(
                    sublayer_site(
                        index,
                        "attention",
                        start=f"{path}.attention",
                        end=f"{path}.attention.output",
                        modules=(f"{path}.attention",),
                    )
                )
                sites.append(attention_site(index, inputs, output, heads=heads, head_dim=head_dim, counters=counters))
                for role, name in zip(ATTENTION, (*inputs, output), strict=True):
                    matrices.append(matrix_of(model, f"encoder.{index}.{role}", name, role, where))
            if not isinstance(layer.intermediate, SKIPPED):
                into, out = f"{path}.intermediate.dense", f"{path}.output.dense"
                points += ffn_points(index, into, out, f"{path}.output.LayerNorm")
                where = f"encoder.{index}.ffn"
                sites.append(
                    sublayer_site(
                        index,
                        "ffn",
                        start=f"{path}.intermediate",
                        end=f"{path}.output",
                        modules=(f"{path}.intermediate", f"{path}.output"),
                    )
                )
                sites.append(ffn_site(index, into, out, width=shape_of(layer.intermediate.dense)[0]))
                for role, name in ((Role.FFN_IN, into), (Role.FFN_OUT, out)):
                    matrices.append(matrix_of(model, f"encoder.{index}.{role}", name, role, where))
        return Anatomy(
            sites={site.id: site for site in sites},
            matrices={item.id: item for item in matrices},
            layers=tuple(f"{prefix}encoder.layer.{index}" for index in range(len(base.encoder.layer))),
            embedding=f"{prefix}{embedding}",
            attentions=tuple(attentions),
            hidden_size=model.config.hidden_size,
            head_dim=head_dim,
            points=told_apart(points, matrices),
        )

    def skip(self, model: PreTrainedModel, site: Site) -> None:
        layer = cast(Any, model.base_model).encoder.layer[site.layer]
        if site.id.endswith(".attention"):
            layer.attention = SkippedAttention()
        else:
            layer.intermediate, layer.output = SkippedInput(), SkippedOutput()

    def inputs(self, model: PreTrainedModel) -> tuple[str, ...]:
        names = ("input_ids", "attention_mask")
        return (*names, "token_type_ids") if model.config.type_vocab_size > 1 else names
