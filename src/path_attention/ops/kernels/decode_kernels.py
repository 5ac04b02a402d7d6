"""Triton kernel that attends to a cache: a few new queries a sequence, all keys and values read once.

What the cache holds, and the letters, are those of ops/history/state.py. Every program moves its queries by itself from
where they stand to the chunk it reads: past the new tokens, past the open ones, and then from edge to edge. Those that
attend to the open tokens also put the new ones behind them, at places that no other program reads; append_kernels.py
joins the results and does the rest.

Moving the queries is a chain of small products that each wait for the one before, and no page can be met before its
end. To call the first pages into the L2 cache meanwhile made steps longer: what the chain itself reads came later.

Logits are times log2(e) in here, for exp2 is what the hardware has.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from path_attention.ops.kernels.tiles import LOG2_E, dot_float32

PAGE = tl.constexpr(64)  # tokens a page: PAGE of state.py
SUFFIX = tl.constexpr(4)  # chunks a suffix: SUFFIX of state.py
# Fewer pages are not worth a program: it moves its queries first, for about as long as it takes to read 4 pages.
LEAST_PAGES = tl.constexpr(8)
# Reflections that queries pass at once, and the tile of their tokens: as few as a matrix unit takes.
BLOCK = tl.constexpr(16)
# Of the loop over these tiles: one is fetched while another is passed.
OPEN_STAGES = tl.constexpr(2)
# In place of minus infinity where a maximum starts, so that differences are numbers.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def count_pieces(p_folded, B, s_items, BLOCK_B: tl.constexpr):
    """Pages of every sequence, and the pieces that each is cut into, one at least, so that all are about alike.

    Rounded down: s_items is as many as run at once, and one more would run after all others.
    """
    o = tl.arange(0, BLOCK_B)
    b_pages = (tl.load(p_folded + o, mask=o < B, other=0) + (PAGE - 1)) // PAGE
    b_count = b_pages * s_items // tl.maximum(tl.sum(b_pages), 1)
    b_count = tl.maximum(tl.minimum(b_count, b_pages // LEAST_PAGES), 1)
    return b_pages, tl.where(o < B, b_count, 0), o


@triton.jit
def pieces_of(p_folded, i_sequence, B, s_items, BLOCK_B: tl.constexpr):
    """(first piece, number of pieces) of one sequence."""
    _, b_count, o = count_pieces(p_folded, B, s_items, BLOCK_B)
    return tl.sum(tl.where(o < i_sequence, b_count, 0)), tl.sum(tl.where(o == i_sequence, b_count, 0))


@triton.jit
def work_item(p_folded, i_item, B, s_items, BLOCK_B: tl.constexpr):
    """(sequence, first page, end page) of piece i_item of the histories, and whether it is its sequence's last.

    At most s_items + B pieces; those past the last have sequence B. No piece spans two sequences; the last ones of a
    sequence may be empty.
    """
    b_pages, b_count, o = count_pieces(p_folded, B, s_items, BLOCK_B)
    b_last = tl.cumsum(b_count, axis=0)
    i_sequence = tl.sum(((b_last <= i_item) & (o < B)).to(tl.int32))
    s_pages = tl.sum(tl.where(o == i_sequence, b_pages, 0))
    s_count = tl.sum(tl.where(o == i_sequence, b_count, 0))
    s_before = tl.sum(tl.where(o < i_sequence, b_count, 0))
    s_each = tl.cdiv(s_pages, tl.maximum(s_count, 1))
    i_first = tl.minimum((i_item - s_before) * s_each, s_pages)
    return i_sequence, i_first, tl.minimum(i_first + s_each, s_pages), i_item - s_before == s_count - 1


@triton.jit
def columns(b_x, i_part: tl.constexpr, WIDTH: tl.constexpr):
    """Columns i_part * WIDTH ... of a tile."""
    ROWS: tl.constexpr = b_x.shape[0]
    PARTS: tl.constexpr = b_x.shape[1] // WIDTH
    if PARTS == 1:
        return b_x
    else:
        b_parts = tl.reshape(b_x, (ROWS, PARTS, WIDTH))
        o_part = tl.arange(0, PARTS)
        return tl.sum(tl.where((o_part == i_part)[None, :, None], b_parts, 0.0), axis=1)


@triton.jit
def times_matrix(b_x, p_matrix, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """b_x (rows, BLOCK_D) times the matrix (D, D) at p_matrix, both float32."""
    o_d = tl.arange(0, BLOCK_D)
    o_row = tl.arange(0, WIDTH)
    b_out = tl.zeros(b_x.shape, dtype=tl.float32)
    for i_part in tl.static_range(BLOCK_D // WIDTH):
        i_row = i_part * WIDTH + o_row
        mask = (i_row < D)[:, None] & (o_d < D)[None, :]
        b_part = tl.load(p_matrix + i_row[:, None] * D + o_d[None, :], mask=mask, other=0.0)
        b_out += dot_float32(columns(b_x, i_part, WIDTH), b_part, HALF)
    return b_out


@triton.jit
def add_up(b_logits, b_v, b_max, b_sum, b_out):
    """One step of the online softmax over a tile of keys."""
    b_new = tl.maximum(b_max, tl.max(b_logits, axis=1))
    b_weights = tl.exp2(b_logits - b_new[:, None])
    b_fade = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_fade + tl.sum(b_weights, axis=1)
    b_out = b_out * b_fade[:, None]
    if b_v.dtype == tl.bfloat16:
        # Two parts, so that weights are not rounded to 8 bits: reading the values takes longer than either.
        b_high = b_weights.to(tl.bfloat16)
        b_out = tl.dot((b_weights - b_high.to(tl.float32)).to(tl.bfloat16), b_v, b_out)
        b_out = tl.dot(b_high, b_v, b_out)
    else:
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision="ieee")
    return b_new, b_sum, b_out


@triton.jit
def halves(b_x):
    """A float32 tile as a float16 one, what its rounding took, and what both are times, a number a row."""
    b_top = tl.max(tl.abs(b_x), axis=1)
    b_top = tl.where(b_top > 0, b_top, 1.0)
    b_part = b_x / b_top[:, None]
    b_high = b_part.to(tl.float16)
    return b_high, (b_part - b_high.to(tl.float32)).to(tl.float16), b_top


@triton.jit
def code_to_float(b_codes):
    """int16 to float32 by arithmetic on its bits: conversions run at an eighth of the rate."""
    return (b_codes.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def past_token(
    b_x,
    b_gate,
    b_max,
    b_sum,
    b_out,
    p_k,  # of this token and head, as are the next
    p_v,
    p_w,
    p_beta,
    p_g,  # (rows,): of each row's query head
    w_stride,  # from one reflection of the token to the next, and of beta
    beta_stride,
    m_later,  # (rows,): queries that are not before this token
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GATED: tl.constexpr,
    ATTENDS: tl.constexpr,
):
    """Queries right behind a token attend to it, where ATTENDS, and move on to its left: the definition itself."""
    o_d = tl.arange(0, BLOCK_D)
    if ATTENDS:
        o_dv = tl.arange(0, BLOCK_DV)
        b_k = tl.load(p_k + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_dv, mask=o_dv < DV, other=0.0).to(tl.float32)
        b_logit = tl.where(m_later, (tl.sum(b_x * b_k[None, :], axis=1) + b_gate) * LOG2_E, float("-inf"))
        b_top = tl.maximum(b_max, b_logit)
        b_weight = tl.exp2(b_logit - b_top)
        b_fade = tl.exp2(b_max - b_top)
        b_sum = b_sum * b_fade + b_weight
        b_out = b_out * b_fade[:, None] + b_weight[:, None] * b_v[None, :]
        b_max = b_top
    for i in tl.static_range(R):
        b_w = tl.load(p_w + (R - 1 - i) * w_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        s_beta = tl.load(p_beta + (R - 1 - i) * beta_stride).to(tl.float32)
        b_along = tl.where(m_later, s_beta * tl.sum(b_x * b_w[None, :], axis=1), 0.0)
        b_x -= b_along[:, None] * b_w[None, :]
    if GATED:
        b_gate += tl.where(m_later, tl.maximum(tl.load(p_g).to(tl.float32), LOWEST), 0.0)
    return b_x, b_gate, b_max, b_sum, b_out


@triton.jit
def triangle_inverse(b_n, HALF: tl.constexpr):
    """(I + n)^-1 of a strictly upper triangular n, from blocks on the diagonal, each made of two of half the size.

    Their numbers are of the order of those of products of transitions, which make nothing longer: nothing cancels.
    """
    SIZE: tl.constexpr = b_n.shape[0]
    o = tl.arange(0, SIZE)
    b_x = tl.where(o[:, None] == o[None, :], 1.0, 0.0)
    for i in tl.static_range(8):
        if 1 << i < SIZE:
            is_pair = (o[:, None] >> (i + 1)) == (o[None, :] >> (i + 1))
            b_between = tl.where(is_pair & ((o[:, None] >> i) < (o[None, :] >> i)), b_n, 0.0)
            if i > 0:
                b_between = dot_float32(dot_float32(b_x, b_between, HALF), b_x, HALF)
            b_x -= b_between
    return b_x


@triton.jit
def past_open_tokens(
    b_x,
    b_gate,
    b_max,
    b_sum,
    b_out,
    p_k,  # open tokens of this sequence and head, as are the next
    p_v,
    p_w,
    p_beta,
    p_g,  # (rows,): of each row's query head
    i_last,
    s_folded,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    HALF: tl.constexpr,
    GATED: tl.constexpr,
    ATTENDS: tl.constexpr,
):
    """Queries moved past TOKENS open tokens at once, from number i_last on to the left. With W the vectors of their
    reflections in the order in which they are met, c = x W^T D (I + strictUpper(W W^T) D)^-1 and x <- x - c W.
    """
    # Numbers of W alone are of order 1.
    UNIT: tl.constexpr = None if HALF is None else tl.float16
    o = tl.arange(0, STEPS)
    o_d = tl.arange(0, BLOCK_D)
    i_open = i_last - o // R
    m_step = (i_open >= 0) & (o < TOKENS * R)
    i_step = ((s_folded + tl.maximum(i_open, 0)) % ROOM) * R + R - 1 - o % R
    b_w = tl.load(p_w + i_step[:, None] * D + o_d[None, :], mask=m_step[:, None] & (o_d < D)[None, :], other=0.0)
    b_beta = tl.load(p_beta + i_step, mask=m_step, other=0.0)
    b_gram = dot_float32(b_w, tl.trans(b_w), UNIT) * b_beta[None, :]
    b_inverse = triangle_inverse(tl.where(o[:, None] < o[None, :], b_gram, 0.0), UNIT)
    b_c = dot_float32(dot_float32(b_x, tl.trans(b_w), HALF) * b_beta[None, :], b_inverse, HALF)
    o_token = tl.arange(0, BLOCK)
    m_token = (i_last - o_token >= 0) & (o_token < TOKENS)
    i_place = (s_folded + tl.maximum(i_last - o_token, 0)) % ROOM
    if GATED:
        b_g = tl.load(p_g[:, None] + i_place[None, :], mask=m_token[None, :], other=0.0)
        b_g = tl.maximum(b_g, LOWEST)
    if ATTENDS:
        o_dv = tl.arange(0, BLOCK_DV)
        b_k = tl.load(p_k + i_place[:, None] * D + o_d[None, :], mask=m_token[:, None] & (o_d < D)[None, :], other=0.0)
        b_k = tl.trans(b_k.to(tl.float32))
        # A query has passed the tokens behind the one that it meets.
        b_behind = tl.where((o // R)[:, None] < o_token[None, :], dot_float32(b_w, b_k, HALF), 0.0)
        b_logits = dot_float32(b_x, b_k, HALF) - dot_float32(b_c, b_behind, HALF)
        if GATED:
            b_before = tl.where(o_token[:, None] < o_token[None, :], 1.0, 0.0)
            b_logits += b_gate[:, None] + tl.dot(b_g, b_before, input_precision="ieee")
        b_logits = tl.where(m_token[None, :], b_logits * LOG2_E, float("-inf"))
        m_v = m_token[:, None] & (o_dv < DV)[None, :]
        b_v = tl.load(p_v + i_place[:, None] * DV + o_dv[None, :], mask=m_v, other=0.0)
        b_max, b_sum, b_out = add_up(b_logits, b_v, b_max, b_sum, b_out)
    if GATED:
        b_gate += tl.sum(b_g, axis=1)
    return b_x - dot_float32(b_c, b_w, HALF), b_gate, b_max, b_sum, b_out


@triton.jit
def past_tokens(
    b_x,
    b_gate,
    b_max,
    b_sum,
    b_out,
    p_new_k,
    p_new_v,
    p_new_w,
    p_new_beta,
    p_new_g,
    p_k,  # open tokens of this sequence and head, as are the next
    p_v,
    p_w,
    p_beta,
    p_g,  # (rows,): of each row's query head
    i_new,
    i_start,
    s_own,
    n,
    s_folded,
    i_query_head,
    i_head,
    H,
    HQ,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STEPS: tl.constexpr,
    HALF: tl.constexpr,
    GATED: tl.constexpr,
    ATTENDS: tl.constexpr,
):
    """Queries of the new tokens i_new moved past all of these and then all open ones, to the fold's edge."""
    for i in range(s_own):
        i_token = (i_start + s_own - 1 - i).to(tl.int64)
        i_step = i_token * R * H + i_head
        p_gates = p_g
        if GATED:
            p_gates = p_new_g + i_token * HQ + i_query_head
        b_x, b_gate, b_max, b_sum, b_out = past_token(
            b_x,
            b_gate,
            b_max,
            b_sum,
            b_out,
            p_new_k + (i_token * H + i_head) * D,
            p_new_v + (i_token * H + i_head) * DV,
            p_new_w + i_step * D,
            p_new_beta + i_step,
            p_gates,
            H * D,
            H,
            i_new >= s_own - 1 - i,
            R,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            GATED,
            ATTENDS,
        )
    TOKENS: tl.constexpr = max(BLOCK // R, 1)
    for i in tl.range(tl.cdiv(n, TOKENS), num_stages=OPEN_STAGES):
        b_x, b_gate, b_max, b_sum, b_out = past_open_tokens(
            b_x,
            b_gate,
            b_max,
            b_sum,
            b_out,
            p_k,
            p_v,
            p_w,
            p_beta,
            p_g,
            n - 1 - i * TOKENS,
            s_folded,
            ROOM,
            R,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            TOKENS,
            STEPS,
            HALF,
            GATED,
            ATTENDS,
        )
    return b_x, b_gate, b_max, b_sum, b_out


@triton.jit
def hold_token(
    p_new_k,  # of one token and head, as are the rest
    p_new_v,
    p_new_w,
    p_new_beta,
    p_k,
    p_v,
    p_w,
    p_beta,
    w_stride,
    beta_stride,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Put a new token to its place among the open ones."""
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    tl.store(p_k + o_d, tl.load(p_new_k + o_d, mask=o_d < D, other=0.0), mask=o_d < D)
    tl.store(p_v + o_dv, tl.load(p_new_v + o_dv, mask=o_dv < DV, other=0.0), mask=o_dv < DV)
    for i in tl.static_range(R):
        b_w = tl.load(p_new_w + i * w_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        tl.store(p_w + i * D + o_d, b_w, mask=o_d < D)
        tl.store(p_beta + i, tl.load(p_new_beta + i * beta_stride).to(tl.float32))


@triton.jit
def plan_hops(i_chunk, s_folded, s_covered, C: tl.constexpr):
    """How many matrices lead from the fold's edge to the right edge of a chunk, by kind and in this order: that of the
    open chunk; single finished chunks; one suffix; single chunks of its group.
    """
    s_finished = s_folded // C
    is_behind = i_chunk < s_finished
    is_covered = i_chunk < s_covered
    i_group_end = (i_chunk // SUFFIX + 1) * SUFFIX
    s_open = (is_behind & (s_folded % C != 0)).to(tl.int32)
    s_singles = tl.where(is_behind, s_finished - tl.maximum(i_chunk + 1, s_covered), 0)
    s_suffix = (is_covered & (i_group_end < s_covered)).to(tl.int32)
    return s_open, s_singles, s_suffix, tl.where(is_covered, i_group_end - 1 - i_chunk, 0)


@triton.jit
def find_hop(
    i_hop,
    i_chunk,
    s_open,
    s_singles,
    s_suffix,
    p_product,  # of this sequence
    p_gate_total,
    p_products,
    p_gate_totals,
    p_suffix,
    p_suffix_gate,
    p_chunks,
    i_crossed,  # the first single chunk
    H,
    HQ,
    D: tl.constexpr,
):
    """Where hop number i_hop of plan_hops() finds its matrices, those of all key heads, and its gates.

    Without branches: the loop over hops fetches ahead, and addresses that come of a branch are not known ahead.
    """
    i_single = i_hop - s_open
    i_group = i_chunk // SUFFIX
    is_suffix = (s_suffix == 1) & (i_single == s_singles)
    i_within = (i_group + 1) * SUFFIX - 1 - (i_single - s_singles - s_suffix)
    i_crossed = tl.where(i_single < s_singles, i_crossed - i_single, i_within)
    i_place = tl.load(p_chunks + i_crossed, mask=(i_single >= 0) & (is_suffix == 0), other=0).to(tl.int64)
    p_matrix = tl.where(is_suffix, p_suffix + i_group.to(tl.int64) * H * (D * D), p_products + i_place * H * (D * D))
    p_total = tl.where(is_suffix, p_suffix_gate + i_group * HQ, p_gate_totals + i_place * HQ)
    return tl.where(i_single < 0, p_product, p_matrix), tl.where(i_single < 0, p_gate_total, p_total)


@triton.jit
def attend_coded(
    b_x,
    b_gate,
    b_max,
    b_sum,
    b_out,
    p_table,
    p_keys,  # of the head, as are the rest
    p_key_scale,
    p_values,
    p_gates,  # (rows,)
    i_page,
    i_end,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention to whole pages of a finished chunk in float16: the queries in two parts, of 22 bits."""
    o_key = tl.arange(0, PAGE)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_high, b_low, b_top = halves(b_x)
    for i in tl.range(i_page, i_end, num_stages=STAGES):
        i_slot = tl.load(p_table + i).to(tl.int64) * PAGE
        o_in = o_key[:, None] * D + o_d[None, :]
        b_keys = tl.trans(tl.load(p_keys + i_slot * D + o_in, mask=(o_d < D)[None, :], other=0.0))
        s_scale = tl.load(p_key_scale + i_slot // PAGE) * LOG2_E
        b_logits = tl.dot(b_high, b_keys, tl.dot(b_low, b_keys)) * (b_top * s_scale)[:, None]
        if GATED:
            b_logits += (b_gate[:, None] + tl.load(p_gates[:, None] + i_slot + o_key[None, :])) * LOG2_E
        o_in = o_key[:, None] * DV + o_dv[None, :]
        b_v = tl.load(p_values + i_slot * DV + o_in, mask=(o_dv < DV)[None, :], other=0.0)
        b_max, b_sum, b_out = add_up(b_logits, b_v, b_max, b_sum, b_out)
    return b_max, b_sum, b_out


@triton.jit
def attend_rest(
    b_x,
    b_gate,
    b_max,
    b_sum,
    b_out,
    p_table,
    p_keys,
    p_codes,
    p_scale,
    p_values,
    p_gates,
    i_page,
    i_end,
    s_folded,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CODED: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As attend_coded, to pages of the open chunk, whose keys are int16; or to any in float32."""
    o_key = tl.arange(0, PAGE)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_high, b_low, b_top = halves(b_x)
    for i in tl.range(i_page, i_end, num_stages=STAGES):
        i_slot = tl.load(p_table + i).to(tl.int64) * PAGE
        m_key = i * PAGE + o_key < s_folded
        o_in = o_key[:, None] * D + o_d[None, :]
        m_in = m_key[:, None] & (o_d < D)[None, :]
        if CODED:
            b_codes = tl.load(p_codes + i_slot * D + o_in, mask=m_in, other=0)
            b_keys = tl.trans(code_to_float(b_codes).to(tl.float16))
            b_scale = tl.load(p_scale + (i * PAGE) % C + o_key, mask=m_key, other=0.0) * LOG2_E
            b_logits = tl.dot(b_high, b_keys, tl.dot(b_low, b_keys)) * (b_top[:, None] * b_scale[None, :])
        else:
            b_keys = tl.load(p_keys + i_slot * D + o_in, mask=m_in, other=0.0)
            b_logits = tl.dot(b_x, tl.trans(b_keys), input_precision="ieee") * LOG2_E
        if GATED:
            b_gates = tl.load(p_gates[:, None] + i_slot + o_key[None, :], mask=m_key[None, :], other=0.0)
            b_logits += (b_gate[:, None] + b_gates) * LOG2_E
        b_logits = tl.where(m_key[None, :], b_logits, float("-inf"))
        o_in = o_key[:, None] * DV + o_dv[None, :]
        b_v = tl.load(p_values + i_slot * DV + o_in, mask=m_key[:, None] & (o_dv < DV)[None, :], other=0.0)
        b_max, b_sum, b_out = add_up(b_logits, b_v, b_max, b_sum, b_out)
    return b_max, b_sum, b_out


# Numbers that no address is a multiple of: that one is 1 or a multiple of 16 is no reason to compile again.
FREE = ("capacity", "B", "H", "s_new", "s_items", "s_page_columns", "s_chunk_columns", "s_groups")


@triton.jit(do_not_specialize=FREE)
def attend_kernel(
    p_q,  # (tokens, HQ, D), or where MOVED x (B, H, rows, D) float32: at the fold's edge, times scale
    p_new_k,  # (tokens, H, D)
    p_new_v,  # (tokens, H, DV)
    p_new_w,  # (tokens, R, H, D)
    p_new_beta,  # (tokens, R, H)
    p_new_g,  # (tokens, HQ) or None; where MOVED (B, H, rows) float32: sum of g from the fold's edge
    p_bounds,  # (B + 1,) of the tokens of each sequence, or None for s_new of each
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
    p_covered,
    p_suffix,
    p_suffix_gate,
    p_product,
    p_gate_total,
    p_scale,
    p_k,  # the open tokens: the new ones are put behind them
    p_v,
    p_w,
    p_beta,
    p_g,
    p_before,  # out (2, B) int32: length and folded as they are now; None where MOVED
    p_out,  # out (H, items + B, rows, DV) float32: attention to a piece's keys, of the last piece to the open ones too
    p_log_sum_exp,  # out (H, items + B, rows) float32, base 2
    scale,
    capacity,  # tokens a sequence at most
    B,
    H,
    s_new,  # T, tokens of each sequence, or of the longest
    s_items,  # pieces asked of work_item()
    s_slots,  # S
    s_page_columns,  # of p_pages
    s_chunk_columns,  # of p_chunks
    s_groups,  # of p_suffix
    GROUP: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    ROOM: tl.constexpr,
    ROWS: tl.constexpr,  # query rows a program
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WIDTH: tl.constexpr,  # tile of rows of a product
    STEPS: tl.constexpr,  # tile of reflections, of one token at least
    CODED: tl.constexpr,
    GATED: tl.constexpr,
    MOVED: tl.constexpr,
    HALF: tl.constexpr,  # type of the parts that rows are moved in, None for float32
    STAGES: tl.constexpr,
    HOP_STAGES: tl.constexpr,  # of the loop over matrices
    OVERLAPS: tl.constexpr,  # the next kernel may be launched meanwhile: it waits by itself for what this one writes
):
    """Attention of the new queries of one key head to one piece of one sequence's history.

    The last piece of a sequence takes its open and new tokens in, which its queries pass as those of all pieces do.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    HQ = H * GROUP
    s_rows = s_new * GROUP
    s_tiles = tl.cdiv(s_rows, ROWS)
    i_tile = tl.program_id(0) % s_tiles
    i_head = (tl.program_id(0) // s_tiles) % H
    i_item = tl.program_id(0) // s_tiles // H
    i_sequence, i_first, i_end, is_last = work_item(p_folded, i_item, B, s_items, BLOCK_B)
    if i_sequence >= B:
        return
    s_length = tl.load(p_length + i_sequence)
    s_folded = tl.load(p_folded + i_sequence)
    n = s_length - s_folded
    i_start = i_sequence * s_new
    s_own = s_new  # tokens of this sequence
    if p_bounds is not None:
        i_start = tl.load(p_bounds + i_sequence)
        s_own = tl.load(p_bounds + i_sequence + 1) - i_start
    if not MOVED:
        if is_last & (i_head == 0) & (i_tile == 0):
            tl.store(p_before + i_sequence, s_length)
            tl.store(p_before + B + i_sequence, s_folded)
    if (s_own == 0) | (s_length + s_own > capacity):
        return

    # From the fold's edge to the right edge of the last chunk of the piece; then on, chunk by chunk.
    s_chunk_pages: tl.constexpr = C // PAGE
    s_finished = s_folded // C
    i_chunk = (i_end - 1) // s_chunk_pages
    i_crossed = s_finished - 1
    s_open, s_singles, s_suffix, s_within = plan_hops(i_chunk, s_folded, tl.load(p_covered + i_sequence), C)
    s_hops = s_open + s_singles + s_suffix + s_within
    p_table = p_pages + i_sequence.to(tl.int64) * s_page_columns
    p_head_keys = p_keys + i_head.to(tl.int64) * s_slots * D
    p_head_values = p_values + i_head.to(tl.int64) * s_slots * DV
    p_own_product = p_product + i_sequence.to(tl.int64) * H * (D * D)
    p_own_total = p_gate_total + i_sequence * HQ
    p_own_suffix = p_suffix + (i_sequence * s_groups).to(tl.int64) * H * (D * D)
    p_own_suffix_gate = p_suffix_gate + i_sequence * s_groups * HQ
    p_own_chunks = p_chunks + i_sequence * s_chunk_columns
    # Every row is one query: token i_new of the new ones, query head i_query_head. Rows past the last repeat it.
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    i_new = tl.minimum(o_row // GROUP, s_own - 1)
    i_query_head = i_head * GROUP + o_row % GROUP
    i_bh = (i_sequence * H + i_head).to(tl.int64)  # counts heads of all sequences
    b_max = tl.full((ROWS,), LOWEST, dtype=tl.float32)
    b_sum = tl.zeros((ROWS,), dtype=tl.float32)
    b_out = tl.zeros((ROWS, BLOCK_DV), dtype=tl.float32)
    b_gate = tl.zeros((ROWS,), dtype=tl.float32)  # sum of g from where the row stands to its token
    if MOVED:
        i_query = i_bh * s_rows + tl.minimum(o_row, s_rows - 1)
        b_x = tl.load(p_q + i_query[:, None] * D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
        if GATED:
            b_gate = tl.load(p_new_g + i_query)
    else:
        i_query = (i_start + i_new).to(tl.int64) * HQ + i_query_head
        b_x = tl.load(p_q + i_query[:, None] * D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
        b_x = b_x.to(tl.float32) * scale
    if not MOVED:
        if is_last:
            b_x, b_gate, b_max, b_sum, b_out = past_tokens(
                b_x,
                b_gate,
                b_max,
                b_sum,
                b_out,
                p_new_k,
                p_new_v,
                p_new_w,
                p_new_beta,
                p_new_g,
                p_k + i_bh * (ROOM * D),
                p_v + i_bh * (ROOM * DV),
                p_w + i_bh * (ROOM * R * D),
                p_beta + i_bh * (ROOM * R),
                p_g + (i_sequence * HQ + i_query_head).to(tl.int64) * ROOM,
                i_new,
                i_start,
                s_own,
                n,
                s_folded,
                i_query_head,
                i_head,
                H,
                HQ,
                ROOM,
                R,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                STEPS,
                HALF,
                GATED,
                True,
            )
        else:
            b_x, b_gate, b_max, b_sum, b_out = past_tokens(
                b_x,
                b_gate,
                b_max,
                b_sum,
                b_out,
                p_new_k,
                p_new_v,
                p_new_w,
                p_new_beta,
                p_new_g,
                p_k,
                p_v,
                p_w + i_bh * (ROOM * R * D),
                p_beta + i_bh * (ROOM * R),
                p_g + (i_sequence * HQ + i_query_head).to(tl.int64) * ROOM,
                i_new,
                i_start,
                s_own,
                n,
                s_folded,
                i_query_head,
                i_head,
                H,
                HQ,
                ROOM,
                R,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                STEPS,
                HALF,
                GATED,
                False,
            )
        if is_last & (i_tile == 0):
            for i in range(s_own):
                i_token = (i_start + i).to(tl.int64)
                i_step = i_token * R * H + i_head
                i_row = i_bh * ROOM + (s_length + i) % ROOM
                hold_token(
                    p_new_k + (i_token * H + i_head) * D,
                    p_new_v + (i_token * H + i_head) * DV,
                    p_new_w + i_step * D,
                    p_new_beta + i_step,
                    p_k + i_row * D,
                    p_v + i_row * DV,
                    p_w + i_row * (R * D),
                    p_beta + i_row * R,
                    H * D,
                    H,
                    R,
                    D,
                    DV,
                    BLOCK_D,
                    BLOCK_DV,
                )
                if GATED:
                    for i_group in range(GROUP):
                        i_own = i_head * GROUP + i_group
                        s_g = tl.load(p_new_g + i_token * HQ + i_own).to(tl.float32)
                        p_own = p_g + (i_sequence * HQ + i_own).to(tl.int64) * ROOM
                        tl.store(p_own + (s_length + i) % ROOM, tl.maximum(s_g, LOWEST))

    if i_first < i_end:
        s_chunks = i_chunk - i_first // s_chunk_pages + 1
        for _ in range(s_chunks):
            for i_hop in tl.range(s_hops, num_stages=HOP_STAGES):
                p_matrix, p_total = find_hop(
                    i_hop,
                    i_chunk,
                    s_open,
                    s_singles,
                    s_suffix,
                    p_own_product,
                    p_own_total,
                    p_products,
                    p_gate_totals,
                    p_own_suffix,
                    p_own_suffix_gate,
                    p_own_chunks,
                    i_crossed,
                    H,
                    HQ,
                    D,
                )
                b_x = times_matrix(b_x, p_matrix + i_head * (D * D), D, BLOCK_D, WIDTH, HALF)
                if GATED:
                    b_gate += tl.load(p_total + i_query_head)
            i_page = tl.maximum(i_first, i_chunk * s_chunk_pages)
            i_last = tl.minimum(i_end, (i_chunk + 1) * s_chunk_pages)
            p_head_gates = p_gates + i_query_head.to(tl.int64) * s_slots
            if CODED and i_chunk < s_finished:
                b_max, b_sum, b_out = attend_coded(
                    b_x,
                    b_gate,
                    b_max,
                    b_sum,
                    b_out,
                    p_table,
                    p_head_keys,
                    p_key_scale + i_head * (s_slots // PAGE),
                    p_head_values,
                    p_head_gates,
                    i_page,
                    i_last,
                    D,
                    DV,
                    BLOCK_D,
                    BLOCK_DV,
                    GATED,
                    STAGES,
                )
            else:
                b_max, b_sum, b_out = attend_rest(
                    b_x,
                    b_gate,
                    b_max,
                    b_sum,
                    b_out,
                    p_table,
                    p_head_keys,
                    p_codes + i_head.to(tl.int64) * s_slots * D,
                    p_scale + i_bh * C,
                    p_head_values,
                    p_head_gates,
                    i_page,
                    i_last,
                    s_folded,
                    D,
                    DV,
                    C,
                    BLOCK_D,
                    BLOCK_DV,
                    CODED,
                    GATED,
                    STAGES,
                )
            # To the next chunk on the left it is one matrix, that of the chunk just read.
            s_open = (i_chunk == s_finished).to(tl.int32)
            s_singles = 1 - s_open
            s_suffix = 0
            s_hops = 1
            i_crossed = i_chunk
            i_chunk -= 1

    # Nothing to attend to gives a log-sum-exp of minus infinity, whose output counts for nothing.
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    o_dv = tl.arange(0, BLOCK_DV)
    i_result = (i_head * (s_items + B) + i_item).to(tl.int64) * s_rows + o_row
    tl.store(
        p_out + i_result[:, None] * DV + o_dv[None, :], b_out, mask=(o_row < s_rows)[:, None] & (o_dv < DV)[None, :]
    )
    tl.store(p_log_sum_exp + i_result, b_max + tl.log2(b_sum), mask=o_row < s_rows)
