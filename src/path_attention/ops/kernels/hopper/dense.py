"""Launchers of the attention between sibling spans on Hopper; operands are those of kernels/dense.py, but for the
queries of the forward pass.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from path_attention.ops.kernels.dense import heads_of_a_section
from path_attention.ops.kernels.dense_kernels import lowest_level_backward_kernel
from path_attention.ops.kernels.hopper.dense_backward import dense_backward_kernel
from path_attention.ops.kernels.hopper.dense_forward import dense_forward_kernel
from path_attention.ops.kernels.launch import launch_kernel, multiprocessors
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, token_heads
from path_attention.ops.kernels.merge_kernels import output_rows_kernel, token_rows_kernel

# Keys of a tile, and rows of a program: two leaves.
PAIR = 128
# Programs of the forward kernel off the GPU, in the place of one for each multiprocessor.
EMULATED = 2
# Heads of one program of output_rows_kernel: 64 x 16 numbers keep its loads 64 bytes wide.
HEADS = 16


@dataclass(frozen=True)
class Options:
    """Launch options of both kernels for one head dim."""

    stages: int  # tiles of keys and values in flight
    turns: bool  # consumers take turns
    registers: int  # of a consumer's thread
    rows: int  # queries of a tile of the backward kernel
    columns: int  # of these, whose logits are held in registers at a time
    gated_columns: int  # the same with gates
    held: bool  # without gates, keys and values of the backward kernel stay in registers
    backward_stages: int
    lowest_warps: int  # of the backward kernel of level 0


# Columns and held by measurement: docs/hopper.md.
_OPTIONS = {
    64: Options(
        stages=2,
        turns=True,
        registers=240,
        rows=128,
        columns=64,
        gated_columns=64,
        held=True,
        backward_stages=2,
        lowest_warps=4,
    ),
    128: Options(
        stages=2,
        turns=True,
        registers=240,
        rows=64,
        columns=64,
        gated_columns=32,
        held=False,
        backward_stages=2,
        lowest_warps=8,
    ),
}
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@cache  # a third of the time that a backward pass takes the host, else
def _layout(rows: int, columns: int, dtype: torch.dtype, swizzled: bool) -> gl.NVMMASharedLayout:
    if swizzled:
        return gl.NVMMASharedLayout.get_default_for([rows, columns], _TYPES[dtype])
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def _descriptor(x: Tensor, rows: int, columns: int, swizzled: bool = True) -> TensorDescriptor:
    """Of x (..., heads, dim) as a matrix of all its rows, in tiles of ``rows`` rows of one head or part of it."""
    matrix = x.view(-1, x.shape[-2] * x.shape[-1])
    return TensorDescriptor.from_tensor(matrix, [rows, columns], _layout(rows, columns, x.dtype, swizzled))


def _turns(table: LeafTable, heads: int) -> tuple[int, int]:
    """Turns (pairs of a sequence, or leaves of a table), and heads of all sequences that take them."""
    if table.columns is not None:
        return table.num_leaves, heads
    return (table.leaves + 1) // 2, table.num_leaves // table.leaves * heads


def _number_descriptor(x: Tensor, tile: int) -> TensorDescriptor:
    """Of numbers (HQ, ...), those of a head side by side, in tiles of so many."""
    return _descriptor(x.flatten(1)[:, None], 1, tile, swizzled=False)


def _arguments(table: LeafTable, query_heads: int, key_rows: Tensor) -> dict[str, object]:
    """What all kernels between siblings take."""
    heads, dim = key_rows.shape[3:]
    return {
        **table.arguments,
        "num_levels": table.num_levels,
        "query_slots": table.query_slots,
        "key_slots": table.key_slots,
        "GROUP": query_heads // heads,
        "D": dim,
        "DV": dim,
    }


def _head_arguments(table: LeafTable, query_heads: int) -> dict[str, object]:
    """What the kernels take that bring numbers from their tokens to their heads, or back."""
    return {
        **table.arguments,
        "HQ": query_heads,
        "row_slots": table.row_slots,
        "BLOCK_HEADS": HEADS,
        "num_warps": 4,
    }


def dense_forward(
    table: LeafTable,
    q_left: Tensor,
    nodes: Tensor,
    key_rows: Tensor,
    values: Tensor,
    gate_query: Tensor | None,
    gate_key: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    query_rows: Tensor | None = None,
) -> None:
    """As :func:`path_attention.ops.kernels.dense.dense_forward`, but of queries as the leaves have them at their left
    edges, q_left (N, 64, HQ, D) times log2(e), which the kernel moves by nodes (2 N, H, D, D), and keeps in query_rows
    if there is such a buffer; gates too are times log2(e).
    """
    if table.num_levels == 0:
        return
    query_heads, heads, dim = q_left.shape[2], key_rows.shape[3], q_left.shape[3]
    options = _OPTIONS[dim]
    turns, groups = _turns(table, query_heads)
    launch_kernel(
        dense_forward_kernel,
        (min(turns * groups, multiprocessors(out.device, EMULATED)),),
        t_q_left=_descriptor(q_left, LEAF, dim),
        t_nodes=_descriptor(nodes[..., None, :], dim, dim),
        t_key_rows=_descriptor(key_rows, PAIR, dim),
        t_values=_descriptor(values, PAIR, dim),
        t_gate_query=None if gate_query is None else _number_descriptor(gate_query, LEAF),
        t_gate_key=None if gate_key is None else _number_descriptor(gate_key, PAIR),
        t_query_rows=None if query_rows is None else _descriptor(query_rows, LEAF, dim),
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        p_next=torch.zeros(1, dtype=torch.int32, device=out.device),
        **_arguments(table, query_heads, key_rows),
        num_turns=turns,
        num_groups=groups,
        HQ=query_heads,
        token_heads=token_heads(values),
        STAGES=options.stages,
        REGISTERS=options.registers,
        TURNS=options.turns,
        BARE=gate_key is None and _has_exponents(values.dtype),
        s_section=heads_of_a_section(table, query_heads // heads, dim, dim, values.element_size()),
        num_warps=4,
    )


def _has_exponents(dtype: torch.dtype) -> bool:
    """Whether weights beside nothing, of any size, are numbers of it: float16 has five bits of exponent."""
    return dtype == torch.bfloat16


def _output_rows(
    table: LeafTable, log_sum_exp: Tensor, delta: Tensor, factor: Tensor, gate_query: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both head by head, as output_rows_kernel says."""
    query_heads = log_sum_exp.shape[1]
    delta_rows = torch.empty(query_heads, table.row_slots, LEAF, dtype=torch.float32, device=delta.device)
    log_sum_exp_rows = torch.empty_like(delta_rows if gate_query is None else gate_query)
    launch_kernel(
        output_rows_kernel,
        (table.num_leaves, triton.cdiv(query_heads, HEADS)),
        p_log_sum_exp=log_sum_exp,
        p_delta=delta,
        p_factor=factor,
        p_gate_query=gate_query,
        p_log_sum_exp_rows=log_sum_exp_rows,
        p_delta_rows=delta_rows,
        num_levels=table.num_levels,
        query_slots=table.query_slots,
        **_head_arguments(table, query_heads),
    )
    return log_sum_exp_rows, delta_rows


def dense_backward(
    table: LeafTable,
    query_rows: Tensor,
    key_rows: Tensor,
    values: Tensor,
    gate_query: Tensor | None,
    gate_key: Tensor | None,
    d_out: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    factor: Tensor,
    d_query_rows: Tensor,
    d_key_rows: Tensor,
    d_values: Tensor,
    gate: Tensor | None,
) -> None:
    """Write d_query_rows, like query_rows in float32, d_key_rows, like key_rows in bfloat16 or float32, and d_values
    (T, H, DV) float32, summed over the levels; all times factor (1,). With gates also gate (T, HQ) float32, row sums
    less column sums of dS over all levels, without the factor.

    d_out is (T, HQ, DV); log_sum_exp, of the whole attention, and delta = rowsum(d_out * out) are (T, HQ) float32.
    """
    if table.num_levels == 0:
        d_values.zero_()
        if gate is not None:
            gate.zero_()
        return
    log_sum_exp_rows, delta_rows = _output_rows(table, log_sum_exp, delta, factor, gate_query)
    gate_rows = None if gate is None else torch.empty_like(delta_rows)
    query_heads, heads, dim = query_rows.shape[3], key_rows.shape[3], query_rows.shape[4]
    options = _OPTIONS[dim]
    launch_kernel(
        lowest_level_backward_kernel,
        (table.num_leaves * heads,),
        p_query_rows=query_rows,
        p_key_rows=key_rows,
        p_values=values,
        p_gate_key=gate_key,
        p_d_out=d_out,
        p_log_sum_exp_rows=log_sum_exp_rows,
        p_delta_rows=delta_rows,
        p_d_query_rows=d_query_rows,
        p_d_key_rows=d_key_rows,
        p_d_values=d_values,
        p_gate=gate_rows,
        **_arguments(table, query_heads, key_rows),
        row_slots=table.row_slots,
        H=heads,
        token_heads=token_heads(values),
        num_warps=options.lowest_warps,
        num_stages=1,
    )
    if table.num_levels > 1:
        d_query_rows[1:].zero_()  # programs add to them
        _upper_levels_backward(
            table, query_rows, key_rows, values, gate_key, d_out, log_sum_exp_rows, delta_rows, d_query_rows,
            d_key_rows, d_values, gate_rows
        )  # fmt: skip
    if gate is not None:
        launch_kernel(
            token_rows_kernel,
            (table.num_leaves, triton.cdiv(query_heads, HEADS)),
            p_rows=gate_rows,
            p_factor=factor,
            p_out=gate,
            **_head_arguments(table, query_heads),
        )


def _upper_levels_backward(
    table: LeafTable,
    query_rows: Tensor,
    key_rows: Tensor,
    values: Tensor,
    gate_key: Tensor | None,
    d_out: Tensor,
    log_sum_exp_rows: Tensor,
    delta_rows: Tensor,
    d_query_rows: Tensor,
    d_key_rows: Tensor,
    d_values: Tensor,
    gate_rows: Tensor | None,
) -> None:
    """Levels from 1 on: d_key_rows there, and what is added to the others."""
    query_heads, heads, dim = query_rows.shape[3], key_rows.shape[3], query_rows.shape[4]
    options = _OPTIONS[dim]
    turns, groups = _turns(table, heads)
    is_float32 = d_key_rows.dtype == torch.float32
    launch_kernel(
        dense_backward_kernel,
        (turns * groups,),
        t_query_rows=_descriptor(query_rows, options.rows, dim),
        t_key_rows=_descriptor(key_rows, PAIR, dim),
        t_values=_descriptor(values, PAIR, dim),
        t_d_out=_descriptor(d_out, options.rows, dim),
        t_log_sum_exp=_number_descriptor(log_sum_exp_rows, options.rows),
        t_delta=_number_descriptor(delta_rows, options.rows),
        t_d_query_rows=_descriptor(d_query_rows, 64, 64),
        t_d_key_rows=None if is_float32 else _descriptor(d_key_rows, LEAF, dim),
        t_d_values=_descriptor(d_values, LEAF, dim),
        p_d_key_rows=d_key_rows if is_float32 else None,
        p_gate_key=gate_key,
        p_gate=gate_rows,
        **_arguments(table, query_heads, key_rows),
        num_turns=turns,
        num_groups=groups,
        row_slots=table.row_slots,
        H=heads,
        ROWS=options.rows,
        COLUMNS=options.gated_columns if gate_rows is not None else options.columns,
        HELD=options.held and gate_rows is None,
        STAGES=options.backward_stages,
        REGISTERS=options.registers,
        s_section=heads_of_a_section(table, 1, dim, dim, values.element_size() * query_heads // heads),
        num_warps=4,
    )
