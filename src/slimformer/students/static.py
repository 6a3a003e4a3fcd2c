"""The mean of word vectors, and a small head: nothing but a look-up, a sum and one or two small matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimformer.students.base import StudentClassifier, StudentConfig, StudentModel, register_student


class StaticConfig(StudentConfig):
    """`hidden_size` is the size of the word vectors."""

    model_type = "static"

    def __init__(self, hidden_size: int = 256, **others: Any) -> None:
        others.pop("embedding_size", None)
        super().__init__(embedding_size=hidden_size, hidden_size=hidden_size, **others)


class StaticModel(StudentModel):
    config_class = StaticConfig

    def build(self, config: StaticConfig) -> int:
        return config.hidden_size

    def pool(self, words: Tensor, mask: Tensor) -> Tensor:
        real = mask.to(words.dtype)
        shares = real / real.sum(1, keepdim=True).clamp_min(1.0)  # (batch, seq)
        return torch.bmm(shares.unsqueeze(1), words).squeeze(1)


class StaticForSequenceClassification(StudentClassifier):
    config_class = StaticConfig
    body = StaticModel


register_student(StaticConfig, StaticModel, StaticForSequenceClassification)
