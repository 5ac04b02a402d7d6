"""Triton kernels that join what separate dense attentions computed for the same rows, in one pass over memory.

Used where the levels run in torch's own attention kernels: each level brings tensors of its own, handed over as tuples.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import COUNTS, LOG2_E, ROWS, gates_of_head, load_rows, place, store_rows, within


@triton.jit
def _level_log_sum_exp(p_lse, i_slot, i_query_head, HQ, level):
    """Rows of one leaf from (spans, HQ, 64 * 2^level), the layout that torch's kernels give."""
    o = tl.arange(0, ROWS)
    i_span = (i_slot >> level).to(tl.int64)
    i_row = (i_slot & ((1 << level) - 1)) * ROWS
    return tl.load(p_lse + (i_span * HQ + i_query_head) * (ROWS << level) + i_row + o)


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(
    p_out,  # (T, HQ, DV): in, attention within the leaf; out, the whole attention
    p_log_sum_exp,  # (T, HQ) float32, likewise
    parts,  # one (query_slots, 64, HQ, DV) for each level from FIRST_LEVEL on
    parts_log_sum_exp,  # one (spans, HQ, 64 * 2^level) float32 for each
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    HQ,
    FIRST_LEVEL: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = sum_l exp(lse_l - lse) out_l with lse = log sum_l exp(lse_l), over the leaf and its left siblings."""
    i_leaf = tl.program_id(0) // HQ
    i_query_head = tl.program_id(0) % HQ
    i_row, s_rows, i_index, _, i_base, _, _ = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    if s_rows == 0 or (i_index >> FIRST_LEVEL) == 0:
        return
    o = tl.arange(0, ROWS)
    p_lse = p_log_sum_exp + (i_row + o).to(tl.int64) * HQ + i_query_head
    b_own = tl.load(p_lse, mask=o < s_rows, other=0.0)
    b_max = b_own
    for i in tl.static_range(NUM_LEVELS):
        level = FIRST_LEVEL + i
        if ((i_index >> level) & 1) == 1:
            b_lse = _level_log_sum_exp(parts_log_sum_exp[i], i_base + within(i_index, level), i_query_head, HQ, level)
            b_max = tl.maximum(b_max, b_lse)
    b_sum = tl.exp2((b_own - b_max) * LOG2_E)
    b_out = load_rows(p_out + i_query_head * DV, i_row, s_rows, HQ * DV, DV, BLOCK_DV, ROWS).to(tl.float32)
    b_out *= b_sum[:, None]
    for i in tl.static_range(NUM_LEVELS):
        level = FIRST_LEVEL + i
        if ((i_index >> level) & 1) == 1:
            i_slot = i_base + within(i_index, level)
            b_lse = _level_log_sum_exp(parts_log_sum_exp[i], i_slot, i_query_head, HQ, level)
            b_weight = tl.exp2((b_lse - b_max) * LOG2_E)
            b_sum += b_weight
            p_part = parts[i] + i_query_head * DV
            b_part = load_rows(p_part, i_slot.to(tl.int64) * ROWS, ROWS, HQ * DV, DV, BLOCK_DV, ROWS)
            b_out += b_weight[:, None] * b_part.to(tl.float32)
    store_rows(p_out + i_query_head * DV, b_out / b_sum[:, None], i_row, s_rows, HQ * DV, DV, BLOCK_DV, ROWS)
    tl.store(p_lse, b_max + tl.log2(b_sum) / LOG2_E, mask=o < s_rows)


@triton.jit(do_not_specialize=COUNTS)
def sum_values_kernel(
    p_d_values,  # (T, H, DV) float32: in, the levels below FIRST_LEVEL; out, all
    parts,  # one (key_slots, 64, H, DV) for each level from FIRST_LEVEL on
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    H,
    FIRST_LEVEL: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Gradient of the values: the sum over the levels at which their leaf has a right sibling."""
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_row, s_rows, i_index, s_count, _, i_base, _ = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    if s_rows == 0:
        return
    b_d = load_rows(p_d_values + i_head * DV, i_row, s_rows, H * DV, DV, BLOCK_DV, ROWS)
    for i in tl.static_range(NUM_LEVELS):
        level = FIRST_LEVEL + i
        if ((i_index >> level) & 1) == 0 and ((i_index >> level) + 1) << level < s_count:
            i_slot = (i_base + within(i_index, level)).to(tl.int64) * ROWS
            b_d += load_rows(parts[i] + i_head * DV, i_slot, ROWS, H * DV, DV, BLOCK_DV, ROWS).to(tl.float32)
    store_rows(p_d_values + i_head * DV, b_d, i_row, s_rows, H * DV, DV, BLOCK_DV, ROWS)


@triton.jit
def _raise_to(p_bits, b_x):
    """The largest |x|, as the bits of a float32: those of positive numbers are in the order of the numbers."""
    s_largest = tl.max(tl.max(tl.abs(b_x), axis=1), axis=0)
    tl.atomic_max(p_bits, s_largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _load_head_rows(p_x, i_rows, s_rows, s_heads, token_heads, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Rows i_rows of (T, s_heads, DV), counted head by head, in float32; a token has token_heads heads in memory."""
    o_column = tl.arange(0, BLOCK_DV)
    i_token = i_rows // s_heads
    p_rows = p_x + (i_token.to(tl.int64) * token_heads + (i_rows - i_token * s_heads)) * DV
    mask = (i_rows < s_rows)[:, None] & (o_column < DV)[None, :]
    return tl.load(p_rows[:, None] + o_column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=(*COUNTS, "HQ", "out_heads", "value_heads"))
def delta_kernel(
    p_out,  # (T, HQ, DV), some of out_heads heads of a token
    p_d_out,  # likewise
    p_v,  # (T, H, DV), some of value_heads
    p_delta,  # out (T, HQ) float32
    p_largest,  # out (2,) int32, zeros before: bits of the largest |d_out| and |v|; None to leave them out
    s_rows,  # T * HQ
    s_values,  # T * H
    HQ,
    H,
    out_heads,
    value_heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """delta = rowsum(d_out * out)."""
    i_row = tl.program_id(0) * BLOCK_ROWS  # 2^31 rows would not fit the memory of a GPU, and 64 bits divide slowly
    o = tl.arange(0, BLOCK_ROWS)
    b_out = _load_head_rows(p_out, i_row + o, s_rows, HQ, out_heads, DV, BLOCK_DV)
    b_d_out = _load_head_rows(p_d_out, i_row + o, s_rows, HQ, out_heads, DV, BLOCK_DV)
    tl.store(p_delta + i_row + o, tl.sum(b_out * b_d_out, axis=1), mask=o < s_rows - i_row)
    if p_largest is not None:
        _raise_to(p_largest, b_d_out)
        if i_row < s_values:
            _raise_to(p_largest + 1, _load_head_rows(p_v, i_row + o, s_values, H, value_heads, DV, BLOCK_DV))


@triton.jit
def factor_kernel(
    p_largest,  # (2,) int32, of delta_kernel
    p_factor,  # out (1,) float32
    HEADROOM: tl.constexpr,
):
    """The power of two that makes dS an operand in float16: 2^HEADROOM over the powers of |d_out| and |v|."""
    s_exponents = (tl.load(p_largest) >> 23) + (tl.load(p_largest + 1) >> 23) - 2 * 127
    s_exponent = tl.minimum(tl.maximum(HEADROOM - s_exponents, -126), 126)
    tl.store(p_factor, ((s_exponent + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _by_token(i_row, o_head, HQ):
    """Where 64 tokens' numbers for some heads stand in (T, HQ): (64, heads)."""
    return tl.cast(i_row, tl.int64) * HQ + tl.arange(0, ROWS)[:, None] * HQ + o_head[None, :]


@triton.jit
def _by_head(i_slot, o_head, row_slots):
    """Where they stand in (HQ, row_slots, 64)."""
    return (tl.cast(o_head, tl.int64) * row_slots + i_slot)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit(do_not_specialize=COUNTS)
def output_rows_kernel(
    p_log_sum_exp,  # (T, HQ) float32
    p_delta,  # (T, HQ) float32
    p_factor,  # (1,) float32
    p_gate_query,  # (HQ, levels, query_slots, 64) float32, base 2, or None
    p_log_sum_exp_rows,  # out (HQ, row_slots, 64) float32, with gates (HQ, levels, query_slots, 64): see below
    p_delta_rows,  # out (HQ, row_slots, 64) float32: -delta; 0 where no token is
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    HQ,
    num_levels,
    query_slots,
    row_slots,
    BLOCK_HEADS: tl.constexpr,
):
    """One leaf's numbers for each head side by side, and those of a slot that no leaf of its sequence stands at.

    Of the log-sum-exp, -x in base 2, plus log2 of the factor, and -infinity where no token is; with gates it is wanted
    at each level that the leaf has a left sibling at, plus the row's gate there. What logits and their gradients are
    added to: products begin with it.
    """
    i_leaf = tl.program_id(0)
    i_row, s_rows, i_index, s_count, i_base, _, i_slot = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    o = tl.arange(0, ROWS)
    o_head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    o_given = _by_token(i_row, o_head, HQ)
    m_head = (o_head < HQ)[None, :]
    m_given = (o < s_rows)[:, None] & m_head
    b_log_sum_exp = tl.load(p_log_sum_exp + o_given, mask=m_given, other=float("inf"))
    b_log_sum_exp = tl.log2(tl.load(p_factor)) - b_log_sum_exp * LOG2_E
    b_delta = -tl.load(p_delta + o_given, mask=m_given, other=0.0)
    o_rows = _by_head(i_slot, o_head, row_slots)
    if s_rows == 0:
        return
    tl.store(p_delta_rows + o_rows, b_delta, mask=m_head)
    b_none = tl.full((ROWS, BLOCK_HEADS), float("-inf"), tl.float32)
    is_alone = (i_index % 2 == 0) & (i_index + 1 == s_count)
    if is_alone:
        tl.store(p_delta_rows + o_rows + ROWS, tl.zeros((ROWS, BLOCK_HEADS), tl.float32), mask=m_head)
    if p_gate_query is None:
        tl.store(p_log_sum_exp_rows + o_rows, b_log_sum_exp, mask=m_head)
        if is_alone:
            tl.store(p_log_sum_exp_rows + o_rows + ROWS, b_none, mask=m_head)
    else:
        o_gates = gates_of_head(o_head, num_levels, query_slots)[None, :] + o[:, None]
        for level in range(num_levels):
            if ((i_index >> level) & 1) == 1:
                i_query = (level * query_slots + i_base + within(i_index, level)) * ROWS
                b_gate = tl.load(p_gate_query + i_query + o_gates, mask=m_head, other=0.0)
                tl.store(p_log_sum_exp_rows + i_query + o_gates, b_log_sum_exp + b_gate, mask=m_head)
                if is_alone:
                    tl.store(p_log_sum_exp_rows + i_query + ROWS + o_gates, b_none, mask=m_head)


@triton.jit(do_not_specialize=COUNTS)
def token_rows_kernel(
    p_rows,  # (HQ, row_slots, 64) float32
    p_factor,  # (1,) float32
    p_out,  # out (T, HQ) float32: divided by the factor
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    HQ,
    row_slots,
    BLOCK_HEADS: tl.constexpr,
):
    """One leaf's numbers from where output_rows_kernel has its own back to the tokens."""
    i_row, s_rows, _, _, _, _, i_slot = place(
        tl.program_id(0), p_table, table_leaves, table_length, table_queries, table_keys
    )
    o = tl.arange(0, ROWS)
    o_head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    mask = (o < s_rows)[:, None] & (o_head < HQ)[None, :]
    b_x = tl.load(p_rows + _by_head(i_slot, o_head, row_slots), mask=mask, other=0.0) / tl.load(p_factor)
    tl.store(p_out + _by_token(i_row, o_head, HQ), b_x, mask=mask)
