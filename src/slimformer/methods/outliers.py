"""Outliers apart: the numbers of each matrix become one of 8 or 16 values, but for the few that are far from all others.

Paper: Zadeh, Edo, Awad, Moshovos: GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy Efficient Inference (MICRO
2020).

Idea: The numbers of a matrix are nearly Gaussian. Those whose density is below exp(-4) are outliers, some 0.1 %, and are kept in
float. The others become the nearest of a few values, which begin as means of equal shares and move until the sum of distances is
least. Nothing is trained, and no data is needed.

Differs: Files hold two codes of 16 values in a byte, or five of 8 values in two: 4 and 3.2 bits a number, where the paper counts 4 and 3.
It computes with codes in hardware of its own; a runtime makes plain float matrices of them when it loads the file. So the file is
smaller, and its speed and memory are those of the float model. Biases, norms and other tables stay in float.

Choose when: the bytes of a file matter, without any training, and int8's quarter is too much. For speed take int8 files.

Cost: a sort of each matrix and some rounds over it; seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast, final

from torch import Tensor

from slimformer.core.anatomy import Anatomy, Matrix, Role
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import PlanError
from slimformer.forms.base import Form
from slimformer.forms.dictionary import UNLIKELY, Dictionary, unlikely
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import one_of, real_number

_Entries = Annotated[int, one_of(8, 16)]
Threshold = Annotated[float, real_number("from -100 to -1", lambda value: -100 <= value <= -1, 0.0, -101.0)]


@final
@dataclass(frozen=True)
class Outliers(Method):
    """`entries`: values of each matrix of the layers, 8 or 16; `embedding`: of the word table, None leaves it plain.

    `threshold`: the logarithm of the density below which a number is an outlier.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(Outliers(entries=8)).method.effects().factors
        True
    """

    entries: _Entries = 8
    embedding: _Entries | None = 16
    threshold: Threshold = UNLIKELY

    def effects(self) -> Effects:
        return Effects(factors=True, uneven=True, factors_table=self.embedding is not None, one_shot=True, refills=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if not self._concerned(anatomy):
            raise PlanError(
                "no matrix can become codes: each has another form already, or is tied to another.",
                help="leave outliers out, or begin with the model before it was factored.",
            )

    def decide(self, state: State, context: Context) -> Decision:
        forms: dict[str, Form] = {}
        plain = []
        weights: dict[str, Tensor] = {}
        every = apart = 0
        for matrix in self._concerned(context.anatomy):
            weight = cast(Any, context.model.get_submodule(matrix.module)).weight.detach()
            form = Dictionary(self._entries(matrix), unlikely(weight, self.threshold))  # type: ignore[arg-type]
            if form.problem(matrix.shape) is not None:
                plain.append(matrix.id)
                continue
            forms[matrix.id] = form
            weights |= {f"{matrix.module}.{name}": value for name, value in form.weights(weight, table=matrix.table).items()}
            every, apart = every + weight.numel(), apart + form.outliers
        notes = [f"{apart / max(1, every):.2%} of the numbers of {len(forms)} matrices are outliers, and kept apart."]
        if plain:
            notes.append(f"{len(plain)} stay plain, with too many outliers for their size: {', '.join(plain[:3])}.")
        return Decision(Plan(forms=forms), weights=weights, notes=tuple(notes))

    def _entries(self, matrix: Matrix) -> int:
        return self.embedding if matrix.role is Role.EMBEDDING and self.embedding is not None else self.entries

    def _concerned(self, anatomy: Anatomy) -> list[Matrix]:
        """The matrices of the layers, and the word table if it is to have codes: those that are plain and are no other's too."""
        there = [
            item for item in anatomy.matrices.values() if item.dense and item.tied is None and item.role is not Role.CLASSIFIER
        ]
        return [item for item in there if self.embedding is not None or not item.table]
