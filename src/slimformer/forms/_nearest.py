"""The nearest matrix of some rank in the Frobenius norm, which forms of several kinds begin with (Eckart and Young 1936)."""

from __future__ import annotations

import torch
from torch import Tensor


def energies(matrix: Tensor) -> Tensor:
    """Squared singular values, the largest first: each further rank takes the next one off the squared error."""
    return torch.linalg.eigvalsh(_gram(matrix)).flip(0).clamp_min(0)


def nearest_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of that rank as a product (rows, rank) (rank, columns), each pair of equal norm.

    It uses the eigenvectors of the smaller Gram matrix: this is cheap for a word table, and the full rank is exact.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left = nearest_factors(matrix.T, rank)
        return left.T, right.T
    unit = torch.linalg.eigh(_gram(matrix)).eigenvectors.flip(1)[:, :rank]  # (rows, rank)
    other = unit.T @ matrix  # (rank, columns)
    size = other.norm(dim=1)  # (rank,): the singular values
    share = torch.where(size > 0, size.sqrt(), 1.0)  # one side of a term that is 0 stays alive, so that it can still learn
    return unit * share, other / share[:, None]


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
