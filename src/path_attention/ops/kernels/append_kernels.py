"""Triton kernels that end a step of a cache, after decode_kernels.py.

append_kernel joins what that one left in pieces, counts the new tokens, and folds the oldest open ones where it is time
for that. No two of its programs touch the same memory, and what the cache held before the step is read from p_before,
which the step's first kernel wrote.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from path_attention.ops.kernels.decode_kernels import (
    LOWEST,
    PAGE,
    code_to_float,
    pieces_of,
)
from path_attention.ops.kernels.tiles import LOG2_E

FOLD = tl.constexpr(16)  # tokens folded at once: FOLD of state.py
LARGEST_CODE = tl.constexpr(32767.0)
TINY = tl.constexpr(7.888609052210118e-31)  # TINY of state.py, 2^-100
# Pieces joined at once.
PIECES = tl.constexpr(32)


@triton.jit
def is_fold_due(n, s_own, keep):
    """folds() of state.py for a short call."""
    return (s_own > 0) & (n >= FOLD) & (n + s_own - FOLD >= keep)


@triton.jit
def join_pieces(
    p_out,
    p_log_sum_exp,
    p_result,
    p_result_lse,
    i_row,
    i_result,
    i_head,
    i_first,
    s_count,
    s_all,
    s_rows,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Row i_row of pieces i_first ... i_first + s_count joined by their log-sum-exp."""
    o = tl.arange(0, PIECES)
    o_dv = tl.arange(0, BLOCK_DV)
    p_lse = p_log_sum_exp + i_head.to(tl.int64) * s_all * s_rows + i_row
    p_rows = p_out + (i_head.to(tl.int64) * s_all * s_rows + i_row) * DV
    b_max = tl.full((PIECES,), LOWEST, dtype=tl.float32)
    for i in range(0, s_count, PIECES):
        b_max = tl.maximum(b_max, tl.load(p_lse + (i_first + i + o) * s_rows, mask=i + o < s_count, other=LOWEST))
    s_max = tl.max(b_max)
    s_sum = 0.0
    b_out = tl.zeros((BLOCK_DV,), dtype=tl.float32)
    for i in range(0, s_count, PIECES):
        m_piece = i + o < s_count
        b_lse = tl.load(p_lse + (i_first + i + o) * s_rows, mask=m_piece, other=float("-inf"))
        b_weight = tl.exp2(b_lse - s_max)
        p = p_rows + ((i_first + i + o).to(tl.int64) * s_rows * DV)[:, None] + o_dv[None, :]
        b_rows = tl.load(p, mask=m_piece[:, None] & (o_dv < DV)[None, :], other=0.0)
        b_out += tl.sum(b_weight[:, None] * b_rows, axis=0)
        s_sum += tl.sum(b_weight)
    b_out = b_out / tl.where(s_sum > 0, s_sum, 1.0)
    tl.store(p_result + i_result * DV + o_dv, b_out.to(p_result.dtype.element_ty), mask=o_dv < DV)
    if p_result_lse is not None:
        tl.store(p_result_lse + i_result, (s_max + tl.log2(s_sum)) / LOG2_E)


@triton.jit
def move_rows(b_x, i_token, p_w, p_beta, s_folded, ROOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Rows (rows, BLOCK_D) moved right past the FOLD oldest open tokens, x <- x - beta (x . w) w, but past those only
    that come after a row's own token, number i_token among the open ones, below 0 for earlier ones.

    One reflection after another, as the definition has them: what comes of it is kept for all tokens to come.
    """
    o_d = tl.arange(0, b_x.shape[1])
    for i_step in range(FOLD * R):
        i_place = ((s_folded + i_step // R) % ROOM) * R + i_step % R
        b_w = tl.load(p_w + i_place * D + o_d, mask=o_d < D, other=0.0)
        b_along = tl.where(i_token < i_step // R, tl.load(p_beta + i_place) * tl.sum(b_x * b_w[None, :], axis=1), 0.0)
        b_x -= b_along[:, None] * b_w[None, :]
    return b_x


@triton.jit
def fold_columns(
    p_w,
    p_beta,
    p_old,
    p_new,
    i_first,
    s_folded,
    has_old,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Columns i_first ... of P of the FOLD oldest open tokens times the matrix at p_old, or the identity, to p_new."""
    o_col = i_first + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_col < D)[:, None] & (o_d < D)[None, :]
    o_in = o_d[None, :] * D + o_col[:, None]
    b_x = tl.where(o_col[:, None] == o_d[None, :], 1.0, 0.0)
    if has_old:
        b_x = tl.load(p_old + o_in, mask=mask, other=0.0)
    b_x = move_rows(b_x, tl.full((ROWS,), -1, dtype=tl.int32), p_w, p_beta, s_folded, ROOM, R, D)
    tl.store(p_new + o_in, b_x, mask=mask)


@triton.jit
def held_keys(
    p_keys,
    p_codes,
    p_scale,
    p_k,
    i_token,
    i_slot,
    s_folded,
    ROOM: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODED: tl.constexpr,
):
    """Keys of the open chunk and of the FOLD oldest open tokens as they are, float32; zeros for later tokens."""
    o_d = tl.arange(0, BLOCK_D)
    i_open = i_token - s_folded  # number among the open tokens
    m_old = i_open < 0
    m_new = (i_open >= 0) & (i_open < FOLD)
    m_d = (o_d < D)[None, :]
    o_in = i_slot[:, None] * D + o_d[None, :]
    if CODED:
        b_k = code_to_float(tl.load(p_codes + o_in, mask=m_old[:, None] & m_d, other=0))
        b_k *= tl.load(p_scale + i_token % C, mask=m_old, other=0.0)[:, None]
    else:
        b_k = tl.load(p_keys + o_in, mask=m_old[:, None] & m_d, other=0.0)
    i_place = tl.where(m_new, i_token, 0) % ROOM
    b_new = tl.load(p_k + i_place[:, None] * D + o_d[None, :], mask=m_new[:, None] & m_d, other=0.0)
    return b_k + b_new.to(tl.float32)


@triton.jit
def fold_page(
    p_keys,
    p_codes,
    p_key_scale,
    p_values,
    p_scale,
    p_k,
    p_v,
    p_w,
    p_beta,
    i_page,
    i_slot,
    s_folded,
    finished,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
):
    """The keys of one page of the open chunk moved past the FOLD oldest open tokens, and these put behind them."""
    o_key = tl.arange(0, KEYS)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    s_scale = 1.0
    if CODED:
        if finished:
            # No transition makes a key longer: the longest of the page bounds its numbers.
            b_longest = tl.zeros((KEYS,), dtype=tl.float32)
            for i in range(PAGE // KEYS):
                i_token = i_page * PAGE + i * KEYS + o_key
                i_place = i_slot + i * KEYS + o_key
                b_k = held_keys(p_keys, p_codes, p_scale, p_k, i_token, i_place, s_folded, ROOM, D, C, BLOCK_D, CODED)
                b_longest = tl.maximum(b_longest, tl.sum(b_k * b_k, axis=1))
            s_scale = page_scale(tl.sqrt(tl.max(b_longest)))
            tl.store(p_key_scale + i_slot // PAGE, s_scale)
    for i in range(PAGE // KEYS):
        i_token = i_page * PAGE + i * KEYS + o_key
        i_place = i_slot + i * KEYS + o_key
        i_open = i_token - s_folded
        b_k = held_keys(p_keys, p_codes, p_scale, p_k, i_token, i_place, s_folded, ROOM, D, C, BLOCK_D, CODED)
        b_k = move_rows(b_k, i_open, p_w, p_beta, s_folded, ROOM, R, D)
        mask = (i_open < FOLD)[:, None] & (o_d < D)[None, :]
        o_in = i_place[:, None] * D + o_d[None, :]
        if CODED:
            if finished:
                tl.store(p_keys + o_in, (b_k / s_scale).to(tl.float16), mask=mask)
            else:
                b_scale = tl.maximum(tl.max(tl.abs(b_k), axis=1), TINY) / LARGEST_CODE
                tl.store(p_codes + o_in, nearest(b_k / b_scale[:, None]), mask=mask)
                tl.store(p_scale + i_token % C, b_scale, mask=i_open < FOLD)
        else:
            tl.store(p_keys + o_in, b_k, mask=mask)
        m_new = (i_open >= 0) & (i_open < FOLD)
        m_v = m_new[:, None] & (o_dv < DV)[None, :]
        i_ring = tl.where(m_new, i_token, 0) % ROOM
        b_v = tl.load(p_v + i_ring[:, None] * DV + o_dv[None, :], mask=m_v, other=0.0)
        tl.store(p_values + i_place[:, None] * DV + o_dv[None, :], b_v, mask=m_v)


@triton.jit
def power_of_two(b_x):
    """The least power of two that is not smaller, but for rounding; that of TINY for less."""
    return tl.exp2(tl.ceil(tl.log2(tl.maximum(b_x, TINY))))


@triton.jit
def page_scale(s_largest):
    """What the float16 keys of a page are times, of which none is larger: encode_pages() of state.py."""
    return power_of_two(s_largest) * 6.103515625e-05  # 2^-14


@triton.jit
def nearest(b_x):
    """float32 of at most 2^21 to the nearest int16, by the rounding of an addition."""
    return ((b_x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int16)


@triton.jit
def fold_part(
    p_keys,
    p_codes,
    p_key_scale,
    p_values,
    p_gates,
    p_products,
    p_gate_totals,
    p_pages,
    p_chunks,
    p_product,
    p_gate_total,
    p_scale,
    p_k,
    p_v,
    p_w,
    p_g,
    p_beta,
    i_sequence,
    i_head,
    i_part,
    s_pages,
    s_folded,
    H,
    s_slots,
    s_page_columns,
    s_chunk_columns,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Part i_part of a fold of one head: one of s_pages pages; past these, some columns of the chunk's product, with
    the first of them the sum of its gates.
    """
    HQ = H * GROUP
    i_bh = i_sequence * H + i_head
    i_long = i_bh.to(tl.int64)
    finished = (s_folded + FOLD) % C == 0
    has_old = s_folded % C != 0
    p_head_w = p_w + i_long * (ROOM * R * D)
    p_head_beta = p_beta + i_long * (ROOM * R)
    o_fold = tl.arange(0, FOLD)
    if i_part >= s_pages:
        p_old = p_product + i_long * (D * D)
        p_new = p_old
        i_place = i_long * 0
        if finished:
            i_place = tl.load(p_chunks + i_sequence * s_chunk_columns + s_folded // C).to(tl.int64)
            p_new = p_products + (i_place * H + i_head) * (D * D)
        i_first = (i_part - s_pages) * KEYS
        fold_columns(p_head_w, p_head_beta, p_old, p_new, i_first, s_folded, has_old, ROOM, R, D, BLOCK_D, KEYS)
        if GATED:
            if i_part == s_pages:
                for i_group in range(GROUP):
                    i_query_head = i_head * GROUP + i_group
                    p_row = p_g + (i_sequence * HQ + i_query_head).to(tl.int64) * ROOM
                    p_total = p_gate_total + i_sequence * HQ + i_query_head
                    s_total = tl.sum(tl.load(p_row + (s_folded + o_fold) % ROOM))
                    if has_old:
                        s_total += tl.load(p_total)
                    if finished:
                        p_total = p_gate_totals + i_place * HQ + i_query_head
                    tl.store(p_total, s_total)
    else:
        i_page = s_folded // C * (C // PAGE) + i_part
        i_slot = tl.load(p_pages + i_sequence.to(tl.int64) * s_page_columns + i_page).to(tl.int64) * PAGE
        fold_page(
            p_keys + i_head.to(tl.int64) * s_slots * D,
            p_codes + i_head.to(tl.int64) * s_slots * D,
            p_key_scale + i_head * (s_slots // PAGE),
            p_values + i_head.to(tl.int64) * s_slots * DV,
            p_scale + i_long * C,
            p_k + i_long * (ROOM * D),
            p_v + i_long * (ROOM * DV),
            p_head_w,
            p_head_beta,
            i_page,
            i_slot,
            s_folded,
            finished,
            ROOM,
            R,
            D,
            DV,
            C,
            BLOCK_D,
            BLOCK_DV,
            KEYS,
            CODED,
        )
        if GATED:
            o_key = tl.arange(0, PAGE)
            i_open = i_page * PAGE + o_key - s_folded
            for i_group in range(GROUP):
                i_query_head = i_head * GROUP + i_group
                p_row = p_g + (i_sequence * HQ + i_query_head).to(tl.int64) * ROOM
                # Of the FOLD tokens those after each key: all of them for older keys.
                b_g = tl.load(p_row + (s_folded + o_fold) % ROOM)
                b_after = tl.sum(tl.where(o_fold[None, :] > i_open[:, None], b_g[None, :], 0.0), axis=1)
                p = p_gates + i_query_head.to(tl.int64) * s_slots + i_slot + o_key
                b_after += tl.load(p, mask=i_open < 0, other=0.0)
                tl.store(p, b_after, mask=i_open < FOLD)


@triton.jit
def fold_due(
    p_before,
    p_bounds,
    p_keys,
    p_codes,
    p_key_scale,
    p_values,
    p_gates,
    p_products,
    p_gate_totals,
    p_pages,
    p_chunks,
    p_product,
    p_gate_total,
    p_scale,
    p_k,
    p_v,
    p_w,
    p_g,
    p_beta,
    i_worker,
    s_workers,
    keep,
    capacity,
    B,
    H,
    s_new,
    s_slots,
    s_page_columns,
    s_chunk_columns,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Fold the FOLD oldest open tokens of all sequences where it is time: s_workers programs share heads and pages."""
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < B
    b_length = tl.load(p_before + o_b, mask=m_b, other=0)
    b_folded = tl.load(p_before + B + o_b, mask=m_b, other=0)
    b_own = tl.where(m_b, s_new, 0)
    if p_bounds is not None:
        b_own = tl.load(p_bounds + 1 + o_b, mask=m_b, other=0) - tl.load(p_bounds + o_b, mask=m_b, other=0)
    m_due = is_fold_due(b_length - b_folded, b_own, keep) & (b_length + b_own <= capacity)
    b_rank = tl.cumsum(m_due.to(tl.int32), axis=0)
    for i_due in range(tl.sum(m_due.to(tl.int32))):
        m_own = m_due & (b_rank == i_due + 1)
        i_sequence = tl.sum(tl.where(m_own, o_b, 0))
        s_folded = tl.sum(tl.where(m_own, b_folded, 0))
        i_chunk_first = s_folded // C * C
        s_pages = (s_folded - i_chunk_first) // PAGE + 1  # those that change
        s_parts = s_pages + (D + KEYS - 1) // KEYS  # and the product
        for i_work in range(i_worker, H * s_parts, s_workers):
            i_head = i_work // s_parts
            i_part = i_work % s_parts
            fold_part(
                p_keys,
                p_codes,
                p_key_scale,
                p_values,
                p_gates,
                p_products,
                p_gate_totals,
                p_pages,
                p_chunks,
                p_product,
                p_gate_total,
                p_scale,
                p_k,
                p_v,
                p_w,
                p_g,
                p_beta,
                i_sequence,
                i_head,
                i_part,
                s_pages,
                s_folded,
                H,
                s_slots,
                s_page_columns,
                s_chunk_columns,
                GROUP,
                R,
                D,
                DV,
                C,
                ROOM,
                BLOCK_D,
                BLOCK_DV,
                KEYS,
                CODED,
                GATED,
            )


@triton.jit(
    do_not_specialize=(
        "keep",
        "capacity",
        "B",
        "H",
        "s_new",
        "s_items",
        "s_queries",
        "s_workers",
        "s_page_columns",
        "s_chunk_columns",
    )
)
def append_kernel(
    p_out,  # what attend_kernel wrote
    p_log_sum_exp,
    p_before,
    p_result,  # out (tokens, HQ, DV)
    p_full,  # out (B,) int32: set where tokens did not fit
    p_bounds,
    p_keys,  # from here on fields of State
    p_codes,  # keys as int16
    p_key_scale,
    p_values,
    p_gates,
    p_products,
    p_gate_totals,
    p_pages,
    p_chunks,
    p_length,
    p_folded,
    p_product,
    p_gate_total,
    p_scale,
    p_k,
    p_v,
    p_w,
    p_beta,
    p_g,
    keep,  # tokens that stay open
    capacity,  # tokens a sequence at most
    B,
    H,
    s_new,  # T, tokens of each sequence, or of the longest
    s_items,  # pieces asked of work_item()
    s_queries,  # tokens of all sequences times HQ
    s_workers,  # programs that share the pages to be folded, 0 if none are
    s_slots,
    s_page_columns,
    s_chunk_columns,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    KEYS: tl.constexpr,  # tile of keys, a part of a page, and of columns of the product
    CODED: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,  # launched before attend_kernel has ended
):
    """The results of one query joined; behind these B programs count the tokens of a sequence, and s_workers fold."""
    if OVERLAPS:
        gdc_wait()
    HQ = H * GROUP
    i_query = tl.program_id(0)
    i_other = i_query - s_queries
    if i_other >= B:
        fold_due(
            p_before,
            p_bounds,
            p_keys,
            p_codes,
            p_key_scale,
            p_values,
            p_gates,
            p_products,
            p_gate_totals,
            p_pages,
            p_chunks,
            p_product,
            p_gate_total,
            p_scale,
            p_k,
            p_v,
            p_w,
            p_g,
            p_beta,
            i_other - B,
            s_workers,
            keep,
            capacity,
            B,
            H,
            s_new,
            s_slots,
            s_page_columns,
            s_chunk_columns,
            GROUP,
            R,
            D,
            DV,
            C,
            ROOM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_B,
            KEYS,
            CODED,
            GATED,
        )
        return
    if i_other >= 0:
        s_length = tl.load(p_before + i_other)
        s_folded = tl.load(p_before + B + i_other)
        s_own = s_new
        if p_bounds is not None:
            s_own = tl.load(p_bounds + i_other + 1) - tl.load(p_bounds + i_other)
        if s_length + s_own > capacity:
            tl.store(p_full + i_other, 1)
        else:
            is_due = is_fold_due(s_length - s_folded, s_own, keep)
            tl.store(p_length + i_other, s_length + s_own)
            tl.store(p_folded + i_other, s_folded + tl.where(is_due, FOLD, 0))
        return
    i_token = i_query // HQ
    i_sequence = i_token // s_new
    i_new = i_token % s_new
    s_own = s_new
    if p_bounds is not None:
        o_b = tl.arange(0, BLOCK_B)
        b_ends = tl.load(p_bounds + 1 + o_b, mask=o_b < B, other=0)
        i_sequence = tl.sum(((b_ends <= i_token) & (o_b < B)).to(tl.int32))
        s_start = tl.load(p_bounds + i_sequence)
        i_new = i_token - s_start
        s_own = tl.load(p_bounds + i_sequence + 1) - s_start
    if tl.load(p_before + i_sequence) + s_own > capacity:
        o_dv = tl.arange(0, BLOCK_DV)
        b_nothing = tl.full((BLOCK_DV,), float("nan"), dtype=tl.float32)
        p_row = p_result + i_query.to(tl.int64) * DV + o_dv
        tl.store(p_row, b_nothing.to(p_result.dtype.element_ty), mask=o_dv < DV)
        return
    i_first, s_count = pieces_of(p_before + B, i_sequence, B, s_items, BLOCK_B)
    join_pieces(
        p_out,
        p_log_sum_exp,
        p_result,
        None,
        i_new * GROUP + i_query % GROUP,
        i_query.to(tl.int64),
        i_query % HQ // GROUP,
        i_first,
        s_count,
        s_items + B,
        s_new * GROUP,
        DV,
        BLOCK_DV,
    )


@triton.jit(do_not_specialize=("B", "H", "s_new", "s_items"))
def join_kernel(
    p_out,  # what attend_kernel wrote, MOVED
    p_log_sum_exp,
    p_result,  # out (B, HQ, T, DV) float32
    p_result_lse,  # out (B, HQ, T) float32, natural
    p_folded,
    B,
    H,
    s_new,
    s_items,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The pieces of one query joined."""
    HQ = H * GROUP
    i_new = tl.program_id(0) % s_new
    i_query_head = tl.program_id(0) // s_new % HQ
    i_sequence = tl.program_id(0) // s_new // HQ
    i_first, s_count = pieces_of(p_folded, i_sequence, B, s_items, BLOCK_B)
    join_pieces(
        p_out,
        p_log_sum_exp,
        p_result,
        p_result_lse,
        i_new * GROUP + i_query_head % GROUP,
        tl.program_id(0).to(tl.int64),
        i_query_head // GROUP,
        i_first,
        s_count,
        s_items + B,
        s_new * GROUP,
        DV,
        BLOCK_DV,
    )
