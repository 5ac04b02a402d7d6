"""Padding taken out: a padded batch becomes one packed row of its real tokens, and back.

A masked token is as if it were not there: wherever it stands, left, right or between, no real token sees it, and a row
may be masked altogether. Whoever needs the tokens of a padded batch unpads once and pads once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from path_attention.checks import bad
from path_attention.ops.arguments import check_cu_seqlens, check_tensor, sequence_bounds


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of a padded batch stand."""

    batch: int
    length: int
    indices: Tensor  # (T,) of the real tokens among batch * length
    cu_seqlens: Tensor  # (batch + 1,) int32 on the host: boundaries of the rows in the packed one

    @classmethod
    def from_mask(cls, attention_mask: Tensor, x: Tensor) -> "Padding | None":
        """Of tokens x (batch, length, ...) and their mask (batch, length), 1 or True for real ones and 0 or False for
        padding; None where there is no padding, and on meta, where no shape depends on it.

        Raises:
            ValueError: the mask has another shape or device, or other values.
        """
        check_tensor("attention_mask", attention_mask)
        batch, length = x.shape[:2]
        if tuple(attention_mask.shape) != (batch, length):
            raise bad(
                "attention_mask",
                f"shape {tuple(attention_mask.shape)}",
                f"({batch}, {length}), one entry for each token",
            )
        if attention_mask.device != x.device:
            raise bad("attention_mask", f"device {attention_mask.device}", f"the device of the tokens, {x.device}")
        if x.is_meta:
            return None
        real = attention_mask != 0
        if attention_mask.dtype != torch.bool and bool((real & (attention_mask != 1)).any()):
            # A mask to be added to logits, 0 for real tokens, would be read the wrong way round.
            raise bad("attention_mask", "values other than 0 and 1", "1 for real tokens and 0 for padding")
        indices = real.flatten().nonzero().squeeze(1)
        if len(indices) == batch * length:
            return None
        ends = real.sum(1).cumsum(0).to("cpu", torch.int32)
        return cls(batch, length, indices, torch.nn.functional.pad(ends, (1, 0)))

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


def sequence_boundaries(cu_seqlens: Tensor | None, x: Tensor, processes: int = 1) -> Tensor | None:
    """``cu_seqlens`` on the host, where attention reads it in every layer, once it is known to fit x (batch, length,
    ...), or the row that so many processes have shards like x of. None on meta, where no shape depends on it.

    Raises:
        ValueError: it does not.
    """
    if cu_seqlens is None:
        return None
    check_cu_seqlens(cu_seqlens, x.device)
    if x.shape[0] != 1:
        raise bad("cu_seqlens", f"one beside a batch of {x.shape[0]}", "all sequences packed into one row")
    if x.is_meta:
        return None
    cu_seqlens = cu_seqlens.cpu()
    if not (torch.compiler.is_compiling() or isinstance(cu_seqlens, FakeTensor)):  # else there are no values
        sequence_bounds(cu_seqlens, x.shape[1] * processes)
    return cu_seqlens


def token_positions(cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """(length,) index of every token in its own sequence: counts from 0 in each sequence of a packed row."""
    tokens = torch.arange(length, device=device)
    if cu_seqlens is None:
        return tokens
    ends = cu_seqlens.to(device=device, dtype=torch.int64)
    return tokens - ends[torch.searchsorted(ends[1:].contiguous(), tokens, right=True)]
