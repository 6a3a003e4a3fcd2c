"""Filters over neighbouring word vectors and the largest answer of each (Kim 2014; as a student: Chia et al. 2019)."""

from __future__ import annotations

from typing import Any, ClassVar, final

from slimformer.families._student import StudentFamily


@final
class Cnn(StudentFamily):
    model_types: ClassVar[tuple[str, ...]] = ("cnn",)
    classes: ClassVar[str] = "slimformer.students.cnn"
    filters: ClassVar[tuple[str, ...]] = ("filters",)

    def tiny(self, model_type: str) -> dict[str, Any]:
        return {"embedding_size": 24, "hidden_size": 8, "head_size": 16}
