"""The dense attention between sibling spans, in two ways that share their operands: rows at the edges of all levels.

``sdpa``: level by level in torch's fastest attention kernel, partial results joined by our merge kernels.
``triton``: one kernel of ours over all levels (kernels/dense.py), which takes gates, packed rows and any length.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from path_attention.ops.engines import dense as torch_dense
from path_attention.ops.kernels import dense as triton_dense
from path_attention.ops.kernels import linear
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable
from path_attention.ops.kernels.merge_kernels import merge_kernel, sum_values_kernel


def triton_forward(
    inputs: linear.Inputs, table: LeafTable, levels: linear.Levels, out: Tensor, log_sum_exp: Tensor
) -> None:
    """Go on in place from the leaves' own attention, out (T, HQ, DV) and log_sum_exp (T, HQ), to the whole."""
    triton_dense.dense_forward(
        table, levels.query_rows, levels.key_rows, inputs.v, levels.gate_query, levels.gate_key, out, log_sum_exp
    )


def triton_backward(
    inputs: linear.Inputs,
    table: LeafTable,
    levels: linear.Levels,
    d_out: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
) -> linear.DenseGradients:
    """log_sum_exp and delta = rowsum(d_out * out) are (T, HQ) float32, of the whole attention."""
    gate_row = gate_column = None
    if inputs.g is not None:
        gate_row, gate_column = torch.empty_like(delta), torch.empty_like(delta)
    result = linear.DenseGradients(
        query_rows=torch.empty_like(levels.query_rows),
        key_rows=torch.empty_like(levels.key_rows),
        values=torch.empty(inputs.v.shape, dtype=torch.float32, device=d_out.device),
        gate=gate_row,
    )
    operands = (table, levels.query_rows, levels.key_rows, inputs.v, levels.gate_query, levels.gate_key)
    of_output = (d_out, log_sum_exp, delta)
    triton_dense.dense_backward_queries(*operands, *of_output, result.query_rows, gate_row)
    triton_dense.dense_backward_keys(*operands, *of_output, result.key_rows, result.values, gate_column)
    if gate_row is not None and gate_column is not None:
        gate_row -= gate_column
    return result


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


def sdpa_forward(
    inputs: linear.Inputs, table: LeafTable, levels: linear.Levels, out: Tensor, log_sum_exp: Tensor
) -> None:
    """As :func:`triton_forward`, for whole binary trees: every sequence 64 * 2^n tokens long, no gates."""
    parts = [torch_dense.select(x.q).forward(x.q, x.k, x.v) for x in _levels(inputs, levels)]
    if not parts:
        return
    query_heads, value_dim = inputs.query_heads, inputs.v.shape[2]
    merge_kernel[(table.num_leaves * query_heads,)](
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        parts=tuple(part.transpose(1, 2).contiguous() for part, _ in parts),
        parts_log_sum_exp=tuple(part.contiguous() for _, part in parts),
        **table.arguments,
        HQ=query_heads,
        FIRST_LEVEL=0,
        NUM_LEVELS=len(parts),
        DV=value_dim,
        BLOCK_DV=triton.next_power_of_2(value_dim),
        num_warps=4,
    )


def sdpa_backward(
    inputs: linear.Inputs,
    table: LeafTable,
    levels: linear.Levels,
    d_out: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
) -> linear.DenseGradients:
    """out (T, HQ, DV) and log_sum_exp (T, HQ) float32 are of the whole attention; delta is torch's own affair."""
    result = linear.DenseGradients(
        query_rows=torch.empty_like(levels.query_rows),
        key_rows=torch.empty_like(levels.key_rows),
        values=torch.zeros(inputs.v.shape, dtype=torch.float32, device=d_out.device),
        gate=None,
    )
    values = []
    for x in _levels(inputs, levels):
        d_q, d_k, d_v = torch_dense.select(x.q).backward(
            _token_pairs(d_out, x.level)[:, x.right].transpose(1, 2),
            x.q,
            x.k,
            x.v,
            _token_pairs(out, x.level)[:, x.right].transpose(1, 2),
            _token_pairs(log_sum_exp, x.level)[:, x.right].transpose(1, 2),
        )
        result.query_rows[x.level].view(d_q.transpose(1, 2).shape).copy_(d_q.transpose(1, 2))
        result.key_rows[x.level].view(d_k.transpose(1, 2).shape).copy_(d_k.transpose(1, 2))
        values.append(d_v.transpose(1, 2).contiguous())
    if values:
        heads, value_dim = inputs.heads, inputs.v.shape[2]
        sum_values_kernel[(table.num_leaves * heads,)](
            p_d_values=result.values,
            parts=tuple(values),
            **table.arguments,
            H=heads,
            FIRST_LEVEL=0,
            NUM_LEVELS=len(values),
            DV=value_dim,
            BLOCK_DV=triton.next_power_of_2(value_dim),
            num_warps=4,
        )
    return result
