"""One layer of an LSTM in both directions that reads each text to its own end: padding changes nothing."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Recurrent(nn.Module):
    """A bidirectional LSTM layer. Exporters leave a marker in its place and write the operator of their format.

    >>> import torch
    >>> layer, words = Recurrent(3, 4).eval(), torch.randn(1, 2, 3)
    >>> padded = torch.cat([words, torch.ones(1, 5, 3)], 1)
    >>> short, long = (layer(text, torch.tensor([[1, 1] + [0] * (text.shape[1] - 2)]))[1] for text in (words, padded))
    >>> bool((short - long).abs().max() < 1e-6)
    True
    """

    def __init__(self, size: int, units: int) -> None:
        super().__init__()
        self.units = units
        self.lstm = nn.LSTM(size, units, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The states of each token, (batch, seq, 2 units), zero at padding, and those that both directions end with, (batch, 2 units)."""
        lengths = mask.sum(1).clamp_min(1).cpu()
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=words.shape[1])
        return states, last.transpose(0, 1).flatten(1)
