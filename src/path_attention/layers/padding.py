"""Padding taken out: a padded batch becomes one packed row of its real tokens, and back.

A masked token is as if it were not there: wherever it stands, left, right or between, no real token sees it, and a row
may be masked altogether. Whoever needs the tokens of a padded batch unpads once and pads once.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of a padded batch stand."""

    batch: int
    length: int
    indices: Tensor  # (T,) of the real tokens among batch * length
    cu_seqlens: Tensor  # (batch + 1,) int32 on the host: boundaries of the rows in the packed one

    @classmethod
    def from_mask(cls, attention_mask: Tensor, batch: int, length: int) -> "Padding":
        """From a mask (batch, length) of 1 or True for real tokens, 0 or False for padding.

        Raises:
            ValueError: the mask has another shape.
        """
        if tuple(attention_mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}; wanted ({batch}, {length}), "
                "one entry for each token"
            )
        real = attention_mask != 0
        ends = real.sum(1).cumsum(0).to("cpu", torch.int32)
        return cls(batch, length, real.flatten().nonzero().squeeze(1), torch.nn.functional.pad(ends, (1, 0)))

    def unpad(self, x: Tensor) -> Tensor:
        """(batch, length, ...) -> (1, T, ...)."""
        return x.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """(1, T, ...) -> (batch, length, ...), zeros at the padding."""
        padded = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return padded.index_copy(0, self.indices, x.squeeze(0)).unflatten(0, (self.batch, self.length))

    def pad_weights(self, weights: Tensor) -> Tensor:
        """Attention maps (1, heads, T, T) of the packed row -> (batch, heads, length, length), zeros at the padding."""
        rows = self.pad(weights.movedim(1, -1))  # (batch, length, T, heads)
        padded = rows.new_zeros(self.batch, self.length, self.batch * self.length, rows.shape[-1])
        padded = padded.index_copy(2, self.indices, rows).unflatten(2, (self.batch, self.length))
        own = torch.arange(self.batch, device=rows.device)
        return padded[own, :, own].movedim(-1, 1)


def sequence_boundaries(cu_seqlens: Tensor | None, batch: int, length: int) -> Tensor | None:
    """``cu_seqlens`` on the host, where attention reads it in every layer, once it is known to fit (batch, length).

    Raises:
        ValueError: it does not.
    """
    if cu_seqlens is None:
        return None
    if batch != 1:
        raise ValueError(f"cu_seqlens: got one beside a batch of {batch}; wanted all sequences packed into one row")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "wanted (number of sequences + 1,) of int32 or int64"
        )
    cu_seqlens = cu_seqlens.cpu()
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens: got {ends}; wanted 0 to {length}, the length, in values that never decrease")
    return cu_seqlens


def token_positions(cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """(length,) index of every token in its own sequence: counts from 0 in each sequence of a packed row."""
    tokens = torch.arange(length, device=device)
    if cu_seqlens is None:
        return tokens
    ends = cu_seqlens.to(device=device, dtype=torch.int64)
    return tokens - ends[torch.searchsorted(ends[1:].contiguous(), tokens, right=True)]
