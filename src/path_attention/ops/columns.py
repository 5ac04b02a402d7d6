"""Rows as a dense attention takes them: grouped queries folded in, gates as further columns.

The G query heads of a group attend to the same keys, so they are extra rows of the same dense attention: no key is
copied. The key's part of the gate, a number per query head and key, rides along as G extra columns: the query of head
g has a one in column g, the key has its gate there, and the gradient of the key's columns is the column sum of dS.
One more column, ones in the key and zeros in the query, gives the row sum of dS in the query's gradient. The gates
after the keys take the one, those up to the queries the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from path_attention.ops.engines import dense


@dataclass(frozen=True)
class Columns:
    """What the operands of one call's dense attentions look like."""

    dim: int  # D
    group: int  # G
    gated: bool
    dtype: torch.dtype
    width: int  # columns of every operand: torch's kernels want one width for q, k and v

    @classmethod
    def of(cls, q: Tensor, v: Tensor, group: int, *, gated: bool) -> "Columns":
        dim, value_dim = q.shape[-1], v.shape[-1]
        width = max(dim + (group + 1 if gated else 0), value_dim)
        multiple = dense.CUDA_COLUMNS if q.is_cuda else 1
        return cls(dim, group, gated, _dense_dtype(q, gated), -(-width // multiple) * multiple)

    def queries(self, x: Tensor) -> Tensor:
        """(H, G, pairs, rows, D) -> (pairs, H, G * rows, width), with the gate's ones."""
        if self.gated:
            ones = torch.eye(self.group, self.group + 1, dtype=x.dtype, device=x.device)
            x = torch.cat([x, ones[None, :, None, None, :].expand(*x.shape[:-1], -1)], dim=-1)
        return self.fill(fold_queries(x))

    def keys(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """(pairs, H, keys, D), and of gated keys their gates to the span's right edge, (pairs, H, keys, G) ->
        (pairs, H, keys, width).
        """
        x = x.to(self.dtype)
        if gate is not None:
            x = torch.cat([x, gate.to(x), x.new_ones(*x.shape[:-1], 1)], dim=-1)
        return self.fill(x)

    def fill(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., width) in the dtype of the dense attention, zeros in what is new."""
        x = x.to(self.dtype)
        return torch.nn.functional.pad(x, (0, self.width - x.shape[-1])) if x.shape[-1] < self.width else x

    def row_sums(self, d_queries: Tensor) -> Tensor:
        """Gradient of :meth:`queries`' result -> row sums of dS, (H, G, pairs, rows, 1)."""
        return unfold_queries(d_queries[..., self.dim + self.group :][..., :1], self.group)

    def column_sums(self, d_keys: Tensor) -> Tensor:
        """Gradient of :meth:`keys`' result -> column sums of dS, (pairs, H, keys, G)."""
        return d_keys[..., self.dim : self.dim + self.group]


def _dense_dtype(q: Tensor, gated: bool) -> torch.dtype:
    """What the dense attentions run in: the dtype of q, but float32 where half precision would not do."""
    if q.dtype in (torch.float16, torch.bfloat16):
        if gated:
            return torch.float32  # the gate's columns and their gradient need more than the 8 or 11 bits of a half
        if q.dtype == torch.float16 and q.device.type == "cpu":
            return torch.float32  # torch's CPU kernel takes 9 times as long to go backward in float16 as in float32
    return q.dtype


def fold_queries(x: Tensor) -> Tensor:
    """(H, G, pairs, rows, dim) -> (pairs, H, G * rows, dim)."""
    return x.permute(2, 0, 1, 3, 4).flatten(2, 3)


def unfold_queries(x: Tensor, group: int) -> Tensor:
    """(pairs, H, G * rows, dim) -> (H, G, pairs, rows, dim)."""
    return x.unflatten(2, (group, -1)).permute(1, 2, 0, 3, 4)
