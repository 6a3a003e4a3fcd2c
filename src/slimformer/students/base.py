"""What students without layers share: a word table, one vector of a text, and a small head, as classes of transformers.

A student reads `input_ids` and `attention_mask` alone. Its answer to a text depends neither on padding nor on the other texts of a
batch; left padding is not read. A module that defines one registers it with the Auto classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput


class StudentConfig(transformers.PretrainedConfig):
    """The sizes of a student: `hidden_size` is that of its own vectors, `head_size` that of the head's inner layer, 0 for none."""

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 256,
        hidden_size: int = 256,
        head_size: int = 256,
        dropout: float = 0.1,
        pad_token_id: int | None = 0,
        **others: Any,
    ) -> None:
        sizes = {"vocab_size": vocab_size, "embedding_size": embedding_size, "hidden_size": hidden_size}
        wrong = [name for name, size in sizes.items() if size < 1] + ["head_size"] * (head_size < 0)
        if wrong:
            raise ValueError(f"{wrong[0]} is too small")
        if not 0 <= dropout < 1:
            raise ValueError("dropout must be 0 or above, and below 1")
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.head_size = head_size
        self.dropout = dropout
        super().__init__(pad_token_id=pad_token_id, **others)  # type: ignore[call-arg]


class StudentModel(transformers.PreTrainedModel):
    """A word table and what makes one vector of a text. `width` is the size of that vector."""

    base_model_prefix = "encoder"
    main_input_name = "input_ids"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.width = self.build(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @abstractmethod
    def build(self, config: Any) -> int:
        """Makes the modules behind the word table; gives the size of a text's vector."""

    @abstractmethod
    def pool(self, words: Tensor, mask: Tensor) -> Tensor:
        """The vector of each text, (batch, width), from its word vectors, (batch, seq, embedding), and the mask, (batch, seq)."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.embeddings(input_ids)  # (batch, seq, embedding)
        return BaseModelOutputWithPooling(last_hidden_state=words, pooler_output=self.pool(words, mask))


class StudentClassifier(transformers.PreTrainedModel):
    """A student with a head that gives the logits of classes, or a score: (batch, labels)."""

    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    body: ClassVar[type[StudentModel]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = self.body(config)
        self.drop = nn.Dropout(config.dropout)
        inner = config.head_size
        self.dense = nn.Linear(self.encoder.width, inner) if inner else nn.Identity()
        self.classifier = nn.Linear(inner or self.encoder.width, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        pooled = self.drop(self.encoder(input_ids, attention_mask).pooler_output)
        if self.config.head_size:
            pooled = self.drop(torch.relu(self.dense(pooled)))
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def register_student(config: type[StudentConfig], body: type[StudentModel], classifier: type[StudentClassifier]) -> None:
    """Teaches a student's classes to transformers' Auto classes."""
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(config, body, exist_ok=True)
    transformers.AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)
