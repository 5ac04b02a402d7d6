"""The dense attention between sibling spans, in three ways that share their operands: rows at the edges of all levels;
forward, ``hopper`` makes those of queries by itself.

``sdpa``: level by level in torch's fastest attention kernel, partial results joined by our merge kernels.
``triton``: one kernel of ours over all levels (kernels/dense.py), which takes gates, packed rows and any length.
``hopper``: the same for Hopper GPUs (kernels/hopper/).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.ops.engines import dense as torch_dense
from path_attention.ops.kernels import dense as triton_dense
from path_attention.ops.kernels import linear
from path_attention.ops.kernels.launch import launch_kernel, next_power_of_2
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable
from path_attention.ops.kernels.merge_kernels import merge_kernel, sum_values_kernel


def triton_forward(
    inputs: linear.Inputs, table: LeafTable, made: linear.Forward, out: Tensor, log_sum_exp: Tensor
) -> None:
    """Go on in place from the leaves' own attention, out (T, HQ, DV) and log_sum_exp (T, HQ), to the whole."""
    levels = made.levels
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
    factor: Tensor | None,
) -> linear.DenseGradients:
    """log_sum_exp and delta = rowsum(d_out * out) are (T, HQ) float32, of the whole attention.

    factor (1,) multiplies all weights, and with them the gradients, by way of the log-sum-exp.
    """
    gate_row = gate_column = None
    if inputs.g is not None:
        gate_row, gate_column = torch.empty_like(delta), torch.empty_like(delta)
    if factor is not None:
        log_sum_exp = log_sum_exp - factor.log()
    dtype = _row_gradient_dtype(inputs)
    result = linear.DenseGradients(
        query_rows=torch.empty_like(levels.query_rows, dtype=dtype),
        key_rows=torch.empty_like(levels.key_rows, dtype=dtype),
        values=torch.empty(inputs.v.shape, dtype=torch.float32, device=d_out.device),
        gate=gate_row,
        factor=factor,
    )
    operands = (table, levels.query_rows, levels.key_rows, inputs.v, levels.gate_query, levels.gate_key)
    of_output = (d_out, log_sum_exp, delta)
    triton_dense.dense_backward_queries(*operands, *of_output, result.query_rows, gate_row)
    triton_dense.dense_backward_keys(*operands, *of_output, result.key_rows, result.values, gate_column)
    if gate_row is not None and gate_column is not None:
        gate_row -= gate_column
        if factor is not None:
            gate_row /= factor
    return result


def hopper_forward(
    inputs: linear.Inputs, table: LeafTable, made: linear.Forward, out: Tensor, log_sum_exp: Tensor
) -> None:
    """As :func:`triton_forward`, on Hopper GPUs, of queries and gates times log2(e); queries are moved on the way."""
    from path_attention.ops.kernels.hopper import dense as hopper_dense  # only some versions of Triton have Gluon

    levels = made.levels
    assert made.queries is not None
    kept = levels.query_rows if levels.query_rows.numel() else None
    hopper_dense.dense_forward(
        table, *made.queries, levels.key_rows, inputs.v, levels.gate_query, levels.gate_key, out, log_sum_exp, kept
    )


def hopper_backward(
    inputs: linear.Inputs,
    table: LeafTable,
    levels: linear.Levels,
    d_out: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    factor: Tensor,
) -> linear.DenseGradients:
    """As :func:`triton_backward`, on Hopper GPUs, of query rows and gates times log2(e)."""
    from path_attention.ops.kernels.hopper import dense as hopper_dense

    result = linear.DenseGradients(
        query_rows=torch.empty_like(levels.query_rows, dtype=torch.float32),
        key_rows=torch.empty_like(levels.key_rows, dtype=_row_gradient_dtype(inputs)),
        values=torch.empty(inputs.v.shape, dtype=torch.float32, device=d_out.device),
        gate=None if inputs.g is None else torch.empty_like(delta),
        factor=factor,
    )
    hopper_dense.dense_backward(
        table, levels.query_rows, levels.key_rows, inputs.v, levels.gate_query, levels.gate_key, d_out, log_sum_exp,
        delta, factor, result.query_rows, result.key_rows, result.values, result.gate
    )  # fmt: skip
    return result


def _row_gradient_dtype(inputs: linear.Inputs) -> torch.dtype:
    """A gradient may be larger than float16 holds, as the sum over many rows with large weights is."""
    return torch.bfloat16 if inputs.q.dtype == torch.bfloat16 else torch.float32


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


def _sibling_rows(rows: Tensor, table: LeafTable, level: int) -> Tensor:
    """(levels, slots, 64, heads, dim) -> (pairs, rows, heads, dim) of a level: half of a whole tree's leaves have rows
    on either side, and of two leaves the slot beside is empty.
    """
    sequences = table.num_leaves // table.leaves
    of_sequences = rows[level].unflatten(0, (sequences, -1))[:, : table.leaves // 2]
    return of_sequences.reshape(-1, LEAF << level, *rows.shape[3:])


def _without_empty_slots(table: LeafTable) -> dict[str, object]:
    """The table as merge kernels take it, where rows are those that torch's kernels return."""
    return {**table.arguments, "table_queries": table.leaves // 2, "table_keys": table.leaves // 2}


def _levels(inputs: linear.Inputs, table: LeafTable, levels: linear.Levels) -> Iterator[_Level]:
    for level in range(table.num_levels):
        rows = LEAF << level
        yield _Level(
            level=level,
            q=_sibling_rows(levels.query_rows, table, level).transpose(1, 2),
            k=_sibling_rows(levels.key_rows, table, level).transpose(1, 2),
            v=_token_pairs(inputs.v, level)[:, :rows].transpose(1, 2),
            right=slice(rows, 2 * rows),
        )


def sdpa_forward(
    inputs: linear.Inputs, table: LeafTable, made: linear.Forward, out: Tensor, log_sum_exp: Tensor
) -> None:
    """As :func:`triton_forward`, for whole binary trees: every sequence 64 * 2^n tokens long, no gates."""
    parts = [torch_dense.select(x.q).forward(x.q, x.k, x.v) for x in _levels(inputs, table, made.levels)]
    if not parts:
        return
    query_heads, value_dim = inputs.query_heads, inputs.v.shape[2]
    launch_kernel(
        merge_kernel,
        (table.num_leaves * query_heads,),
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        parts=tuple(part.transpose(1, 2).contiguous() for part, _ in parts),
        parts_log_sum_exp=tuple(part.contiguous() for _, part in parts),
        **_without_empty_slots(table),
        HQ=query_heads,
        FIRST_LEVEL=0,
        NUM_LEVELS=len(parts),
        DV=value_dim,
        BLOCK_DV=next_power_of_2(value_dim),
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
        factor=None,
    )
    values = []
    for x in _levels(inputs, table, levels):
        d_q, d_k, d_v = torch_dense.select(x.q).backward(
            _token_pairs(d_out, x.level)[:, x.right].transpose(1, 2),
            x.q,
            x.k,
            x.v,
            _token_pairs(out, x.level)[:, x.right].transpose(1, 2),
            _token_pairs(log_sum_exp, x.level)[:, x.right].transpose(1, 2),
        )
        _sibling_rows(result.query_rows, table, x.level).copy_(d_q.transpose(1, 2))
        _sibling_rows(result.key_rows, table, x.level).copy_(d_k.transpose(1, 2))
        values.append(d_v.transpose(1, 2).contiguous())
    if values:
        heads, value_dim = inputs.heads, inputs.v.shape[2]
        launch_kernel(
            sum_values_kernel,
            (table.num_leaves * heads,),
            p_d_values=result.values,
            parts=tuple(values),
            **_without_empty_slots(table),
            H=heads,
            FIRST_LEVEL=0,
            NUM_LEVELS=len(values),
            DV=value_dim,
            BLOCK_DV=next_power_of_2(value_dim),
            num_warps=4,
        )
    return result


FORWARD = {"triton": triton_forward, "hopper": hopper_forward, "sdpa": sdpa_forward}
# Those that move queries from level to level by themselves.
MOVES_QUERIES = frozenset({"hopper"})
# What query rows and gates are multiplied by, in both passes: those of our kernels for Hopper make logits in base 2.
UNITS = {"triton": 1.0, "hopper": 1 / math.log(2), "sdpa": 1.0}
