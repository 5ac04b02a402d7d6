"""Triton kernels that fold many tokens at once, as after a prompt whose leaves are not at hand (prefill_kernels.py).

Pages are leaves of ops/leaf.py, whose formulas take all of their 64 tokens at once. With A = T^-1 D, U = A W and
Y = A strictTril(W K^T) of a page's new tokens,

    k_right = k - Y^T W         each key at the right edge of its page
    P       = I - W^T U         the product of the page

fold_leaf_kernel makes them for each page by itself. What is left to do in order is short: fold_chain_kernel goes over
the pages of a chunk from right to left and carries M, the product of all pages to the right, with which

    k       = k_right M^T       at the right edge of the chunk, or of its last folded token
    M      <- M P

Tokens that the chunk had before have no transitions here: their keys pass those of the new ones, as formulas have it
for a row with beta = 0. What is kept is for all tokens to come, so products are those of two float16 parts, 22 bits:
numbers are of order 1, for keys are divided by a power of two.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.append_kernels import LARGEST_CODE, TINY, nearest, page_scale, power_of_two
from path_attention.ops.kernels.decode_kernels import PAGE, code_to_float
from path_attention.ops.kernels.leaf_kernels import corrected_inverse
from path_attention.ops.kernels.tiles import dot_float32, dot_split

# Rows of P made at a time: a whole P of 128 x 128 does not fit beside the page's other tiles.
PRODUCT_ROWS = tl.constexpr(64)
# Numbers that no address is a multiple of: that one is 1 or a multiple of 16 is no reason to compile again.
FREE = (
    "s_tokens", "s_folded", "s_due", "s_first", "s_chains", "s_segments", "H", "s_page_columns", "s_chunk_columns"
)  # fmt: skip


@triton.jit
def halves_to(p_high, p_low, b_x):
    """Store a float32 tile as a rounded part and the rounded rest."""
    b_high = b_x.to(tl.float16)
    tl.store(p_high, b_high)
    tl.store(p_low, (b_x - b_high.to(tl.float32)).to(tl.float16))


@triton.jit
def find_chain(i_chain, p_rows, s_segments, s_folded, s_due, H, C: tl.constexpr):
    """(given sequence, sequence, head, chunk, end of the chunk's folded tokens) of chain i_chain, heads first."""
    i_head = i_chain % H
    i_given = i_chain // H // s_segments
    i_sequence = i_given
    if p_rows is not None:
        i_sequence = tl.load(p_rows + i_given)
    i_chunk = s_folded // C + i_chain // H % s_segments
    return i_given, i_sequence, i_head, i_chunk, tl.minimum((i_chunk + 1) * C, s_folded + s_due)


@triton.jit(do_not_specialize=FREE)
def fold_leaf_kernel(
    p_k,  # (b, tokens, H, D): the first s_due of these tokens are folded
    p_v,  # (b, tokens, H, DV)
    p_w,  # (b, tokens, H, D)
    p_beta,  # (b, tokens, H)
    p_rows,  # (b,) int32: which of the state's sequences these are; None for all
    p_codes,  # from here on fields of State; keys as int16
    p_key_scale,
    p_values,
    p_pages,
    p_scale,
    p_right,  # out (2, leaves, PAGE, BLOCK_D) float16: k_right over its row's unit, rounded, and its rest
    p_unit,  # out (leaves, PAGE) float32: a power of two for each key
    p_matrix,  # out (2, leaves, BLOCK_D, BLOCK_D) float16: P, rounded, and its rest
    s_tokens,
    s_folded,  # tokens before these, the same for all b sequences
    s_due,
    s_first,  # chain of the first program
    s_chains,  # chains of this launch: chunks times key heads; C / PAGE leaves each
    s_segments,  # chunks of a sequence that change
    H,
    s_slots,
    s_page_columns,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HALF: tl.constexpr,
):
    """One page of one key head: its keys at its right edge, its product, its values and the scale of its keys."""
    i_chain = tl.program_id(0) % s_chains
    i_part = tl.program_id(0) // s_chains
    i_given, i_sequence, i_head, i_chunk, s_end = find_chain(
        s_first + i_chain, p_rows, s_segments, s_folded, s_due, H, C
    )
    i_page = i_chunk * (C // PAGE) + i_part
    if i_page * PAGE >= s_end:
        return
    o = tl.arange(0, PAGE)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    i_token = i_page * PAGE + o
    m_old = (i_token < s_folded)[:, None] & (o_d < D)[None, :]
    is_new = (i_token >= s_folded) & (i_token < s_end)
    m_new = is_new[:, None] & (o_d < D)[None, :]
    i_place = tl.load(p_pages + i_sequence.to(tl.int64) * s_page_columns + i_page).to(tl.int64) * PAGE + o
    i_row = (i_given.to(tl.int64) * s_tokens + i_token - s_folded) * H + i_head
    p_codes += i_head.to(tl.int64) * s_slots * D
    p_scale += (i_sequence * H + i_head).to(tl.int64) * C
    b_k = code_to_float(tl.load(p_codes + i_place[:, None] * D + o_d[None, :], mask=m_old, other=0))
    b_k *= tl.load(p_scale + i_token % C, mask=i_token < s_folded, other=0.0)[:, None]
    b_k += tl.load(p_k + i_row[:, None] * D + o_d[None, :], mask=m_new, other=0.0).to(tl.float32)
    if s_end == (i_chunk + 1) * C:
        # No transition makes a key longer: its length bounds its numbers wherever it is moved.
        s_longest = tl.sqrt(tl.max(tl.sum(b_k * b_k, axis=1)))
        tl.store(p_key_scale + i_head * (s_slots // PAGE) + tl.min(i_place) // PAGE, page_scale(s_longest))
    m_v = is_new[:, None] & (o_dv < DV)[None, :]
    b_v = tl.load(p_v + i_row[:, None] * DV + o_dv[None, :], mask=m_v, other=0.0)
    p_values += i_head.to(tl.int64) * s_slots * DV
    tl.store(p_values + i_place[:, None] * DV + o_dv[None, :], b_v, mask=m_v)

    b_w = tl.load(p_w + i_row[:, None] * D + o_d[None, :], mask=m_new, other=0.0).to(tl.float32)
    b_beta = tl.load(p_beta + i_row, mask=is_new, other=0.0).to(tl.float32)
    b_gram = dot_float32(b_w, tl.trans(b_w), HALF)
    b_a = corrected_inverse(tl.where(o[:, None] > o[None, :], b_beta[:, None] * b_gram, 0.0), HALF) * b_beta[None, :]
    i_leaf = (i_chain * (C // PAGE) + i_part).to(tl.int64)
    s_leaves = s_chains.to(tl.int64) * (C // PAGE)
    b_unit = power_of_two(tl.max(tl.abs(b_k), axis=1))
    tl.store(p_unit + i_leaf * PAGE + o, b_unit)
    b_k = b_k / b_unit[:, None]
    b_z = tl.where(o[:, None] < o[None, :], dot_float32(b_k, tl.trans(b_w), HALF), 0.0)
    b_k -= dot_float32(dot_float32(b_z, tl.trans(b_a), HALF), b_w, HALF)
    p_right += (i_leaf * PAGE + o)[:, None] * BLOCK_D + o_d[None, :]
    halves_to(p_right, p_right + s_leaves * (PAGE * BLOCK_D), b_k)
    b_u = dot_float32(b_a, b_w, HALF)
    ROWS: tl.constexpr = min(PRODUCT_ROWS, BLOCK_D)
    for i in tl.static_range(0, BLOCK_D, ROWS):
        o_row = i + tl.arange(0, ROWS)
        m_part = is_new[:, None] & (o_row < D)[None, :]
        b_part = tl.load(p_w + i_row[:, None] * D + o_row[None, :], mask=m_part, other=0.0).to(tl.float32)
        b_p = tl.where(o_row[:, None] == o_d[None, :], 1.0, 0.0) - dot_float32(tl.trans(b_part), b_u, HALF)
        p_rows_of = p_matrix + (i_leaf * BLOCK_D + o_row)[:, None] * BLOCK_D + o_d[None, :]
        halves_to(p_rows_of, p_rows_of + s_leaves * (BLOCK_D * BLOCK_D), b_p)


@triton.jit(do_not_specialize=FREE)
def fold_chain_kernel(
    p_rows,
    p_right,  # what fold_leaf_kernel made
    p_unit,
    p_matrix,
    p_keys,  # from here on fields of State
    p_codes,
    p_key_scale,
    p_products,
    p_pages,
    p_chunks,
    p_product,
    p_scale,
    s_folded,
    s_due,
    s_first,
    s_chains,
    s_segments,
    H,
    s_slots,
    s_page_columns,
    s_chunk_columns,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The pages of one chunk and key head from right to left: keys at the chunk's right edge, and its product."""
    i_chain = tl.program_id(0)
    _, i_sequence, i_head, i_chunk, s_end = find_chain(s_first + i_chain, p_rows, s_segments, s_folded, s_due, H, C)
    finished = s_end == (i_chunk + 1) * C
    i_bh = (i_sequence * H + i_head).to(tl.int64)
    o = tl.arange(0, PAGE)
    o_d = tl.arange(0, BLOCK_D)
    o_right = o[:, None] * BLOCK_D + o_d[None, :]
    o_matrix = o_d[:, None] * BLOCK_D + o_d[None, :]
    s_leaves = s_chains.to(tl.int64) * (C // PAGE)
    p_table = p_pages + i_sequence.to(tl.int64) * s_page_columns
    p_keys += i_head.to(tl.int64) * s_slots * D
    p_codes += i_head.to(tl.int64) * s_slots * D
    p_key_scale += i_head * (s_slots // PAGE)
    p_scale += i_bh * C
    b_m = tl.where(o_d[:, None] == o_d[None, :], 1.0, 0.0)
    s_last = (s_end - 1) // PAGE - i_chunk * (C // PAGE)
    for i in tl.range(s_last + 1, num_stages=STAGES):
        i_part = s_last - i
        i_leaf = (i_chain * (C // PAGE) + i_part).to(tl.int64)
        p_leaf = p_right + i_leaf * (PAGE * BLOCK_D) + o_right
        b_right = tl.load(p_leaf)
        b_right_rest = tl.load(p_leaf + s_leaves * (PAGE * BLOCK_D))
        p_leaf = p_matrix + i_leaf * (BLOCK_D * BLOCK_D) + o_matrix
        b_p = tl.load(p_leaf)
        b_p_rest = tl.load(p_leaf + s_leaves * (BLOCK_D * BLOCK_D))
        b_m_high = b_m.to(HALF)
        b_m_rest = (b_m - b_m_high.to(tl.float32)).to(HALF)
        # A column for each key: what is carried is the left operand, which may stay in registers.
        b_k = dot_split(b_m_high, b_m_rest, tl.trans(b_right), tl.trans(b_right_rest), HALF)
        b_m = dot_split(b_m_high, b_m_rest, b_p, b_p_rest, HALF)
        b_k *= tl.load(p_unit + i_leaf * PAGE + o)[None, :]
        i_page = tl.load(p_table + i_chunk * (C // PAGE) + i_part).to(tl.int64)
        i_token = (i_chunk * (C // PAGE) + i_part) * PAGE + o
        m_token = i_token < s_end
        o_in = (i_page * PAGE + o)[None, :] * D + o_d[:, None]
        mask = m_token[None, :] & (o_d < D)[:, None]
        if finished:
            tl.store(p_keys + o_in, (b_k / tl.load(p_key_scale + i_page)).to(tl.float16), mask=mask)
        else:
            b_scale = tl.maximum(tl.max(tl.abs(b_k), axis=0), TINY) / LARGEST_CODE
            tl.store(p_codes + o_in, nearest(b_k / b_scale[None, :]), mask=mask)
            tl.store(p_scale + i_token % C, b_scale, mask=m_token)

    p_old = p_product + i_bh * (D * D)
    p_new = p_old
    if finished:
        i_place = tl.load(p_chunks + i_sequence * s_chunk_columns + i_chunk).to(tl.int64)
        p_new = p_products + (i_place * H + i_head) * (D * D)
    o_in = o_d[:, None] * D + o_d[None, :]
    mask = (o_d < D)[:, None] & (o_d < D)[None, :]
    if s_folded > i_chunk * C:
        b_m = dot_float32(b_m, tl.load(p_old + o_in, mask=mask, other=0.0), HALF)
        tl.debug_barrier()  # all have read what is written now
    tl.store(p_new + o_in, b_m, mask=mask)
