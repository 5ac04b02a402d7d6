"""Triton kernels of the attention between sibling spans: all levels in one kernel, without a partial result in memory.

Query leaf i attends at every level l whose bit is set in i to the whole left sibling, 2^l leaves:

    S = Q_l K_l^T + gates      P = exp(S - log_sum_exp)      out += P V

    dV += P^T dO      dS = P (dO V^T - delta)      dQ_l = dS K_l      dK_l = dS^T Q_l

The siblings of a leaf are all leaves to its left, each once, and so are the tokens whose rows of V it needs; the rows
of Q and K are another set at every level. A program takes LEAVES neighbouring leaves, the first at an even index if
there are two: from level 1 on both have the same siblings and their rows are consecutive. At level 0 the left one of
the two is the sibling, and the rows that take no part get a bias of minus infinity.

Where PIECE is given rows are float32, too much for whole tiles: logits and dO V^T are sums over PIECE columns of both
factors, read from memory again and again. One leaf a program, and no descriptors.

Exponents are kept in base 2, biases included. leaf_table.py says where rows stand. What a loop reads comes by a tensor
descriptor (t_) where the launcher could make one, else by pointers (p_): descriptors need no addresses in registers.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import COUNTS, LOG2_E, gates_of_head, load_piece, place, within

LEAF = tl.constexpr(64)  # tokens a leaf: LEAF of leaf_table.py


@triton.constexpr_function
def block_of(dim):
    """Columns of a tile that holds rows of dim: a power of two, as Triton wants it.

    Triton 3.6 makes wrong code of a product with fewer than 64 columns of values after logits of 64 keys.
    """
    return max(64, triton.next_power_of_2(dim))


@triton.jit
def _dot(b_a, b_b, b_c=None):
    """a b + c in float32: :func:`path_attention.ops.kernels.tiles.dot`, of operands of half precision as it is."""
    if b_a.dtype == tl.float32:
        return tl.dot(b_a, b_b, b_c, input_precision="tf32x3")
    else:
        return tl.dot(b_a, b_b, b_c, input_precision="ieee")


@triton.jit
def _leaf_and_head(num_leaves, num_heads, s_section):
    """Programs in sections of heads whose keys and values fit the L2 cache; leaf by leaf within a section."""
    i = tl.program_id(0)
    i_section = i // (s_section * num_leaves)
    s_heads = tl.minimum(s_section, num_heads - i_section * s_section)
    i -= i_section * s_section * num_leaves
    return i // s_heads, i_section * s_section + i % s_heads


@triton.jit
def _tokens(i_leaf, p_table, table_leaves, table_length, table_queries, table_keys):
    """Tokens in a leaf."""
    _, s_tokens, _, _, _, _, _ = place(i_leaf, p_table, table_leaves, table_length, table_queries, table_keys)
    return s_tokens


@triton.jit
def _place_of_leaves(i_leaf, p_table, table_leaves, table_length, table_queries, table_keys, LEAVES: tl.constexpr):
    """``place`` of the program's first leaf, with the tokens of all; 0 if another program has them, or none."""
    i_row, s_rows, i_index, s_count, i_query_base, i_key_base, _ = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    if LEAVES == 2:
        if i_index + 1 < s_count:
            s_rows += _tokens(i_leaf + 1, p_table, table_leaves, table_length, table_queries, table_keys)
        s_rows = tl.where(i_index % 2 == 0, s_rows, 0)
    return i_row, s_rows, i_index, s_count, i_query_base, i_key_base


@triton.jit
def _tile(p_x, i_row, row_stride, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to rows i_row .. i_row + ROWS. Only the first needs 64 bits: a tile itself is small."""
    p_first = p_x + tl.cast(i_row, tl.int64) * row_stride
    return p_first + (tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, block_of(DIM))[None, :])


@triton.jit
def _mask(m_row, DIM: tl.constexpr):
    """Mask of a tile of rows of DIM."""
    if block_of(DIM) == DIM:
        return m_row[:, None]
    else:
        return m_row[:, None] & (tl.arange(0, block_of(DIM)) < DIM)[None, :]


@triton.jit
def _load(p_x, i_row, m_row, row_stride, DIM: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, block_of(DIM)) from row i_row on, zeros where m_row is false and past column DIM."""
    return tl.load(_tile(p_x, i_row, row_stride, DIM, ROWS), mask=_mask(m_row, DIM), other=0.0)


@triton.jit
def _store(p_x, b_x, i_row, m_row, row_stride, DIM: tl.constexpr, ROWS: tl.constexpr):
    """The opposite of _load, in the type of p_x."""
    p = _tile(p_x, i_row, row_stride, DIM, ROWS)
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=_mask(m_row, DIM))


@triton.jit
def _stream(t_x, p_x, i_row, i_column, row_stride, DIM: tl.constexpr, ROWS: tl.constexpr):
    """A tile in a loop: rows i_row .. i_row + ROWS, all of which exist, of the head that starts at i_column.

    A descriptor gives the next head's columns past DIM: the other factor of every product has zeros there, or the
    product's columns are not stored.
    """
    if t_x is not None:
        return t_x.load([i_row, i_column])
    elif block_of(DIM) == DIM:
        return tl.load(_tile(p_x + i_column, i_row, row_stride, DIM, ROWS))
    else:
        m_column = (tl.arange(0, block_of(DIM)) < DIM)[None, :]
        return tl.load(_tile(p_x + i_column, i_row, row_stride, DIM, ROWS), mask=m_column, other=0.0)


@triton.jit
def _product_in_pieces(
    p_x, i_x, s_x, x_stride, p_y, i_y, s_y, y_stride, DIM: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr,
    PIECE: tl.constexpr
):  # fmt: skip
    """x y^T of rows in memory, s_x and s_y of them, in float32."""
    b_sum = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
    for i in range(0, DIM, PIECE):
        b_x = load_piece(p_x, i_x, s_x, x_stride, i, DIM, PIECE, X_ROWS)
        b_y = load_piece(p_y, i_y, s_y, y_stride, i, DIM, PIECE, Y_ROWS)
        b_sum = _dot(b_x, tl.trans(b_y), b_sum)
    return b_sum


@triton.jit
def _head_rows(p_x, i_row, row_stride, ROWS: tl.constexpr):
    """Pointers to one number for each of ROWS rows."""
    return p_x + tl.cast(i_row, tl.int64) * row_stride + tl.arange(0, ROWS) * row_stride


@triton.jit
def _bias(m_row, p_gate, i_row, ROWS: tl.constexpr):
    """What is added to the logits of each row in base 2: its gate, if there are gates; minus infinity outside m_row."""
    b_bias = tl.where(m_row, 0.0, float("-inf"))
    if p_gate is not None:
        b_bias += tl.load(_head_rows(p_gate, i_row, 1, ROWS), mask=m_row, other=0.0) * LOG2_E
    return b_bias


@triton.jit
def _scaled(b_s, p_gate_key, i_key, KEYS: tl.constexpr):
    """Logits of KEYS keys in base 2, with the keys' gates."""
    b_s *= LOG2_E
    if p_gate_key is not None:
        b_s += tl.load(_head_rows(p_gate_key, i_key, 1, KEYS))[None, :] * LOG2_E
    return b_s


@triton.jit
def _online_softmax(b_s, b_bias, b_max, b_sum):
    """One step: the weights of b_s, what the sums so far are multiplied by, and the new maximum and sum.

    The bias of a row is taken off its maximum instead of being added to all its logits.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) + b_bias)
    b_p = tl.exp2(b_s - (b_new - b_bias)[:, None])
    b_decay = tl.exp2(b_max - b_new)
    return b_p, b_decay, b_new, b_sum * b_decay + tl.sum(b_p, axis=1)


@triton.jit
def _attend_in_pieces(
    b_bias, b_max, b_sum, b_acc, p_query_rows, p_key_rows, p_values, p_gate_key, i_query, i_key, i_value, s_keys,
    i_head, H, value_stride, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    PIECE: tl.constexpr
):  # fmt: skip
    """_attend of the slot of queries at i_query."""
    for i in range(0, s_keys, KEYS):
        b_s = _product_in_pieces(
            p_query_rows, i_query, LEAF, H * GROUP * D, p_key_rows + i_head * D, i_key + i, KEYS, H * D, D, LEAF, KEYS,
            PIECE
        )  # fmt: skip
        b_s = _scaled(b_s, p_gate_key, i_key + i, KEYS)
        b_p, b_decay, b_max, b_sum = _online_softmax(b_s, b_bias, b_max, b_sum)
        b_v = _stream(None, p_values, i_value + i, i_head * DV, value_stride, DV, KEYS)
        b_acc = _dot(b_p, b_v, b_acc * b_decay[:, None])
    return b_max, b_sum, b_acc


@triton.jit
def _attend(
    b_q,
    b_bias,
    b_max,
    b_sum,
    b_acc,
    t_key_rows,
    t_values,
    p_key_rows,
    p_values,
    p_gate_key,
    i_key,  # first of s_keys rows of the keys and their gates
    i_value,  # first of s_keys rows of the values
    s_keys,
    i_head,
    H,
    value_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax over the keys of one sibling. The logits run one tile ahead, under the softmax of the last."""
    b_k = _stream(t_key_rows, p_key_rows, i_key, i_head * D, H * D, D, KEYS)
    b_s = _dot(b_q, tl.trans(b_k))
    for _ in tl.range(0, s_keys - KEYS, KEYS, num_stages=STAGES):
        b_k = _stream(t_key_rows, p_key_rows, i_key + KEYS, i_head * D, H * D, D, KEYS)
        b_s_next = _dot(b_q, tl.trans(b_k))
        b_s = _scaled(b_s, p_gate_key, i_key, KEYS)
        b_p, b_decay, b_max, b_sum = _online_softmax(b_s, b_bias, b_max, b_sum)
        b_acc *= b_decay[:, None]
        b_v = _stream(t_values, p_values, i_value, i_head * DV, value_stride, DV, KEYS)
        b_acc = _dot(b_p.to(b_v.dtype), b_v, b_acc)
        b_s = b_s_next
        i_key += KEYS
        i_value += KEYS
    b_s = _scaled(b_s, p_gate_key, i_key, KEYS)
    b_p, b_decay, b_max, b_sum = _online_softmax(b_s, b_bias, b_max, b_sum)
    b_acc *= b_decay[:, None]
    b_v = _stream(t_values, p_values, i_value, i_head * DV, value_stride, DV, KEYS)
    b_acc = _dot(b_p.to(b_v.dtype), b_v, b_acc)
    return b_max, b_sum, b_acc


@triton.jit(do_not_specialize=COUNTS)
def dense_forward_kernel(
    t_key_rows,  # descriptors in tiles of KEYS rows, or None
    t_values,
    p_query_rows,  # (levels, query_slots, 64, HQ, D)
    p_key_rows,  # (levels, key_slots, 64, H, D)
    p_values,  # (T, H, DV)
    p_gate_query,  # (HQ, levels, query_slots, 64) float32 or None
    p_gate_key,  # (HQ, levels, key_slots, 64) float32 or None
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_out,  # (T, HQ, DV): in, attention within the leaf; out, the whole attention
    p_log_sum_exp,  # (T, HQ) float32, likewise
    num_leaves,
    num_levels,
    query_slots,
    key_slots,
    H,
    token_heads,  # key heads of a token in p_values and p_out, of which these H are some
    s_section,  # heads whose keys and values fit the L2 cache
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    LEAVES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PIECE: tl.constexpr = None,
):
    """Rows of LEAVES leaves and one query head: the leaves' own softmax goes on over all their left siblings."""
    ROWS: tl.constexpr = LEAVES * LEAF
    HQ = H * GROUP
    i_turn, i_query_head = _leaf_and_head(num_leaves, HQ, s_section)
    i_leaf = num_leaves - 1 - i_turn  # the last leaves have the most keys: they come first
    i_row, s_rows, i_index, s_count, i_query_base, i_key_base = _place_of_leaves(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys, LEAVES
    )
    i_last = i_index + LEAVES - 1
    if s_rows == 0 or i_last == 0:
        return
    i_head = i_query_head // GROUP
    value_stride = token_heads * DV
    p_query_rows += i_query_head * D
    p_out += i_query_head * DV
    if p_gate_query is not None:
        p_gate_query += gates_of_head(i_query_head, num_levels, query_slots)
        p_gate_key += gates_of_head(i_query_head, num_levels, key_slots)
    o = tl.arange(0, ROWS)
    m_row = o < s_rows
    p_lse = _head_rows(p_log_sum_exp + i_query_head, i_row, HQ, ROWS)
    b_max = tl.load(p_lse, mask=m_row, other=0.0) * LOG2_E
    b_sum = tl.full((ROWS,), 1.0, tl.float32)
    b_acc = _load(p_out, i_row, m_row, value_stride * GROUP, DV, ROWS).to(tl.float32)
    if (i_last & 1) == 1 and i_last < s_count:
        i_query = (i_query_base + within(i_last, 0) - (LEAVES - 1)) * LEAF
        i_key = (i_key_base + within(i_last - 1, 0)) * LEAF
        m_right = m_row & (o >= ROWS - LEAF)
        if PIECE is not None:
            b_max, b_sum, b_acc = _attend_in_pieces(
                _bias(m_right, p_gate_query, i_query, ROWS), b_max, b_sum, b_acc, p_query_rows, p_key_rows,
                p_values, p_gate_key, i_query, i_key, i_row - LEAF, LEAF, i_head, H, value_stride, GROUP, D, DV, KEYS,
                PIECE
            )  # fmt: skip
        else:
            b_q = _load(p_query_rows, i_query, m_right, HQ * D, D, ROWS)
            b_bias = _bias(m_right, p_gate_query, i_query, ROWS)
            b_max, b_sum, b_acc = _attend(
                b_q, b_bias, b_max, b_sum, b_acc, None, None, p_key_rows, p_values, p_gate_key, i_key,
                i_row + ROWS - 2 * LEAF, LEAF, i_head, H, value_stride, GROUP, D, DV, LEAF, STAGES
            )  # fmt: skip
    for level in range(1, num_levels):
        if ((i_index >> level) & 1) == 1:
            i_first = ((i_index >> level) - 1) << level
            i_query = (level * query_slots + i_query_base + within(i_index, level)) * LEAF
            i_key = (level * key_slots + i_key_base + within(i_first, level)) * LEAF
            if PIECE is not None:
                b_max, b_sum, b_acc = _attend_in_pieces(
                    _bias(m_row, p_gate_query, i_query, ROWS), b_max, b_sum, b_acc, p_query_rows, p_key_rows,
                    p_values, p_gate_key, i_query, i_key, i_row - (i_index - i_first) * LEAF, LEAF << level, i_head, H,
                    value_stride, GROUP, D, DV, KEYS, PIECE
                )  # fmt: skip
            else:
                b_q = _load(p_query_rows, i_query, m_row, HQ * D, D, ROWS)
                b_bias = _bias(m_row, p_gate_query, i_query, ROWS)
                b_max, b_sum, b_acc = _attend(
                    b_q, b_bias, b_max, b_sum, b_acc, t_key_rows, t_values, p_key_rows, p_values, p_gate_key, i_key,
                    i_row - (i_index - i_first) * LEAF, LEAF << level, i_head, H, value_stride, GROUP, D, DV, KEYS,
                    STAGES
                )  # fmt: skip
    _store(p_out, b_acc / b_sum[:, None], i_row, m_row, value_stride * GROUP, DV, ROWS)
    tl.store(p_lse, (b_max + tl.log2(b_sum)) / LOG2_E, mask=m_row)


@triton.jit
def _query_gradients(
    b_q,
    b_d_out,
    b_shift,  # a row's bias less its log-sum-exp, base 2
    b_delta,
    b_row_sum,
    t_key_rows,
    t_values,
    p_key_rows,
    p_values,
    p_gate_key,
    i_key,  # first of s_keys rows of the keys and their gates
    i_value,  # first of s_keys rows of the values
    s_keys,
    i_head,
    H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ = dS K over the keys of one sibling; the sum of dS over them is added to b_row_sum, for gates."""
    b_d_q = tl.zeros_like(b_q).to(tl.float32)
    for i in tl.range(0, s_keys, KEYS, num_stages=STAGES):
        b_k = _stream(t_key_rows, p_key_rows, i_key + i, i_head * D, H * D, D, KEYS)
        b_s = _dot(b_q, tl.trans(b_k))
        b_v = _stream(t_values, p_values, i_value + i, i_head * DV, H * DV, DV, KEYS)
        b_d_p = _dot(b_d_out, tl.trans(b_v))
        b_p = tl.exp2(_scaled(b_s, p_gate_key, i_key + i, KEYS) + b_shift[:, None])
        b_d_s = b_p * (b_d_p - b_delta[:, None])
        if p_gate_key is not None:
            b_row_sum += tl.sum(b_d_s, axis=1)
        b_d_q = _dot(b_d_s.to(b_k.dtype), b_k, b_d_q)
    return b_d_q, b_row_sum


@triton.jit
def _query_gradients_in_pieces(
    b_shift, b_delta, b_row_sum, p_query_rows, p_d_out, p_key_rows, p_values, p_gate_key, i_query, i_row, s_rows, i_key,
    i_value, s_keys, i_head, H, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    PIECE: tl.constexpr
):  # fmt: skip
    """_query_gradients of the slot of queries at i_query, whose s_rows tokens start at i_row."""
    b_d_q = tl.zeros((LEAF, block_of(D)), tl.float32)
    for i in range(0, s_keys, KEYS):
        b_s = _product_in_pieces(
            p_query_rows, i_query, LEAF, H * GROUP * D, p_key_rows + i_head * D, i_key + i, KEYS, H * D, D, LEAF, KEYS,
            PIECE
        )  # fmt: skip
        b_d_p = _product_in_pieces(
            p_d_out, i_row, s_rows, H * GROUP * DV, p_values + i_head * DV, i_value + i, KEYS, H * DV, DV, LEAF, KEYS,
            PIECE
        )  # fmt: skip
        b_p = tl.exp2(_scaled(b_s, p_gate_key, i_key + i, KEYS) + b_shift[:, None])
        b_d_s = b_p * (b_d_p - b_delta[:, None])
        if p_gate_key is not None:
            b_row_sum += tl.sum(b_d_s, axis=1)
        b_d_q = _dot(b_d_s, _stream(None, p_key_rows, i_key + i, i_head * D, H * D, D, KEYS), b_d_q)
    return b_d_q, b_row_sum


@triton.jit(do_not_specialize=COUNTS)
def dense_backward_queries_kernel(
    t_key_rows,  # descriptors in tiles of KEYS rows, or None
    t_values,
    p_query_rows,
    p_key_rows,
    p_values,
    p_gate_query,
    p_gate_key,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_d_out,  # (T, HQ, DV)
    p_log_sum_exp,  # (T, HQ) float32
    p_delta,  # (T, HQ) float32: rowsum(d_out * out)
    p_d_query_rows,  # out, like p_query_rows
    p_gate_row,  # out (T, HQ) float32: row sums of dS over all levels; None without gates
    num_leaves,
    num_levels,
    query_slots,
    key_slots,
    H,
    s_section,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    LEAVES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PIECE: tl.constexpr = None,
):
    """Gradients of the queries of LEAVES leaves and one query head, at every level that they stand at."""
    ROWS: tl.constexpr = LEAVES * LEAF
    HQ = H * GROUP
    i_turn, i_query_head = _leaf_and_head(num_leaves, HQ, s_section)
    i_leaf = num_leaves - 1 - i_turn  # the last leaves have the most keys: they come first
    i_row, s_rows, i_index, s_count, i_query_base, i_key_base = _place_of_leaves(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys, LEAVES
    )
    if s_rows == 0:
        return
    i_last = i_index + LEAVES - 1
    i_head = i_query_head // GROUP
    p_query_rows += i_query_head * D
    p_d_query_rows += i_query_head * D
    p_d_out += i_query_head * DV
    if p_gate_query is not None:
        p_gate_query += gates_of_head(i_query_head, num_levels, query_slots)
        p_gate_key += gates_of_head(i_query_head, num_levels, key_slots)
    o = tl.arange(0, ROWS)
    m_row = o < s_rows
    m_slot = o < tl.cdiv(s_rows, LEAF) * LEAF  # rows past a sequence's end belong to its last slot: they get zeros
    b_lse = tl.load(_head_rows(p_log_sum_exp + i_query_head, i_row, HQ, ROWS), mask=m_row, other=0.0) * LOG2_E
    b_delta = tl.load(_head_rows(p_delta + i_query_head, i_row, HQ, ROWS), mask=m_row, other=0.0)
    b_row_sum = tl.zeros((ROWS,), tl.float32)
    if (i_last & 1) == 1 and i_last < s_count:
        i_query = (i_query_base + within(i_last, 0) - (LEAVES - 1)) * LEAF
        i_key = (i_key_base + within(i_last - 1, 0)) * LEAF
        m_right = o >= ROWS - LEAF
        if PIECE is not None:
            b_d_q, b_row_sum = _query_gradients_in_pieces(
                _bias(m_row & m_right, p_gate_query, i_query, ROWS) - b_lse, b_delta, b_row_sum, p_query_rows,
                p_d_out, p_key_rows, p_values, p_gate_key, i_query, i_row, s_rows, i_key, i_row - LEAF, LEAF, i_head, H,
                GROUP, D, DV, KEYS, PIECE
            )  # fmt: skip
        else:
            b_q = _load(p_query_rows, i_query, m_row & m_right, HQ * D, D, ROWS)
            b_shift = _bias(m_row & m_right, p_gate_query, i_query, ROWS) - b_lse
            b_d_out = _load(p_d_out, i_row, m_row, HQ * DV, DV, ROWS)
            b_d_q, b_row_sum = _query_gradients(
                b_q, b_d_out, b_shift, b_delta, b_row_sum, None, None, p_key_rows, p_values, p_gate_key, i_key,
                i_row + ROWS - 2 * LEAF, LEAF, i_head, H, GROUP, D, DV, LEAF, STAGES
            )  # fmt: skip
        _store(p_d_query_rows, b_d_q, i_query, m_slot & m_right, HQ * D, D, ROWS)
    for level in range(1, num_levels):
        if ((i_index >> level) & 1) == 1:
            i_first = ((i_index >> level) - 1) << level
            i_query = (level * query_slots + i_query_base + within(i_index, level)) * LEAF
            i_key = (level * key_slots + i_key_base + within(i_first, level)) * LEAF
            if PIECE is not None:
                b_d_q, b_row_sum = _query_gradients_in_pieces(
                    _bias(m_row, p_gate_query, i_query, ROWS) - b_lse, b_delta, b_row_sum, p_query_rows, p_d_out,
                    p_key_rows, p_values, p_gate_key, i_query, i_row, s_rows, i_key,
                    i_row - (i_index - i_first) * LEAF, LEAF << level, i_head, H, GROUP, D, DV, KEYS, PIECE
                )  # fmt: skip
            else:
                b_q = _load(p_query_rows, i_query, m_row, HQ * D, D, ROWS)
                b_shift = _bias(m_row, p_gate_query, i_query, ROWS) - b_lse
                b_d_out = _load(p_d_out, i_row, m_row, HQ * DV, DV, ROWS)  # again, not to hold it in registers
                b_d_q, b_row_sum = _query_gradients(
                    b_q, b_d_out, b_shift, b_delta, b_row_sum, t_key_rows, t_values, p_key_rows, p_values, p_gate_key,
                    i_key, i_row - (i_index - i_first) * LEAF, LEAF << level, i_head, H, GROUP, D, DV, KEYS, STAGES
                )  # fmt: skip
            _store(p_d_query_rows, b_d_q, i_query, m_slot, HQ * D, D, ROWS)
    if p_gate_row is not None:
        tl.store(_head_rows(p_gate_row + i_query_head, i_row, HQ, ROWS), b_row_sum, mask=m_row)


@triton.jit
def _key_step(
    b_k,
    b_v,
    b_bias,
    b_d_k,
    b_d_v,
    b_column_sum,
    t_query_rows,
    t_d_out,
    p_query_rows,
    p_gate_query,
    p_d_out,
    p_log_sum_exp,
    p_delta,
    i_query,
    i_row,
    s_rows,  # of the tile that exist, or None if all do: a mask would take a third more instructions
    i_query_head,
    HQ,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """One tile of _key_gradients: a leaf's slot of queries, whose rows past the sequence's end get no weight."""
    b_q = _stream(t_query_rows, p_query_rows, i_query, i_query_head * D, HQ * D, D, LEAF)
    b_s = _dot(b_k, tl.trans(b_q))
    if s_rows is None:
        b_shift = tl.load(_head_rows(p_log_sum_exp, i_row, HQ, LEAF)) * -LOG2_E
        b_delta = tl.load(_head_rows(p_delta, i_row, HQ, LEAF))
        b_d_out = _stream(t_d_out, p_d_out, i_row, i_query_head * DV, HQ * DV, DV, LEAF)
    else:
        m_row = tl.arange(0, LEAF) < s_rows
        b_shift = tl.load(_head_rows(p_log_sum_exp, i_row, HQ, LEAF), mask=m_row, other=float("inf")) * -LOG2_E
        b_delta = tl.load(_head_rows(p_delta, i_row, HQ, LEAF), mask=m_row, other=0.0)
        b_d_out = _load(p_d_out + i_query_head * DV, i_row, m_row, HQ * DV, DV, LEAF)
    if p_gate_query is not None:
        b_shift += tl.load(_head_rows(p_gate_query, i_query, 1, LEAF)) * LOG2_E
    b_s = b_s * LOG2_E + b_shift[None, :]
    if b_bias is not None:
        b_s += b_bias[:, None]
    b_p = tl.exp2(b_s)
    b_d_p = _dot(b_v, tl.trans(b_d_out))
    b_d_v = _dot(b_p.to(b_d_out.dtype), b_d_out, b_d_v)
    b_d_s = b_p * (b_d_p - b_delta[None, :])
    if p_gate_query is not None:
        b_column_sum += tl.sum(b_d_s, axis=1)
    b_d_k = _dot(b_d_s.to(b_q.dtype), b_q, b_d_k)
    return b_d_k, b_d_v, b_column_sum


@triton.jit
def _key_gradients(
    b_k,
    b_v,
    b_bias,  # of the keys, base 2, or None
    b_d_k,
    b_d_v,
    b_column_sum,
    t_query_rows,
    t_d_out,
    p_query_rows,
    p_gate_query,
    p_d_out,
    p_log_sum_exp,
    p_delta,
    i_query,  # first of s_rows rows of the queries and their gates
    i_row,  # first of s_rows tokens
    s_rows,
    i_query_head,
    HQ,
    D: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK += dS^T Q and dV += P^T dO over one sibling's queries of one head, and b_column_sum likewise, for gates."""
    s_full = s_rows // LEAF * LEAF
    for i in tl.range(0, s_full, LEAF, num_stages=STAGES):
        b_d_k, b_d_v, b_column_sum = _key_step(
            b_k, b_v, b_bias, b_d_k, b_d_v, b_column_sum, t_query_rows, t_d_out, p_query_rows, p_gate_query, p_d_out,
            p_log_sum_exp, p_delta, i_query + i, i_row + i, None, i_query_head, HQ, D, DV
        )  # fmt: skip
    if s_full < s_rows:
        b_d_k, b_d_v, b_column_sum = _key_step(
            b_k, b_v, b_bias, b_d_k, b_d_v, b_column_sum, t_query_rows, t_d_out, p_query_rows, p_gate_query, p_d_out,
            p_log_sum_exp, p_delta, i_query + s_full, i_row + s_full, s_rows - s_full, i_query_head, HQ, D, DV
        )  # fmt: skip
    return b_d_k, b_d_v, b_column_sum


@triton.jit
def _key_gradients_in_pieces(
    b_bias, b_d_k, b_d_v, b_column_sum, p_key_rows, p_values, p_query_rows, p_gate_query, p_d_out, p_log_sum_exp,
    p_delta, i_key, i_own, s_own, i_query, i_row, s_rows, i_head, i_query_head, H, HQ, D: tl.constexpr,
    DV: tl.constexpr, QUERIES: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """_key_gradients of the slot of keys at i_key, whose s_own tokens start at i_own."""
    o = tl.arange(0, QUERIES)
    for i in range(0, s_rows, QUERIES):
        m_row = o < s_rows - i
        b_s = _product_in_pieces(
            p_key_rows + i_head * D, i_key, LEAF, H * D, p_query_rows + i_query_head * D, i_query + i, QUERIES, HQ * D,
            D, LEAF, QUERIES, PIECE
        )  # fmt: skip
        b_d_p = _product_in_pieces(
            p_values + i_head * DV, i_own, s_own, H * DV, p_d_out + i_query_head * DV, i_row + i, s_rows - i, HQ * DV,
            DV, LEAF, QUERIES, PIECE
        )  # fmt: skip
        b_shift = tl.load(_head_rows(p_log_sum_exp, i_row + i, HQ, QUERIES), mask=m_row, other=float("inf")) * -LOG2_E
        b_delta = tl.load(_head_rows(p_delta, i_row + i, HQ, QUERIES), mask=m_row, other=0.0)
        if p_gate_query is not None:
            b_shift += tl.load(_head_rows(p_gate_query, i_query + i, 1, QUERIES)) * LOG2_E
        b_s = b_s * LOG2_E + b_shift[None, :]
        if b_bias is not None:
            b_s += b_bias[:, None]
        b_p = tl.exp2(b_s)
        b_d_s = b_p * (b_d_p - b_delta[None, :])
        if p_gate_query is not None:
            b_column_sum += tl.sum(b_d_s, axis=1)
        b_d_v = _dot(b_p, _load(p_d_out + i_query_head * DV, i_row + i, m_row, HQ * DV, DV, QUERIES), b_d_v)
        b_d_k = _dot(b_d_s, _load(p_query_rows + i_query_head * D, i_query + i, m_row, HQ * D, D, QUERIES), b_d_k)
    return b_d_k, b_d_v, b_column_sum


@triton.jit
def _key_level(
    b_d_v,
    m_own,  # rows that are keys at any level
    m_key,  # rows that are keys at this level; all of them unless MASK_KEYS
    t_query_rows,
    t_d_out,
    p_query_rows,
    p_key_rows,
    p_values,
    p_gate_query,
    p_gate_key,
    p_d_out,
    p_log_sum_exp,
    p_delta,
    p_d_key_rows,
    p_gate_column,
    i_own,  # first of s_own tokens of the keys
    s_own,
    i_key,
    i_query,
    i_row,  # first token of the queries
    s_rows,
    s_gate_queries,  # from the gates of a head to the next one's
    s_gate_keys,
    i_head,
    H,
    MASK_KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    QUERIES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One level of dense_backward_keys_kernel: dK of all query heads of the group is stored, dV goes on to the next."""
    HQ = H * GROUP
    if PIECE is None:
        b_k = _load(p_key_rows + i_head * D, i_key, m_key, H * D, D, KEYS)
        b_v = _load(p_values + i_head * DV, i_own, m_own, H * DV, DV, KEYS)  # again, not to hold it in registers
    b_d_k = tl.zeros((KEYS, block_of(D)), tl.float32)
    for i_group in range(GROUP):
        i_query_head = i_head * GROUP + i_group
        b_bias = None
        p_gate = None
        if p_gate_key is not None:
            b_bias = _bias(m_key, p_gate_key + i_query_head * s_gate_keys, i_key, KEYS)
            p_gate = p_gate_query + i_query_head * s_gate_queries
        elif MASK_KEYS:
            b_bias = _bias(m_key, None, i_key, KEYS)
        if PIECE is not None:
            b_d_k, b_d_v, b_column_sum = _key_gradients_in_pieces(
                b_bias, b_d_k, b_d_v, tl.zeros((KEYS,), tl.float32), p_key_rows, p_values, p_query_rows, p_gate,
                p_d_out, p_log_sum_exp + i_query_head, p_delta + i_query_head, i_key, i_own, s_own, i_query, i_row,
                s_rows, i_head, i_query_head, H, HQ, D, DV, QUERIES, PIECE
            )  # fmt: skip
        else:
            b_d_k, b_d_v, b_column_sum = _key_gradients(
                b_k, b_v, b_bias, b_d_k, b_d_v, tl.zeros((KEYS,), tl.float32), t_query_rows, t_d_out, p_query_rows,
                p_gate, p_d_out, p_log_sum_exp + i_query_head, p_delta + i_query_head, i_query, i_row, s_rows,
                i_query_head, HQ, D, DV, STAGES
            )  # fmt: skip
        if p_gate_column is not None:
            # Only this program writes here; the barrier shows each of its threads what another wrote a level ago.
            tl.debug_barrier()
            p_column = _head_rows(p_gate_column + i_query_head, i_own, HQ, KEYS)
            tl.store(p_column, tl.load(p_column, mask=m_key, other=0.0) + b_column_sum, mask=m_key)
    _store(p_d_key_rows + i_head * D, b_d_k, i_key, m_key, H * D, D, KEYS)
    return b_d_v


@triton.jit(do_not_specialize=COUNTS)
def dense_backward_keys_kernel(
    t_query_rows,  # descriptors in tiles of LEAF rows, or None
    t_d_out,
    p_query_rows,
    p_key_rows,
    p_values,
    p_gate_query,
    p_gate_key,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_d_out,  # (T, HQ, DV)
    p_log_sum_exp,  # (T, HQ) float32
    p_delta,  # (T, HQ) float32: rowsum(d_out * out)
    p_d_key_rows,  # out, like p_key_rows
    p_d_values,  # out (T, H, DV) float32: sum over all levels
    p_gate_column,  # out (T, HQ) float32: column sums of dS over all levels; None without gates
    num_leaves,
    num_levels,
    query_slots,
    key_slots,
    H,
    s_section,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    LEAVES: tl.constexpr,
    STAGES: tl.constexpr,
    QUERIES: tl.constexpr = LEAF,  # of a tile, in pieces
    PIECE: tl.constexpr = None,
):
    """Gradients of the keys of LEAVES leaves and one key head at every level that they stand at, and of the values."""
    KEYS: tl.constexpr = LEAVES * LEAF
    i_leaf, i_head = _leaf_and_head(num_leaves, H, s_section)  # the first leaves, with the most queries, come first
    i_row, s_own, i_index, s_count, i_query_base, i_key_base = _place_of_leaves(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys, LEAVES
    )
    if s_own == 0:
        return
    o = tl.arange(0, KEYS)
    m_own = o < s_own
    b_d_v = tl.zeros((KEYS, block_of(DV)), tl.float32)
    s_gate_queries = gates_of_head(1, num_levels, query_slots)
    s_gate_keys = gates_of_head(1, num_levels, key_slots)
    if p_gate_column is not None:
        for i_group in range(GROUP):
            p_column = _head_rows(p_gate_column + i_head * GROUP + i_group, i_row, H * GROUP, KEYS)
            tl.store(p_column, tl.zeros((KEYS,), tl.float32), mask=m_own)
    if LEAVES == 2:
        if i_index + 1 < s_count:
            b_d_v = _key_level(
                b_d_v, m_own, o < LEAF, t_query_rows, t_d_out, p_query_rows, p_key_rows, p_values, p_gate_query,
                p_gate_key, p_d_out, p_log_sum_exp, p_delta, p_d_key_rows, p_gate_column, i_row, s_own,
                (i_key_base + within(i_index, 0)) * LEAF, (i_query_base + within(i_index + 1, 0)) * LEAF, i_row + LEAF,
                _tokens(i_leaf + 1, p_table, table_leaves, table_length, table_queries, table_keys), s_gate_queries,
                s_gate_keys, i_head, H, True, GROUP, D, DV, KEYS, STAGES, QUERIES, PIECE
            )  # fmt: skip
    for level in range(LEAVES - 1, num_levels):
        i_first = ((i_index >> level) + 1) << level  # of the right sibling, which the sequence's end may cut short
        if ((i_index >> level) & 1) == 0 and i_first < s_count:
            s_more = tl.minimum(1 << level, s_count - i_first) - 1  # leaves before its last, all of them full
            s_rows = s_more * LEAF + _tokens(
                i_leaf - i_index + i_first + s_more, p_table, table_leaves, table_length, table_queries, table_keys
            )
            i_key = (level * key_slots + i_key_base + within(i_index, level)) * LEAF
            i_query = (level * query_slots + i_query_base + within(i_first, level)) * LEAF
            b_d_v = _key_level(
                b_d_v, m_own, m_own, t_query_rows, t_d_out, p_query_rows, p_key_rows, p_values, p_gate_query,
                p_gate_key, p_d_out, p_log_sum_exp, p_delta, p_d_key_rows, p_gate_column, i_row, s_own, i_key,
                i_query, i_row + (i_first - i_index) * LEAF, s_rows, s_gate_queries, s_gate_keys, i_head, H, False,
                GROUP, D, DV, KEYS, STAGES, QUERIES, PIECE
            )  # fmt: skip
    _store(p_d_values + i_head * DV, b_d_v, i_row, m_own, H * DV, DV, KEYS)


@triton.jit(do_not_specialize=COUNTS)
def lowest_level_backward_kernel(
    p_query_rows,  # times log2(e)
    p_key_rows,
    p_values,
    p_gate_key,  # base 2
    p_d_out,  # (T, HQ, DV)
    p_log_sum_exp_rows,  # float32, as output_rows_kernel writes both
    p_delta_rows,  # (HQ, row_slots, 64) float32
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_d_query_rows,  # out, like p_query_rows, of rows without log2(e): level 0 of it
    p_d_key_rows,  # out, like p_key_rows, likewise
    p_d_values,  # out (T, H, DV) float32: of level 0, zeros for leaves that are no keys there
    p_gate,  # out (HQ, row_slots, 64) float32: row sums less column sums of dS at level 0; None without gates
    num_levels,
    query_slots,
    key_slots,
    row_slots,
    H,
    token_heads,  # key heads of a token in p_values and p_d_out, of which these H are some
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """Gradients of a pair of leaves at level 0, where the right one's queries have the left one's keys: in one pass,
    for no other program has a share in them.
    """
    HQ = H * GROUP
    value_stride = token_heads * DV
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_row, s_rows, i_index, s_count, i_query_base, i_key_base, i_slot = place(
        i_leaf, p_table, table_leaves, table_length, table_queries, table_keys
    )
    if s_rows == 0:
        return
    o = tl.arange(0, LEAF)
    b_d_v = tl.zeros((LEAF, block_of(DV)), tl.float32)
    if i_index % 2 == 0 and i_index + 1 < s_count:
        s_queries = _tokens(i_leaf + 1, p_table, table_leaves, table_length, table_queries, table_keys)
        i_query = (i_query_base + i_index // 2) * LEAF
        i_key = (i_key_base + i_index // 2) * LEAF
        m_all = o < LEAF
        b_k = _load(p_key_rows + i_head * D, i_key, m_all, H * D, D, LEAF)
        b_v = _load(p_values + i_head * DV, i_row, m_all, value_stride, DV, LEAF)
        b_d_k = tl.zeros((LEAF, block_of(D)), tl.float32)
        for i_group in range(GROUP):
            i_query_head = i_head * GROUP + i_group
            o_number = gates_of_head(i_query_head, 1, row_slots) + (i_slot + 1) * LEAF + o
            o_lse = o_number
            b_q = _load(p_query_rows + i_query_head * D, i_query, m_all, HQ * D, D, LEAF)
            b_d_out = _load(p_d_out + i_query_head * DV, i_row + LEAF, o < s_queries, value_stride * GROUP, DV, LEAF)
            # What is subtracted from products here would, added to them, be what Triton has them begin with, and ptxas
            # more fences for.
            b_s = _dot(b_k, tl.trans(b_q))
            if p_gate is not None:
                o_lse = gates_of_head(i_query_head, num_levels, query_slots) + i_query + o
                b_gate = -tl.load(p_gate_key + gates_of_head(i_query_head, num_levels, key_slots) + i_key + o)
                b_s -= b_gate[:, None]
            b_log_sum_exp = -tl.load(p_log_sum_exp_rows + o_lse)
            b_delta = -tl.load(p_delta_rows + o_number)
            b_p = tl.exp2(b_s - b_log_sum_exp[None, :])
            b_d_p = _dot(b_v, tl.trans(b_d_out))
            b_d_v = _dot(b_p.to(b_d_out.dtype), b_d_out, b_d_v)
            b_d_s = b_p * (b_d_p - b_delta[None, :])
            if p_gate is not None:
                tl.store(p_gate + o_number, tl.sum(b_d_s, axis=0))
                tl.store(p_gate + o_number - LEAF, -tl.sum(b_d_s, axis=1))
            b_d_s = b_d_s.to(b_q.dtype)
            b_d_k = _dot(b_d_s, b_q, b_d_k)
            _store(p_d_query_rows + i_query_head * D, _dot(tl.trans(b_d_s), b_k), i_query, m_all, HQ * D, D, LEAF)
        _store(p_d_key_rows + i_head * D, b_d_k * (1 / LOG2_E), i_key, m_all, H * D, D, LEAF)
    elif i_index % 2 == 0:
        if p_gate is not None:
            for i_group in range(GROUP):
                o_number = gates_of_head(i_head * GROUP + i_group, 1, row_slots) + i_slot * LEAF + o
                tl.store(p_gate + o_number, tl.zeros((LEAF,), tl.float32))
    _store(p_d_values + i_head * DV, b_d_v, i_row, o < s_rows, H * DV, DV, LEAF)
