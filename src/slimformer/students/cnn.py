"""Filters over a few neighbouring words, and the largest answer of each: one convolution (Kim 2014, section 2).

The convolution is one product with all filters, whose parts are shifted and added: runtimes have int8 kernels for products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.students.base import StudentClassifier, StudentConfig, StudentModel, register_student


class CnnConfig(StudentConfig):
    """`hidden_size` is the number of filters of each width; `widths` says over how many words they go."""

    model_type = "cnn"

    def __init__(
        self,
        embedding_size: int = 300,
        hidden_size: int = 100,
        head_size: int = 0,
        dropout: float = 0.5,
        widths: Sequence[int] = (3, 4, 5),
        **others: Any,
    ) -> None:
        if not widths or any(type(width) is not int or not 1 <= width <= 100 for width in widths):
            raise ValueError("widths must be whole numbers from 1 to 100")
        self.widths = list(widths)
        super().__init__(embedding_size=embedding_size, hidden_size=hidden_size, head_size=head_size, dropout=dropout, **others)


class CnnModel(StudentModel):
    config_class = CnnConfig

    def build(self, config: CnnConfig) -> int:
        self.widths, self.count = tuple(config.widths), config.hidden_size
        self.filters = nn.Linear(config.embedding_size, self.count * sum(self.widths))
        return self.count * len(self.widths)

    def pool(self, words: Tensor, mask: Tensor) -> Tensor:
        real = mask.to(words.dtype).unsqueeze(-1)  # (batch, seq, 1)
        beyond = max(self.widths) - 1  # so many words behind the last one, all zero
        parts = nn.functional.pad(self.filters(words) * real, (0, 0, 0, beyond))
        found, place = [], 0
        for width in self.widths:
            total = torch.zeros((), dtype=parts.dtype, device=parts.device)
            for step in range(width):  # what the filter's word number `step` adds at the place where the filter begins
                total = total + parts[:, step : step - beyond or None, place : place + self.count]  # (batch, seq, count)
                place += self.count
            found.append(
                torch.relu(total).amax(1)
            )  # a filter that begins behind the last word answers 0, which no answer is below
        return torch.cat(found, -1)


class CnnForSequenceClassification(StudentClassifier):
    config_class = CnnConfig
    body = CnnModel


register_student(CnnConfig, CnnModel, CnnForSequenceClassification)
