"""Triton kernels that move rows: each leaf's queries to the left edges, its keys to the right edges of all spans that
use them there, and the gradients of those rows back.

A program takes a pair of leaves, the first at an even index: at level 0 one of them is moved by the other's matrix,
from level 1 on both have the same siblings. A moved row stays in float32 registers from level to level; it is rounded
as an operand of the next product, to 11 bits, and once for the level that uses it. leaf_table.py says where rows stand.

Where PIECE is given matrices are float32, too much for one tile: a product reads its factors from memory, PIECE
columns or rows at a time, the moved rows too. They lie where the rows came from, or where the gradients go to.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import (
    COUNTS,
    ROWS,
    columns_times,
    dot,
    gates_of_head,
    inverse_of,
    load_rows,
    load_square,
    load_where,
    node,
    normalised,
    place,
    rounded,
    rows_times,
    store_rows,
    store_square_scaled,
    store_where,
    within,
)
from path_attention.ops.kernels.tree_kernels import partial_tile, store_rows_of

PAIR = tl.constexpr(128)  # rows of two leaves


@triton.jit
def _pair(p_table, table_leaves, table_length, table_queries, table_keys, s_heads):
    """First leaf, head, the leaf's index and its sequence's leaves, how many leaves (0: no pair) and tokens the pair
    has, its first token's row, and its sequence's first query and key slots.
    """
    i_leaf = tl.program_id(0) // s_heads
    i_row, s_tokens, i_index, s_count, i_query_base, i_key_base, _ = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    s_leaves = tl.where((i_index % 2 == 0) & (s_tokens > 0), tl.minimum(2, s_count - i_index), 0)
    if s_leaves == 2:
        _, s_more, _, _, _, _, _ = place(i_leaf + 1, p_table, table_leaves, table_length, table_queries, table_keys)
        s_tokens += s_more
    i_head = tl.program_id(0) % s_heads
    return i_leaf, i_head, i_index, s_count, s_leaves, s_tokens, i_row, i_query_base, i_key_base


@triton.jit
def _gates_of_pair(p_g, i_row, s_rows, row_stride):
    """(2, 64) log gates of a pair's tokens for one query head."""
    o = tl.arange(0, 2)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    return tl.load(p_g + tl.cast(i_row, tl.int64) * row_stride + o * row_stride, mask=o < s_rows, other=0.0)


@triton.jit
def _moved_in_pieces(
    p_x, b_x, i_leaf, s_leaves, row_stride, p_node, i_tile, TRANSPOSED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """x M, or x M^T, for a pair's rows x and the matrix i_tile, by way of the pair's rows of p_x (N, 64, heads, D)."""
    tl.debug_barrier()  # every thread has read what lay there before
    store_rows(p_x, b_x, i_leaf * ROWS, s_leaves * ROWS, row_stride, D, BLOCK_D, PAIR)
    tl.debug_barrier()  # and sees what the others have written
    return rows_times(
        p_x, i_leaf * ROWS, s_leaves * ROWS, row_stride, p_node, i_tile, TRANSPOSED, D, BLOCK_D, PIECE, PAIR
    )


@triton.jit
def _store_partial_in_pieces(
    p_partials, i_tile, p_x, i_x, p_y, i_y, row_stride, s_rows, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr
):  # fmt: skip
    """x^T y of s_rows rows each in memory to the matrix i_tile."""
    for i in range(0, D, ROWS):
        b_partial = columns_times(p_x, i_x, row_stride, i, p_y, i_y, row_stride, s_rows, D, BLOCK_D, PIECE, ROWS)
        store_rows_of(p_partials, b_partial, i_tile, i, D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def query_transport_kernel(
    p_q_left,  # (N, 64, HQ, D) WORK, or None: gates alone are wanted
    p_g,  # (T, HQ) or None
    p_node,
    p_gate_node,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_query_rows,  # out (levels, query_slots, 64, HQ, D), of ONLY_TOP (query_slots, 64, HQ, D); None without p_q_left
    p_gate_query,  # out (HQ, levels, query_slots, 64) float32 or None: gates from the edge up to each query, times UNIT
    H,
    query_slots,
    num_levels,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    PIECE: tl.constexpr = None,
    ONLY_TOP: tl.constexpr = False,  # rows of the uppermost level alone are wanted, and no gates
    UNIT: tl.constexpr = 1.0,  # of the gates; rows come with it
):
    """Queries of one pair of leaves and one query head at the left edge of each span that has a left sibling."""
    HQ = H * GROUP
    i_leaf, i_query_head, i_index, _, s_leaves, s_tokens, i_row, i_base, _ = _pair(
        p_table, table_leaves, table_length, table_queries, table_keys, HQ
    )
    if s_leaves == 0:
        return
    i_head = i_query_head // GROUP
    o = tl.arange(0, PAIR)
    m_pair = o < s_leaves * ROWS
    m_right = m_pair & (o >= ROWS)
    HAS_ROWS: tl.constexpr = p_query_rows is not None
    tl.static_assert(HAS_ROWS or (PIECE is None and not ONLY_TOP))
    if HAS_ROWS:
        p_query_rows += i_query_head * D
        p_q_left += i_query_head * D
        b_moved = load_where(p_q_left, i_leaf * ROWS, m_pair, HQ * D, D, BLOCK_D, PAIR).to(tl.float32)
    b_gate = tl.zeros((PAIR,), tl.float32)
    if p_g is not None:
        b_g = _gates_of_pair(p_g + i_query_head, i_row, s_tokens, HQ).to(tl.float32)
        b_gate = tl.reshape(tl.cumsum(b_g, axis=1), (PAIR,))
        p_gate_query += gates_of_head(i_query_head, num_levels, query_slots)
        p_gate_node += i_query_head
    if s_leaves == 2:
        i_slot = (i_base + within(i_index + 1, 0) - 1) * ROWS
        if HAS_ROWS and not ONLY_TOP:
            store_where(p_query_rows, b_moved, i_slot, m_right, HQ * D, D, BLOCK_D, PAIR)
        if p_gate_query is not None:
            tl.store(p_gate_query + i_slot + o, b_gate * UNIT, mask=m_right)
        if i_index != 0:
            if PIECE is not None:
                b_product = _moved_in_pieces(
                    p_q_left, b_moved, i_leaf, s_leaves, HQ * D, p_node, 2 * i_leaf * H + i_head, False, D, BLOCK_D,
                    PIECE
                )  # fmt: skip
                b_moved = load_rows(p_q_left, i_leaf * ROWS, s_leaves * ROWS, HQ * D, D, BLOCK_D, PAIR)
                b_moved = tl.where(m_right[:, None], b_product, b_moved)
            elif HAS_ROWS:
                b_p = load_square(p_node, 2 * i_leaf * H + i_head, D, BLOCK_D)
                b_moved = tl.where(m_right[:, None], dot(rounded(b_moved, WORK), b_p), b_moved)
            if p_gate_query is not None:
                b_gate += tl.where(m_right, tl.load(p_gate_node + 2 * i_leaf * HQ), 0.0)
    for level in range(1, num_levels):
        if ((i_index >> level) & 1) == 1:
            if not ONLY_TOP:
                i_slot = (level * query_slots + i_base + within(i_index, level)) * ROWS
                if HAS_ROWS:  # zeros for a leaf that is not there
                    store_rows(p_query_rows, b_moved, i_slot, PAIR, HQ * D, D, BLOCK_D, PAIR)
            elif level == num_levels - 1:
                i_slot = (i_base + within(i_index, level)) * ROWS
                store_rows(p_query_rows, b_moved, i_slot, PAIR, HQ * D, D, BLOCK_D, PAIR)
            if p_gate_query is not None:
                tl.store(p_gate_query + i_slot + o, b_gate * UNIT)
            if (i_index >> (level + 1)) != 0:
                i_left = ((i_index >> level) - 1) << level
                i_node = 2 * (i_leaf - i_index) + node(i_left, level)
                if PIECE is not None:
                    b_moved = _moved_in_pieces(
                        p_q_left, b_moved, i_leaf, s_leaves, HQ * D, p_node, i_node * H + i_head, False, D, BLOCK_D,
                        PIECE
                    )  # fmt: skip
                elif HAS_ROWS:
                    b_p = load_square(p_node, i_node * H + i_head, D, BLOCK_D)
                    b_moved = dot(rounded(b_moved, WORK), b_p)
                if p_gate_query is not None:
                    b_gate += tl.load(p_gate_node + i_node * HQ)


@triton.jit(do_not_specialize=COUNTS)
def key_transport_kernel(
    p_k_right,  # (N, 64, H, D) WORK
    p_g,  # (T, HQ) or None
    p_node,
    p_gate_node,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_key_rows,  # out (levels, key_slots, 64, H, D), of ONLY_TOP (key_slots, 64, H, D)
    p_gate_key,  # out (HQ, levels, key_slots, 64) float32 or None: the gates after each key up to the edge, times UNIT
    H,
    key_slots,
    num_levels,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    PIECE: tl.constexpr = None,
    ONLY_TOP: tl.constexpr = False,
    UNIT: tl.constexpr = 1.0,
):
    """Keys of one pair of leaves and one key head at the right edge of each span that has a right sibling."""
    HQ = H * GROUP
    i_leaf, i_head, i_index, s_count, s_leaves, s_tokens, i_row, _, i_base = _pair(
        p_table, table_leaves, table_length, table_queries, table_keys, H
    )
    if s_leaves < 2:  # the last leaf of a sequence has no queries to the right of it
        return
    o = tl.arange(0, PAIR)
    m_left = o < ROWS
    o_group = tl.arange(0, BLOCK_GROUP)
    m_group = o_group < GROUP
    o_gate = o[:, None] * HQ + (i_head * GROUP + o_group)[None, :]
    o_gate_out = o[:, None] + gates_of_head(i_head * GROUP + o_group, num_levels, key_slots)[None, :]
    p_key_rows += i_head * D
    p_k_right += i_head * D
    b_moved = load_rows(p_k_right, i_leaf * ROWS, PAIR, H * D, D, BLOCK_D, PAIR).to(tl.float32)
    b_gate = tl.zeros((PAIR, BLOCK_GROUP), tl.float32)
    if p_g is not None:
        # The gates of the tokens after each key, summed from the leaf's end: no difference of sums, for a gate that
        # closes would take the others' bits with it.
        m_next = (o % ROWS != ROWS - 1) & (o + 1 < s_tokens)
        p_next = p_g + (tl.cast(i_row, tl.int64) + 1) * HQ + o_gate
        b_next = tl.load(p_next, mask=m_next[:, None] & m_group[None, :], other=0.0).to(tl.float32)
        b_next = tl.reshape(b_next, (2, ROWS, BLOCK_GROUP))
        b_gate = tl.reshape(tl.cumsum(b_next, axis=1, reverse=True), (PAIR, BLOCK_GROUP))
    i_slot = (i_base + within(i_index, 0)) * ROWS
    if not ONLY_TOP:
        store_where(p_key_rows, b_moved, i_slot, m_left, H * D, D, BLOCK_D, PAIR)
    if p_gate_key is not None:
        tl.store(p_gate_key + i_slot + o_gate_out, b_gate * UNIT, mask=m_left[:, None] & m_group[None, :])
    if i_index + 2 < s_count:
        if PIECE is not None:
            b_product = _moved_in_pieces(
                p_k_right, b_moved, i_leaf, 2, H * D, p_node, 2 * (i_leaf + 1) * H + i_head, True, D, BLOCK_D, PIECE
            )
            b_moved = load_rows(p_k_right, i_leaf * ROWS, PAIR, H * D, D, BLOCK_D, PAIR)
            b_moved = tl.where(m_left[:, None], b_product, b_moved)
        else:
            b_p = load_square(p_node, 2 * (i_leaf + 1) * H + i_head, D, BLOCK_D)
            b_moved = tl.where(m_left[:, None], dot(rounded(b_moved, WORK), tl.trans(b_p)), b_moved)
        if p_gate_key is not None:
            b_span = tl.load(p_gate_node + 2 * (i_leaf + 1) * HQ + i_head * GROUP + o_group, mask=m_group, other=0.0)
            b_gate += tl.where(m_left[:, None], b_span[None, :], 0.0)
    for level in range(1, num_levels):
        i_right = ((i_index >> level) + 1) << level
        if ((i_index >> level) & 1) == 0 and i_right < s_count:
            if not ONLY_TOP:
                i_slot = (level * key_slots + i_base + within(i_index, level)) * ROWS
                store_rows(p_key_rows, b_moved, i_slot, PAIR, H * D, D, BLOCK_D, PAIR)
            elif level == num_levels - 1:
                i_slot = (i_base + within(i_index, level)) * ROWS
                store_rows(p_key_rows, b_moved, i_slot, PAIR, H * D, D, BLOCK_D, PAIR)
            if p_gate_key is not None:
                tl.store(p_gate_key + i_slot + o_gate_out, b_gate * UNIT, mask=m_group[None, :])
            if i_right + (1 << level) < s_count:
                i_node = 2 * (i_leaf - i_index) + node(i_right, level)
                if PIECE is not None:
                    b_moved = _moved_in_pieces(
                        p_k_right, b_moved, i_leaf, 2, H * D, p_node, i_node * H + i_head, True, D, BLOCK_D, PIECE
                    )
                else:
                    b_p = load_square(p_node, i_node * H + i_head, D, BLOCK_D)
                    b_moved = dot(rounded(b_moved, WORK), tl.trans(b_p))
                if p_gate_key is not None:
                    b_span = tl.load(p_gate_node + i_node * HQ + i_head * GROUP + o_group, mask=m_group, other=0.0)
                    b_gate += b_span[None, :]


@triton.jit
def _store_pair(
    p_x, p_power, b_x, i_leaf, i_head, s_leaves, s_heads, D: tl.constexpr, BLOCK_D: tl.constexpr, WORK: tl.constexpr,
    PIECE: tl.constexpr
):  # fmt: skip
    """A pair's gradients to (N, 64, heads, D), to be multiplied by the power (N, heads) of their leaf."""
    b_x, s_power, _inverse = normalised(b_x, WORK)
    if PIECE is not None:
        tl.debug_barrier()  # every thread has read what lay there before
    store_rows(p_x + i_head * D, b_x, i_leaf * ROWS, s_leaves * ROWS, s_heads * D, D, BLOCK_D, PAIR)
    if WORK is not None:
        o = tl.arange(0, 2)
        tl.store(p_power + (i_leaf + o) * s_heads + i_head, tl.zeros((2,), tl.float32) + s_power, mask=o < s_leaves)


@triton.jit
def _moved_back(
    b_d, b_x, b_p, p_partials, p_partials_power, i_tile, OF_QUERIES: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WORK: tl.constexpr, UNIT: tl.constexpr = 1.0
):  # fmt: skip
    """dx = dx' P^T, of keys dx' P, for the gradients dx' of rows x that P has moved, and x^T dx', of keys dx'^T x, to
    the tile i_tile; of rows b_x = UNIT x.
    """
    b_x = rounded(b_x, WORK)
    b_half, s_power, _inverse = normalised(b_d, WORK)
    if OF_QUERIES:
        b_partial = dot(tl.trans(b_x), b_half) * (s_power * (1 / UNIT))
    else:
        b_partial = dot(tl.trans(b_half), b_x) * s_power
    store_square_scaled(p_partials, p_partials_power, b_partial, i_tile, D, BLOCK_D, WORK)
    if OF_QUERIES:
        b_p = tl.trans(b_p)
    return dot(b_half, b_p) * s_power


@triton.jit(do_not_specialize=COUNTS)
def query_transport_backward_kernel(
    p_node,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_query_rows,  # (levels, query_slots, 64, HQ, D), times UNIT, which without PIECE alone may be another than 1
    p_d_query_rows,  # (levels, query_slots, 64, HQ, D), of ONLY_TOP (query_slots, 64, HQ, D): of rows without UNIT
    p_factor,  # what those were multiplied by, or None
    p_d_q_left,  # out (N, 64, HQ, D) WORK, to be multiplied by its power
    p_d_q_left_power,  # out (N, HQ) float32
    p_partials,  # out (tiles, HQ, D, D) WORK, likewise: the pair's share of the gradients of the matrices that moved it
    p_partials_power,  # out (tiles, HQ) float32
    H,
    query_slots,
    num_levels,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    PIECE: tl.constexpr = None,
    ONLY_TOP: tl.constexpr = False,  # rows of lower levels have no gradients but those of the uppermost one
    UNIT: tl.constexpr = 1.0,
):
    """Gradients of one pair's moved queries back at its leaves' left edges: x' = x P_left gives dx = dx' P_left^T and
    dP_left = x^T dx'.

    All that a level reads is asked for before anything is done with it: a program waits for memory once a level. With
    PIECE gradients of rows are not kept while others are moved, for they would be spilled.
    """
    HQ = H * GROUP
    i_leaf, i_query_head, i_index, _, s_leaves, s_tokens, _, i_base, _ = _pair(
        p_table, table_leaves, table_length, table_queries, table_keys, HQ
    )
    if s_leaves == 0:
        return
    i_head = i_query_head // GROUP
    o = tl.arange(0, PAIR)
    m_pair = o < s_tokens
    p_query_rows += i_query_head * D
    p_d_query_rows += i_query_head * D
    s_factor = inverse_of(p_factor)
    b_d = tl.zeros((PAIR, BLOCK_D), tl.float32)
    for i in range(1, num_levels):
        level = num_levels - i
        if ((i_index >> level) & 1) == 1:
            i_slot = level * query_slots + i_base + within(i_index, level)
            if PIECE is None and not ONLY_TOP:
                b_row = load_where(p_d_query_rows, i_slot * ROWS, m_pair, HQ * D, D, BLOCK_D, PAIR)
            if (i_index >> (level + 1)) != 0:
                i_tile = partial_tile(level, i_base + within(i_index, level), query_slots) * HQ + i_query_head
                i_left = ((i_index >> level) - 1) << level
                i_node = 2 * (i_leaf - i_index) + node(i_left, level)
                if PIECE is not None:
                    p_moved = p_d_q_left + i_query_head * D
                    b_d = _moved_in_pieces(
                        p_moved, b_d, i_leaf, s_leaves, HQ * D, p_node, i_node * H + i_head, True, D, BLOCK_D, PIECE
                    )
                    _store_partial_in_pieces(
                        p_partials, i_tile, p_query_rows, i_slot * ROWS, p_moved, i_leaf * ROWS, HQ * D,
                        s_leaves * ROWS, D, BLOCK_D, PIECE
                    )  # fmt: skip
                else:
                    b_x = load_where(p_query_rows, i_slot * ROWS, m_pair, HQ * D, D, BLOCK_D, PAIR)
                    b_p = load_square(p_node, i_node * H + i_head, D, BLOCK_D)
                    b_d = _moved_back(b_d, b_x, b_p, p_partials, p_partials_power, i_tile, True, D, BLOCK_D, WORK, UNIT)
            if not ONLY_TOP:
                if PIECE is not None:
                    b_row = load_where(p_d_query_rows, i_slot * ROWS, m_pair, HQ * D, D, BLOCK_D, PAIR)
                b_d += s_factor * b_row.to(tl.float32)
            elif i == 1:
                i_slot = i_base + within(i_index, level)
                b_row = load_where(p_d_query_rows, i_slot * ROWS, m_pair, HQ * D, D, BLOCK_D, PAIR)
                b_d += s_factor * b_row.to(tl.float32)
    if s_leaves == 2:
        m_right = m_pair & (o >= ROWS)
        i_slot = i_base + within(i_index + 1, 0)
        if PIECE is None and not ONLY_TOP:
            b_row = load_where(p_d_query_rows, (i_slot - 1) * ROWS, m_right, HQ * D, D, BLOCK_D, PAIR)
        if i_index != 0:
            i_tile = partial_tile(0, i_slot, query_slots) * HQ + i_query_head
            if PIECE is not None:
                p_moved = p_d_q_left + i_query_head * D
                b_product = _moved_in_pieces(
                    p_moved, b_d, i_leaf, s_leaves, HQ * D, p_node, 2 * i_leaf * H + i_head, True, D, BLOCK_D, PIECE
                )
                _store_partial_in_pieces(
                    p_partials, i_tile, p_query_rows, i_slot * ROWS, p_moved, (i_leaf + 1) * ROWS, HQ * D, ROWS, D,
                    BLOCK_D, PIECE
                )  # fmt: skip
                b_d = load_rows(p_moved, i_leaf * ROWS, s_leaves * ROWS, HQ * D, D, BLOCK_D, PAIR)
                b_d = tl.where(m_right[:, None], b_product, b_d)
            else:
                b_x = load_where(p_query_rows, (i_slot - 1) * ROWS, m_right, HQ * D, D, BLOCK_D, PAIR)
                b_p = load_square(p_node, 2 * i_leaf * H + i_head, D, BLOCK_D)
                b_product = _moved_back(
                    b_d, b_x, b_p, p_partials, p_partials_power, i_tile, True, D, BLOCK_D, WORK, UNIT
                )
                b_d = tl.where(m_right[:, None], b_product, b_d)
        if not ONLY_TOP:
            if PIECE is not None:
                b_row = load_where(p_d_query_rows, (i_slot - 1) * ROWS, m_right, HQ * D, D, BLOCK_D, PAIR)
            b_d += s_factor * b_row.to(tl.float32)
    _store_pair(p_d_q_left, p_d_q_left_power, b_d, i_leaf, i_query_head, s_leaves, HQ, D, BLOCK_D, WORK, PIECE)


@triton.jit(do_not_specialize=COUNTS)
def key_transport_backward_kernel(
    p_node,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_key_rows,  # (levels, key_slots, 64, H, D)
    p_d_key_rows,  # (levels, key_slots, 64, H, D), of ONLY_TOP (key_slots, 64, H, D): from the attention
    p_factor,
    p_d_k_right,  # out (N, 64, H, D) WORK, to be multiplied by its power
    p_d_k_right_power,  # out (N, H) float32
    p_partials,  # out (tiles, H, D, D) WORK, likewise
    p_partials_power,  # out (tiles, H) float32
    H,
    key_slots,
    num_levels,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    PIECE: tl.constexpr = None,
    ONLY_TOP: tl.constexpr = False,
):
    """The same for keys: x' = x P_right^T gives dx = dx' P_right and dP_right = dx'^T x."""
    i_leaf, i_head, i_index, s_count, s_leaves, _, _, _, i_base = _pair(
        p_table, table_leaves, table_length, table_queries, table_keys, H
    )
    if s_leaves < 2:
        return
    m_left = tl.arange(0, PAIR) < ROWS
    p_key_rows += i_head * D
    p_d_key_rows += i_head * D
    s_factor = inverse_of(p_factor)
    b_d = tl.zeros((PAIR, BLOCK_D), tl.float32)
    for i in range(1, num_levels):
        level = num_levels - i
        i_right = ((i_index >> level) + 1) << level
        if ((i_index >> level) & 1) == 0 and i_right < s_count:
            i_slot = level * key_slots + i_base + within(i_index, level)
            if PIECE is None and not ONLY_TOP:
                b_row = load_rows(p_d_key_rows, i_slot * ROWS, PAIR, H * D, D, BLOCK_D, PAIR)
            if i_right + (1 << level) < s_count:
                i_tile = partial_tile(level, i_base + within(i_index, level), key_slots) * H + i_head
                i_node = 2 * (i_leaf - i_index) + node(i_right, level)
                if PIECE is not None:
                    p_moved = p_d_k_right + i_head * D
                    b_d = _moved_in_pieces(
                        p_moved, b_d, i_leaf, 2, H * D, p_node, i_node * H + i_head, False, D, BLOCK_D, PIECE
                    )
                    _store_partial_in_pieces(
                        p_partials, i_tile, p_moved, i_leaf * ROWS, p_key_rows, i_slot * ROWS, H * D, PAIR, D,
                        BLOCK_D, PIECE
                    )  # fmt: skip
                else:
                    b_x = load_rows(p_key_rows, i_slot * ROWS, PAIR, H * D, D, BLOCK_D, PAIR)
                    b_p = load_square(p_node, i_node * H + i_head, D, BLOCK_D)
                    b_d = _moved_back(b_d, b_x, b_p, p_partials, p_partials_power, i_tile, False, D, BLOCK_D, WORK)
            if not ONLY_TOP:
                if PIECE is not None:
                    b_row = load_rows(p_d_key_rows, i_slot * ROWS, PAIR, H * D, D, BLOCK_D, PAIR)
                b_d += s_factor * b_row.to(tl.float32)
            elif i == 1:
                i_slot = i_base + within(i_index, level)
                b_d += s_factor * load_rows(p_d_key_rows, i_slot * ROWS, PAIR, H * D, D, BLOCK_D, PAIR).to(tl.float32)
    i_slot = i_base + within(i_index, 0)
    if PIECE is None and not ONLY_TOP:
        b_row = load_where(p_d_key_rows, i_slot * ROWS, m_left, H * D, D, BLOCK_D, PAIR)
    if i_index + 2 < s_count:
        i_tile = partial_tile(0, i_slot, key_slots) * H + i_head
        if PIECE is not None:
            p_moved = p_d_k_right + i_head * D
            b_product = _moved_in_pieces(
                p_moved, b_d, i_leaf, 2, H * D, p_node, 2 * (i_leaf + 1) * H + i_head, False, D, BLOCK_D, PIECE
            )
            _store_partial_in_pieces(
                p_partials, i_tile, p_moved, i_leaf * ROWS, p_key_rows, i_slot * ROWS, H * D, ROWS, D, BLOCK_D,
                PIECE
            )  # fmt: skip
            b_d = load_rows(p_moved, i_leaf * ROWS, PAIR, H * D, D, BLOCK_D, PAIR)
            b_d = tl.where(m_left[:, None], b_product, b_d)
        else:
            b_x = load_where(p_key_rows, i_slot * ROWS, m_left, H * D, D, BLOCK_D, PAIR)
            b_p = load_square(p_node, 2 * (i_leaf + 1) * H + i_head, D, BLOCK_D)
            b_product = _moved_back(b_d, b_x, b_p, p_partials, p_partials_power, i_tile, False, D, BLOCK_D, WORK)
            b_d = tl.where(m_left[:, None], b_product, b_d)
    if not ONLY_TOP:
        if PIECE is not None:
            b_row = load_where(p_d_key_rows, i_slot * ROWS, m_left, H * D, D, BLOCK_D, PAIR)
        b_d += s_factor * b_row.to(tl.float32)
    _store_pair(p_d_k_right, p_d_k_right_power, b_d, i_leaf, i_head, s_leaves, H, D, BLOCK_D, WORK, PIECE)
