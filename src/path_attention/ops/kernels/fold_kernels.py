"""Triton kernel that folds many tokens at once, as after a prompt: a chunk of one key head is one program.

The program goes over the chunk from right to left, FOLD tokens at once, and carries N = M^T, M the product of all
tokens to the right. With the triangular matrices of FOLD tokens (ops/leaf.py),

    k_right = k - Y^T W         each key at the right edge of its FOLD tokens
    k       = k_right N         at the right edge of the chunk, or of its last folded token
    N      <- P^T N = N - W^T A^T (W N)

FOLD tokens are the least that fill a matrix unit, and their triangular matrices take next to nothing. Keys that the
chunk had before have only the second line. Numbers here are of order 1 (keys are divided by a power of two), so that
two float16 parts hold 22 bits of each.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.append_kernels import FOLD, LARGEST_CODE, TINY, nearest, page_scale, power_of_two
from path_attention.ops.kernels.decode_kernels import PAGE, code_to_float
from path_attention.ops.kernels.tiles import dot_float32


@triton.jit
def fold_inverse(b_n, HALF: tl.constexpr):
    """(I + n)^-1 for a strictly lower triangular n (FOLD, FOLD): diagonal blocks join in pairs until one is left.

    (D + C)^-1 = D^-1 - D^-1 C D^-1 for the blocks D of a pair and C below the first, and 1 - n for blocks of one row. A
    product of powers of n would take as many products, but its terms grow and cancel where w repeats.
    """
    o = tl.arange(0, FOLD)
    b_x = tl.where(o[:, None] == o[None, :], 1.0, 0.0)
    b_x -= tl.where((o[:, None] // 2 == o[None, :] // 2), b_n, 0.0)
    for doubling in tl.static_range(1, 4):
        o_block = o // (1 << doubling)
        pair = (o_block[:, None] // 2 == o_block[None, :] // 2) & (o_block[:, None] > o_block[None, :])
        b_x -= dot_float32(dot_float32(b_x, tl.where(pair, b_n, 0.0), HALF), b_x, HALF)
    return b_x


@triton.jit
def load_keys(
    p_k,  # new ones (tokens, H, D), of this sequence and head, the first at place s_folded
    p_codes,  # of the head
    p_scale,  # of the sequence and head
    i_token,  # (rows,): all of them old, or all new
    i_slot,
    s_folded,
    H,
    is_old,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(rows, BLOCK_D) float32: keys that the open chunk had, or new ones."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    if is_old:
        b_k = code_to_float(tl.load(p_codes + i_slot[:, None] * D + o_d[None, :], mask=m_d, other=0))
        b_k *= tl.load(p_scale + i_token % C)[:, None]
    else:
        i_row = (i_token - s_folded).to(tl.int64) * H
        b_k = tl.load(p_k + i_row[:, None] * D + o_d[None, :], mask=m_d, other=0.0).to(tl.float32)
    return b_k


@triton.jit(do_not_specialize=("s_tokens", "s_folded", "s_due", "H", "s_page_columns", "s_chunk_columns"))
def fold_chunk_kernel(
    p_k,  # (b, tokens, H, D): the first s_due of these tokens are folded
    p_v,  # (b, tokens, H, DV)
    p_w,  # (b, tokens, H, D)
    p_beta,  # (b, tokens, H)
    p_rows,  # (b,) int32: which of the state's sequences these are; None for all
    p_keys,  # from here on fields of State
    p_codes,
    p_key_scale,
    p_values,
    p_products,
    p_pages,
    p_chunks,
    p_product,
    p_scale,
    s_tokens,
    s_folded,  # tokens before these, the same for all b sequences; a multiple of FOLD, as is the next
    s_due,
    H,
    s_slots,
    s_page_columns,
    s_chunk_columns,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HALF: tl.constexpr,
):
    """The tokens of one chunk, those it had and those that come, at their new right edge; and the chunk's product."""
    s_segments = (s_folded + s_due - 1) // C - s_folded // C + 1
    i_segment = tl.program_id(0) % s_segments
    i_head = tl.program_id(0) // s_segments % H
    i_given = tl.program_id(0) // s_segments // H
    i_sequence = i_given
    if p_rows is not None:
        i_sequence = tl.load(p_rows + i_given)
    i_chunk = s_folded // C + i_segment
    s_end = tl.minimum((i_chunk + 1) * C, s_folded + s_due)
    finished = s_end == (i_chunk + 1) * C
    i_bh = (i_sequence * H + i_head).to(tl.int64)
    i_first_row = i_given.to(tl.int64) * s_tokens * H + i_head
    o = tl.arange(0, FOLD)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_d = (o_d < D)[None, :]
    m_dv = (o_dv < DV)[None, :]
    strict = o[:, None] > o[None, :]
    p_head_keys = p_keys + i_head.to(tl.int64) * s_slots * D
    p_head_codes = p_codes + i_head.to(tl.int64) * s_slots * D
    p_head_values = p_values + i_head.to(tl.int64) * s_slots * DV
    p_head_scale = p_scale + i_bh * C
    p_head_k = p_k + i_first_row * D
    b_n = tl.where(o_d[:, None] == o_d[None, :], 1.0, 0.0)
    i_last = (s_end - 1) // PAGE
    for i in range(i_last - i_chunk * C // PAGE + 1):
        i_page = i_last - i
        i_slot = tl.load(p_pages + i_sequence.to(tl.int64) * s_page_columns + i_page).to(tl.int64) * PAGE
        s_scale = 1.0
        if finished:
            # No transition makes a key longer: its length bounds its numbers wherever it is moved.
            b_longest = tl.zeros((FOLD,), dtype=tl.float32)
            for i_part in range(PAGE // FOLD):
                i_token = i_page * PAGE + i_part * FOLD + o
                is_old = i_page * PAGE + i_part * FOLD < s_folded
                i_place = i_slot + i_part * FOLD + o
                b_k = load_keys(
                    p_head_k, p_head_codes, p_head_scale, i_token, i_place, s_folded, H, is_old, D, C, BLOCK_D
                )
                b_longest = tl.maximum(b_longest, tl.sum(b_k * b_k, axis=1))
            s_scale = page_scale(tl.sqrt(tl.max(b_longest)))
            tl.store(p_key_scale + i_head * (s_slots // PAGE) + i_slot // PAGE, s_scale)
        s_parts = tl.minimum(s_end - i_page * PAGE, PAGE) // FOLD
        for i_step in range(s_parts):
            i_part = s_parts - 1 - i_step
            i_token = i_page * PAGE + i_part * FOLD + o
            i_place = i_slot + i_part * FOLD + o
            is_old = i_page * PAGE + i_part * FOLD < s_folded
            b_k = load_keys(p_head_k, p_head_codes, p_head_scale, i_token, i_place, s_folded, H, is_old, D, C, BLOCK_D)
            b_unit = power_of_two(tl.max(tl.abs(b_k), axis=1))
            b_k = b_k / b_unit[:, None]
            b_next = b_n
            if not is_old:
                i_row = i_first_row + (i_token - s_folded).to(tl.int64) * H
                b_w = tl.load(p_w + i_row[:, None] * D + o_d[None, :], mask=m_d, other=0.0).to(tl.float32)
                b_beta = tl.load(p_beta + i_row).to(tl.float32)
                b_strict = tl.where(strict, b_beta[:, None] * dot_float32(b_w, tl.trans(b_w), HALF), 0.0)
                b_a = fold_inverse(b_strict, HALF) * b_beta[None, :]
                b_z = tl.where(strict, dot_float32(b_w, tl.trans(b_k), HALF), 0.0)
                b_k -= dot_float32(tl.trans(dot_float32(b_a, b_z, HALF)), b_w, HALF)
                b_wn = dot_float32(b_w, b_n, HALF)
                b_next = b_n - dot_float32(tl.trans(b_w), dot_float32(tl.trans(b_a), b_wn, HALF), HALF)
                b_v = tl.load(p_v + i_row[:, None] * DV + o_dv[None, :], mask=m_dv, other=0.0)
                tl.store(p_head_values + i_place[:, None] * DV + o_dv[None, :], b_v, mask=m_dv)
            b_k = dot_float32(b_k, b_n, HALF) * b_unit[:, None]
            o_in = i_place[:, None] * D + o_d[None, :]
            if finished:
                tl.store(p_head_keys + o_in, (b_k / s_scale).to(tl.float16), mask=m_d)
            else:
                b_scale = tl.maximum(tl.max(tl.abs(b_k), axis=1), TINY) / LARGEST_CODE
                tl.store(p_head_codes + o_in, nearest(b_k / b_scale[:, None]), mask=m_d)
                tl.store(p_head_scale + i_token % C, b_scale)
            b_n = b_next

    p_old = p_product + i_bh * (D * D)
    p_new = p_old
    if finished:
        i_place = tl.load(p_chunks + i_sequence * s_chunk_columns + i_chunk).to(tl.int64)
        p_new = p_products + (i_place * H + i_head) * (D * D)
    if s_folded > i_chunk * C:
        # Rows of P^T move right as keys do: a few of them at once, each in its own place.
        for i in range((D + FOLD - 1) // FOLD):
            o_col = i * FOLD + o
            o_in = o_d[None, :] * D + o_col[:, None]
            mask = (o_col < D)[:, None] & m_d
            b_rows = tl.load(p_old + o_in, mask=mask, other=0.0)
            b_rows = dot_float32(b_rows, b_n, HALF)
            tl.debug_barrier()  # all have read what is written now
            tl.store(p_new + o_in, b_rows, mask=mask)
    else:
        tl.store(p_new + o_d[None, :] * D + o_d[:, None], b_n, mask=(o_d < D)[:, None] & m_d)
