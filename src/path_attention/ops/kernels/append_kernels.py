"""Triton kernels that end a step of a cache, after decode_kernels.py.

append_kernel joins what that one left in pieces and counts the new tokens; fold_kernel folds the oldest open ones where
it is time for that. No two programs of a launch touch the same memory, and what the cache held before the step is read
from p_before, which the step's first kernel wrote.

A fold reads and writes all keys of the open chunk, up to C a head, so what it does to them is two products of matrix
units, of float16 parts: a key's new format, 16 bits, rounds more than 22 bits do. The chunk's product is kept for all
tokens to come and has few columns: they move in float32, one reflection after another.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from path_attention.ops.kernels.decode_kernels import (
    LOWEST,
    PAGE,
    code_to_float,
    pieces_of,
    triangle_inverse,
)
from path_attention.ops.kernels.tiles import LOG2_E, dot_float32

FOLD = tl.constexpr(16)  # tokens folded at once: FOLD of state.py
LARGEST_CODE = tl.constexpr(32767.0)
CODE_UNIT = tl.constexpr(2.0**-15)  # makes int16 numbers of at most 1
TINY = tl.constexpr(7.888609052210118e-31)  # TINY of state.py, 2^-100
# Pieces joined at once.
PIECES = tl.constexpr(32)
# Parts that a program folds, where there are enough pages. For each it solves for the reflections of the fold first;
# but all have about the same number only if this is not one or two.
PARTS = tl.constexpr(4)


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
def move_rows(b_x, p_w, p_beta, s_folded, ROOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Rows (rows, BLOCK_D) moved right past the FOLD oldest open tokens, x <- x - beta (x . w) w.

    One reflection after another, as the definition has them: what comes of it is kept for all tokens to come.
    """
    o_d = tl.arange(0, b_x.shape[1])
    for i_step in range(FOLD * R):
        i_place = ((s_folded + i_step // R) % ROOM) * R + i_step % R
        b_w = tl.load(p_w + i_place * D + o_d, mask=o_d < D, other=0.0)
        b_along = tl.load(p_beta + i_place) * tl.sum(b_x * b_w[None, :], axis=1)
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
    b_x = move_rows(b_x, p_w, p_beta, s_folded, ROOM, R, D)
    tl.store(p_new + o_in, b_x, mask=mask)


@triton.jit
def fold_factors(
    p_w,
    p_beta,
    s_folded,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    HALF: tl.constexpr,
):
    """W and U (STEPS, BLOCK_D) of the FOLD oldest open tokens: a row that passes them all becomes x - (x W^T) U, and
    one that starts behind some of them the same without what x W^T has of these. Rows past the last are zeros.

    U = D (I + strictUpper(W W^T) D)^-1 W.
    """
    o = tl.arange(0, STEPS)
    o_d = tl.arange(0, BLOCK_D)
    i_place = ((s_folded + o // R) % ROOM) * R + o % R
    m_step = o < FOLD * R
    b_w = tl.load(p_w + i_place[:, None] * D + o_d[None, :], mask=m_step[:, None] & (o_d < D)[None, :], other=0.0)
    b_beta = tl.load(p_beta + i_place, mask=m_step, other=0.0)
    b_gram = tl.where(o[:, None] < o[None, :], dot_float32(b_w, tl.trans(b_w), HALF) * b_beta[None, :], 0.0)
    b_u = b_beta[:, None] * dot_float32(triangle_inverse(b_gram, HALF), b_w, HALF)
    return b_w, b_u


@triton.jit
def old_keys(
    p_keys,  # of the first key of a tile, as are the next
    p_codes,
    p_scale,
    m_key,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
):
    """A tile of keys of the open chunk, float32, and what each row is times, zeros where m_key is false. CODED rows
    have numbers of at most 1, so that their parts are float16 numbers.
    """
    o_key = tl.arange(0, KEYS)
    o_d = tl.arange(0, BLOCK_D)
    mask = m_key[:, None] & (o_d < D)[None, :]
    o_in = o_key[:, None] * D + o_d[None, :]
    if CODED:
        b_k = code_to_float(tl.load(p_codes + o_in, mask=mask, other=0)) * CODE_UNIT
        return b_k, tl.load(p_scale + o_key, mask=m_key, other=0.0) / CODE_UNIT
    else:
        return tl.load(p_keys + o_in, mask=mask, other=0.0), tl.full((KEYS,), 1.0, dtype=tl.float32)


@triton.jit
def new_keys(
    p_k,
    i_token,
    s_folded,
    ROOM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
):
    """Of the tile from token i_token on the FOLD oldest open tokens, as old_keys() has the others, zeros elsewhere."""
    i_own = i_token + tl.arange(0, KEYS)
    o_d = tl.arange(0, BLOCK_D)
    m_new = (i_own >= s_folded) & (i_own < s_folded + FOLD)
    o_in = (tl.where(m_new, i_own, 0) % ROOM)[:, None] * D + o_d[None, :]
    b_k = tl.load(p_k + o_in, mask=m_new[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    b_unit = tl.where(m_new, 1.0, 0.0)
    if CODED:
        b_unit = tl.where(m_new, power_of_two(tl.max(tl.abs(b_k), axis=1)), 0.0)
        b_k = b_k / tl.where(m_new, b_unit, 1.0)[:, None]
    return b_k, b_unit


@triton.jit
def put_keys(
    p_keys,  # of the first key of a tile, as are the next
    p_codes,
    p_scale,
    p_page_scale,
    b_k,
    b_unit,
    m_key,
    finished,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
):
    """Store a tile of keys that has moved, those of a finished chunk in float16."""
    o_key = tl.arange(0, KEYS)
    o_d = tl.arange(0, BLOCK_D)
    mask = m_key[:, None] & (o_d < D)[None, :]
    o_in = o_key[:, None] * D + o_d[None, :]
    if CODED:
        if finished:
            b_factor = b_unit / tl.load(p_page_scale)
            tl.store(p_keys + o_in, (b_k * b_factor[:, None]).to(tl.float16), mask=mask)
        else:
            b_scale = tl.maximum(tl.max(tl.abs(b_k), axis=1) * b_unit, TINY) / LARGEST_CODE
            tl.store(p_codes + o_in, nearest(b_k * (b_unit / b_scale)[:, None]), mask=mask)
            tl.store(p_scale + o_key, b_scale, mask=m_key)
    else:
        tl.store(p_keys + o_in, b_k, mask=mask)


@triton.jit
def scale_pages(
    p_table,
    p_codes,
    p_key_scale,
    p_scale,
    p_k,
    i_first,
    i_end,
    s_folded,
    ROOM: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
):
    """What the float16 keys of these pages will be times: no transition makes a key longer, so the longest of the page
    bounds its numbers.
    """
    for i_page in range(i_first, i_end):
        i_slot = tl.load(p_table + i_page).to(tl.int64) * PAGE
        b_longest = tl.zeros((KEYS,), dtype=tl.float32)
        for i in range(PAGE // KEYS):
            i_token = i_page * PAGE + i * KEYS
            m_old = i_token + tl.arange(0, KEYS) < s_folded
            p_tile = p_codes + (i_slot + i * KEYS) * D
            b_k, b_unit = old_keys(p_codes, p_tile, p_scale + i_token % C, m_old, D, BLOCK_D, KEYS, True)
            b_longest = tl.maximum(b_longest, tl.sqrt(tl.sum(b_k * b_k, axis=1)) * b_unit)
            if i_token + KEYS > s_folded:
                b_k, b_unit = new_keys(p_k, i_token, s_folded, ROOM, D, BLOCK_D, KEYS, True)
                b_longest = tl.maximum(b_longest, tl.sqrt(tl.sum(b_k * b_k, axis=1)) * b_unit)
        tl.store(p_key_scale + i_slot // PAGE, page_scale(tl.max(b_longest)))


@triton.jit
def fold_pages(
    p_table,
    p_keys,
    p_codes,
    p_key_scale,
    p_values,
    p_scale,
    p_k,
    p_v,
    p_w,
    p_beta,
    i_first,
    i_end,
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
    STEPS: tl.constexpr,
    CODED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The keys of some pages of the open chunk moved past the FOLD oldest open tokens, and these put behind them: FOLD
    tokens are in one tile.
    """
    HALF: tl.constexpr = tl.float16 if CODED else None
    TILES: tl.constexpr = PAGE // KEYS
    o_key = tl.arange(0, KEYS)
    o_dv = tl.arange(0, BLOCK_DV)
    o_step = tl.arange(0, STEPS)
    if CODED:
        if finished:
            scale_pages(
                p_table, p_codes, p_key_scale, p_scale, p_k, i_first, i_end, s_folded, ROOM, D, C, BLOCK_D, KEYS
            )
            tl.debug_barrier()  # what one thread wrote all read below
    b_w, b_u = fold_factors(p_w, p_beta, s_folded, ROOM, R, D, BLOCK_D, STEPS, HALF)
    i_mixed = s_folded // KEYS  # the tile of the new tokens
    for i_tile in tl.range(i_first * TILES, tl.minimum(i_end * TILES, i_mixed), num_stages=STAGES):
        i_token, i_page, i_place = find_keys(p_table, i_tile, KEYS)
        p_own_keys = p_keys + i_place * D
        p_own_codes = p_codes + i_place * D
        p_own_scale = p_scale + i_token % C
        b_k, b_unit = old_keys(p_own_keys, p_own_codes, p_own_scale, o_key >= 0, D, BLOCK_D, KEYS, CODED)
        b_k -= dot_float32(dot_float32(b_k, tl.trans(b_w), HALF), b_u, HALF)
        put_keys(
            p_own_keys,
            p_own_codes,
            p_own_scale,
            p_key_scale + i_page,
            b_k,
            b_unit,
            o_key >= 0,
            finished,
            D,
            BLOCK_D,
            KEYS,
            CODED,
        )
    if i_mixed < i_end * TILES:
        i_token, i_page, i_place = find_keys(p_table, i_mixed, KEYS)
        p_own_keys = p_keys + i_place * D
        p_own_codes = p_codes + i_place * D
        p_own_scale = p_scale + i_token % C
        i_open = i_token + o_key - s_folded
        b_k, b_unit = old_keys(p_own_keys, p_own_codes, p_own_scale, i_open < 0, D, BLOCK_D, KEYS, CODED)
        b_new, b_new_unit = new_keys(p_k, i_token, s_folded, ROOM, D, BLOCK_D, KEYS, CODED)
        b_k += b_new
        # A key passes the tokens that come after its own.
        b_along = dot_float32(b_k, tl.trans(b_w), HALF)
        b_along = tl.where(i_open[:, None] < (o_step // R)[None, :], b_along, 0.0)
        b_k -= dot_float32(b_along, b_u, HALF)
        put_keys(
            p_own_keys,
            p_own_codes,
            p_own_scale,
            p_key_scale + i_page,
            b_k,
            b_unit + b_new_unit,
            i_open < FOLD,
            finished,
            D,
            BLOCK_D,
            KEYS,
            CODED,
        )
        m_v = ((i_open >= 0) & (i_open < FOLD))[:, None] & (o_dv < DV)[None, :]
        o_in = (tl.where(i_open >= 0, i_token + o_key, 0) % ROOM)[:, None] * DV + o_dv[None, :]
        b_v = tl.load(p_v + o_in, mask=m_v, other=0.0)
        tl.store(p_values + i_place * DV + o_key[:, None] * DV + o_dv[None, :], b_v, mask=m_v)


@triton.jit
def find_keys(p_table, i_tile, KEYS: tl.constexpr):
    """The first token of tile i_tile of a sequence, its page and its place in the pages."""
    i_token = i_tile * KEYS
    i_number = i_token // PAGE
    i_page = tl.load(p_table + i_number).to(tl.int64)
    return i_token, i_page, i_page * PAGE + (i_token - i_number * PAGE)


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
    is_product,
    s_each,
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
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CODED: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Part i_part of a fold of one head: s_each of its pages; or some columns of the chunk's product, with the first of
    them the sum of its gates.
    """
    HQ = H * GROUP
    i_bh = i_sequence * H + i_head
    i_long = i_bh.to(tl.int64)
    finished = (s_folded + FOLD) % C == 0
    has_old = s_folded % C != 0
    p_head_w = p_w + i_long * (ROOM * R * D)
    p_head_beta = p_beta + i_long * (ROOM * R)
    o_fold = tl.arange(0, FOLD)
    if is_product:
        p_old = p_product + i_long * (D * D)
        p_new = p_old
        i_place = i_long * 0
        if finished:
            i_place = tl.load(p_chunks + i_sequence * s_chunk_columns + s_folded // C).to(tl.int64)
            p_new = p_products + (i_place * H + i_head) * (D * D)
        fold_columns(
            p_head_w, p_head_beta, p_old, p_new, i_part * COLUMNS, s_folded, has_old, ROOM, R, D, BLOCK_D, COLUMNS
        )
        if GATED:
            if i_part == 0:
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
        i_first = s_folded // C * (C // PAGE) + i_part * s_each
        i_end = tl.minimum(i_first + s_each, s_folded // PAGE + 1)
        p_table = p_pages + i_sequence.to(tl.int64) * s_page_columns
        fold_pages(
            p_table,
            p_keys + i_head.to(tl.int64) * s_slots * D,
            p_codes + i_head.to(tl.int64) * s_slots * D,
            p_key_scale + i_head * (s_slots // PAGE),
            p_values + i_head.to(tl.int64) * s_slots * DV,
            p_scale + i_long * C,
            p_k + i_long * (ROOM * D),
            p_v + i_long * (ROOM * DV),
            p_head_w,
            p_head_beta,
            i_first,
            i_end,
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
            STEPS,
            CODED,
            STAGES,
        )
        if GATED:
            o_key = tl.arange(0, PAGE)
            for i_page in range(i_first, i_end):
                i_open = i_page * PAGE + o_key - s_folded
                i_slot = tl.load(p_table + i_page).to(tl.int64) * PAGE
                for i_group in range(GROUP):
                    i_query_head = i_head * GROUP + i_group
                    p_row = p_g + (i_sequence * HQ + i_query_head).to(tl.int64) * ROOM
                    # Of the FOLD tokens those after each key: all of them for older keys.
                    b_g = tl.load(p_row + (s_folded + o_fold) % ROOM)
                    b_after = tl.sum(tl.where(o_fold[None, :] > i_open[:, None], b_g[None, :], 0.0), axis=1)
                    p = p_gates + i_query_head.to(tl.int64) * s_slots + i_slot + o_key
                    b_after += tl.load(p, mask=i_open < 0, other=0.0)
                    tl.store(p, b_after, mask=i_open < FOLD)


@triton.jit(do_not_specialize=("s_workers", "keep", "capacity", "B", "H", "s_new", "s_page_columns", "s_chunk_columns"))
def fold_kernel(
    p_before,  # what attend_kernel wrote
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
    p_product,
    p_gate_total,
    p_scale,
    p_k,
    p_v,
    p_w,
    p_beta,
    p_g,
    s_workers,  # programs
    keep,  # tokens that stay open
    capacity,  # tokens a sequence at most
    B,
    H,
    s_new,  # T, tokens of each sequence, or of the longest
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
    KEYS: tl.constexpr,  # tile of keys, a part of a page
    COLUMNS: tl.constexpr,  # tile of columns of the product
    STEPS: tl.constexpr,  # tile of the reflections that are folded
    CODED: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop over tiles of keys
):
    """Fold the FOLD oldest open tokens of all sequences where it is time: s_workers programs share heads and pages.

    Parts are dealt out in turn, those of all pages and then those of all products, of which each has as much to do as
    the others of its kind.
    """
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < B
    b_length = tl.load(p_before + o_b, mask=m_b, other=0)
    b_folded = tl.load(p_before + B + o_b, mask=m_b, other=0)
    b_own = tl.where(m_b, s_new, 0)
    if p_bounds is not None:
        b_own = tl.load(p_bounds + 1 + o_b, mask=m_b, other=0) - tl.load(p_bounds + o_b, mask=m_b, other=0)
    m_due = is_fold_due(b_length - b_folded, b_own, keep) & (b_length + b_own <= capacity)
    b_rank = tl.cumsum(m_due.to(tl.int32), axis=0)
    s_due = tl.sum(m_due.to(tl.int32))
    b_pages = tl.where(m_due, b_folded % C // PAGE + 1, 0)  # those that change
    s_each = tl.cdiv(H * tl.sum(b_pages), s_workers * PARTS)
    i_next = tl.program_id(0)  # of the parts that are not dealt out yet the first of this program
    for i_turn in range(2 * s_due):
        is_product = i_turn >= s_due
        m_own = m_due & (b_rank == i_turn % s_due + 1)
        i_sequence = tl.sum(tl.where(m_own, o_b, 0))
        s_folded = tl.sum(tl.where(m_own, b_folded, 0))
        s_parts = tl.cdiv(tl.sum(tl.where(m_own, b_pages, 0)), tl.maximum(s_each, 1))
        if is_product:
            s_parts = (D + COLUMNS - 1) // COLUMNS
        while i_next < H * s_parts:
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
                i_next // s_parts,
                i_next % s_parts,
                is_product,
                s_each,
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
                COLUMNS,
                STEPS,
                CODED,
                GATED,
                STAGES,
            )
            i_next += s_workers
        i_next -= H * s_parts


@triton.jit(do_not_specialize=("keep", "capacity", "B", "H", "s_new", "s_items", "s_queries"))
def append_kernel(
    p_out,  # what attend_kernel wrote
    p_log_sum_exp,
    p_before,
    p_result,  # out (tokens, HQ, DV)
    p_full,  # out (B,) int32: set where tokens did not fit
    p_bounds,
    p_length,  # of State, as the next
    p_folded,
    keep,  # tokens that stay open
    capacity,  # tokens a sequence at most
    B,
    H,
    s_new,  # T, tokens of each sequence, or of the longest
    s_items,  # pieces asked of work_item()
    s_queries,  # tokens of all sequences times HQ
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    OVERLAPS: tl.constexpr,  # launched before attend_kernel has ended
):
    """The results of one query joined; behind these B programs count the tokens of a sequence."""
    if OVERLAPS:
        gdc_wait()
    HQ = H * GROUP
    i_query = tl.program_id(0)
    i_other = i_query - s_queries
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
