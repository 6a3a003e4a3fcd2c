"""The losses that teachers of this folder's tasks have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of the distributions over the last axis, times temperature^2; the mean over rows: a scalar.

    Logits of both are (batch, choices) in float32. Hinton et al. 2015 (https://arxiv.org/abs/1503.02531, section 2).
    """
    from torch.nn import functional

    ours, theirs = (functional.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def kl_divergence_of_each(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of each logit's own yes and no, times temperature^2; the mean over rows and labels: a scalar.

    Logits of both are (batch, labels) in float32.
    """
    from torch.nn import functional

    ours, theirs = student / temperature, teacher / temperature
    shares = theirs.sigmoid()
    crossed = functional.binary_cross_entropy_with_logits(ours, shares)
    return (crossed - functional.binary_cross_entropy_with_logits(theirs, shares)) * temperature**2
