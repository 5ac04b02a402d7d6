"""Triton kernels of the tree of transitions: products of the spans' matrices upwards, their gradients downwards.

The matrix P of a span is kept in two parts of half precision, what it rounds to and the rest: 22 bits together. A row
that a span moves needs the first part only.

Upwards a program works through LEVELS levels of one subtree and keeps what it makes at hand: it reads matrices of the
lowest level alone, each once, and writes rests of the uppermost alone. Downwards it makes one matrix of one level: most
of its time it adds up what the rows above have to say of it, more of them the higher the level and the fewer the
matrices.

Where PIECE is given matrices are float32, too much for one tile: made ROWS rows at a time, from PIECE columns or
rows of their factors at a time. Upwards what a level writes is then what the next one reads, in the same program.
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
    store_square_scaled,
    within,
)


@triton.jit
def _rows_of(p_x, i_tile, i_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i_row .. i_row + ROWS of matrix i_tile of p_x (tiles, D, D)."""
    return load_rows(p_x + tl.cast(i_tile, tl.int64) * (D * D), i_row, D - i_row, D, D, BLOCK_D, ROWS)


@triton.jit
def store_rows_of(p_x, b_x, i_tile, i_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of _rows_of."""
    store_rows(p_x + tl.cast(i_tile, tl.int64) * (D * D), b_x, i_row, D - i_row, D, D, BLOCK_D, ROWS)


@triton.jit
def _first_leaf(i_span, s_span, p_table, table_leaves):
    """The leaf at which span number i_span of s_span leaves begins, where all sequences are alike; with a table every
    leaf is a number, and most begin none.
    """
    if p_table is not None:
        return i_span
    else:
        s_spans = (table_leaves + s_span - 1) // s_span
        i_sequence = i_span // s_spans
        return i_sequence * table_leaves + (i_span - i_sequence * s_spans) * s_span


@triton.jit
def _product_in_pieces(
    p_node, i_right, i_left, i_parent, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """P_parent = P_right P_left."""
    p_right = p_node + tl.cast(i_right, tl.int64) * (D * D)
    for i in range(0, D, ROWS):
        b_parent = rows_times(p_right, i, D - i, D, p_node, i_left, False, D, BLOCK_D, PIECE, ROWS)
        store_rows_of(p_node, b_parent, i_parent, i, D, BLOCK_D)


@triton.jit
def _load_used(p_x, i_tile, is_used, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Matrix i_tile of p_x (tiles, D, D); zeros, and no traffic, where it is not used."""
    return load_rows(p_x + tl.cast(i_tile, tl.int64) * (D * D), 0, tl.where(is_used, D, 0), D, D, BLOCK_D, BLOCK_D)


@triton.jit
def _store_used(p_x, b_x, i_tile, is_used, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of _load_used."""
    store_rows(p_x + tl.cast(i_tile, tl.int64) * (D * D), b_x, 0, tl.where(is_used, D, 0), D, D, BLOCK_D, BLOCK_D)


@triton.jit
def _parent(
    p_node, p_node_rest, b_right, b_right_rest, b_left, b_left_rest, i_left, level, s_count, H,
    KEEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WORK: tl.constexpr
):  # fmt: skip
    """Both parts of P_right P_left, the matrix of the span of 2^level leaves from i_left on.

    Its rest goes to memory with KEEPS only, for the next launch, or whoever wants it.
    """
    b_parent = dot_split(b_right, b_right_rest, b_left, b_left_rest, WORK)
    b_rounded = rounded(b_parent, WORK)
    b_rest = rest(b_parent, b_rounded, WORK)
    i_parent_node = node(i_left, level) * H
    is_used = i_left + (1 << level) < s_count
    _store_used(p_node, b_rounded, i_parent_node, is_used, D, BLOCK_D)
    tl.debug_barrier()  # or Triton 3.9 loads the next pair while this matrix still takes registers, and spills
    if KEEPS and WORK is not None:
        _store_used(p_node_rest, b_rest, i_parent_node, is_used, D, BLOCK_D)
    return b_rounded, b_rest


@triton.jit
def _parent_in_memory(
    p_node, p_node_rest, i_left, level, s_count, H, KEEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WORK: tl.constexpr
):  # fmt: skip
    """_parent of two matrices that lie in memory."""
    s_span = 1 << (level - 1)
    is_used = i_left + 2 * s_span < s_count
    i_left_node = node(i_left, level - 1) * H
    i_right_node = node(i_left + s_span, level - 1) * H
    b_left = _load_used(p_node, i_left_node, is_used, D, BLOCK_D)
    b_right = _load_used(p_node, i_right_node, is_used, D, BLOCK_D)
    b_left_rest, b_right_rest = b_left, b_right
    if WORK is not None:
        b_left_rest = _load_used(p_node_rest, i_left_node, is_used, D, BLOCK_D)
        b_right_rest = _load_used(p_node_rest, i_right_node, is_used, D, BLOCK_D)
    return _parent(
        p_node, p_node_rest, b_right, b_right_rest, b_left, b_left_rest, i_left, level, s_count, H, KEEPS, D, BLOCK_D,
        WORK
    )  # fmt: skip


@triton.jit
def _subtree(
    p_node, p_node_rest, i_first, first_level, s_count, H, D: tl.constexpr, BLOCK_D: tl.constexpr, WORK: tl.constexpr,
    LEVELS: tl.constexpr, ALL_RESTS: tl.constexpr
):  # fmt: skip
    """All parents above 2^LEVELS spans: one stays at hand until its right sibling is there."""
    tl.static_assert(LEVELS <= 2)
    level = first_level + 1
    b_left, b_left_rest = _parent_in_memory(
        p_node, p_node_rest, i_first, level, s_count, H, ALL_RESTS or LEVELS == 1, D, BLOCK_D, WORK
    )  # fmt: skip
    if LEVELS == 2:
        b_right, b_right_rest = _parent_in_memory(
            p_node, p_node_rest, i_first + (1 << level), level, s_count, H, ALL_RESTS, D, BLOCK_D, WORK
        )  # fmt: skip
        _parent(
            p_node, p_node_rest, b_right, b_right_rest, b_left, b_left_rest, i_first, level + 1, s_count, H, True, D,
            BLOCK_D, WORK
        )  # fmt: skip


@triton.jit
def _subtree_in_pieces(
    p_node, i_first, first_level, s_count, H, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
    LEVELS: tl.constexpr
):  # fmt: skip
    """The same of float32 matrices, level by level: what a level writes, the next one reads."""
    for i in range(LEVELS):
        level = first_level + i
        s_span = 1 << level
        for i_pair in range(1 << (LEVELS - 1 - i)):
            i_left = i_first + 2 * s_span * i_pair
            if i_left + 2 * s_span < s_count:
                i_left_node, i_right_node = node(i_left, level) * H, node(i_left + s_span, level) * H
                _product_in_pieces(
                    p_node, i_right_node, i_left_node, node(i_left, level + 1) * H, D, BLOCK_D, PIECE
                )  # fmt: skip
        tl.debug_barrier()  # the next level reads what every thread of this program has written


@triton.jit
def _sum_gates(p_gate_node, i_first, first_level, s_count, s_heads, LEVELS: tl.constexpr):
    """Gates of all parents above 2^LEVELS spans, of one query head: neighbours are added up level by level."""
    SPANS: tl.constexpr = 1 << LEVELS
    o = tl.arange(0, SPANS)
    m_used = i_first + ((o // 2 + 1) << (first_level + 1)) < s_count
    i_node = node(i_first + (o << first_level), first_level)
    b_gate = tl.load(p_gate_node + i_node * s_heads, mask=m_used, other=0.0)
    for i in tl.static_range(1, LEVELS + 1):
        b_gate = tl.sum(tl.reshape(b_gate, (SPANS >> i, 2)), axis=1)
        level = first_level + i
        i_left = i_first + (tl.arange(0, SPANS >> i) << level)
        tl.store(p_gate_node + node(i_left, level) * s_heads, b_gate, mask=i_left + (1 << level) < s_count)


@triton.jit(do_not_specialize=COUNTS)
def tree_kernel(
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_node,  # (2 N, H, D, D) WORK: reads first_level, writes those above it
    p_node_rest,  # likewise, but of those above it the uppermost alone, if not ALL_RESTS
    p_gate_node,  # (2 N, HQ) float32 or None: reads first_level, writes those above it
    first_level,
    H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    LEVELS: tl.constexpr,
    ALL_RESTS: tl.constexpr,
    PIECE: tl.constexpr = None,
):
    """P_parent = P_right P_left for the parents that something lies to the right of: no other is ever used."""
    s_subtree = 1 << (first_level + LEVELS)
    i_leaf = _first_leaf(tl.program_id(0) // H, s_subtree, p_table, table_leaves)
    i_head = tl.program_id(0) % H
    _, _, i_first, s_count, _, _, _ = place(i_leaf, p_table, table_leaves, table_length, table_queries, table_keys)
    if (i_first & (s_subtree - 1)) != 0 or i_first + (2 << first_level) >= s_count:
        return
    i_tile = 2 * (i_leaf - i_first) * H + i_head  # from here on tiles of this sequence and head are counted
    p_node += tl.cast(i_tile, tl.int64) * (D * D)
    if PIECE is not None:
        _subtree_in_pieces(p_node, i_first, first_level, s_count, H, D, BLOCK_D, PIECE, LEVELS)
    else:
        if WORK is not None:
            p_node_rest += tl.cast(i_tile, tl.int64) * (D * D)
        _subtree(p_node, p_node_rest, i_first, first_level, s_count, H, D, BLOCK_D, WORK, LEVELS, ALL_RESTS)
    if p_gate_node is not None:
        for i in range(GROUP):
            _sum_gates(p_gate_node + i_tile * GROUP + i, i_first, first_level, s_count, H * GROUP, LEVELS)


@triton.jit
def _tile_of_group(i, i_first, i_head, s_heads, GROUP: tl.constexpr):
    """Number of the i-th of the tiles from i_first on of (tiles, s_heads * GROUP): head after head of the group."""
    return (i_first + i // GROUP) * s_heads * GROUP + i_head * GROUP + i % GROUP


@triton.jit
def _partial(
    p_partials, p_power, i, i_first, i_head, s_heads, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WORK: tl.constexpr
):  # fmt: skip
    i_tile = _tile_of_group(i, i_first, i_head, s_heads, GROUP)
    return load_square(p_partials, i_tile, D, BLOCK_D).to(tl.float32) * load_power(p_power, i_tile, WORK)


@triton.jit
def _sum_of_partials(
    p_partials, p_power, i_first, s_count, i_head, s_heads, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WORK: tl.constexpr
):  # fmt: skip
    """Sum of the s_count tiles from i_first on of (tiles, s_heads * GROUP, D, D), of all heads of the group."""
    # So many are under way at a time; of 64 x 64 halves four warps hold that many beside their sum.
    AHEAD: tl.constexpr = 4
    b_sum = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    s_tiles = s_count * GROUP
    s_whole = s_tiles // AHEAD * AHEAD
    for i in range(0, s_whole, AHEAD):
        for j in tl.static_range(AHEAD):
            b_sum += _partial(p_partials, p_power, i + j, i_first, i_head, s_heads, GROUP, D, BLOCK_D, WORK)
    for i in range(s_whole, s_tiles):
        b_sum += _partial(p_partials, p_power, i, i_first, i_head, s_heads, GROUP, D, BLOCK_D, WORK)
    return b_sum


@triton.jit
def _sum_of_partial_rows(
    p_partials, i_first, s_count, i_row, i_head, s_heads, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """_sum_of_partials of rows i_row .. i_row + ROWS of float32 tiles."""
    b_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(s_count * GROUP):
        b_sum += _rows_of(p_partials, _tile_of_group(i, i_first, i_head, s_heads, GROUP), i_row, D, BLOCK_D)
    return b_sum


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
    p_d_node,  # (2 N, H, D, D) WORK, to be multiplied by its power: reads the level above, writes this one
    p_d_node_power,  # (2 N, H) float32
    level,
    H,
    query_slots,
    key_slots,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
    PIECE: tl.constexpr = None,
):
    """Gradient of one matrix of each pair of a level: of P_left (program_id(1) = 0) from the queries it moved, of
    P_right from the keys it moved, and of either from their product, P_parent = P_right P_left.
    """
    s_span = 1 << level
    i_leaf = _first_leaf(tl.program_id(0) // H, 2 * s_span, p_table, table_leaves)
    i_head = tl.program_id(0) % H
    is_left = tl.program_id(1) == 0
    _, _, i_left, s_count, i_query_base, i_key_base, _ = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    i_right = i_left + s_span
    if (i_left & (2 * s_span - 1)) != 0 or i_right >= s_count:
        return
    parent_used = i_right + s_span < s_count
    if not is_left and not parent_used:  # nothing lies to the right of it
        return
    i_base = 2 * (i_leaf - i_left)
    i_left_node = (i_base + node(i_left, level)) * H + i_head
    i_right_node = (i_base + node(i_right, level)) * H + i_head
    i_parent_node = (i_base + node(i_left, level + 1)) * H + i_head
    i_query_tile = partial_tile(level, i_query_base + within(i_right, level), query_slots)
    s_query_tiles = (tl.minimum(s_span, s_count - i_right) + 1) // 2
    if i_left == 0:  # no query is moved past the first span
        s_query_tiles = 0
    i_key_tile = partial_tile(level, i_key_base + within(i_left, level), key_slots)
    s_key_tiles = (s_span + 1) // 2
    if PIECE is not None:
        p_right = p_node + tl.cast(i_right_node, tl.int64) * (D * D)
        p_d_parent = p_d_node + tl.cast(i_parent_node, tl.int64) * (D * D)
        s_parent = tl.where(parent_used, D, 0)
        if is_left:
            for i in range(0, D, ROWS):
                b_d = columns_times(p_right, 0, D, i, p_d_parent, 0, D, s_parent, D, BLOCK_D, PIECE, ROWS)
                b_d += _sum_of_partial_rows(
                    p_query_partials, i_query_tile, s_query_tiles, i, i_head, H, GROUP, D, BLOCK_D
                )  # fmt: skip
                store_rows_of(p_d_node, b_d, i_left_node, i, D, BLOCK_D)
        else:
            for i in range(0, D, ROWS):
                b_d = rows_times(p_d_parent, i, D - i, D, p_node, i_left_node, True, D, BLOCK_D, PIECE, ROWS)
                b_d += _sum_of_partial_rows(p_key_partials, i_key_tile, s_key_tiles, i, i_head, H, 1, D, BLOCK_D)
                store_rows_of(p_d_node, b_d, i_right_node, i, D, BLOCK_D)
    elif is_left:
        b_d = _sum_of_partials(
            p_query_partials, p_query_partials_power, i_query_tile, s_query_tiles, i_head, H, GROUP, D, BLOCK_D, WORK
        )
        if parent_used:
            b_d_parent = load_square(p_d_node, i_parent_node, D, BLOCK_D)
            b_right = load_square(p_node, i_right_node, D, BLOCK_D)
            b_d += dot(tl.trans(b_right), b_d_parent) * load_power(p_d_node_power, i_parent_node, WORK)
        store_square_scaled(p_d_node, p_d_node_power, b_d, i_left_node, D, BLOCK_D, WORK)
    else:
        b_d = _sum_of_partials(
            p_key_partials, p_key_partials_power, i_key_tile, s_key_tiles, i_head, H, 1, D, BLOCK_D, WORK
        )
        b_d_parent = load_square(p_d_node, i_parent_node, D, BLOCK_D)
        b_left = load_square(p_node, i_left_node, D, BLOCK_D)
        b_d += dot(b_d_parent, tl.trans(b_left)) * load_power(p_d_node_power, i_parent_node, WORK)
        store_square_scaled(p_d_node, p_d_node_power, b_d, i_right_node, D, BLOCK_D, WORK)
