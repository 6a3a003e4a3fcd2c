"""An LSTM in both directions over word vectors (Tang et al. 2019): a student that still reads words in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from slimformer.families._student import StudentFamily


@final
class Bilstm(StudentFamily):
    model_types: ClassVar[tuple[str, ...]] = ("bilstm",)
    classes: ClassVar[str] = "slimformer.students.bilstm"

    def recurrent_weights(self, config: Mapping[str, Any]) -> int:
        units, layers = config["hidden_size"], config["num_hidden_layers"]
        read = config["embedding_size"] + 2 * units * (layers - 1)  # by all layers
        return 2 * 4 * units * (read + units * layers)  # two directions, four gates

    def tiny(self, model_type: str) -> dict[str, Any]:
        return {"embedding_size": 24, "hidden_size": 12, "head_size": 16, "num_hidden_layers": 2}
