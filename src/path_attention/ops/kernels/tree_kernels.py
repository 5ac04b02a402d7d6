"""Triton kernels of the tree of transitions: products of the spans' matrices upwards, their gradients downwards.

The matrix P of a span is kept in two parts of half precision, what it rounds to and the rest: 22 bits together. A row
that a span moves needs the first part only.

A program works through LEVELS levels of one subtree: what a level writes, the next one reads in the same program.

Where PIECE is given matrices are float32, too much for one tile: made ROWS rows at a time, from PIECE columns or
rows of their factors at a time.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import (
    COUNTS,
    ROWS,
    columns_times,
    dot,
    dot_split,
    load_power,
    load_rows,
    load_square,
    node,
    place,
    rest,
    rounded,
    rows_times,
    store_rows,
    store_square,
    store_square_scaled,
    within,
)


@triton.jit
def _rest_of(p_rest, b_x, i_tile, D: tl.constexpr, BLOCK_D: tl.constexpr, WORK: tl.constexpr):
    """What rounding left of the matrix b_x; without WORK nothing."""
    if WORK is None:
        return b_x
    else:
        return load_square(p_rest, i_tile, D, BLOCK_D)


@triton.jit
def _rows_of(p_x, i_tile, i_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i_row .. i_row + ROWS of matrix i_tile of p_x (tiles, D, D)."""
    return load_rows(p_x + tl.cast(i_tile, tl.int64) * (D * D), i_row, D - i_row, D, D, BLOCK_D, ROWS)


@triton.jit
def store_rows_of(p_x, b_x, i_tile, i_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of _rows_of."""
    store_rows(p_x + tl.cast(i_tile, tl.int64) * (D * D), b_x, i_row, D - i_row, D, D, BLOCK_D, ROWS)


@triton.jit
def _product_in_pieces(
    p_node, i_right, i_left, i_parent, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """P_parent = P_right P_left."""
    p_right = p_node + tl.cast(i_right, tl.int64) * (D * D)
    for i in range(0, D, ROWS):
        b_parent = rows_times(p_right, i, D - i, D, p_node, i_left, False, D, BLOCK_D, PIECE, ROWS)
        store_rows_of(p_node, b_parent, i_parent, i, D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def tree_kernel(
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_node,  # (2 N, H, D, D) WORK: reads first_level, writes those above it
    p_node_rest,  # likewise
    p_gate_node,  # (2 N, HQ) float32 or None, likewise
    first_level,
    H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    LEVELS: tl.constexpr,
    PIECE: tl.constexpr = None,
):
    """P_parent = P_right P_left for the parents that something lies to the right of: no other is ever used."""
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    _, _, i_first, s_count, _, _, _ = place(i_leaf, p_table, table_leaves, table_length, table_queries, table_keys)
    if (i_first & ((1 << (first_level + LEVELS)) - 1)) != 0:
        return
    i_base = 2 * (i_leaf - i_first)
    for i in range(LEVELS):
        level = first_level + i
        s_span = 1 << level
        for i_pair in range(1 << (LEVELS - 1 - i)):
            i_left = i_first + 2 * s_span * i_pair
            if i_left + 2 * s_span < s_count:
                i_left_node = i_base + node(i_left, level)
                i_right_node = i_base + node(i_left + s_span, level)
                i_parent_node = i_base + node(i_left, level + 1)
                if PIECE is not None:
                    _product_in_pieces(
                        p_node, i_right_node * H + i_head, i_left_node * H + i_head, i_parent_node * H + i_head, D,
                        BLOCK_D, PIECE
                    )  # fmt: skip
                else:
                    b_left = load_square(p_node, i_left_node * H + i_head, D, BLOCK_D)
                    b_right = load_square(p_node, i_right_node * H + i_head, D, BLOCK_D)
                    b_left_rest = _rest_of(p_node_rest, b_left, i_left_node * H + i_head, D, BLOCK_D, WORK)
                    b_right_rest = _rest_of(p_node_rest, b_right, i_right_node * H + i_head, D, BLOCK_D, WORK)
                    b_parent = dot_split(b_right, b_right_rest, b_left, b_left_rest, WORK)
                    b_rounded = rounded(b_parent, WORK)
                    store_square(p_node, b_rounded, i_parent_node * H + i_head, D, BLOCK_D)
                    if WORK is not None:
                        b_rest = rest(b_parent, b_rounded, WORK)
                        store_square(p_node_rest, b_rest, i_parent_node * H + i_head, D, BLOCK_D)
                if p_gate_node is not None:
                    for i_group in range(GROUP):
                        i_query_head = i_head * GROUP + i_group
                        s_left = tl.load(p_gate_node + i_left_node * H * GROUP + i_query_head)
                        s_right = tl.load(p_gate_node + i_right_node * H * GROUP + i_query_head)
                        tl.store(p_gate_node + i_parent_node * H * GROUP + i_query_head, s_left + s_right)
        tl.debug_barrier()  # the next level reads what every thread of this program has written


@triton.jit
def _add_partials(
    b_sum, p_partials, p_power, i_first, s_count, i_head, s_heads, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WORK: tl.constexpr
):  # fmt: skip
    """b_sum and the s_count tiles from i_first on of (tiles, s_heads * GROUP, D, D), of all heads of the group."""
    for i in range(s_count * GROUP):
        i_tile = (i_first + i // GROUP) * s_heads * GROUP + i_head * GROUP + i % GROUP
        b_partial = load_square(p_partials, i_tile, D, BLOCK_D).to(tl.float32)
        b_sum += b_partial * load_power(p_power, i_tile, WORK)
    return b_sum


@triton.jit
def _add_partial_rows(
    b_sum, p_partials, i_first, s_count, i_row, i_head, s_heads, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr
):  # fmt: skip
    """_add_partials of rows i_row .. i_row + ROWS of float32 tiles."""
    for i in range(s_count * GROUP):
        i_tile = (i_first + i // GROUP) * s_heads * GROUP + i_head * GROUP + i % GROUP
        b_sum += _rows_of(p_partials, i_tile, i_row, D, BLOCK_D)
    return b_sum


@triton.jit
def _pair_gradients_in_pieces(
    p_query_partials, p_key_partials, p_node, p_d_node, i_query_tile, s_query_tiles, i_key_tile, s_key_tiles,
    i_left_node, i_right_node, i_parent_node, is_moved, parent_used, i_head, H, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """Gradients of both matrices of a pair; is_moved: some queries of the right one are moved by the left one's."""
    p_right = p_node + tl.cast(i_right_node, tl.int64) * (D * D)
    p_d_parent = p_d_node + tl.cast(i_parent_node, tl.int64) * (D * D)
    for i in range(0, D, ROWS):
        b_d = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if parent_used:
            b_d = columns_times(p_right, 0, D, i, p_d_parent, 0, D, D, D, BLOCK_D, PIECE, ROWS)
        if is_moved:
            b_d = _add_partial_rows(
                b_d, p_query_partials, i_query_tile, s_query_tiles, i, i_head, H, GROUP, D, BLOCK_D
            )  # fmt: skip
        store_rows_of(p_d_node, b_d, i_left_node, i, D, BLOCK_D)
        if parent_used:
            b_d = rows_times(p_d_parent, i, D - i, D, p_node, i_left_node, True, D, BLOCK_D, PIECE, ROWS)
            b_d = _add_partial_rows(b_d, p_key_partials, i_key_tile, s_key_tiles, i, i_head, H, 1, D, BLOCK_D)
            store_rows_of(p_d_node, b_d, i_right_node, i, D, BLOCK_D)


@triton.jit
def partial_tile(level, i_slot, slots):
    """Place of the gradient that the leaf pair at slot i_slot of a level has for the matrix that moved its rows.

    At level 0 a single leaf of the pair was moved and the pairs are as many as the slots; above, two slots a pair.
    """
    return tl.where(level == 0, i_slot, slots + (level - 1) * (slots // 2) + i_slot // 2)


@triton.jit(do_not_specialize=COUNTS)
def tree_backward_kernel(
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_query_partials,  # (tiles, HQ, D, D) WORK, to be multiplied by their powers: see partial_tile
    p_query_partials_power,  # (tiles, HQ) float32
    p_key_partials,  # (tiles, H, D, D) likewise
    p_key_partials_power,
    p_node,  # (2 N, H, D, D) WORK
    p_d_node,  # (2 N, H, D, D) WORK, to be multiplied by its power: reads the level above, writes those below it
    p_d_node_power,  # (2 N, H) float32
    first_level,
    H,
    query_slots,
    key_slots,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    LEVELS: tl.constexpr,
    PIECE: tl.constexpr = None,
):
    """Gradients of both matrices of the pairs of LEVELS levels: of P_left from the queries it moved, of P_right from
    the keys it moved, and of both from their product, P_parent = P_right P_left.
    """
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    _, _, i_first, s_count, i_query_base, i_key_base, _ = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    if (i_first & ((1 << (first_level + LEVELS)) - 1)) != 0:
        return
    i_base = 2 * (i_leaf - i_first)
    for i in range(LEVELS):
        level = first_level + LEVELS - 1 - i
        s_span = 1 << level
        for i_pair in range(1 << i):
            i_left = i_first + 2 * s_span * i_pair
            i_right = i_left + s_span
            if i_right < s_count:
                i_left_node = (i_base + node(i_left, level)) * H + i_head
                i_right_node = (i_base + node(i_right, level)) * H + i_head
                i_parent_node = (i_base + node(i_left, level + 1)) * H + i_head
                parent_used = i_right + s_span < s_count
                if PIECE is not None:
                    i_query_tile = partial_tile(level, i_query_base + within(i_right, level), query_slots)
                    i_key_tile = partial_tile(level, i_key_base + within(i_left, level), key_slots)
                    _pair_gradients_in_pieces(
                        p_query_partials, p_key_partials, p_node, p_d_node, i_query_tile,
                        (tl.minimum(s_span, s_count - i_right) + 1) // 2, i_key_tile, (s_span + 1) // 2, i_left_node,
                        i_right_node, i_parent_node, i_left != 0, parent_used, i_head, H, GROUP, D, BLOCK_D, PIECE
                    )  # fmt: skip
                else:
                    # One matrix after the other: both at once do not fit in registers at D = 128.
                    b_d = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
                    if i_left != 0:
                        i_tile = partial_tile(level, i_query_base + within(i_right, level), query_slots)
                        s_tiles = (tl.minimum(s_span, s_count - i_right) + 1) // 2
                        b_d = _add_partials(
                            b_d, p_query_partials, p_query_partials_power, i_tile, s_tiles, i_head, H, GROUP, D,
                            BLOCK_D, WORK
                        )  # fmt: skip
                    if parent_used:
                        b_d_parent = load_square(p_d_node, i_parent_node, D, BLOCK_D)
                        b_right = load_square(p_node, i_right_node, D, BLOCK_D)
                        b_d += dot(tl.trans(b_right), b_d_parent) * load_power(p_d_node_power, i_parent_node, WORK)
                    store_square_scaled(p_d_node, p_d_node_power, b_d, i_left_node, D, BLOCK_D, WORK)
                    if parent_used:
                        i_tile = partial_tile(level, i_key_base + within(i_left, level), key_slots)
                        b_d = _add_partials(
                            tl.zeros((BLOCK_D, BLOCK_D), tl.float32), p_key_partials, p_key_partials_power, i_tile,
                            (s_span + 1) // 2, i_head, H, 1, D, BLOCK_D, WORK
                        )  # fmt: skip
                        b_d_parent = load_square(p_d_node, i_parent_node, D, BLOCK_D)
                        b_left = load_square(p_node, i_left_node, D, BLOCK_D)
                        b_d += dot(b_d_parent, tl.trans(b_left)) * load_power(p_d_node_power, i_parent_node, WORK)
                        store_square_scaled(p_d_node, p_d_node_power, b_d, i_right_node, D, BLOCK_D, WORK)
        tl.debug_barrier()  # the next level reads what every thread of this program has written
