"""What every kernel shares: products in more than half precision, places in the leaf table, masked tiles.

Only Triton is imported here and in the kernels' own modules, so that they compile ahead of time without torch.
Prefixes: i_ an index, b_ a tile in registers, p_ a pointer, s_ a scalar.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E): exp2 is what the hardware has


@triton.jit
def dot_split(b_a, b_b, HALF: tl.constexpr):
    """a b for float32 tiles on half-precision matrix units, to about 16 bits: each tile is the sum of a rounded part
    and the rounded rest, and only rest times rest is left out. HALF is the parts' type, or None for float32 products.

    For what every later token depends on, a leaf's triangular inverse, its transition and products of transitions; and
    for gradients that the inverse multiplies, where its condition would magnify the error.
    """
    if HALF is None:
        return tl.dot(b_a, b_b, input_precision="ieee")
    else:
        b_a_high = b_a.to(HALF)
        b_b_high = b_b.to(HALF)
        b_a_low = (b_a - b_a_high.to(tl.float32)).to(HALF)
        b_b_low = (b_b - b_b_high.to(tl.float32)).to(HALF)
        b_c = tl.dot(b_a_low, b_b_high)
        b_c = tl.dot(b_a_high, b_b_low, b_c)
        return tl.dot(b_a_high, b_b_high, b_c)


@triton.jit
def _to_tf32(b_x):
    """Nearest number of 11 bits. The matrix unit would truncate, which shrinks a row a little at every level."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1)


@triton.jit
def dot_rows(b_a, b_b, HALF: tl.constexpr):
    """a b for rows and gradients that end in half precision, to at least three bits more than it has.

    For bfloat16 both are rounded to the 11 bits of tensor-float-32: one product in place of dot_split's three. Measured
    faster where b comes transposed; else the matrix unit's 32-bit operand is transposed through shared memory.
    """
    if tl.bfloat16 == HALF:
        return tl.dot(_to_tf32(b_a), _to_tf32(b_b), input_precision="tf32")
    else:
        return dot_split(b_a, b_b, HALF)


@triton.jit
def dot_exact_left(b_a, b_b, HALF: tl.constexpr):
    """a b where a was given in half precision (or float32 where HALF is None) and only b has more bits to keep."""
    if HALF is None:
        return tl.dot(b_a, b_b, input_precision="ieee")
    else:
        b_b_high = b_b.to(HALF)
        b_b_low = (b_b - b_b_high.to(tl.float32)).to(HALF)
        return tl.dot(b_a, b_b_high, tl.dot(b_a, b_b_low))


@triton.jit
def dot_exact_right(b_a, b_b, HALF: tl.constexpr):
    """a b where b was given in half precision (or float32 where HALF is None) and only a has more bits to keep."""
    if HALF is None:
        return tl.dot(b_a, b_b, input_precision="ieee")
    else:
        b_a_high = b_a.to(HALF)
        b_a_low = (b_a - b_a_high.to(tl.float32)).to(HALF)
        return tl.dot(b_a_high, b_b, tl.dot(b_a_low, b_b))


@triton.jit
def dot_half(b_a, b_b, HALF: tl.constexpr):
    """a b with both rounded to half precision: for gradients, which are rounded to it in the end anyway."""
    if HALF is None:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(b_a.to(HALF), b_b.to(HALF))


@triton.jit
def within(i_leaf, level):
    """The leaf's index with bit ``level`` taken out: its place among the leaves of its kind at that level."""
    return ((i_leaf >> (level + 1)) << level) | (i_leaf & ((1 << level) - 1))


@triton.jit
def node(i_first, level):
    """Place of the matrix of the span of 2^level leaves that starts at leaf i_first, among its sequence's nodes."""
    return 2 * i_first + (1 << level) - 1


@triton.jit
def load_rows(p_x, i_row, s_rows, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, BLOCK) tile of rows i_row .. i_row + s_rows, zeros past them and past column DIM."""
    o_row = tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    p = p_x + (i_row + o_row).to(tl.int64)[:, None] * row_stride + o_col[None, :]
    return tl.load(p, mask=(o_row < s_rows)[:, None] & (o_col < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(p_x, b_x, i_row, s_rows, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The opposite of load_rows, in the type of p_x."""
    o_row = tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    p = p_x + (i_row + o_row).to(tl.int64)[:, None] * row_stride + o_col[None, :]
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=(o_row < s_rows)[:, None] & (o_col < DIM)[None, :])
