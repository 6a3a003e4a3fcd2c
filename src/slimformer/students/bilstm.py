"""An LSTM in both directions, whose last states are the vector of a text (Tang et al. 2019, section 3.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimformer.students.base import StudentClassifier, StudentConfig, StudentModel, register_student
from slimformer.students.recurrent import Recurrent


class BilstmConfig(StudentConfig):
    """`hidden_size` is the number of units of each direction, `num_hidden_layers` that of LSTMs on top of one another."""

    model_type = "bilstm"

    def __init__(
        self,
        embedding_size: int = 300,
        hidden_size: int = 150,
        head_size: int = 200,
        num_hidden_layers: int = 1,
        **others: Any,
    ) -> None:
        if num_hidden_layers < 1:
            raise ValueError("num_hidden_layers is too small")
        self.num_hidden_layers = num_hidden_layers
        super().__init__(embedding_size=embedding_size, hidden_size=hidden_size, head_size=head_size, **others)


class BilstmModel(StudentModel):
    config_class = BilstmConfig

    def build(self, config: BilstmConfig) -> int:
        width = 2 * config.hidden_size
        sizes = [config.embedding_size, *[width] * (config.num_hidden_layers - 1)]
        self.recurrent = nn.ModuleList(Recurrent(size, config.hidden_size) for size in sizes)
        return width

    def pool(self, words: Tensor, mask: Tensor) -> Tensor:
        states, last = words, words
        for layer in self.recurrent:
            states, last = layer(states, mask)
        return last


class BilstmForSequenceClassification(StudentClassifier):
    config_class = BilstmConfig
    body = BilstmModel


register_student(BilstmConfig, BilstmModel, BilstmForSequenceClassification)
