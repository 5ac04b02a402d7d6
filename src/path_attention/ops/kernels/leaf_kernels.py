"""Triton kernels of the leaves: 64 tokens of one key head, forward and backward.

Notation of ops/leaf.py with one reflection a token; A = T^-1 D is triangular, Y = A Z and U = A W:

    logits = tril(Q K^T) - X Y       q_left = Q - X U       k_right = K - Y^T W       P = I - W^T U

Rows of a leaf are 64 tokens; where its sequence leaves one partly empty the rows are zeros, identity transitions.
Y and what belongs to keys is kept transposed, a row for each key. leaf_table.py says where rows and matrices stand.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import (
    COUNTS,
    LOG2_E,
    ROWS,
    dot,
    dot_split,
    inverse_of,
    load_power,
    load_rows,
    load_square,
    normalised,
    place,
    power_of_two,
    rest,
    rounded,
    store_rows,
    store_square,
)

# Rows of P made at a time: a whole P of 128 x 128 does not fit beside the leaf's other tiles.
CHUNK = tl.constexpr(64)
# A log gate below this one closes: exp(-1000) is 0 beside the own key's weight in any dtype, whatever two logits of
# half-precision rows differ by, and sums of 64 that are above it have an error of 2e-3, that of bfloat16.
CLOSED = tl.constexpr(-1000.0)


@triton.jit
def _join_pairs(b_x, b_n, o, doubling: tl.constexpr, WORK: tl.constexpr):
    """Inverses of diagonal blocks of 2^doubling rows to those of twice the size: (D + C)^-1 = D^-1 - D^-1 C D^-1."""
    o_block = o // (1 << doubling)
    pair = (o_block[:, None] // 2 == o_block[None, :] // 2) & (o_block[:, None] > o_block[None, :])
    b_inverse = rounded(b_x, WORK)
    # D^-1 has no other blocks: the product with all of n holds that with C where C is.
    return b_x - dot(rounded(tl.where(pair, dot(b_inverse, b_n), 0.0), WORK), b_inverse)


@triton.jit
def _unit_lower_inverse(b_n, WORK: tl.constexpr):
    """(I + n)^-1 in float32 for a strictly lower triangular n (64, 64) in WORK, from operands rounded once each.

    The 2 x 2 diagonal blocks are inverted by a sign; then blocks join in pairs until one is left, up to 16 rows in a
    batch of four. A product of powers of n would take as many matrix products, but for repeated w with beta = 2 its
    terms grow to 10^18 and cancel.
    """
    o = tl.arange(0, 16)
    o_block = tl.arange(0, 4)
    diagonal = o_block[:, None, None, None] == o_block[None, None, :, None]
    b_blocks = rounded(tl.sum(tl.where(diagonal, tl.reshape(b_n, (4, 16, 4, 16)).to(tl.float32), 0.0), axis=2), WORK)
    b_x = tl.where(o[:, None] == o[None, :], 1.0, 0.0)[None, :, :]
    b_x = b_x - tl.where((o[:, None] // 2 == o[None, :] // 2)[None, :, :], b_blocks.to(tl.float32), 0.0)
    for doubling in tl.static_range(1, 4):
        b_x = _join_pairs(b_x, b_blocks, o, doubling, WORK)
    b_x = tl.reshape(tl.where(diagonal, b_x[:, :, None, :], 0.0), (ROWS, ROWS))
    for doubling in tl.static_range(4, 6):
        b_x = _join_pairs(b_x, b_n, tl.arange(0, ROWS), doubling, WORK)
    return b_x


@triton.jit
def corrected_inverse(b_n, WORK: tl.constexpr):
    """(I + n)^-1 of a float32 n to some 20 bits: x + x (I - (I + n) x) for the x of :func:`_unit_lower_inverse`."""
    o = tl.arange(0, ROWS)
    b_n_rounded = rounded(b_n, WORK)
    b_x = _unit_lower_inverse(b_n_rounded, WORK)
    if WORK is None:
        return b_x
    else:
        b_x_rounded = rounded(b_x, WORK)
        b_product = dot(b_n_rounded, b_x_rounded)
        b_product = dot(rest(b_n, b_n_rounded, WORK), b_x_rounded, b_product)
        b_residual = tl.where(o[:, None] == o[None, :], 1.0, 0.0) - b_x_rounded.to(tl.float32) - b_product
        return b_x_rounded.to(tl.float32) + dot(b_x_rounded, rounded(b_residual, WORK))


@triton.jit
def _dot_exact(b_a, b_b, b_b_rest, SPLIT: tl.constexpr):
    """a b of an operand and, with SPLIT, both parts of another."""
    b_c = dot(b_a, b_b)
    if SPLIT:
        b_c = dot(b_a, b_b_rest, b_c)
    return b_c


@triton.jit
def _dot_parts(b_a, b_b, b_b_rest, WORK: tl.constexpr, SPLIT: tl.constexpr):
    """a b for a float32 a: rounded, or with SPLIT in two parts as b is."""
    b_a_rounded = rounded(b_a, WORK)
    if SPLIT:
        return dot_split(b_a_rounded, rest(b_a, b_a_rounded, WORK), b_b, b_b_rest, WORK)
    else:
        return dot(b_a_rounded, b_b)


@triton.jit
def _triangle(b_w, b_w_rest, b_beta, WORK: tl.constexpr, SPLIT_W: tl.constexpr):
    """T - I = strictLower(D W W^T) in float32."""
    o = tl.arange(0, ROWS)
    b_gram = dot(b_w, tl.trans(b_w))
    if SPLIT_W:
        b_gram = dot(b_w, tl.trans(b_w_rest), b_gram)
        b_gram = dot(b_w_rest, tl.trans(b_w), b_gram)
    return tl.where(o[:, None] > o[None, :], b_beta[:, None] * b_gram, 0.0)


@triton.jit
def _gates_between(b_g):
    """(64, 64), base 2: the sum of the log gates of the tokens after the key, the column, up to the query, the row.

    A difference of running sums, from which a gate that closes is left out: what comes after it keeps its bits.
    """
    is_closed = b_g < CLOSED
    b_sum = tl.cumsum(tl.where(is_closed, 0.0, b_g), axis=0) * LOG2_E
    b_closed = tl.cumsum(is_closed.to(tl.int32), axis=0)
    return tl.where(b_closed[:, None] == b_closed[None, :], b_sum[:, None] - b_sum[None, :], float("-inf"))


@triton.jit(do_not_specialize=COUNTS)
def leaf_forward_kernel(
    p_q,  # (T, HQ, D)
    p_k,  # (T, H, D)
    p_v,  # (T, H, DV)
    p_w,  # (T, H, D)
    p_beta,  # (T, H)
    p_g,  # (T, HQ) or None
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_q_left,  # out (N, 64, HQ, D) WORK, times row_scale
    p_k_right,  # out (N, 64, H, D) WORK
    p_node,  # out (2 N, H, D, D) WORK, leaf nodes: P rounded
    p_node_rest,  # out, likewise: what rounding left of P
    p_gate_node,  # out (2 N, HQ) float32, leaf nodes, or None
    p_out,  # out (T, HQ, DV): attention within the leaf; None where the backward pass computes the rest again
    p_log_sum_exp,  # out (T, HQ) float32, likewise
    p_inverse,  # out (N, H, 64, 64) WORK: T^-1, for the backward pass; None where p_out is not
    p_y,  # out (N, H, 64, 64) WORK, likewise
    p_u,  # out (N, H, 64, D) WORK, likewise
    scale,
    row_scale,  # scale, and the unit of queries at edges
    H,
    token_heads,  # key heads of a token in p_q, p_k, p_v, p_w and p_out, of which these H are some
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WORK: tl.constexpr,
    SPLIT_W: tl.constexpr,  # w has more bits than WORK
    SPLIT_ROWS: tl.constexpr,  # rows meet the leaf's factors in two parts each
):
    """One leaf and key head with its query heads: what the rest of the sequence needs of it, and its own attention.

    T^-1, U and P are exact to some 20 bits: later tokens see products of all P, whose errors add up. What a single row
    meets once needs no more than WORK has beside bfloat16's 8 bits; with SPLIT_ROWS it has 22.
    """
    HQ = H * GROUP
    key_stride = token_heads * D
    query_stride = key_stride * GROUP
    value_stride = token_heads * DV
    out_stride = value_stride * GROUP
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_row, s_rows, _, _, _, _, _ = place(i_leaf, p_table, table_leaves, table_length, table_queries, table_keys)
    if s_rows == 0:
        return
    o = tl.arange(0, ROWS)
    i_tile = i_leaf * H + i_head
    p_w += i_head * D
    b_w_given = load_rows(p_w, i_row, s_rows, key_stride, D, BLOCK_D, ROWS)
    b_w = rounded(b_w_given, WORK)
    b_w_rest = rest(b_w_given, b_w, WORK)
    b_beta = tl.load(p_beta + tl.cast(i_row, tl.int64) * H + o * H + i_head, mask=o < s_rows, other=0.0).to(tl.float32)
    b_n = _triangle(b_w, b_w_rest, b_beta, WORK, SPLIT_W)
    b_inverse = corrected_inverse(b_n, WORK)
    if p_inverse is not None:
        store_square(p_inverse, b_inverse, i_tile, ROWS, ROWS)
    b_a_whole = b_inverse * b_beta[None, :]
    b_a = rounded(b_a_whole, WORK)
    b_a_rest = rest(b_a_whole, b_a, WORK)
    b_u_whole = dot_split(b_a, b_a_rest, b_w, b_w_rest, WORK)
    b_u = rounded(b_u_whole, WORK)
    b_u_rest = rest(b_u_whole, b_u, WORK)
    o_d = tl.arange(0, BLOCK_D)
    o_chunk = tl.arange(0, CHUNK)
    i_node = (tl.cast(2 * i_leaf, tl.int64) * H + i_head) * D * D
    for i in tl.static_range(0, BLOCK_D, CHUNK):
        b_w_chunk = load_rows(p_w + i, i_row, s_rows, key_stride, D - i, CHUNK, ROWS)
        b_w_columns = tl.trans(rounded(b_w_chunk, WORK))
        b_p = dot(b_w_columns, b_u)
        b_p = dot(b_w_columns, b_u_rest, b_p)
        if SPLIT_W:
            b_p = dot(tl.trans(rest(b_w_chunk, rounded(b_w_chunk, WORK), WORK)), b_u, b_p)
        b_p = tl.where((o_chunk + i)[:, None] == o_d[None, :], 1.0, 0.0) - b_p
        b_p_rounded = rounded(b_p, WORK)
        store_rows(p_node + i_node, b_p_rounded, i, D - i, D, D, BLOCK_D, CHUNK)
        if WORK is not None:
            store_rows(p_node_rest + i_node, rest(b_p, b_p_rounded, WORK), i, D - i, D, D, BLOCK_D, CHUNK)
    if p_u is not None:
        store_rows(p_u, b_u, i_tile * ROWS, ROWS, D, D, BLOCK_D, ROWS)
    b_k = rounded(load_rows(p_k + i_head * D, i_row, s_rows, key_stride, D, BLOCK_D, ROWS), WORK)
    b_z = tl.where(o[:, None] < o[None, :], _dot_exact(b_k, tl.trans(b_w), tl.trans(b_w_rest), SPLIT_ROWS), 0.0)
    b_y_whole = _dot_parts(b_z, tl.trans(b_a), tl.trans(b_a_rest), WORK, SPLIT_ROWS)
    b_y = rounded(b_y_whole, WORK)
    if p_y is not None:
        store_square(p_y, b_y, i_tile, ROWS, ROWS)
    b_k_right = b_k.to(tl.float32) - _dot_parts(b_y_whole, b_w, b_w_rest, WORK, SPLIT_ROWS)
    store_rows(p_k_right + i_head * D, b_k_right, i_leaf * ROWS, ROWS, H * D, D, BLOCK_D, ROWS)
    for i_group in range(GROUP):
        i_query_head = i_head * GROUP + i_group
        b_q = rounded(load_rows(p_q + i_query_head * D, i_row, s_rows, query_stride, D, BLOCK_D, ROWS), WORK)
        b_x = tl.where(o[:, None] >= o[None, :], _dot_exact(b_q, tl.trans(b_w), tl.trans(b_w_rest), SPLIT_ROWS), 0.0)
        b_q_left = (b_q.to(tl.float32) - _dot_parts(b_x, b_u, b_u_rest, WORK, SPLIT_ROWS)) * row_scale
        store_rows(p_q_left + i_query_head * D, b_q_left, i_leaf * ROWS, ROWS, HQ * D, D, BLOCK_D, ROWS)
        o_row = tl.cast(i_row, tl.int64) * HQ + o * HQ + i_query_head
        if p_g is not None:
            b_g = tl.load(p_g + o_row, mask=o < s_rows, other=0.0).to(tl.float32)
            tl.store(p_gate_node + tl.cast(2 * i_leaf, tl.int64) * HQ + i_query_head, tl.sum(b_g))
        if p_out is not None:
            b_y_rest = rest(b_y_whole, b_y, WORK)
            b_logits = dot(b_q, tl.trans(b_k)) - _dot_parts(b_x, tl.trans(b_y), tl.trans(b_y_rest), WORK, SPLIT_ROWS)
            b_logits *= scale * LOG2_E
            if p_g is not None:
                b_logits += _gates_between(b_g)
            b_logits = tl.where(o[:, None] >= o[None, :], b_logits, float("-inf"))
            b_max = tl.max(b_logits, axis=1)
            b_weights = tl.exp2(b_logits - b_max[:, None])
            b_sum = tl.sum(b_weights, axis=1)
            b_v = load_rows(p_v + i_head * DV, i_row, s_rows, value_stride, DV, BLOCK_DV, ROWS)
            b_out = dot(b_weights.to(b_v.dtype), b_v) / b_sum[:, None]
            store_rows(p_out + i_query_head * DV, b_out, i_row, s_rows, out_stride, DV, BLOCK_DV, ROWS)
            tl.store(p_log_sum_exp + o_row, (b_max + tl.log2(b_sum)) / LOG2_E, mask=o < s_rows)


@triton.jit(do_not_specialize=COUNTS)
def leaf_backward_kernel(
    p_q,  # (T, HQ, D)
    p_k,  # (T, H, D)
    p_v,  # (T, H, DV)
    p_w,  # (T, H, D)
    p_beta,  # (T, H)
    p_g,  # (T, HQ) or None
    p_inverse,  # (N, H, 64, 64) WORK
    p_y,  # (N, H, 64, 64) WORK
    p_u,  # (N, H, 64, D) WORK
    p_log_sum_exp,  # (T, HQ) float32, of the whole attention
    p_delta,  # (T, HQ) float32: rowsum(d_out * out)
    p_d_out,  # (T, HQ, DV); None where there was no attention: so are both before it and p_d_values, p_d_v then
    p_d_q_left,  # (N, 64, HQ, D) WORK, to be multiplied by its power
    p_d_q_left_power,  # (N, HQ) float32
    p_d_k_right,  # (N, 64, H, D) WORK, likewise
    p_d_k_right_power,  # (N, H) float32
    p_d_node,  # (2 N, H, D, D) WORK, likewise
    p_d_node_power,  # (2 N, H) float32
    p_d_values,  # (T, H, DV): from the other spans
    p_factor,  # what those were multiplied by, or None
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_d_q,  # out (T, HQ, D)
    p_d_k,  # out (T, H, D)
    p_d_v,  # out (T, H, DV)
    p_d_w,  # out (T, H, D)
    p_d_beta,  # out (T, H)
    p_d_gate,  # (T, HQ) float32 or None: row sums less column sums of dS; in, of the other spans; out, of all
    scale,
    H,
    token_heads,  # key heads of a token, of which these H are some, in p_q, p_k, p_v, p_w, p_d_out and their gradients
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WORK: tl.constexpr,
):
    """From logits, q_left, k_right and P of one leaf and key head back to all inputs: docs/math.md, section 6.

    Operands in WORK are kept near 1: q and k as q / p_q and k / p_k with the powers of two of their tiles, so that what
    is called a gradient of q below is p_q times the true one; and all gradients in one unit, the largest of those that
    come in, which the group's heads may raise one after another.
    """
    HQ = H * GROUP
    key_stride = token_heads * D
    query_stride = key_stride * GROUP
    value_stride = token_heads * DV
    out_stride = value_stride * GROUP
    # Products of gradients grow, some 50 times from dS to dT; with this the largest stay far below float16's 65504.
    HEADROOM: tl.constexpr = 0.0625
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_row, s_rows, i_index, s_count, _, _, _ = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    if s_rows == 0:
        return
    has_right = i_index + 1 < s_count  # else nobody uses k_right and P
    o = tl.arange(0, ROWS)
    m_row = o < s_rows
    causal = o[:, None] >= o[None, :]
    i_tile = i_leaf * H + i_head
    i_node = 2 * i_leaf * H + i_head
    b_w = rounded(load_rows(p_w + i_head * D, i_row, s_rows, key_stride, D, BLOCK_D, ROWS), WORK)
    b_k, s_k, s_k_inverse = normalised(load_rows(p_k + i_head * D, i_row, s_rows, key_stride, D, BLOCK_D, ROWS), WORK)
    b_y = rounded(load_square(p_y, i_tile, ROWS, ROWS).to(tl.float32) * s_k_inverse, WORK)
    b_u = load_rows(p_u, i_tile * ROWS, ROWS, D, D, BLOCK_D, ROWS)
    s_unit = 2.0**-100
    s_d_k_right = 0.0
    s_d_p = 0.0
    if has_right:
        s_d_k_right = load_power(p_d_k_right_power, i_tile, WORK) * s_k
        s_d_p = load_power(p_d_node_power, i_node, WORK)
        s_unit = tl.maximum(s_unit, tl.maximum(s_d_k_right, s_d_p))
    b_d_y = tl.zeros((ROWS, ROWS), tl.float32)
    b_d_u = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_d_w = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_d_k = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if p_d_out is not None:
        b_d_v = load_rows(p_d_values + i_head * DV, i_row, s_rows, H * DV, DV, BLOCK_DV, ROWS).to(tl.float32)
        b_d_v *= inverse_of(p_factor)
    for i_group in range(GROUP):
        i_query_head = i_head * GROUP + i_group
        o_row = tl.cast(i_row, tl.int64) * HQ + o * HQ + i_query_head
        b_q, s_q, s_q_inverse = normalised(
            load_rows(p_q + i_query_head * D, i_row, s_rows, query_stride, D, BLOCK_D, ROWS), WORK
        )
        b_x = rounded(tl.where(causal, dot(b_q, tl.trans(b_w)), 0.0), WORK)
        if p_d_out is not None:
            b_logits = (dot(b_q, tl.trans(b_k)) - dot(b_x, tl.trans(b_y))) * (s_q * s_k * scale * LOG2_E)
            if p_g is not None:
                b_logits += _gates_between(tl.load(p_g + o_row, mask=m_row, other=0.0).to(tl.float32))
            b_shift = tl.load(p_log_sum_exp + o_row, mask=m_row, other=0.0) * LOG2_E
            b_weights = tl.where(causal & m_row[:, None], tl.exp2(b_logits - b_shift[:, None]), 0.0)
            b_d_out = load_rows(p_d_out + i_query_head * DV, i_row, s_rows, out_stride, DV, BLOCK_DV, ROWS)
            b_d_v = dot(tl.trans(b_weights.to(b_d_out.dtype)), b_d_out, b_d_v)
            b_v = load_rows(p_v + i_head * DV, i_row, s_rows, value_stride, DV, BLOCK_DV, ROWS)
            b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
            b_d_s = b_weights * (dot(b_d_out, tl.trans(b_v)) - b_delta[:, None])
            if p_g is not None:
                b_d_gate = (
                    tl.load(p_d_gate + o_row, mask=m_row, other=0.0) + tl.sum(b_d_s, axis=1) - tl.sum(b_d_s, axis=0)
                )
                tl.store(p_d_gate + o_row, b_d_gate, mask=m_row)
        s_d_q_left = load_power(p_d_q_left_power, i_leaf * HQ + i_query_head, WORK) * (s_q * scale)
        s_d_s = s_q * s_k * scale
        s_gradient = 1.0
        if WORK is not None:
            if p_d_out is not None:
                s_power, _inverse = power_of_two(b_d_s)
                s_largest = tl.maximum(s_unit, tl.maximum(s_power * s_d_s, s_d_q_left))
            else:
                s_largest = tl.maximum(s_unit, s_d_q_left)
            if GROUP > 1:
                s_ratio = s_unit / s_largest
                b_d_y *= s_ratio
                b_d_u *= s_ratio
                b_d_w *= s_ratio
                b_d_k *= s_ratio
            s_unit = s_largest
            s_gradient = HEADROOM / s_unit
        if p_d_out is not None:
            b_d_s = rounded(b_d_s * (s_d_s * s_gradient), WORK)
        b_d_q_left = load_rows(p_d_q_left + i_query_head * D, i_leaf * ROWS, ROWS, HQ * D, D, BLOCK_D, ROWS)
        b_d_q = b_d_q_left.to(tl.float32) * (s_d_q_left * s_gradient)
        b_d_q_left = rounded(b_d_q, WORK)
        if p_d_out is not None:
            b_d_x = dot(b_d_s, b_y)
            b_d_x = dot(b_d_q_left, tl.trans(b_u), b_d_x)
        else:
            b_d_x = dot(b_d_q_left, tl.trans(b_u))
        b_d_x = rounded(tl.where(causal, -b_d_x, 0.0), WORK)
        if p_d_out is not None:
            b_d_q = dot(b_d_s, b_k, b_d_q)
        b_d_q = dot(b_d_x, b_w, b_d_q)
        b_d_q *= s_q_inverse / s_gradient
        store_rows(p_d_q + i_query_head * D, b_d_q, i_row, s_rows, query_stride, D, BLOCK_D, ROWS)
        b_d_w = dot(tl.trans(b_d_x), b_q, b_d_w)
        if p_d_out is not None:
            b_d_k = dot(tl.trans(b_d_s), b_q, b_d_k)
            b_d_y -= dot(tl.trans(b_d_s), b_x)
        b_d_u -= dot(tl.trans(b_x), b_d_q_left)
    if p_d_out is not None:
        store_rows(p_d_v + i_head * DV, b_d_v, i_row, s_rows, value_stride, DV, BLOCK_DV, ROWS)
    s_gradient = 1.0
    if WORK is not None:
        s_gradient = HEADROOM / s_unit
    if has_right:
        b_d_k_right = load_rows(p_d_k_right + i_head * D, i_leaf * ROWS, ROWS, H * D, D, BLOCK_D, ROWS)
        b_d_k_right = b_d_k_right.to(tl.float32) * (s_d_k_right * s_gradient)
        b_d_k += b_d_k_right
        b_d_k_right = rounded(b_d_k_right, WORK)
        b_d_y -= dot(b_d_k_right, tl.trans(b_w))
        b_d_w -= dot(tl.trans(b_y), b_d_k_right)
        b_d_p = rounded(load_square(p_d_node, i_node, D, BLOCK_D).to(tl.float32) * (s_d_p * s_gradient), WORK)
        b_d_u -= dot(b_w, b_d_p)
        b_d_w -= dot(b_u, tl.trans(b_d_p))
    # E = T^-T dU and F = T^-T dY, the gradients of D W and D Z; here F comes transposed, as Y does.
    b_inverse = load_square(p_inverse, i_tile, ROWS, ROWS)
    b_e = dot(tl.trans(b_inverse), rounded(b_d_u, WORK))
    b_f = dot(rounded(b_d_y, WORK), b_inverse)
    b_f_rounded = rounded(b_f, WORK)
    b_d_t = dot(rounded(b_e, WORK), tl.trans(b_u))
    b_d_t = dot(tl.trans(b_f_rounded), b_y, b_d_t)
    b_d_t = tl.where(o[:, None] > o[None, :], -b_d_t, 0.0)
    b_f = tl.where(o[:, None] < o[None, :], b_f, 0.0)
    # Gradient of each row of D times what D multiplies: W, and below the diagonals W W^T and W K^T.
    b_e = dot(rounded(b_d_t, WORK), b_w, b_e)
    b_e = dot(tl.trans(rounded(b_f, WORK)), b_k, b_e)
    o_beta = tl.cast(i_row, tl.int64) * H + o * H + i_head
    b_w_given = load_rows(p_w + i_head * D, i_row, s_rows, key_stride, D, BLOCK_D, ROWS).to(tl.float32)
    tl.store(p_d_beta + o_beta, tl.sum(b_e * b_w_given, axis=1) / s_gradient, mask=m_row)
    b_beta = tl.load(p_beta + o_beta, mask=m_row, other=0.0).to(tl.float32)
    b_d_w += b_beta[:, None] * b_e
    b_d_w = dot(tl.trans(rounded(b_d_t * b_beta[:, None], WORK)), b_w, b_d_w)
    store_rows(p_d_w + i_head * D, b_d_w / s_gradient, i_row, s_rows, key_stride, D, BLOCK_D, ROWS)
    b_d_k = dot(rounded(b_f * b_beta[None, :], WORK), b_w, b_d_k)
    store_rows(p_d_k + i_head * D, b_d_k * (s_k_inverse / s_gradient), i_row, s_rows, key_stride, D, BLOCK_D, ROWS)
