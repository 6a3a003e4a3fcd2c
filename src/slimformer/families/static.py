"""A table of word vectors and their mean: the fastest student there is.

The idea is model2vec's: the vector of a word is what a teacher makes of it alone, so that nothing is left to compute but a sum.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

from slimformer.families._student import StudentFamily


@final
class Static(StudentFamily):
    model_types: ClassVar[tuple[str, ...]] = ("static",)
    classes: ClassVar[str] = "slimformer.students.static"

    def tiny(self, model_type: str) -> dict[str, Any]:
        return {"hidden_size": 24, "head_size": 16}
