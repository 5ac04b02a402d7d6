"""Triton kernel that folds many tokens at once, as after a prompt: a chunk of one key head is one program.

The program goes over the chunk's pages from right to left and carries M, the product of all tokens to the right:

    k_right = k - Y^T W         (ops/leaf.py: each key at the right edge of its page)
    k       = k_right M^T       at the right edge of the chunk, or of its last folded token
    M      <- M P = M - (M W^T) A W

Keys that the chunk had before are rows without a transition. Numbers here are of order 1 (keys are divided by their
largest one), so that two float16 parts hold 22 bits of each.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.append_kernels import LARGEST_CODE, TINY, nearest
from path_attention.ops.kernels.decode_kernels import PAGE, code_to_float
from path_attention.ops.kernels.leaf_kernels import _unit_lower_inverse
from path_attention.ops.kernels.tiles import dot_split


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
    s_folded,  # tokens before these, the same for all b sequences
    s_due,  # a multiple of 16
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
    o = tl.arange(0, PAGE)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_d = (o_d < D)[None, :]
    p_head_keys = p_keys + i_head.to(tl.int64) * s_slots * D
    p_head_codes = p_codes + i_head.to(tl.int64) * s_slots * D
    p_head_values = p_values + i_head.to(tl.int64) * s_slots * DV
    b_m = tl.where(o_d[:, None] == o_d[None, :], 1.0, 0.0)
    i_last = (s_end - 1) // PAGE
    for i in range(i_last - i_chunk * C // PAGE + 1):
        i_page = i_last - i
        i_slot = tl.load(p_pages + i_sequence.to(tl.int64) * s_page_columns + i_page).to(tl.int64) * PAGE
        i_token = i_page * PAGE + o
        m_old = i_token < s_folded
        m_new = (i_token >= s_folded) & (i_token < s_end)
        i_row = (i_given.to(tl.int64) * s_tokens + tl.where(m_new, i_token - s_folded, 0)) * H + i_head
        o_in = (i_slot + o)[:, None] * D + o_d[None, :]
        b_k = code_to_float(tl.load(p_head_codes + o_in, mask=m_old[:, None] & m_d, other=0))
        b_k *= tl.load(p_scale + i_bh * C + i_token % C, mask=m_old, other=0.0)[:, None]
        b_k += tl.load(p_k + i_row[:, None] * D + o_d[None, :], mask=m_new[:, None] & m_d, other=0.0).to(tl.float32)
        b_top = tl.maximum(tl.max(tl.abs(b_k), axis=1), TINY)
        b_k = b_k / b_top[:, None]
        b_next = b_m
        if i_page * PAGE + PAGE > s_folded:
            b_w = tl.load(p_w + i_row[:, None] * D + o_d[None, :], mask=m_new[:, None] & m_d, other=0.0)
            b_w = b_w.to(tl.float32)
            b_beta = tl.load(p_beta + i_row, mask=m_new, other=0.0).to(tl.float32)
            strict = o[:, None] > o[None, :]
            b_n = tl.where(strict, b_beta[:, None] * dot_split(b_w, tl.trans(b_w), HALF), 0.0)
            b_a = _unit_lower_inverse(b_n, HALF) * b_beta[None, :]
            b_z = tl.where(strict, dot_split(b_w, tl.trans(b_k), HALF), 0.0)
            b_y = dot_split(b_a, b_z, HALF)
            b_k -= dot_split(tl.trans(b_y), b_w, HALF)
            b_mw = dot_split(b_m, tl.trans(b_w), HALF)
            b_next = b_m - dot_split(b_mw, dot_split(b_a, b_w, HALF), HALF)
            o_rows = i_row[:, None] * DV + o_dv[None, :]
            m_v = m_new[:, None] & (o_dv < DV)[None, :]
            b_v = tl.load(p_v + o_rows, mask=m_v, other=0.0)
            tl.store(p_head_values + (i_slot + o)[:, None] * DV + o_dv[None, :], b_v, mask=m_v)
        b_k = dot_split(b_k, tl.trans(b_m), HALF) * b_top[:, None]
        b_top = tl.maximum(tl.max(tl.abs(b_k), axis=1), TINY)
        m_any = m_old | m_new
        if finished:
            s_scale = tl.exp2(tl.ceil(tl.log2(tl.max(b_top))) - 14.0)
            tl.store(p_head_keys + o_in, (b_k / s_scale).to(tl.float16), mask=m_d)
            tl.store(p_key_scale + i_head * (s_slots // PAGE) + i_slot // PAGE, s_scale)
        else:
            b_scale = b_top / LARGEST_CODE
            tl.store(p_head_codes + o_in, nearest(b_k / b_scale[:, None]), mask=m_any[:, None] & m_d)
            tl.store(p_scale + i_bh * C + i_token % C, b_scale, mask=m_any)
        b_m = b_next

    o_in = o_d[:, None] * D + o_d[None, :]
    mask = (o_d < D)[:, None] & m_d
    p_new = p_product + i_bh * (D * D)
    if s_folded > i_chunk * C:
        b_old = tl.load(p_new + o_in, mask=mask, other=0.0)
        b_m = dot_split(b_m, b_old, HALF)
        tl.debug_barrier()  # all have read what is written now
    if finished:
        i_place = tl.load(p_chunks + i_sequence * s_chunk_columns + i_chunk).to(tl.int64)
        p_new = p_products + (i_place * H + i_head) * (D * D)
    tl.store(p_new + o_in, b_m, mask=mask)
