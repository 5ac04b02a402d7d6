"""Triton kernels of softmax attention without a mask, with a gate for every row and every key: a pair of pieces.

    S = Q K^T + gate_q + gate_k      P = exp(S - log_sum_exp)      out = P V

    dV = P^T dO      dS = P (dO V^T - delta)      dQ = dS K      dK = dS^T Q      gate_row, gate_column: sums of dS

The loops are those of the attention between sibling spans (dense_kernels.py). Every head's rows lie one after another,
(batch, heads, rows, dim), so that a head of its own is all that those loops see.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.dense_kernels import (
    LEAF,
    _attend,
    _bias,
    _head_rows,
    _key_gradients,
    _load,
    _query_gradients,
    _store,
    block_of,
)
from path_attention.ops.kernels.tiles import COUNTS, LOG2_E


@triton.jit
def _all(ROWS: tl.constexpr):
    """A mask that leaves nothing out: launchers take whole tiles alone."""
    return tl.arange(0, ROWS) < ROWS


@triton.jit(do_not_specialize=COUNTS)
def pair_forward_kernel(
    t_keys,  # descriptors of (batch * heads * keys, D) in tiles of KEYS rows, or None
    t_values,
    p_queries,  # (batch, HQ, rows, D)
    p_keys,  # (batch, H, keys, D)
    p_values,  # (batch, H, keys, DV)
    p_gate_query,  # (batch, HQ, rows) float32
    p_gate_key,  # (batch, HQ, keys) float32
    p_out,  # out (batch, HQ, rows, DV)
    p_log_sum_exp,  # out (batch, HQ, rows) float32
    s_rows,
    s_keys,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A leaf's rows of one query head."""
    i_query_head = tl.program_id(1).to(tl.int64)  # of all in the batch
    i_head = i_query_head // GROUP
    i_row = i_query_head * s_rows + tl.program_id(0) * LEAF
    m_row = _all(LEAF)
    b_q = _load(p_queries, i_row, m_row, D, D, LEAF)
    b_bias = _bias(m_row, p_gate_query, i_row, LEAF)
    b_max = tl.full((LEAF,), float("-inf"), tl.float32)
    b_sum = tl.zeros((LEAF,), tl.float32)
    b_acc = tl.zeros((LEAF, block_of(DV)), tl.float32)
    i_key = (i_head * s_keys).to(tl.int32)  # of descriptors: they count in 32 bits
    p_gate_key += (i_query_head - i_head) * s_keys
    b_max, b_sum, b_acc = _attend(
        b_q, b_bias, b_max, b_sum, b_acc, t_keys, t_values, p_keys, p_values, p_gate_key, i_key, i_key, s_keys,
        0, 1, DV, 1, D, DV, KEYS, STAGES
    )  # fmt: skip
    _store(p_out, b_acc / b_sum[:, None], i_row, m_row, DV, DV, LEAF)
    tl.store(_head_rows(p_log_sum_exp, i_row, 1, LEAF), (b_max + tl.log2(b_sum)) / LOG2_E)


@triton.jit(do_not_specialize=COUNTS)
def pair_backward_queries_kernel(
    t_keys,
    t_values,
    p_queries,
    p_keys,
    p_values,
    p_gate_query,
    p_gate_key,
    p_d_out,  # (batch, HQ, rows, DV)
    p_log_sum_exp,  # (batch, HQ, rows) float32, of the whole attention
    p_delta,  # (batch, HQ, rows) float32: rowsum(d_out * out) of the whole attention
    p_d_queries,  # out (batch, HQ, rows, D) float32
    p_gate_row,  # out (batch, HQ, rows) float32
    s_rows,
    s_keys,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a leaf's rows of one query head."""
    i_query_head = tl.program_id(1).to(tl.int64)
    i_head = i_query_head // GROUP
    i_row = i_query_head * s_rows + tl.program_id(0) * LEAF
    m_row = _all(LEAF)
    b_q = _load(p_queries, i_row, m_row, D, D, LEAF)
    b_lse = tl.load(_head_rows(p_log_sum_exp, i_row, 1, LEAF)) * LOG2_E
    b_delta = tl.load(_head_rows(p_delta, i_row, 1, LEAF))
    b_shift = _bias(m_row, p_gate_query, i_row, LEAF) - b_lse
    b_d_out = _load(p_d_out, i_row, m_row, DV, DV, LEAF)
    i_key = (i_head * s_keys).to(tl.int32)
    p_gate_key += (i_query_head - i_head) * s_keys
    b_d_q, b_row_sum = _query_gradients(
        b_q, b_d_out, b_shift, b_delta, tl.zeros((LEAF,), tl.float32), t_keys, t_values, p_keys, p_values, p_gate_key,
        i_key, i_key, s_keys, 0, 1, 1, D, DV, KEYS, STAGES
    )  # fmt: skip
    _store(p_d_queries, b_d_q, i_row, m_row, D, D, LEAF)
    tl.store(_head_rows(p_gate_row, i_row, 1, LEAF), b_row_sum)


@triton.jit(do_not_specialize=COUNTS)
def pair_backward_keys_kernel(
    t_queries,  # descriptors of (batch * query heads * rows, D) in tiles of LEAF rows, or None
    t_d_out,
    p_queries,
    p_keys,
    p_values,
    p_gate_query,
    p_gate_key,
    p_d_out,
    p_log_sum_exp,
    p_delta,
    p_d_keys,  # out (batch, H, keys, D) float32
    p_d_values,  # out (batch, H, keys, DV) float32
    p_gate_column,  # out (batch, HQ, keys) float32
    s_rows,
    s_keys,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a leaf's keys and values of one key head, over all query heads of its group."""
    i_head = tl.program_id(1).to(tl.int64)
    i_own = tl.program_id(0) * LEAF
    i_key = i_head * s_keys + i_own
    m_key = _all(LEAF)
    b_k = _load(p_keys, i_key, m_key, D, D, LEAF)
    b_v = _load(p_values, i_key, m_key, DV, DV, LEAF)
    b_d_k = tl.zeros((LEAF, block_of(D)), tl.float32)
    b_d_v = tl.zeros((LEAF, block_of(DV)), tl.float32)
    for i_group in range(GROUP):
        i_query_head = i_head * GROUP + i_group
        i_column = i_query_head * s_keys + i_own
        i_row = (i_query_head * s_rows).to(tl.int32)
        b_d_k, b_d_v, b_column_sum = _key_gradients(
            b_k, b_v, _bias(m_key, p_gate_key, i_column, LEAF), b_d_k, b_d_v, tl.zeros((LEAF,), tl.float32),
            t_queries, t_d_out, p_queries, p_gate_query, p_d_out, p_log_sum_exp, p_delta, i_row, i_row, s_rows, 0, 1,
            D, DV, STAGES
        )  # fmt: skip
        tl.store(_head_rows(p_gate_column, i_column, 1, LEAF), b_column_sum)
    _store(p_d_keys, b_d_k, i_key, m_key, D, D, LEAF)
    _store(p_d_values, b_d_v, i_key, m_key, DV, DV, LEAF)
