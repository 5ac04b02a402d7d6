"""Triton kernel that attends to a cache: a few new queries a sequence, all keys and values read once.

What the cache holds, and the letters, are those of ops/history/state.py. Every program moves its queries by itself from
where they stand to the chunk it reads: through the new tokens, which are not in the cache yet, through the open rows,
and then from edge to edge. It changes nothing but its own results; append_kernels.py joins them and adds the tokens.

Logits are times log2(e) in here, for exp2 is what the hardware has.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import LOG2_E, dot_split

PAGE = tl.constexpr(64)  # tokens a page: PAGE of state.py
SUFFIX = tl.constexpr(4)  # chunks a suffix: SUFFIX of state.py
# Fewer pages are not worth a program: it moves its queries first, for about as long as it takes to read 4 pages.
LEAST_PAGES = tl.constexpr(8)
# In place of minus infinity where a maximum starts, so that differences are numbers.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def count_pieces(p_folded, B, s_items, BLOCK_B: tl.constexpr):
    """Pages of every sequence, and the pieces that each is cut into so that all are about s_items alike ones."""
    o = tl.arange(0, BLOCK_B)
    b_pages = (tl.load(p_folded + o, mask=o < B, other=0) + (PAGE - 1)) // PAGE
    s_size = tl.maximum(tl.cdiv(tl.sum(b_pages), s_items), LEAST_PAGES)
    return b_pages, tl.cdiv(b_pages, s_size), o


@triton.jit
def pieces_of(p_folded, i_sequence, B, s_items, BLOCK_B: tl.constexpr):
    """(first piece, number of pieces) of one sequence."""
    _, b_count, o = count_pieces(p_folded, B, s_items, BLOCK_B)
    return tl.sum(tl.where(o < i_sequence, b_count, 0)), tl.sum(tl.where(o == i_sequence, b_count, 0))


@triton.jit
def work_item(p_folded, i_item, B, s_items, BLOCK_B: tl.constexpr):
    """(sequence, first page, end page) of piece i_item of the histories.

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
    return i_sequence, i_first, tl.minimum(i_first + s_each, s_pages)


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
        b_out += dot_split(columns(b_x, i_part, WIDTH), b_part, HALF)
    return b_out


@triton.jit
def load_open(
    p_x, i_first, n, s_folded, ROOM, DIM: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """(ROWS, BLOCK) tile of reflections i_first ... of the open tokens, zeros past the last; R = 1 for keys."""
    i_step = i_first + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    i_place = ((s_folded + i_step // R) % ROOM) * R + i_step % R
    mask = (i_step < n * R)[:, None] & (o_col < DIM)[None, :]
    return tl.load(p_x + i_place[:, None] * DIM + o_col[None, :], mask=mask, other=0.0)


@triton.jit
def load_lower(
    p_x,
    i_row,
    i_col,
    n,
    s_folded,
    ROOM,
    R_ROW: tl.constexpr,
    R_COL: tl.constexpr,
    STRICT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tile of A (R_COL = R) or Y (R_COL = 1, STRICT) of the open tokens, zeros where an entry is later than its row."""
    i_step = i_row + tl.arange(0, ROWS)
    i_other = i_col + tl.arange(0, COLUMNS)
    i_place = ((s_folded + i_step // R_ROW) % ROOM) * R_ROW + i_step % R_ROW
    i_other_place = ((s_folded + i_other // R_COL) % ROOM) * R_COL + i_other % R_COL
    if STRICT:
        mask = (i_step // R_ROW)[:, None] > i_other[None, :]
    else:
        mask = i_step[:, None] >= i_other[None, :]
    mask = mask & (i_step < n * R_ROW)[:, None]
    return tl.load(p_x + i_place[:, None] * (ROOM * R_COL) + i_other_place[None, :], mask=mask, other=0.0)


@triton.jit
def pass_open(
    b_x,
    p_w,
    p_a,
    n,
    s_folded,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Queries behind the newest open token, moved to the left edge of the oldest: x - ((x W^T) A) W."""
    b_out = b_x
    TILES: tl.constexpr = (ROOM * R + STEPS - 1) // STEPS
    for i_col in tl.static_range(TILES):
        b_own = load_open(p_w, i_col * STEPS, n, s_folded, ROOM, D, R, BLOCK_D, STEPS)
        b_xwa = tl.zeros((b_x.shape[0], STEPS), dtype=tl.float32)
        for i_row in tl.static_range(i_col, TILES):
            if i_row == i_col:
                b_w = b_own
            else:
                b_w = load_open(p_w, i_row * STEPS, n, s_folded, ROOM, D, R, BLOCK_D, STEPS)
            b_a = load_lower(p_a, i_row * STEPS, i_col * STEPS, n, s_folded, ROOM, R, R, False, STEPS, STEPS)
            b_xw = dot_split(b_x, tl.trans(b_w), HALF)
            b_xwa += dot_split(b_xw, b_a, HALF)
        b_out -= dot_split(b_xwa, b_own, HALF)
    return b_out


@triton.jit
def open_logits(
    b_x,
    p_k,
    p_w,
    p_y,
    i_first,
    n,
    s_folded,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
):
    """x K^T - (x W^T) Y for the open tokens i_first ... i_first + KEYS, (rows, KEYS)."""
    b_k = load_open(p_k, i_first, n, s_folded, ROOM, D, 1, BLOCK_D, KEYS).to(tl.float32)
    b_out = dot_split(b_x, tl.trans(b_k), HALF)
    for i_row in tl.static_range((ROOM * R + STEPS - 1) // STEPS):
        b_w = load_open(p_w, i_row * STEPS, n, s_folded, ROOM, D, R, BLOCK_D, STEPS)
        b_y = load_lower(p_y, i_row * STEPS, i_first, n, s_folded, ROOM, R, 1, True, STEPS, KEYS)
        b_xw = dot_split(b_x, tl.trans(b_w), HALF)
        b_out -= dot_split(b_xw, b_y, HALF)
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
    p_k,
    p_v,
    p_w,
    p_g,
    p_a,
    p_y,
    p_before,  # out (2, B) int32: length and folded as they are now; None where MOVED
    p_out,  # out (H, items + B, rows, DV) float32: attention to a piece's keys; past the items, to the open tokens
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
    BLOCK_ROOM: tl.constexpr,
    STEPS: tl.constexpr,  # tile of reflections of the open tokens
    WIDTH: tl.constexpr,  # tile of rows of a product
    CODED: tl.constexpr,
    GATED: tl.constexpr,
    MOVED: tl.constexpr,
    HALF: tl.constexpr,  # type of the parts that rows are moved in, None for float32
    STAGES: tl.constexpr,
):
    """Attention of the new queries of one key head to one piece of one sequence's history, or to its open tokens."""
    s_rows = s_new * GROUP
    s_tiles = tl.cdiv(s_rows, ROWS)
    i_tile = tl.program_id(0) % s_tiles
    i_head = (tl.program_id(0) // s_tiles) % H
    i_item = tl.program_id(0) // s_tiles // H
    s_all_items = s_items + B
    is_open = i_item >= s_all_items
    i_sequence, i_first, i_end = work_item(p_folded, i_item, B, s_items, BLOCK_B)
    if is_open:
        i_sequence = i_item - s_all_items
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
    if is_open and not MOVED:
        if (i_head == 0) & (i_tile == 0):
            tl.store(p_before + i_sequence, s_length)
            tl.store(p_before + B + i_sequence, s_folded)
    if (s_own == 0) | (s_length + s_own > capacity):
        return

    # Every row is one query: token i_new of the new ones, query head i_group of the group.
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    i_new = o_row // GROUP
    i_group = o_row % GROUP
    m_row = i_new < s_own
    HQ = H * GROUP
    i_bh = i_sequence * H + i_head  # where it counts heads of all sequences
    i_gate_row = i_sequence * HQ + i_head * GROUP + i_group  # of fields (B, HQ)
    b_max = tl.full((ROWS,), LOWEST, dtype=tl.float32)
    b_sum = tl.zeros((ROWS,), dtype=tl.float32)
    b_out = tl.zeros((ROWS, BLOCK_DV), dtype=tl.float32)
    b_gate = tl.zeros((ROWS,), dtype=tl.float32)  # sum of g from where the row stands to its token
    mask = m_row[:, None] & (o_d < D)[None, :]
    if MOVED:
        b_x = tl.load(p_q + (i_bh.to(tl.int64) * s_rows + o_row)[:, None] * D + o_d[None, :], mask=mask, other=0.0)
        if GATED:
            b_gate = tl.load(p_new_g + i_bh.to(tl.int64) * s_rows + o_row, mask=m_row, other=0.0)
    else:
        i_query = (i_start + i_new).to(tl.int64) * HQ + i_head * GROUP + i_group
        b_x = tl.load(p_q + i_query[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32) * scale
        for i in range(s_own):
            i_last = s_own - 1 - i
            m_later = i_new >= i_last
            i_token = (i_start + i_last).to(tl.int64)
            if is_open:
                b_k = tl.load(p_new_k + (i_token * H + i_head) * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
                b_v = tl.load(p_new_v + (i_token * H + i_head) * DV + o_dv, mask=o_dv < DV, other=0.0).to(tl.float32)
                b_logit = tl.where(m_later, (tl.sum(b_x * b_k[None, :], axis=1) + b_gate) * LOG2_E, float("-inf"))
                b_top = tl.maximum(b_max, b_logit)
                b_weight = tl.exp2(b_logit - b_top)
                b_fade = tl.exp2(b_max - b_top)
                b_sum = b_sum * b_fade + b_weight
                b_out = b_out * b_fade[:, None] + b_weight[:, None] * b_v[None, :]
                b_max = b_top
            for i_reflection in range(R):
                i_step = i_token * R + (R - 1 - i_reflection)
                b_w = tl.load(p_new_w + (i_step * H + i_head) * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
                s_beta = tl.load(p_new_beta + i_step * H + i_head).to(tl.float32)
                b_dot = tl.where(m_later, s_beta * tl.sum(b_x * b_w[None, :], axis=1), 0.0)
                b_x -= b_dot[:, None] * b_w[None, :]
            if GATED:
                b_g = tl.load(p_new_g + i_token * HQ + i_head * GROUP + i_group).to(tl.float32)
                b_gate += tl.where(m_later, tl.maximum(b_g, LOWEST), 0.0)

    p_head_w = p_w + i_bh.to(tl.int64) * (ROOM * R * D)
    p_head_a = p_a + i_bh.to(tl.int64) * (ROOM * R * ROOM * R)
    if is_open and not MOVED:
        p_head_k = p_k + i_bh.to(tl.int64) * (ROOM * D)
        p_head_v = p_v + i_bh.to(tl.int64) * (ROOM * DV)
        p_head_y = p_y + i_bh.to(tl.int64) * (ROOM * R * ROOM)
        TILES: tl.constexpr = (ROOM + PAGE - 1) // PAGE
        for i in range(TILES):  # from the newest, for the gates
            i_key = (TILES - 1 - i) * PAGE
            if i_key < n:
                o_key = i_key + tl.arange(0, PAGE)
                b_logits = open_logits(
                    b_x, p_head_k, p_head_w, p_head_y, i_key, n, s_folded, ROOM, R, D, BLOCK_D, STEPS, PAGE, HALF
                )
                if GATED:
                    p_row = p_g + (i_gate_row.to(tl.int64) * ROOM)[:, None]
                    m_key = (o_key < n)[None, :] & m_row[:, None]
                    b_g = tl.load(p_row + ((s_folded + o_key) % ROOM)[None, :], mask=m_key, other=0.0)
                    # From the token after each key on: not what is left of a sum, where a large gate hides small ones.
                    m_after = m_key & (o_key + 1 < n)[None, :] & (tl.arange(0, PAGE) + 1 < PAGE)[None, :]
                    b_after = tl.load(p_row + ((s_folded + o_key + 1) % ROOM)[None, :], mask=m_after, other=0.0)
                    b_logits += b_gate[:, None] + tl.cumsum(b_after, axis=1, reverse=True)
                    b_gate += tl.sum(b_g, axis=1)
                b_logits = tl.where((o_key < n)[None, :], b_logits * LOG2_E, float("-inf"))
                b_v = load_open(p_head_v, i_key, n, s_folded, ROOM, DV, 1, BLOCK_DV, PAGE)
                b_max, b_sum, b_out = add_up(b_logits, b_v, b_max, b_sum, b_out)
    if not is_open:
        if not MOVED:
            b_x = pass_open(b_x, p_head_w, p_head_a, n, s_folded, ROOM, R, D, BLOCK_D, STEPS, HALF)
            if GATED:
                o_open = tl.arange(0, BLOCK_ROOM)
                p_row = p_g + (i_gate_row.to(tl.int64) * ROOM)[:, None] + ((s_folded + o_open) % ROOM)[None, :]
                b_gate += tl.sum(tl.load(p_row, mask=m_row[:, None] & (o_open < n)[None, :], other=0.0), axis=1)

        # From the fold's edge to the right edge of the last chunk of the piece; then on, chunk by chunk.
        s_chunk_pages = C // PAGE
        i_chunk = (i_end - 1) // s_chunk_pages
        s_finished = s_folded // C
        s_covered = tl.load(p_covered + i_sequence)
        is_behind = i_chunk < s_finished
        s_open_hop = (is_behind & (s_folded % C != 0)).to(tl.int32)
        is_covered = i_chunk < s_covered
        i_suffix = i_chunk // SUFFIX
        s_singles = tl.where(is_behind, s_finished - tl.maximum(i_chunk + 1, s_covered), 0)
        s_suffix_hop = (is_covered & ((i_suffix + 1) * SUFFIX < s_covered)).to(tl.int32)
        s_within = tl.where(is_covered, (i_suffix + 1) * SUFFIX - 1 - i_chunk, 0)
        s_hops = tl.where(i_first < i_end, s_open_hop + s_singles + s_suffix_hop + s_within, 0)
        s_chunks = tl.where(i_first < i_end, i_chunk - i_first // s_chunk_pages + 1, 0)
        for i in range(s_chunks):
            i_own = i_chunk - i
            for i_hop in range(s_hops):
                i_single = i_hop - s_open_hop
                p_matrix = p_product + i_bh.to(tl.int64) * (D * D)
                p_total = p_gate_total + i_sequence * HQ
                if (i > 0) & (i_own + 1 < s_finished):
                    i_place = tl.load(p_chunks + i_sequence * s_chunk_columns + i_own + 1).to(tl.int64)
                    p_matrix = p_products + (i_place * H + i_head) * (D * D)
                    p_total = p_gate_totals + i_place * HQ
                if (i == 0) & (i_single >= 0):
                    if (s_suffix_hop == 1) & (i_single == s_singles):
                        i_place = (i_sequence * s_groups + i_suffix).to(tl.int64)
                        p_matrix = p_suffix + (i_place * H + i_head) * (D * D)
                        p_total = p_suffix_gate + i_place * HQ
                    else:
                        i_crossed = s_finished - 1 - i_single
                        if i_single >= s_singles:
                            i_crossed = (i_suffix + 1) * SUFFIX - 1 - (i_single - s_singles - s_suffix_hop)
                        i_place = tl.load(p_chunks + i_sequence * s_chunk_columns + i_crossed).to(tl.int64)
                        p_matrix = p_products + (i_place * H + i_head) * (D * D)
                        p_total = p_gate_totals + i_place * HQ
                b_x = times_matrix(b_x, p_matrix, D, BLOCK_D, WIDTH, HALF)
                if GATED:
                    b_gate += tl.load(p_total + i_head * GROUP + i_group, mask=m_row, other=0.0)
            s_hops = 1
            i_page = tl.maximum(i_first, i_own * s_chunk_pages)
            i_last_page = tl.minimum(i_end, (i_own + 1) * s_chunk_pages)
            o_key = tl.arange(0, PAGE)
            p_table = p_pages + i_sequence.to(tl.int64) * s_page_columns
            p_head_keys = p_keys + i_head.to(tl.int64) * s_slots * D
            p_head_codes = p_codes + i_head.to(tl.int64) * s_slots * D
            p_head_values = p_values + i_head.to(tl.int64) * s_slots * DV
            p_head_gates = p_gates + (i_head * GROUP + i_group).to(tl.int64)[:, None] * s_slots
            o_in_keys = o_key[:, None] * D + o_d[None, :]
            o_in_values = o_key[:, None] * DV + o_dv[None, :]
            m_keys = (o_d < D)[None, :]
            m_values = (o_dv < DV)[None, :]
            b_high, b_low, b_top = halves(b_x)
            is_finished = False
            if CODED:
                is_finished = i_own < s_finished
            if is_finished:
                for i_read in tl.range(i_page, i_last_page, num_stages=STAGES):
                    i_slot = tl.load(p_table + i_read).to(tl.int64) * PAGE
                    b_keys = tl.load(p_head_keys + i_slot * D + o_in_keys, mask=m_keys, other=0.0)
                    s_scale = tl.load(p_key_scale + i_head * (s_slots // PAGE) + i_slot // PAGE)
                    b_logits = tl.dot(b_high, tl.trans(b_keys), tl.dot(b_low, tl.trans(b_keys)))
                    b_logits *= (b_top * (s_scale * LOG2_E))[:, None]
                    if GATED:
                        b_gates = tl.load(p_head_gates + i_slot + o_key[None, :], mask=m_row[:, None], other=0.0)
                        b_logits += (b_gate[:, None] + b_gates) * LOG2_E
                    b_v = tl.load(p_head_values + i_slot * DV + o_in_values, mask=m_values, other=0.0)
                    b_max, b_sum, b_out = add_up(b_logits, b_v, b_max, b_sum, b_out)
            else:
                for i_read in tl.range(i_page, i_last_page, num_stages=STAGES):
                    i_slot = tl.load(p_table + i_read).to(tl.int64) * PAGE
                    m_key = i_read * PAGE + o_key < s_folded
                    m_in = m_key[:, None]
                    if CODED:
                        b_codes = tl.load(p_head_codes + i_slot * D + o_in_keys, mask=m_in & m_keys, other=0)
                        o_scale = i_bh.to(tl.int64) * C + (i_read * PAGE) % C + o_key
                        b_scale = tl.load(p_scale + o_scale, mask=m_key, other=0.0)
                        b_keys = code_to_float(b_codes).to(tl.float16)
                        b_logits = tl.dot(b_high, tl.trans(b_keys), tl.dot(b_low, tl.trans(b_keys)))
                        b_logits *= (b_top * LOG2_E)[:, None] * b_scale[None, :]
                    else:
                        b_keys = tl.load(p_head_keys + i_slot * D + o_in_keys, mask=m_in & m_keys, other=0.0)
                        b_logits = tl.dot(b_x, tl.trans(b_keys), input_precision="ieee") * LOG2_E
                    if GATED:
                        m_gate = m_row[:, None] & m_key[None, :]
                        b_gates = tl.load(p_head_gates + i_slot + o_key[None, :], mask=m_gate, other=0.0)
                        b_logits += (b_gate[:, None] + b_gates) * LOG2_E
                    b_logits = tl.where(m_key[None, :], b_logits, float("-inf"))
                    b_v = tl.load(p_head_values + i_slot * DV + o_in_values, mask=m_in & m_values, other=0.0)
                    b_max, b_sum, b_out = add_up(b_logits, b_v, b_max, b_sum, b_out)

    # Nothing to attend to gives a log-sum-exp of minus infinity, whose output counts for nothing.
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    i_result = (i_head * (s_all_items + B) + i_item).to(tl.int64) * s_rows + o_row
    m_result = o_row < s_rows
    tl.store(p_out + i_result[:, None] * DV + o_dv[None, :], b_out, mask=m_result[:, None] & (o_dv < DV)[None, :])
    tl.store(p_log_sum_exp + i_result, b_max + tl.log2(b_sum), mask=m_result)


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
