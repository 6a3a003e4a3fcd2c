"""Codebook: the word table becomes codes of pieces that few rows share (product quantization).

Paper: Jégou, Douze, Schmid: Product Quantization for Nearest Neighbor Search (PAMI 2011); Prakash, Shashidhar, Zhao, Rongali, Khan,
Kayser: Compressing Transformer-Based Semantic Parsing Models using Compositional Code Embeddings (Findings of EMNLP 2020).

Idea: Each row of the table is cut into pieces of `columns` numbers. k-means finds `entries` pieces that stand for all others in the same
place, and a row keeps the number of the nearest for each, which is a byte.

Differs: Prakash et al. learn codes with an autoencoder and add up whole rows; here they are the nearest pieces, as in product
quantization. Words count as often as the training examples have them, and once more, so that entries go where texts are. Later stages
train the entries, and codes stay as they are.

Choose when: the word table is most of what is left, and a file matters more than int8's quarter: 8 columns a code are 32 times fewer
bytes than float32, the codebook apart. Nothing is faster, and nothing slower.

Cost: k-means for each piece of a row; the examples are counted, not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, final

import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy, Matrix
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import PlanError
from slimformer.forms.codebook import MOST_ENTRIES, Codebook
from slimformer.hooks.feeding import unpadded
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import Count, whole_number

_Entries = Annotated[
    int, whole_number(f"from 2 to {MOST_ENTRIES}", lambda value: 2 <= value <= MOST_ENTRIES, 1, MOST_ENTRIES + 1)
]


@final
@dataclass(frozen=True)
class CodebookWords(Method):
    """`columns` of the word table share a code of one byte; `entries` are the pieces that a code can name, at most one for four words.

    `weighted`: by what k-means counts a word: how often it is in `reads` of training examples, or `none`, all alike.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(CodebookWords(columns=4)).method.effects().factors_table
        True
    """

    columns: Count = 8
    entries: _Entries = MOST_ENTRIES
    weighted: Literal["reads", "none"] = "reads"
    examples: Count = 100_000  # training examples whose words are counted

    def effects(self) -> Effects:
        return Effects(factors=True, factors_table=True, one_shot=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        Plan(forms={matrix.id: self._form(matrix) for matrix in _tables(anatomy)}).check(anatomy)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        return Plan(forms={matrix.id: self._form(matrix) for matrix in _tables(anatomy)})

    def decide(self, state: State, context: Context) -> Decision:
        tables = _tables(context.anatomy)
        plan = Plan(forms={matrix.id: self._form(matrix) for matrix in tables})
        plan.check(context.anatomy)
        weights: dict[str, Tensor] = {}
        for matrix in tables:
            table = cast(Any, context.model.get_submodule(matrix.module)).weight.detach()
            counts = None if self.weighted == "none" else reads(context, matrix, self.examples)
            parts = self._form(matrix).weights(table, table=True, counts=counts)
            weights |= {f"{matrix.module}.{name}": value for name, value in parts.items()}
        return Decision(plan, weights=weights)

    def _form(self, matrix: Matrix) -> Codebook:
        if matrix.shape[1] % self.columns:
            raise PlanError(
                f"matrix '{matrix.id}' has {matrix.shape[1]} columns, which pieces of {self.columns} do not divide.",
                help="name a number of columns that does.",
            )
        return Codebook(matrix.shape[1] // self.columns, max(2, min(self.entries, matrix.shape[0] // 4)))


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def reads(context: Context, matrix: Matrix, examples: int) -> Tensor:
    """How often each word of a table is in the training examples, and once more: (words,)."""
    counts = torch.ones(matrix.shape[0])
    for batch in context.batches(examples):
        ids = context.subject.feed(batch)[matrix.tokens.ids][unpadded(batch, matrix.tokens)]
        counts += torch.bincount(ids.cpu(), minlength=len(counts)).float()
    return counts


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _tables(anatomy: Anatomy) -> list[Matrix]:
    """The word tables; PlanError if there is none that can become codes."""
    tables = [matrix for matrix in anatomy.matrices.values() if matrix.table and matrix.dense]
    if not tables:
        raise PlanError(
            "there is no plain word table to store as codes: it has another form already.", help="leave codebook out."
        )
    return tables
