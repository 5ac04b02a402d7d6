"""Triton kernels that fill a cache from the operator's own pass over a prompt.

That pass has what a fold begins with: keys at the right edge of their leaf, which is a page, and the products P of
spans of 2^l leaves (leaf_kernels.py, tree_kernels.py). From there a key goes on to the right edge of its chunk, or of
the last folded token, past spans alone: each time past the largest one that begins where the key stands and ends within
the chunk. In a whole chunk of 2^n leaves that is one span for each left half that its leaf is in, n / 2 on average; in
an open chunk at most twice n.

The last page of the folded tokens, if they do not fill it, is no leaf of the operator's. fold_leaf_kernel of
fold_kernels.py makes its keys and its product, the ``tail`` here, and writes its values.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.append_kernels import LARGEST_CODE, TINY, nearest, page_scale
from path_attention.ops.kernels.tiles import ROWS, dot, dot_split, load_rows, load_square, rest, store_rows

# As FREE of fold_kernels.py: numbers that programs only count with.
FREE = (
    "token_heads",
    "s_tokens", "s_leaves", "s_due", "s_pages", "s_segments", "s_sequences", "i_first", "i_first_head", "H", "s_heads",
    "s_page_columns", "s_chunk_columns",
)  # fmt: skip


@triton.jit
def largest_span(i_leaf, i_end, LEAVES: tl.constexpr):
    """Leaves of the largest span of the tree that begins at leaf i_leaf and ends, in its chunk of LEAVES, by i_end."""
    s_span = (i_leaf | LEAVES) & -(i_leaf | LEAVES)
    while i_leaf + s_span > i_end:
        s_span = s_span // 2
    return s_span


@triton.jit
def find_unit(s_units, i_first, i_first_head, H, s_heads):
    """What this program is for, heads first: which of the s_units of a sequence and head; its sequence and head in the
    part; both in the state, and the number of the pair there.
    """
    i_head = tl.program_id(0) % H
    i_given = tl.program_id(0) // H // s_units
    i_sequence, i_state_head = i_first + i_given, i_first_head + i_head
    i_bh = i_sequence * s_heads + i_state_head
    return tl.program_id(0) // H % s_units, i_given, i_head, i_sequence, i_state_head, i_bh


@triton.jit
def key_past(b_k, p_matrix, p_rest, i_tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """k P^T in float32, from operands rounded to float16; with SPLIT from two parts of each, 22 bits."""
    b_p = load_square(p_matrix, i_tile, DIM, BLOCK_D)
    b_half = b_k.to(tl.float16)
    if SPLIT:
        b_p_rest = load_square(p_rest, i_tile, DIM, BLOCK_D)
        return dot_split(b_half, rest(b_k, b_half, tl.float16), tl.trans(b_p), tl.trans(b_p_rest), tl.float16)
    else:
        return dot(b_half, tl.trans(b_p))


@triton.jit
def product_past(b_m, p_matrix, p_rest, i_tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """P m in float32, from two float16 parts of each."""
    b_half = b_m.to(tl.float16)
    b_p = load_square(p_matrix, i_tile, DIM, BLOCK_D)
    b_p_rest = load_square(p_rest, i_tile, DIM, BLOCK_D)
    return dot_split(b_p, b_p_rest, b_half, rest(b_m, b_half, tl.float16), tl.float16)


@triton.jit(do_not_specialize=FREE)
def prefill_keys_kernel(
    p_k_right,  # (b s_leaves, 64, H, DIM) float16: of b sequences and H key heads, a part of the operator's call
    p_node,  # (2 b s_leaves, H, DIM, DIM) float16
    p_node_rest,  # likewise
    p_v,  # (b s_tokens, H, DIM_V), of rows of token_heads heads
    p_tail,  # (2, s_sequences s_heads, 64, BLOCK_D) float16, of all sequences and heads: p_right of fold_leaf_kernel
    p_tail_unit,  # (s_sequences s_heads, 64) float32
    p_tail_matrix,  # (2, s_sequences s_heads, BLOCK_D, BLOCK_D) float16
    p_keys,  # from here on fields of State; keys also as int16
    p_codes,
    p_key_scale,
    p_values,
    p_pages,
    p_scale,
    s_tokens,
    s_leaves,  # of a sequence
    s_due,  # folded tokens of a sequence
    s_pages,  # pages that they take
    s_sequences,  # of the state
    i_first,  # the part's first sequence and first key head in the state
    i_first_head,
    H,
    token_heads,  # key heads of a token in p_v
    s_heads,  # key heads of the state
    s_slots,
    s_page_columns,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DIM: tl.constexpr,  # columns of the operator's rows, which are padded with zeros
    DIM_V: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One page of one key head: its keys at the right edge of its chunk or of the last folded token, and its values."""
    LEAVES: tl.constexpr = C // ROWS
    i_leaf, i_given, i_head, i_sequence, i_state_head, i_bh = find_unit(s_pages, i_first, i_first_head, H, s_heads)
    i_chunk = i_leaf // LEAVES
    s_end = tl.minimum((i_chunk + 1) * C, s_due)
    i_edge = s_end // ROWS  # the leaf that whole leaves of this chunk end before
    o = tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    i_page = tl.load(p_pages + i_sequence.to(tl.int64) * s_page_columns + i_leaf).to(tl.int64)
    if i_leaf < i_edge:
        i_row = i_given * s_leaves
        b_k = load_rows(p_k_right + i_head * DIM, (i_row + i_leaf) * ROWS, ROWS, H * DIM, DIM, BLOCK_D, ROWS)
        b_k = b_k.to(tl.float32)
        b_v = load_rows(
            p_v + i_head * DIM_V, i_given * s_tokens + i_leaf * ROWS, ROWS, token_heads * DIM_V, DV, BLOCK_DV, ROWS
        )  # fmt: skip
        store_rows(p_values, b_v, i_state_head.to(tl.int64) * s_slots + i_page * ROWS, ROWS, DV, DV, BLOCK_DV, ROWS)
        i_at = i_leaf + 1
        while i_at < i_edge:
            s_span = largest_span(i_at, i_edge, LEAVES)
            i_tile = (2 * (i_row + i_at) + s_span - 1) * H + i_head
            b_k = key_past(b_k, p_node, p_node_rest, i_tile, DIM, BLOCK_D, SPLIT)
            i_at += s_span
        if s_end % ROWS != 0:
            p_rest = p_tail_matrix + (s_sequences * s_heads).to(tl.int64) * (BLOCK_D * BLOCK_D)
            b_k = key_past(b_k, p_tail_matrix, p_rest, i_bh, BLOCK_D, BLOCK_D, SPLIT)
    else:
        p_rest = p_tail + (s_sequences * s_heads).to(tl.int64) * (ROWS * BLOCK_D)
        b_k = load_rows(p_tail, i_bh * ROWS, ROWS, BLOCK_D, BLOCK_D, BLOCK_D, ROWS).to(tl.float32)
        b_k += load_rows(p_rest, i_bh * ROWS, ROWS, BLOCK_D, BLOCK_D, BLOCK_D, ROWS).to(tl.float32)
        b_k *= tl.load(p_tail_unit + i_bh * ROWS + o)[:, None]
    i_token = i_leaf * ROWS + o
    m_token = i_token < s_end
    mask = m_token[:, None] & (o_d < D)[None, :]
    o_in = (i_page * ROWS + o)[:, None] * D + o_d[None, :] + i_state_head.to(tl.int64) * s_slots * D
    if s_end == (i_chunk + 1) * C:
        s_scale = page_scale(tl.max(tl.max(tl.abs(b_k), axis=1), axis=0))
        tl.store(p_key_scale + i_state_head * (s_slots // ROWS) + i_page, s_scale)
        tl.store(p_keys + o_in, (b_k / s_scale).to(tl.float16), mask=mask)
    else:
        b_scale = tl.maximum(tl.max(tl.abs(b_k), axis=1), TINY) / LARGEST_CODE
        tl.store(p_codes + o_in, nearest(b_k / b_scale[:, None]), mask=mask)
        tl.store(p_scale + i_bh.to(tl.int64) * C + i_token % C, b_scale, mask=m_token)


@triton.jit(do_not_specialize=FREE)
def prefill_products_kernel(
    p_node,  # as prefill_keys_kernel has them
    p_node_rest,
    p_tail_matrix,
    p_products,  # from here on fields of State
    p_chunks,
    p_product,
    s_leaves,
    s_due,
    s_segments,  # chunks of a sequence that have folded tokens
    s_sequences,
    i_first,
    i_first_head,
    H,
    s_heads,
    s_chunk_columns,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM: tl.constexpr,
):
    """P of one chunk and key head, or P_open of the last one: of a whole chunk that of its span."""
    LEAVES: tl.constexpr = C // ROWS
    i_chunk, i_given, i_head, i_sequence, i_state_head, i_bh = find_unit(s_segments, i_first, i_first_head, H, s_heads)
    s_end = tl.minimum((i_chunk + 1) * C, s_due)
    i_edge = s_end // ROWS
    o_d = tl.arange(0, BLOCK_D)
    b_m = tl.where(o_d[:, None] == o_d[None, :], 1.0, 0.0)
    i_at = i_chunk * LEAVES
    while i_at < i_edge:
        s_span = largest_span(i_at, i_edge, LEAVES)
        i_tile = (2 * (i_given * s_leaves + i_at) + s_span - 1) * H + i_head
        b_m = product_past(b_m, p_node, p_node_rest, i_tile, DIM, BLOCK_D)
        i_at += s_span
    if s_end % ROWS != 0:
        p_rest = p_tail_matrix + (s_sequences * s_heads).to(tl.int64) * (BLOCK_D * BLOCK_D)
        b_m = product_past(b_m, p_tail_matrix, p_rest, i_bh, BLOCK_D, BLOCK_D)
    p_out = p_product + i_bh.to(tl.int64) * (D * D)
    if s_end == (i_chunk + 1) * C:
        i_place = tl.load(p_chunks + i_sequence.to(tl.int64) * s_chunk_columns + i_chunk).to(tl.int64)
        p_out = p_products + (i_place * s_heads + i_state_head) * (D * D)
    mask = (o_d < D)[:, None] & (o_d < D)[None, :]
    tl.store(p_out + o_d[:, None] * D + o_d[None, :], b_m, mask=mask)
