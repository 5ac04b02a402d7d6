"""Stick-breaking attention (SBA, arXiv 2410.17980): every key in turn takes a share of what is left."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attention.checks import bad
from path_attention.layers.attention import Attention

# Weights that are made at once where no backward pass keeps them: 1 GiB in float32, of which some six are alive
# together.
ENTRIES = 2**28


class StickBreakingAttention(Attention):
    """With z_ij = q_i k_j^T / sqrt(D), and j strictly before i,

        A_ij = sigmoid(z_ij) prod_{j < k < i} (1 - sigmoid(z_ik))
        out_i = sum_j A_ij v_j + (1 - sum_j A_ij) v_i

    There is no softmax and no position encoding: the order of the tokens is in the product. What the keys leave over
    goes to the token's own value, as in the authors' experiments on associative recall, so that the weights of a row
    add up to 1. Time and memory are quadratic in the length. Arguments of :class:`Attention`.
    """

    def attend(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = self._project(hidden_states)
        group = self.num_heads // self.num_kv_heads
        if cu_seqlens is None:
            return self._mix(group, q, k, v)
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([self._mix(group, *part) for part in parts], dim=1)

    def weigh(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, _ = self._project(hidden_states)
        length, group = q.shape[1], self.num_heads // self.num_kv_heads
        ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
        dtype = torch.promote_types(q.dtype, torch.float32)
        weights = torch.zeros(len(q), self.num_heads, length, length, dtype=dtype, device=q.device)
        for start, end in pairwise(ends):
            part = slice(start, end)
            weights[:, :, part, part] = stick_breaking_weights(q[:, part], k[:, part], group)
        return weights

    def attend_cached(
        self, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, cache: Any
    ) -> Tensor:
        if cu_seqlens is not None:
            raise bad("cu_seqlens", "boundaries beside a cache", "None: keys and values have a row each")
        length, group = hidden_states.shape[1], self.num_heads // self.num_kv_heads
        rows = cache.length + torch.arange(length, device=hidden_states.device)
        q, k, v = self._project(hidden_states)
        keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2))
        real = None
        if attention_mask is not None:
            real = F.pad(attention_mask != 0, (0, keys.shape[2] - attention_mask.shape[1]), value=True)
        weights = stick_breaking_weights(q, keys.transpose(1, 2), group, rows, real).to(values.dtype)
        return (weights @ values.repeat_interleave(group, dim=1)).transpose(1, 2)

    @classmethod
    def _mix(cls, group: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            size = max(1, ENTRIES // max(1, q.shape[2] * q.shape[1] * k.shape[1]))
            if size < len(q):
                parts = zip(*(x.split(size) for x in (q, k, v)), strict=True)
                return torch.cat([cls._mix(group, *part) for part in parts])
        weights = stick_breaking_weights(q, k, group).to(v.dtype)
        return (weights @ v.transpose(1, 2).repeat_interleave(group, dim=1)).transpose(1, 2)


def stick_breaking_weights(
    q: Tensor, k: Tensor, group: int = 1, rows: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """A with the remainders on its diagonal, (B, HQ, L, K), in float32 at least.

    q is (B, L, HQ, D) and k (B, K, HQ / group, D); rows (L,), the key that is each query's own token, counts from 0
    where it is None; keys that ``real`` (B, K) calls False are as if absent.

    log A_ij = z_ij - sum_{j <= k < i} softplus(z_ik) and log remainder_i = - sum_{k < i} softplus(z_ik): sums of terms
    of one sign, of which nothing cancels. The keys are taken in reverse, so that the sums are running ones.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    length, keys = q.shape[1], k.shape[1]
    q, k = q.transpose(1, 2), k.flip(1).transpose(1, 2).repeat_interleave(group, dim=1)
    z = (q @ k.mT).to(dtype) * q.shape[-1] ** -0.5
    column = keys - 1 - torch.arange(keys, device=q.device)  # the token of each column
    row = (torch.arange(length, device=q.device) if rows is None else rows)[:, None]
    hidden = column >= row
    if real is not None:
        hidden = hidden | ~real.flip(1)[:, None, None, :]
    # Columns from the query on break nothing off: softplus -> 0. Under autocast softplus stays in its input's dtype.
    broken = F.softplus(z).masked_fill(hidden, 0).cumsum(-1)
    log_weights = torch.where(column == row, -broken[..., -1:], (z - broken).masked_fill(hidden, float("-inf")))
    return log_weights.exp().flip(-1)
