"""The operator on CUDA: linear stages by our Triton kernels, the dense levels by torch's fastest attention kernel.

Same algorithm as ops/dyadic.py, on rows of tokens as they come, (B * L, heads, dim): nothing is packed or transposed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from path_attention.ops.engines import dense
from path_attention.ops.kernels import linear
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, batch_leaf_table
from path_attention.ops.kernels.merge_kernels import delta_kernel, merge_kernel, sum_values_kernel

# Widest row for which a leaf's tiles fit an SM; wider ones would spill (docs/kernels.md).
MAX_DIM = 128
# Rows of one program of the delta kernel: 64 x 64 tiles keep loads wide and registers few.
DELTA_ROWS = 64


def unsupported_reason(q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> str | None:
    """Why this engine cannot serve a call, or None. w is (B, L, R, H, D)."""
    length, dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    leaves = length // LEAF
    if not q.is_cuda:
        return f"q is on {q.device}, not on CUDA"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, not bfloat16 or float16"
    if w.shape[2] != 1:
        return f"{w.shape[2]} reflections a token, not 1"
    if g is not None:
        return "the levels run in torch's attention kernels, which take no forget gate"
    if cu_seqlens is not None:
        return "the levels run in torch's attention kernels, which take no packed sequences"
    if dim != value_dim or dim % dense.CUDA_COLUMNS or dim > MAX_DIM:
        return f"head_dim {dim} and value_dim {value_dim} are not equal, at most {MAX_DIM} and a multiple of 8"
    if length % LEAF or leaves & (leaves - 1):
        return f"length {length} is not {LEAF} times a power of two"
    return None


class _Level(NamedTuple):
    """One level's operands as torch's kernels take them, (pairs, heads, rows, dim): views, nothing is copied."""

    level: int
    q: Tensor
    k: Tensor
    v: Tensor
    right: slice  # of a token view (pairs, 2 * rows, ...): the right siblings


def _token_pairs(x: Tensor, level: int) -> Tensor:
    """(T, heads, dim) -> (pairs, 2 * rows, heads, dim)."""
    return x.view(-1, 2 * LEAF << level, *x.shape[1:])


def _levels(inputs: linear.Inputs, levels: linear.Levels) -> Iterator[_Level]:
    for level in range(levels.query_rows.shape[0]):
        rows = LEAF << level
        yield _Level(
            level=level,
            q=levels.query_rows[level].view(-1, rows, *inputs.q.shape[1:]).transpose(1, 2),
            k=levels.key_rows[level].view(-1, rows, *inputs.k.shape[1:]).transpose(1, 2),
            v=_token_pairs(inputs.v, level)[:, :rows].transpose(1, 2),
            right=slice(rows, 2 * rows),
        )


def _inputs(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, scale: float) -> tuple[linear.Inputs, LeafTable]:
    batch, length = q.shape[:2]
    inputs = linear.Inputs(
        q=_rows(q), k=_rows(k), v=_rows(v), w=_rows(w.squeeze(2)), beta=_rows(beta.squeeze(2)), g=None, scale=scale
    )
    return inputs, batch_leaf_table(batch, length, q.device)


def _rows(x: Tensor) -> Tensor:
    """(B, L, ...) -> (B * L, ...), contiguous."""
    return x.flatten(0, 1).contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, L, HQ, DV) and log_sum_exp (B, L, HQ) float32; w (B, L, 1, H, D), beta (B, L, 1, H)."""
    inputs, table = _inputs(q, k, v, w, beta, scale)
    out = torch.empty(q.shape[0] * q.shape[1], q.shape[2], v.shape[3], dtype=q.dtype, device=q.device)
    log_sum_exp = torch.empty(out.shape[:2], dtype=torch.float32, device=q.device)
    levels = linear.leaves_and_levels(inputs, table, out, log_sum_exp)
    parts = [dense.select(x.q).forward(x.q, x.k, x.v) for x in _levels(inputs, levels)]
    if parts:
        merge_kernel[(table.num_leaves * q.shape[2],)](
            p_out=out,
            p_log_sum_exp=log_sum_exp,
            parts=tuple(part.transpose(1, 2).contiguous() for part, _ in parts),
            parts_log_sum_exp=tuple(part.contiguous() for _, part in parts),
            p_start=table.start,
            p_length=table.length,
            p_index=table.index,
            p_query_base=table.query_base,
            HQ=q.shape[2],
            FIRST_LEVEL=0,
            NUM_LEVELS=len(parts),
            DV=v.shape[3],
            BLOCK_DV=triton.next_power_of_2(v.shape[3]),
            num_warps=4,
        )
    return out.view(*q.shape[:3], -1), log_sum_exp.view(q.shape[:3])


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, w and beta, in their dtypes."""
    inputs, table = _inputs(q, k, v, w, beta, scale)
    d_out, out, log_sum_exp = _rows(d_out), _rows(out), _rows(log_sum_exp)
    delta = torch.empty_like(log_sum_exp)
    delta_kernel[(triton.cdiv(delta.numel(), DELTA_ROWS),)](
        p_out=out,
        p_d_out=d_out,
        p_delta=delta,
        s_rows=delta.numel(),
        DV=v.shape[3],
        BLOCK_DV=triton.next_power_of_2(v.shape[3]),
        BLOCK_ROWS=DELTA_ROWS,
        num_warps=4,
    )
    levels = linear.leaves_and_levels(inputs, table, None, None)
    gradients = linear.DenseGradients(
        query_rows=torch.empty_like(levels.query_rows),
        key_rows=torch.empty_like(levels.key_rows),
        values=torch.zeros(inputs.v.shape, dtype=torch.float32, device=v.device),
        gate=None,
    )
    values = []
    for x in _levels(inputs, levels):
        d_q, d_k, d_v = dense.select(x.q).backward(
            _token_pairs(d_out, x.level)[:, x.right].transpose(1, 2),
            x.q,
            x.k,
            x.v,
            _token_pairs(out, x.level)[:, x.right].transpose(1, 2),
            _token_pairs(log_sum_exp, x.level)[:, x.right].transpose(1, 2),
        )
        gradients.query_rows[x.level].view(d_q.transpose(1, 2).shape).copy_(d_q.transpose(1, 2))
        gradients.key_rows[x.level].view(d_k.transpose(1, 2).shape).copy_(d_k.transpose(1, 2))
        values.append(d_v.transpose(1, 2).contiguous())
    if values:
        sum_values_kernel[(table.num_leaves * k.shape[2],)](
            p_d_values=gradients.values,
            parts=tuple(values),
            p_start=table.start,
            p_length=table.length,
            p_index=table.index,
            p_count=table.count,
            p_key_base=table.key_base,
            H=k.shape[2],
            FIRST_LEVEL=0,
            NUM_LEVELS=len(values),
            DV=v.shape[3],
            BLOCK_DV=triton.next_power_of_2(v.shape[3]),
            num_warps=4,
        )
    result = linear.leaves_and_levels_backward(inputs, table, levels, gradients, log_sum_exp, delta, d_out)
    return (
        result.q.view(q.shape),
        result.k.view(k.shape),
        result.v.view(v.shape),
        result.w.view(w.shape),
        result.beta.view(beta.shape),
    )
