"""Triton kernels of the linear-cost stages: leaves, the tree of products, and the rows moved to every level's edges.

Notation of ops/leaf.py with one reflection a token. Y = A Z and U = A W are all that queries need of a leaf:

    logits = tril(Q K^T) - X Y       q_left = Q - X U       k_right = K - Y^T W       P = I - W^T U

Rows of a leaf are 64 tokens; where its sequence leaves one partly empty the rows are zeros, identity transitions.
Matrices of spans (D x D, float32) stand at tree nodes as leaf_table.py says.
"""

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import (
    LOG2_E,
    dot_exact_left,
    dot_exact_right,
    dot_half,
    dot_rows,
    dot_split,
    load_rows,
    node,
    store_rows,
    within,
)

ROWS = tl.constexpr(64)  # tokens a leaf: LEAF of leaf_table.py


@triton.jit
def _join_pairs(b_x, b_n, o, doubling: tl.constexpr, HALF: tl.constexpr):
    """Inverses of diagonal blocks of 2^doubling rows to those of twice the size: (D + C)^-1 = D^-1 - D^-1 C D^-1."""
    o_block = o // (1 << doubling)
    pair = (o_block[:, None] // 2 == o_block[None, :] // 2) & (o_block[:, None] > o_block[None, :])
    b_c = tl.where(pair, b_n, 0.0)
    return b_x - dot_split(dot_split(b_x, b_c, HALF), b_x, HALF)


@triton.jit
def _unit_lower_inverse(b_n, HALF: tl.constexpr):
    """(I + n)^-1 for a strictly lower triangular n (64, 64).

    The 2 x 2 diagonal blocks are inverted by a sign; then blocks join in pairs until one is left, up to 16 rows in a
    batch of four. A product of powers of n would take as many matrix products, but for repeated w with beta = 2 its
    terms grow to 10^18 and cancel.
    """
    o = tl.arange(0, 16)
    o_block = tl.arange(0, 4)
    diagonal = o_block[:, None, None, None] == o_block[None, None, :, None]
    b_blocks = tl.sum(tl.where(diagonal, tl.reshape(b_n, (4, 16, 4, 16)), 0.0), axis=2)
    b_x = tl.where(o[:, None] == o[None, :], 1.0, 0.0)[None, :, :]
    b_x = b_x - tl.where((o[:, None] // 2 == o[None, :] // 2)[None, :, :], b_blocks, 0.0)
    for doubling in tl.static_range(1, 4):
        b_x = _join_pairs(b_x, b_blocks, o, doubling, HALF)
    b_x = tl.reshape(tl.where(diagonal, b_x[:, :, None, :], 0.0), (ROWS, ROWS))
    for doubling in tl.static_range(4, 6):
        b_x = _join_pairs(b_x, b_n, tl.arange(0, ROWS), doubling, HALF)
    return b_x


@triton.jit
def leaf_transition_kernel(
    p_k,  # (T, H, D)
    p_w,  # (T, H, D)
    p_beta,  # (T, H)
    p_g,  # (T, HQ) or None
    p_start,
    p_length,
    p_inverse,  # out (N, H, 64, 64) float32: T^-1, for the backward pass; None to leave it out
    p_y,  # out (N, H, 64, 64) float32
    p_u,  # out (N, H, 64, D) float32
    p_k_right,  # out (N, H, 64, D) float32
    p_node,  # out (2 N, H, D, D) float32, leaf nodes
    p_gate_node,  # out (2 N, HQ) float32, leaf nodes, or None
    H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Y, U, k_right and P of one leaf and key head, and the leaf's sum of each query head's log gates."""
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    s_rows = tl.load(p_length + i_leaf)
    if s_rows == 0:
        return
    i_row = tl.load(p_start + i_leaf)
    o = tl.arange(0, ROWS)
    b_k = load_rows(p_k + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS)
    b_w = load_rows(p_w + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS).to(tl.float32)
    b_beta = tl.load(p_beta + (i_row + o).to(tl.int64) * H + i_head, mask=o < s_rows, other=0.0).to(tl.float32)
    strict = o[:, None] > o[None, :]
    b_n = tl.where(strict, b_beta[:, None] * dot_split(b_w, tl.trans(b_w), HALF), 0.0)
    b_inverse = _unit_lower_inverse(b_n, HALF)
    i_tile = (i_leaf * H + i_head).to(tl.int64) * ROWS
    if p_inverse is not None:
        store_rows(p_inverse + i_tile * ROWS, b_inverse, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
    b_a = b_inverse * b_beta[None, :]
    b_z = tl.where(strict, dot_exact_right(b_w, tl.trans(b_k), HALF), 0.0)
    b_y = dot_split(b_a, b_z, HALF)
    b_u = dot_split(b_a, b_w, HALF)
    store_rows(p_y + i_tile * ROWS, b_y, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
    store_rows(p_u + i_tile * D, b_u, 0, ROWS, D, D, BLOCK_D, ROWS)
    b_k_right = b_k.to(tl.float32) - dot_split(tl.trans(b_y), b_w, HALF)
    store_rows(p_k_right + i_tile * D, b_k_right, 0, ROWS, D, D, BLOCK_D, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    b_identity = tl.where(o_d[:, None] == o_d[None, :], 1.0, 0.0)
    p_matrix = p_node + ((2 * i_leaf).to(tl.int64) * H + i_head) * D * D
    store_rows(p_matrix, b_identity - dot_split(tl.trans(b_w), b_u, HALF), 0, D, D, D, BLOCK_D, BLOCK_D)
    if p_g is not None:
        for i_group in range(GROUP):
            i_query_head = i_head * GROUP + i_group
            b_g = tl.load(p_g + (i_row + o).to(tl.int64) * H * GROUP + i_query_head, mask=o < s_rows, other=0.0)
            tl.store(p_gate_node + (2 * i_leaf).to(tl.int64) * H * GROUP + i_query_head, tl.sum(b_g.to(tl.float32)))


@triton.jit
def tree_kernel(
    p_index,
    p_count,
    p_node,  # (2 N, H, D, D) float32: reads level, writes level + 1
    p_gate_node,  # (2 N, HQ) float32 or None, likewise
    level,
    H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    """P_parent = P_right P_left for the parents that something lies to the right of: no other is ever used."""
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_first = tl.load(p_index + i_leaf)
    s_span = 1 << level
    if (i_first & (2 * s_span - 1)) != 0 or i_first + 2 * s_span >= tl.load(p_count + i_leaf):
        return
    i_base = 2 * (i_leaf - i_first)
    i_left = (i_base + node(i_first, level)).to(tl.int64)
    i_right = (i_base + node(i_first + s_span, level)).to(tl.int64)
    i_parent = (i_base + node(i_first, level + 1)).to(tl.int64)
    b_left = load_rows(p_node + (i_left * H + i_head) * D * D, 0, D, D, D, BLOCK_D, BLOCK_D)
    b_right = load_rows(p_node + (i_right * H + i_head) * D * D, 0, D, D, D, BLOCK_D, BLOCK_D)
    p_parent = p_node + (i_parent * H + i_head) * D * D
    store_rows(p_parent, dot_split(b_right, b_left, HALF), 0, D, D, D, BLOCK_D, BLOCK_D)
    if p_gate_node is not None:
        for i_group in range(GROUP):
            i_query_head = i_head * GROUP + i_group
            s_left = tl.load(p_gate_node + i_left * H * GROUP + i_query_head)
            s_right = tl.load(p_gate_node + i_right * H * GROUP + i_query_head)
            tl.store(p_gate_node + i_parent * H * GROUP + i_query_head, s_left + s_right)


@triton.jit
def leaf_queries_kernel(
    p_q,  # (T, HQ, D)
    p_k,  # (T, H, D)
    p_v,  # (T, H, DV)
    p_w,  # (T, H, D)
    p_g,  # (T, HQ) or None
    p_y,  # (N, H, 64, 64) float32
    p_u,  # (N, H, 64, D) float32
    p_node,
    p_gate_node,
    p_start,
    p_length,
    p_index,
    p_query_base,
    p_out,  # out (T, HQ, DV): attention within the leaf; None to leave it out
    p_log_sum_exp,  # out (T, HQ) float32
    p_query_rows,  # out (levels, query_slots, 64, HQ, D), times scale
    p_gate_query,  # out (levels, query_slots, 64, HQ) float32 or None
    scale,
    H,
    query_slots,
    num_levels,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HALF: tl.constexpr,
):
    """Attention within one leaf for one query head, and its queries moved to the edges of all levels that use them.

    The moved row stays in float32 registers from level to level and is rounded once for each.
    """
    HQ = H * GROUP
    i_leaf = tl.program_id(0) // HQ
    i_query_head = tl.program_id(0) % HQ
    i_head = i_query_head // GROUP
    s_rows = tl.load(p_length + i_leaf)
    if s_rows == 0:
        return
    i_row = tl.load(p_start + i_leaf)
    o = tl.arange(0, ROWS)
    i_tile = (i_leaf * H + i_head).to(tl.int64) * ROWS
    b_q = load_rows(p_q + i_query_head * D, i_row, s_rows, HQ * D, D, BLOCK_D, ROWS)
    b_w = load_rows(p_w + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS).to(tl.float32)
    b_x = tl.where(o[:, None] >= o[None, :], dot_exact_left(b_q, tl.trans(b_w), HALF), 0.0)
    b_gate = tl.zeros((ROWS,), dtype=tl.float32)
    if p_g is not None:
        b_g = tl.load(p_g + (i_row + o).to(tl.int64) * HQ + i_query_head, mask=o < s_rows, other=0.0)
        b_gate = tl.cumsum(b_g.to(tl.float32), axis=0)
    if p_out is not None:
        b_k = load_rows(p_k + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS)
        b_v = load_rows(p_v + i_head * DV, i_row, s_rows, H * DV, DV, BLOCK_DV, ROWS)
        b_y = load_rows(p_y + i_tile * ROWS, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
        b_logits = (tl.dot(b_q, tl.trans(b_k), input_precision="ieee") - dot_split(b_x, b_y, HALF)) * scale
        b_logits += b_gate[:, None] - b_gate[None, :]
        b_logits = tl.where(o[:, None] >= o[None, :], b_logits, float("-inf"))
        b_max = tl.max(b_logits, axis=1)
        b_weights = tl.exp2((b_logits - b_max[:, None]) * LOG2_E)
        b_sum = tl.sum(b_weights, axis=1)
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, input_precision="ieee") / b_sum[:, None]
        store_rows(p_out + i_query_head * DV, b_out, i_row, s_rows, HQ * DV, DV, BLOCK_DV, ROWS)
        p_lse = p_log_sum_exp + (i_row + o).to(tl.int64) * HQ + i_query_head
        tl.store(p_lse, b_max + tl.log2(b_sum) / LOG2_E, mask=o < s_rows)

    b_u = load_rows(p_u + i_tile * D, 0, ROWS, D, D, BLOCK_D, ROWS)
    b_moved = (b_q.to(tl.float32) - dot_split(b_x, b_u, HALF)) * scale
    i_index = tl.load(p_index + i_leaf)
    i_base = tl.load(p_query_base + i_leaf)
    for level in range(num_levels):
        if ((i_index >> level) & 1) == 1:
            i_slot = (level * query_slots + i_base + within(i_index, level)).to(tl.int64) * ROWS
            store_rows(p_query_rows + i_query_head * D, b_moved, i_slot, ROWS, HQ * D, D, BLOCK_D, ROWS)
            if p_gate_query is not None:
                tl.store(p_gate_query + (i_slot + o) * HQ + i_query_head, b_gate)
            if (i_index >> (level + 1)) != 0:
                i_left = ((i_index >> level) - 1) << level
                i_node = (2 * (i_leaf - i_index) + node(i_left, level)).to(tl.int64)
                b_p = load_rows(p_node + (i_node * H + i_head) * D * D, 0, D, D, D, BLOCK_D, BLOCK_D)
                b_moved = dot_split(b_moved, b_p, HALF)
                if p_gate_query is not None:
                    b_gate += tl.load(p_gate_node + i_node * HQ + i_query_head)


@triton.jit
def key_transport_kernel(
    p_k_right,  # (N, H, 64, D) float32
    p_g,  # (T, HQ) or None
    p_node,
    p_gate_node,
    p_start,
    p_length,
    p_index,
    p_count,
    p_key_base,
    p_key_rows,  # out (levels, key_slots, 64, H, D)
    p_gate_key,  # out (levels, key_slots, 64, HQ) float32 or None
    H,
    key_slots,
    num_levels,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    """The keys of one leaf moved to the right edge of each span that has a right sibling, and the gates up to there."""
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_index = tl.load(p_index + i_leaf)
    s_count = tl.load(p_count + i_leaf)
    s_rows = tl.load(p_length + i_leaf)
    if s_rows < ROWS or i_index + 1 >= s_count:
        return
    i_row = tl.load(p_start + i_leaf)
    o = tl.arange(0, ROWS)
    o_group = tl.arange(0, BLOCK_GROUP)
    m_group = o_group < GROUP
    p_tile = p_k_right + (i_leaf * H + i_head).to(tl.int64) * ROWS * D
    b_moved = load_rows(p_tile, 0, ROWS, D, D, BLOCK_D, ROWS)
    b_gate = tl.zeros((ROWS, BLOCK_GROUP), dtype=tl.float32)
    o_query_head = i_head * GROUP + o_group
    if p_g is not None:
        p_gates = p_g + (i_row + o).to(tl.int64)[:, None] * H * GROUP + o_query_head[None, :]
        b_g = tl.load(p_gates, mask=m_group[None, :], other=0.0).to(tl.float32)
        b_gate = tl.sum(b_g, axis=0)[None, :] - tl.cumsum(b_g, axis=0)
    i_base = tl.load(p_key_base + i_leaf)
    for level in range(num_levels):
        i_right = ((i_index >> level) + 1) << level
        if ((i_index >> level) & 1) == 0 and i_right < s_count:
            i_slot = (level * key_slots + i_base + within(i_index, level)).to(tl.int64) * ROWS
            store_rows(p_key_rows + i_head * D, b_moved, i_slot, ROWS, H * D, D, BLOCK_D, ROWS)
            if p_gate_key is not None:
                p_gates = p_gate_key + (i_slot + o)[:, None] * H * GROUP + o_query_head[None, :]
                tl.store(p_gates, b_gate, mask=m_group[None, :])
            if i_right + (1 << level) < s_count:
                i_node = (2 * (i_leaf - i_index) + node(i_right, level)).to(tl.int64)
                b_p = load_rows(p_node + (i_node * H + i_head) * D * D, 0, D, D, D, BLOCK_D, BLOCK_D)
                b_moved = dot_rows(b_moved, tl.trans(b_p), HALF)
                if p_gate_key is not None:
                    p_span = p_gate_node + i_node * H * GROUP + o_query_head
                    b_gate += tl.load(p_span, mask=m_group, other=0.0)[None, :]


@triton.jit
def query_transport_backward_kernel(
    p_node,
    p_length,
    p_index,
    p_query_base,
    p_d_query_rows,  # (levels, query_slots, 64, HQ, D): in, dense gradients; out, gradients of the rows moved on
    p_d_q_left,  # out (N, HQ, 64, D)
    H,
    query_slots,
    num_levels,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Gradients of one leaf's moved queries pulled back to its left edge: x' = x P_left gives dx = dx' P_left^T.

    A level's slot is left holding dx', which the gradient of P_left needs.
    """
    HQ = H * GROUP
    i_leaf = tl.program_id(0) // HQ
    i_query_head = tl.program_id(0) % HQ
    i_head = i_query_head // GROUP
    s_rows = tl.load(p_length + i_leaf)
    i_index = tl.load(p_index + i_leaf)
    i_base = tl.load(p_query_base + i_leaf)
    p_rows = p_d_query_rows + i_query_head * D
    b_d = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for i in range(num_levels):
        level = num_levels - 1 - i
        if ((i_index >> level) & 1) == 1 and s_rows > 0:
            i_slot = (level * query_slots + i_base + within(i_index, level)).to(tl.int64) * ROWS
            b_row = load_rows(p_rows, i_slot, s_rows, HQ * D, D, BLOCK_D, ROWS).to(tl.float32)
            if (i_index >> (level + 1)) != 0:
                tl.debug_barrier()  # every thread has read the slot before any thread writes to it
                store_rows(p_rows, b_d, i_slot, ROWS, HQ * D, D, BLOCK_D, ROWS)
                i_left = ((i_index >> level) - 1) << level
                i_node = (2 * (i_leaf - i_index) + node(i_left, level)).to(tl.int64)
                b_p = load_rows(p_node + (i_node * H + i_head) * D * D, 0, D, D, D, BLOCK_D, BLOCK_D)
                b_row += dot_rows(b_d, tl.trans(b_p), HALF)
            b_d = b_row
    p_tile = p_d_q_left + (i_leaf * HQ + i_query_head).to(tl.int64) * ROWS * D
    store_rows(p_tile, b_d, 0, ROWS, D, D, BLOCK_D, ROWS)


@triton.jit
def key_transport_backward_kernel(
    p_node,
    p_length,
    p_index,
    p_count,
    p_key_base,
    p_d_key_rows,  # (levels, key_slots, 64, H, D): in, dense gradients; out, gradients of the rows moved on
    p_d_k_right,  # out (N, H, 64, D)
    H,
    key_slots,
    num_levels,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    """The same for keys: x' = x P_right^T gives dx = dx' P_right."""
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_index = tl.load(p_index + i_leaf)
    s_count = tl.load(p_count + i_leaf)
    s_rows = tl.load(p_length + i_leaf)
    i_base = tl.load(p_key_base + i_leaf)
    p_rows = p_d_key_rows + i_head * D
    b_d = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for i in range(num_levels):
        level = num_levels - 1 - i
        i_right = ((i_index >> level) + 1) << level
        if ((i_index >> level) & 1) == 0 and i_right < s_count and s_rows > 0:
            i_slot = (level * key_slots + i_base + within(i_index, level)).to(tl.int64) * ROWS
            b_row = load_rows(p_rows, i_slot, ROWS, H * D, D, BLOCK_D, ROWS).to(tl.float32)
            if i_right + (1 << level) < s_count:
                tl.debug_barrier()  # every thread has read the slot before any thread writes to it
                store_rows(p_rows, b_d, i_slot, ROWS, H * D, D, BLOCK_D, ROWS)
                i_node = (2 * (i_leaf - i_index) + node(i_right, level)).to(tl.int64)
                b_p = load_rows(p_node + (i_node * H + i_head) * D * D, 0, D, D, D, BLOCK_D, BLOCK_D)
                b_row += dot_split(b_d, b_p, HALF)
            b_d = b_row
    p_tile = p_d_k_right + (i_leaf * H + i_head).to(tl.int64) * ROWS * D
    store_rows(p_tile, b_d, 0, ROWS, D, D, BLOCK_D, ROWS)


@triton.jit
def tree_backward_kernel(
    p_index,
    p_count,
    p_query_base,
    p_key_base,
    p_query_rows,  # (levels, query_slots, 64, HQ, D)
    p_key_rows,  # (levels, key_slots, 64, H, D)
    p_d_query_rows,  # gradients of the rows moved on, as the transports' backward leaves them
    p_d_key_rows,
    p_node,
    p_d_node,  # (2 N, H, D, D) float32: reads level + 1, writes level
    level,
    H,
    query_slots,
    key_slots,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Gradients of both matrices of one pair: of P_left from the queries it moved, of P_right from the keys it moved,
    and of both from their product, P_parent = P_right P_left.
    """
    HQ = H * GROUP
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    i_first = tl.load(p_index + i_leaf)
    s_count = tl.load(p_count + i_leaf)
    s_span = 1 << level
    i_right = i_first + s_span
    if (i_first & (2 * s_span - 1)) != 0 or i_right >= s_count:
        return
    i_base = 2 * (i_leaf - i_first)
    i_left_node = ((i_base + node(i_first, level)).to(tl.int64) * H + i_head) * D * D
    i_right_node = ((i_base + node(i_right, level)).to(tl.int64) * H + i_head) * D * D
    i_parent_node = ((i_base + node(i_first, level + 1)).to(tl.int64) * H + i_head) * D * D
    parent_used = i_right + s_span < s_count
    # One matrix after the other: both at once do not fit in registers at D = 128.
    b_d = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    if i_first != 0:
        i_slot = (level * query_slots + tl.load(p_query_base + i_leaf) + within(i_right, level)).to(tl.int64) * ROWS
        for i_chunk in range(tl.minimum(s_span, s_count - i_right) * GROUP):
            i_row = i_slot + (i_chunk // GROUP) * ROWS
            o_head = (i_head * GROUP + i_chunk % GROUP) * D
            b_x = load_rows(p_query_rows + o_head, i_row, ROWS, HQ * D, D, BLOCK_D, ROWS)
            b_d_x = load_rows(p_d_query_rows + o_head, i_row, ROWS, HQ * D, D, BLOCK_D, ROWS)
            b_d = tl.dot(tl.trans(b_x), b_d_x, b_d, input_precision="ieee")
    if parent_used:
        b_d_parent = load_rows(p_d_node + i_parent_node, 0, D, D, D, BLOCK_D, BLOCK_D)
        b_right = load_rows(p_node + i_right_node, 0, D, D, D, BLOCK_D, BLOCK_D)
        b_d += dot_split(tl.trans(b_right), b_d_parent, HALF)
    store_rows(p_d_node + i_left_node, b_d, 0, D, D, D, BLOCK_D, BLOCK_D)
    b_d = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    if parent_used:
        i_slot = (level * key_slots + tl.load(p_key_base + i_leaf) + within(i_first, level)).to(tl.int64) * ROWS
        for i_chunk in range(s_span):
            i_row = i_slot + i_chunk * ROWS
            b_x = load_rows(p_key_rows + i_head * D, i_row, ROWS, H * D, D, BLOCK_D, ROWS)
            b_d_x = load_rows(p_d_key_rows + i_head * D, i_row, ROWS, H * D, D, BLOCK_D, ROWS)
            b_d = tl.dot(tl.trans(b_d_x), b_x, b_d, input_precision="ieee")
        b_d_parent = load_rows(p_d_node + i_parent_node, 0, D, D, D, BLOCK_D, BLOCK_D)
        b_left = load_rows(p_node + i_left_node, 0, D, D, D, BLOCK_D, BLOCK_D)
        b_d += dot_rows(b_d_parent, tl.trans(b_left), HALF)
    if i_right + s_span <= s_count:
        store_rows(p_d_node + i_right_node, b_d, 0, D, D, D, BLOCK_D, BLOCK_D)


@triton.jit
def leaf_queries_backward_kernel(
    p_q,  # (T, HQ, D)
    p_k,  # (T, H, D)
    p_v,  # (T, H, DV)
    p_w,  # (T, H, D)
    p_g,  # (T, HQ) or None
    p_y,  # (N, H, 64, 64) float32
    p_u,  # (N, H, 64, D) float32
    p_log_sum_exp,  # (T, HQ) float32, of the whole attention
    p_delta,  # (T, HQ) float32: rowsum(d_out * out)
    p_d_out,  # (T, HQ, DV)
    p_d_q_left,  # (N, HQ, 64, D)
    p_d_values,  # (T, H, DV) float32: from the other spans
    p_start,
    p_length,
    p_d_q,  # out (T, HQ, D)
    p_d_v,  # out (T, H, DV)
    p_d_y,  # out (N, H, 64, 64) float32
    p_d_u,  # out (N, H, 64, D) float32
    p_d_w,  # out (N, H, 64, D) float32: the queries' share
    p_d_k,  # out (N, H, 64, D) float32: the queries' share
    p_d_gate,  # (T, HQ) float32 or None: row sums less column sums of dS; in, of the other spans; out, of all
    scale,
    H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HALF: tl.constexpr,
):
    """From logits = tril(Q K^T) - X Y and q_left = Q - X U back to the queries, the values, Y, U and X's share of w."""
    HQ = H * GROUP
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    s_rows = tl.load(p_length + i_leaf)
    if s_rows == 0:
        return
    i_row = tl.load(p_start + i_leaf)
    o = tl.arange(0, ROWS)
    m_row = o < s_rows
    causal = o[:, None] >= o[None, :]
    i_tile = (i_leaf * H + i_head).to(tl.int64) * ROWS
    b_d_y = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    b_d_u = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_d_w = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_d_k = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_d_v = load_rows(p_d_values + i_head * DV, i_row, s_rows, H * DV, DV, BLOCK_DV, ROWS)
    for i_group in range(GROUP):
        i_query_head = i_head * GROUP + i_group
        o_row = (i_row + o).to(tl.int64) * HQ + i_query_head
        b_q = load_rows(p_q + i_query_head * D, i_row, s_rows, HQ * D, D, BLOCK_D, ROWS)
        b_w = load_rows(p_w + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS).to(tl.float32)
        b_x = tl.where(causal, dot_exact_left(b_q, tl.trans(b_w), HALF), 0.0)
        b_k = load_rows(p_k + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS)
        b_y = load_rows(p_y + i_tile * ROWS, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
        b_logits = (tl.dot(b_q, tl.trans(b_k), input_precision="ieee") - dot_split(b_x, b_y, HALF)) * scale
        if p_g is not None:
            b_gate = tl.cumsum(tl.load(p_g + o_row, mask=m_row, other=0.0).to(tl.float32), axis=0)
            b_logits += b_gate[:, None] - b_gate[None, :]
        b_log_sum_exp = tl.load(p_log_sum_exp + o_row, mask=m_row, other=0.0)
        b_weights = tl.where(causal & m_row[:, None], tl.exp2((b_logits - b_log_sum_exp[:, None]) * LOG2_E), 0.0)
        b_d_out = load_rows(p_d_out + i_query_head * DV, i_row, s_rows, HQ * DV, DV, BLOCK_DV, ROWS)
        b_d_v += dot_half(tl.trans(b_weights), b_d_out, HALF)
        b_v = load_rows(p_v + i_head * DV, i_row, s_rows, H * DV, DV, BLOCK_DV, ROWS)
        b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
        b_d_s = b_weights * (tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        if p_g is not None:
            b_d_gate = tl.load(p_d_gate + o_row, mask=m_row, other=0.0) + tl.sum(b_d_s, axis=1) - tl.sum(b_d_s, axis=0)
            tl.store(p_d_gate + o_row, b_d_gate, mask=m_row)
        b_d_s *= scale
        b_d_k += dot_half(tl.trans(b_d_s), b_q, HALF)
        p_tile = p_d_q_left + (i_leaf * HQ + i_query_head).to(tl.int64) * ROWS * D
        b_d_q_left = load_rows(p_tile, 0, ROWS, D, D, BLOCK_D, ROWS).to(tl.float32) * scale
        b_d_y -= dot_split(tl.trans(b_x), b_d_s, HALF)
        b_d_u -= dot_split(tl.trans(b_x), b_d_q_left, HALF)
        b_u = load_rows(p_u + i_tile * D, 0, ROWS, D, D, BLOCK_D, ROWS)
        b_d_x = dot_rows(b_d_s, tl.trans(b_y), HALF) + dot_rows(b_d_q_left, tl.trans(b_u), HALF)
        b_d_x = tl.where(causal, -b_d_x, 0.0)
        b_d_w += dot_exact_right(tl.trans(b_d_x), b_q, HALF)
        b_d_q = b_d_q_left + dot_half(b_d_s, b_k, HALF) + dot_split(b_d_x, b_w, HALF)
        store_rows(p_d_q + i_query_head * D, b_d_q, i_row, s_rows, HQ * D, D, BLOCK_D, ROWS)
    store_rows(p_d_v + i_head * DV, b_d_v, i_row, s_rows, H * DV, DV, BLOCK_DV, ROWS)
    store_rows(p_d_y + i_tile * ROWS, b_d_y, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
    store_rows(p_d_u + i_tile * D, b_d_u, 0, ROWS, D, D, BLOCK_D, ROWS)
    store_rows(p_d_w + i_tile * D, b_d_w, 0, ROWS, D, D, BLOCK_D, ROWS)
    store_rows(p_d_k + i_tile * D, b_d_k, 0, ROWS, D, D, BLOCK_D, ROWS)


@triton.jit
def leaf_transition_backward_kernel(
    p_k,  # (T, H, D)
    p_w,  # (T, H, D)
    p_beta,  # (T, H)
    p_inverse,  # (N, H, 64, 64) float32
    p_y,  # (N, H, 64, 64) float32
    p_u,  # (N, H, 64, D) float32
    p_d_y,  # (N, H, 64, 64) float32
    p_d_u,  # (N, H, 64, D) float32
    p_d_w_queries,  # (N, H, 64, D) float32: the queries' share
    p_d_k_queries,  # (N, H, 64, D) float32: the queries' share
    p_d_k_right,  # (N, H, 64, D)
    p_d_node,  # (2 N, H, D, D) float32
    p_start,
    p_length,
    p_index,
    p_count,
    p_d_k,  # out (T, H, D)
    p_d_w,  # out (T, H, D)
    p_d_beta,  # out (T, H)
    H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    """From Y, U, k_right = K - Y^T W and P = I - W^T U back to the keys, w and beta: leaf_backward in ops/leaf.py."""
    i_leaf = tl.program_id(0) // H
    i_head = tl.program_id(0) % H
    s_rows = tl.load(p_length + i_leaf)
    if s_rows == 0:
        return
    i_row = tl.load(p_start + i_leaf)
    o = tl.arange(0, ROWS)
    m_row = o < s_rows
    strict = o[:, None] > o[None, :]
    i_tile = (i_leaf * H + i_head).to(tl.int64) * ROWS
    b_w = load_rows(p_w + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS).to(tl.float32)
    b_d_y = load_rows(p_d_y + i_tile * ROWS, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
    b_d_u = load_rows(p_d_u + i_tile * D, 0, ROWS, D, D, BLOCK_D, ROWS)
    b_d_w = load_rows(p_d_w_queries + i_tile * D, 0, ROWS, D, D, BLOCK_D, ROWS)
    b_d_k = load_rows(p_d_k_queries + i_tile * D, 0, ROWS, D, D, BLOCK_D, ROWS)
    if tl.load(p_index + i_leaf) + 1 < tl.load(p_count + i_leaf):  # else nobody uses k_right and P
        b_d_k_right = load_rows(p_d_k_right + i_tile * D, 0, ROWS, D, D, BLOCK_D, ROWS).to(tl.float32)
        b_d_k += b_d_k_right
        b_d_y -= dot_rows(b_w, tl.trans(b_d_k_right), HALF)
        b_y = load_rows(p_y + i_tile * ROWS, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
        b_d_w -= dot_rows(b_y, b_d_k_right, HALF)
        b_d_p = load_rows(p_d_node + ((2 * i_leaf).to(tl.int64) * H + i_head) * D * D, 0, D, D, D, BLOCK_D, BLOCK_D)
        b_d_u -= dot_rows(b_w, b_d_p, HALF)
        b_u = load_rows(p_u + i_tile * D, 0, ROWS, D, D, BLOCK_D, ROWS)
        b_d_w -= dot_rows(b_u, tl.trans(b_d_p), HALF)
    o_beta = (i_row + o).to(tl.int64) * H + i_head
    b_beta = tl.load(p_beta + o_beta, mask=m_row, other=0.0).to(tl.float32)
    b_inverse = load_rows(p_inverse + i_tile * ROWS, 0, ROWS, ROWS, ROWS, ROWS, ROWS)
    b_a = b_inverse * b_beta[None, :]
    b_d_w += dot_rows(tl.trans(b_a), b_d_u, HALF)
    b_d_z = tl.where(strict, dot_rows(tl.trans(b_a), b_d_y, HALF), 0.0)
    b_d_k += dot_rows(tl.trans(b_d_z), b_w, HALF)
    store_rows(p_d_k + i_head * D, b_d_k, i_row, s_rows, H * D, D, BLOCK_D, ROWS)
    b_k = load_rows(p_k + i_head * D, i_row, s_rows, H * D, D, BLOCK_D, ROWS)
    b_d_w += dot_exact_right(b_d_z, b_k, HALF)
    b_z = tl.where(strict, dot_exact_right(b_w, tl.trans(b_k), HALF), 0.0)
    b_d_a = dot_rows(b_d_y, tl.trans(b_z), HALF) + dot_rows(b_d_u, tl.trans(b_w), HALF)
    b_d_t = dot_split(tl.trans(b_inverse), b_d_a, HALF)
    b_d_scaled_gram = tl.where(strict, -dot_split(b_d_t, tl.trans(b_a), HALF), 0.0)  # of D W W^T below the diagonal
    b_scaled = dot_split(b_d_scaled_gram, b_w, HALF)
    b_d_beta = tl.sum(tl.where(o[:, None] == o[None, :], b_d_t, 0.0), axis=1) + tl.sum(b_scaled * b_w, axis=1)
    tl.store(p_d_beta + o_beta, b_d_beta, mask=m_row)
    b_d_w += b_beta[:, None] * b_scaled
    b_d_w += dot_split(tl.trans(b_d_scaled_gram * b_beta[:, None]), b_w, HALF)
    store_rows(p_d_w + i_head * D, b_d_w, i_row, s_rows, H * D, D, BLOCK_D, ROWS)
