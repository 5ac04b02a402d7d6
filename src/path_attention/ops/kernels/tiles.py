"""What every kernel shares: rounding and products of tiles, tiles kept in half precision, places in the leaf table.

Only Triton is imported here and in the kernels' own modules, so that they compile ahead of time without torch.
Prefixes: i_ an index, b_ a tile in registers, p_ a pointer, s_ a scalar.

WORK is the type that operands of the linear stages' products are rounded to: float16 for half-precision inputs, whose
11 bits are three more than bfloat16 has at the same speed, or None for float32 inputs, which are not rounded. The
numbers in question need no wider exponent: w is a unit vector, every row of T^-1, U and P is bounded by 2, queries and
keys keep their length, and gradients are scaled by a power of two (see :func:`power_of_two`).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E): exp2 is what the hardware has
ROWS = tl.constexpr(64)  # tokens a leaf: LEAF of leaf_table.py
# Numbers that change with the lengths and heads of a call, and programs only count with. A kernel is compiled once for
# all of them: Triton would do it again for each that is 1 or a multiple of 16, to learn of alignments that follow from
# the width of the rows. A single level is another kernel, without loops.
COUNTS = (
    "table_leaves", "table_length", "table_queries", "table_keys", "num_leaves", "num_turns", "num_groups",
    "query_slots", "key_slots", "row_slots", "level", "first_level", "s_rows", "s_keys", "s_values",
    "s_section", "H", "token_heads",
)  # fmt: skip
# Bits of the exponent of a float32, and the largest power of two whose reciprocal is a normal number.
EXPONENT = tl.constexpr(0x7F800000)
LARGEST_POWER = tl.constexpr(253 << 23)


@triton.jit
def rounded(b_x, WORK: tl.constexpr):
    """b_x as an operand of a product."""
    if WORK is None:
        return b_x.to(tl.float32)
    else:
        return b_x.to(WORK)


@triton.jit
def rest(b_x, b_rounded, WORK: tl.constexpr):
    """What rounding left out, as an operand: b_rounded + rest has 22 bits. Zeros, not to be used, without WORK."""
    return (b_x.to(tl.float32) - b_rounded.to(tl.float32)).to(b_rounded.dtype)


@triton.jit
def dot(b_a, b_b, b_c=None):
    """a b + c in float32. float32 operands take three products of tensor-float-32 parts, about 21 bits."""
    return tl.dot(b_a, b_b, b_c, input_precision="tf32x3")


@triton.jit
def dot_split(b_a, b_a_rest, b_b, b_b_rest, WORK: tl.constexpr):
    """(a + a_rest)(b + b_rest) less the product of both rests: 22 bits for half-precision parts.

    For what every later token depends on, and whose errors therefore add up: products of transitions.
    """
    b_c = dot(b_a, b_b)
    if WORK is not None:
        b_c = dot(b_a, b_b_rest, b_c)
        b_c = dot(b_a_rest, b_b, b_c)
    return b_c


@triton.jit
def dot_float32(b_a, b_b, HALF: tl.constexpr):
    """a b for float32 tiles, each a part in HALF and a rest, less the product of both rests; in float32 without HALF.

    For the cache, where rows stay in float32 between products.
    """
    if HALF is None:
        return tl.dot(b_a, b_b, input_precision="ieee")
    else:
        # Not by dot_split: Triton 3.6 moves its roundings before what they round.
        b_a_half = b_a.to(HALF)
        b_b_half = b_b.to(HALF)
        b_a_rest = (b_a - b_a_half.to(tl.float32)).to(HALF)
        b_b_rest = (b_b - b_b_half.to(tl.float32)).to(HALF)
        b_c = tl.dot(b_a_rest, b_b_half)
        b_c = tl.dot(b_a_half, b_b_rest, b_c)
        return tl.dot(b_a_half, b_b_half, b_c)


@triton.jit
def power_of_two(b_x):
    """(p, 1 / p) for the largest power of two p that max |x| reaches, among float32's normal numbers; p is 0 for zeros.

    Gradients may have any size (a loss may be scaled): x / p, at most 2 in size, is what half precision holds best.
    """
    s_bits = tl.max(tl.max(tl.abs(b_x).to(tl.float32), axis=1), axis=0).to(tl.int32, bitcast=True) & EXPONENT
    s_bits = tl.minimum(s_bits, LARGEST_POWER)
    return s_bits.to(tl.float32, bitcast=True), ((254 << 23) - s_bits).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(p_factor):
    """1 / the number at p_factor; 1 where there is none."""
    if p_factor is None:
        return 1.0
    else:
        return 1.0 / tl.load(p_factor)


@triton.jit
def place(i_leaf, p_table, table_leaves, table_length, table_queries, table_keys):
    """First row, tokens, index and sequence's leaves of a leaf, its sequence's first query and key slots, and the slot
    of its rows.

    Computed where all sequences are alike: a program that began with a load would wait for it.
    """
    if p_table is not None:
        p = p_table + i_leaf * 8  # COLUMNS of leaf_table.py
        i_index = tl.load(p + 2)
        i_slot = tl.load(p + 6) + i_index
        return tl.load(p), tl.load(p + 1), i_index, tl.load(p + 3), tl.load(p + 4), tl.load(p + 5), i_slot
    else:
        i_sequence = i_leaf // table_leaves
        i_index = i_leaf - i_sequence * table_leaves
        s_tokens = tl.minimum(ROWS, table_length - i_index * ROWS)
        i_row = i_sequence * table_length + i_index * ROWS
        i_slot = i_sequence * (table_leaves + table_leaves % 2) + i_index
        return i_row, s_tokens, i_index, table_leaves, i_sequence * table_queries, i_sequence * table_keys, i_slot


@triton.jit
def gates_of_head(i_query_head, num_levels, slots):
    """Where a query head's gates begin in (HQ, levels, slots, 64)."""
    return tl.cast(i_query_head, tl.int64) * (num_levels * slots * ROWS)


@triton.jit
def within(i_leaf, level):
    """The leaf's index with bit ``level`` taken out: its place among the leaves of its kind at that level."""
    return ((i_leaf >> (level + 1)) << level) | (i_leaf & ((1 << level) - 1))


@triton.jit
def node(i_first, level):
    """Place of the matrix of the span of 2^level leaves that starts at leaf i_first, among its sequence's nodes."""
    return 2 * i_first + (1 << level) - 1


@triton.jit
def _pointers(p_x, i_row, row_stride, BLOCK: tl.constexpr, N_ROWS: tl.constexpr):
    """Of rows i_row .. i_row + N_ROWS. Only the first needs 64 bits: a tile itself is small."""
    p_first = p_x + tl.cast(i_row, tl.int64) * row_stride
    return p_first + (tl.arange(0, N_ROWS)[:, None] * row_stride + tl.arange(0, BLOCK)[None, :])


@triton.jit
def _mask(m_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    if DIM >= BLOCK:
        return m_row[:, None]
    else:
        return m_row[:, None] & (tl.arange(0, BLOCK) < DIM)[None, :]


@triton.jit
def load_where(p_x, i_row, m_row, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, N_ROWS: tl.constexpr):
    """(N_ROWS, BLOCK) tile from row i_row on, zeros where m_row is false and past column DIM."""
    p = _pointers(p_x, i_row, row_stride, BLOCK, N_ROWS)
    return tl.load(p, mask=_mask(m_row, DIM, BLOCK), other=0.0)


@triton.jit
def store_where(p_x, b_x, i_row, m_row, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, N_ROWS: tl.constexpr):
    """The opposite of load_where, in the type of p_x."""
    p = _pointers(p_x, i_row, row_stride, BLOCK, N_ROWS)
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=_mask(m_row, DIM, BLOCK))


@triton.jit
def load_rows(p_x, i_row, s_rows, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, N_ROWS: tl.constexpr):
    """load_where of rows i_row .. i_row + s_rows."""
    return load_where(p_x, i_row, tl.arange(0, N_ROWS) < s_rows, row_stride, DIM, BLOCK, N_ROWS)


@triton.jit
def store_rows(p_x, b_x, i_row, s_rows, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, N_ROWS: tl.constexpr):
    """The opposite of load_rows, in the type of p_x."""
    store_where(p_x, b_x, i_row, tl.arange(0, N_ROWS) < s_rows, row_stride, DIM, BLOCK, N_ROWS)


@triton.jit
def load_square(p_x, i_tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Matrix i_tile of p_x (tiles, DIM, DIM)."""
    return load_rows(p_x + tl.cast(i_tile, tl.int64) * (DIM * DIM), 0, DIM, DIM, DIM, BLOCK, BLOCK)


@triton.jit
def store_square(p_x, b_x, i_tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    store_rows(p_x + tl.cast(i_tile, tl.int64) * (DIM * DIM), b_x, 0, DIM, DIM, DIM, BLOCK, BLOCK)


@triton.jit
def store_square_scaled(p_x, p_power, b_x, i_tile, DIM: tl.constexpr, BLOCK: tl.constexpr, WORK: tl.constexpr):
    """store_square of x / p, and p to p_power (tiles,); without WORK of x itself."""
    if WORK is None:
        store_square(p_x, b_x, i_tile, DIM, BLOCK)
    else:
        s_power, s_inverse = power_of_two(b_x)
        store_square(p_x, b_x * s_inverse, i_tile, DIM, BLOCK)
        tl.store(p_power + i_tile, s_power)


@triton.jit
def normalised(b_x, WORK: tl.constexpr):
    """x / p in WORK, p and 1 / p for the power of two p of the tile; without WORK x as it is."""
    if WORK is None:
        return b_x.to(tl.float32), 1.0, 1.0
    else:
        s_power, s_inverse = power_of_two(b_x)
        return (b_x.to(tl.float32) * s_inverse).to(WORK), s_power, s_inverse


@triton.jit
def load_power(p_power, i_tile, WORK: tl.constexpr):
    """What the tile i_tile is to be multiplied by."""
    if WORK is None:
        return 1.0
    else:
        return tl.load(p_power + i_tile)


@triton.jit
def load_piece(p_x, i_row, s_rows, row_stride, i_column, D: tl.constexpr, COLUMNS: tl.constexpr, N_ROWS: tl.constexpr):
    """(N_ROWS, COLUMNS) tile from row i_row and column i_column on in float32, zeros past s_rows and past column D."""
    o_row = tl.arange(0, N_ROWS)[:, None]
    o_column = i_column + tl.arange(0, COLUMNS)[None, :]
    p_first = p_x + tl.cast(i_row, tl.int64) * row_stride
    return tl.load(
        p_first + o_row * row_stride + o_column, mask=(o_row < s_rows) & (o_column < D), other=0.0
    ).to(tl.float32)  # fmt: skip


@triton.jit
def rows_times(
    p_x, i_row, s_rows, row_stride, p_matrix, i_tile, TRANSPOSED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr, N_ROWS: tl.constexpr
):  # fmt: skip
    """x M, or x M^T, of rows x in memory and matrix i_tile of p_matrix (tiles, D, D), PIECE columns of x at a time."""
    p_matrix += tl.cast(i_tile, tl.int64) * (D * D)
    b_sum = tl.zeros((N_ROWS, BLOCK_D), tl.float32)
    for i in range(0, D, PIECE):
        b_x = load_piece(p_x, i_row, s_rows, row_stride, i, D, PIECE, N_ROWS)
        if TRANSPOSED:
            b_sum = dot(b_x, tl.trans(load_piece(p_matrix, 0, D, D, i, D, PIECE, BLOCK_D)), b_sum)
        else:
            b_sum = dot(b_x, load_piece(p_matrix, i, D - i, D, 0, D, BLOCK_D, PIECE), b_sum)
    return b_sum


@triton.jit
def columns_times(
    p_x, i_x, x_stride, i_column, p_y, i_y, y_stride, s_rows, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr, N_COLUMNS: tl.constexpr
):  # fmt: skip
    """N_COLUMNS rows of x^T y from column i_column of x on; x and y have s_rows rows in memory, PIECE at a time."""
    b_sum = tl.zeros((N_COLUMNS, BLOCK_D), tl.float32)
    for i in range(0, s_rows, PIECE):
        b_x = load_piece(p_x, i_x + i, s_rows - i, x_stride, i_column, D, N_COLUMNS, PIECE)
        b_y = load_piece(p_y, i_y + i, s_rows - i, y_stride, 0, D, BLOCK_D, PIECE)
        b_sum = dot(tl.trans(b_x), b_y, b_sum)
    return b_sum
