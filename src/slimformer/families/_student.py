"""What the families of students without layers share: a word table that can be trimmed, Linears, and classes of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer.core.anatomy import VOCABULARY_SITE, Anatomy, Kind, Matrix, Point, PointRole, Role, Site, Slice, Stack
from slimformer.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StudentFamily(Family):
    """An encoder without layers: a table of word vectors, and what makes one vector of a text.

    `filters`: the names of its Linears, within the encoder.
    """

    filters: ClassVar[tuple[str, ...]] = ()

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        from slimformer.forms.base import form_of, shape_of  # needs torch

        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        table = f"{prefix}embeddings"
        modules = {"embeddings.word": table} | {name: f"{prefix}{name}" for name in self.filters}
        matrices = {
            name: Matrix(
                name,
                path,
                shape_of(model.get_submodule(path)),
                Role.EMBEDDING if path == table else Role.FILTERS,
                form=form_of(model.get_submodule(path)),
            )
            for name, path in modules.items()
        }
        words = matrices["embeddings.word"]
        pieces = Site(VOCABULARY_SITE, Kind.PIECES, words.shape[0], layer=-1, slices=(Slice(f"{table}.weight", 0),))
        return Anatomy(
            sites={},
            matrices=matrices,
            stacks=(Stack("encoder", (), table),),
            attentions={},
            hidden_size=int(model.config.hidden_size),
            points={point.id: point for point in self._points(model, matrices)},
            vocabulary=pieces if words.dense else None,
            recurrent=self.recurrent_weights(model.config.to_dict()),
        )

    def _points(self, model: PreTrainedModel, matrices: Mapping[str, Matrix]) -> Iterator[Point]:
        """What each Linear reads."""
        for name in self.filters:
            matrix = matrices[name]
            if matrix.dense:
                yield Point(f"{name}.input", (matrix.module,), "input", PointRole.MATRIX)
            yield from matrix.points.values()
        if model.base_model is not model:
            if model.config.head_size:
                yield Point("dense.input", ("dense",), "input", PointRole.MATRIX)
            yield Point("classifier.input", ("classifier",), "input", PointRole.HEAD)

    def recurrent_weights(self, config: Mapping[str, Any]) -> int:
        """How many weights each token meets that are in no matrix here."""
        return 0

    @property
    def decodes(self) -> bool:
        return False

    def width(self, config: Mapping[str, Any]) -> int | None:
        size = config.get("hidden_size")
        return size if type(size) is int and size > 0 else None

    def positions(self, config: Mapping[str, Any]) -> int | None:
        return None  # it has none: a text may have any length
