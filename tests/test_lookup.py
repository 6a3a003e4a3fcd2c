"""A kept gradient is the gradient, step after step, and is off the embedding afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimformer.training.embedding_gradient import kept_gradient


def loss(embedding: nn.Embedding, ids: torch.Tensor, also: bool) -> torch.Tensor:
    value = embedding(ids).sin().square().sum()
    return value + embedding.weight.square().sum() if also else value


@pytest.mark.parametrize("also", [False, True])  # whether the weight is used in another way too
@pytest.mark.parametrize("padding", [None, 1])
def test_gradients_are_those_of_pytorch(also: bool, padding: int | None) -> None:
    mine, other = (nn.Embedding(20, 4, padding_idx=padding) for _ in range(2))
    other.load_state_dict(mine.state_dict())
    with kept_gradient(mine) as lookup:
        assert lookup is not None
        for batch in ([[1, 2, 2], [3, 1, 19]], [[4, 4, 4]], [[1, 1, 2]]):
            ids = torch.tensor(batch)
            for _ in range(2):  # gradients of two passes add up
                loss(mine, ids, also).backward()
                loss(other, ids, also).backward()
            lookup.gather()
            assert mine.weight.grad is not None
            torch.testing.assert_close(mine.weight.grad, other.weight.grad)
            rows = lookup.rows()
            assert rows is None if also else rows.tolist() == sorted({token for row in batch for token in row})
            mine.weight.grad.mul_(3.0)  # as clipping does
            lookup.clear()
            other.zero_grad()
            assert mine.weight.grad is None
    assert "forward" not in vars(mine)
    loss(mine, ids, also).backward()
    loss(other, ids, also).backward()
    assert torch.equal(mine.weight.grad, other.weight.grad)


def test_unusual_embeddings_are_left_alone() -> None:
    frozen = nn.Embedding(5, 2)
    frozen.weight.requires_grad_(False)
    parametrised = nn.Embedding(5, 2)
    nn.utils.parametrizations.weight_norm(parametrised)
    for module in (
        None,
        nn.Linear(2, 2),
        frozen,
        parametrised,
        nn.Embedding(5, 2, sparse=True),
        nn.Embedding(5, 2, max_norm=1.0),
    ):
        with kept_gradient(module) as lookup:
            assert lookup is None


def test_an_error_leaves_no_trace() -> None:
    embedding = nn.Embedding(5, 2)
    with pytest.raises(ZeroDivisionError), kept_gradient(embedding):
        raise ZeroDivisionError
    assert "forward" not in vars(embedding)
