"""Attention between sibling spans on Hopper, forward: all levels in one warp-specialised kernel.

A piece of the work is one pair of leaves, 128 rows, and one query head; a program, one on each multiprocessor, takes
one after another. A producer warp group has the copy engine (TMA) fetch the pair's queries, and for each level the
matrix that brings them there and tiles of 128 keys and values; two consumer warp groups, a leaf of 64 rows each, move
their queries from level to level and compute. From level 1 on both leaves have the same left siblings, complete ones,
so no tile needs a mask. Level 0, where the right leaf of the pair meets the left one, is a step of its own for the
right leaf's group, behind the others, with the queries as they came.

A multiprocessor issues an instruction or feeds its matrix units, hardly both at a time (docs/hopper.md), so the loop
has as few instructions a logit as may be. Query rows and gates are times log2(e): a weight is exp2 of a logit. Without
gates and in bfloat16 it is beside nothing, not even a maximum. With gates it is beside the log-sum-exp that the row has
of its own leaf, of which that, the row's gate and the key's are one number, where the product begins to add up; in
float16, which has few exponents, beside the same. Nothing is rescaled. Where a log-sum-exp or a sum is too far out for
that, the program goes through the piece once more, with the maximum.

Order of work in a consumer, for tile i: the logits Q K_i^T and the product P_{i-1} V_{i-1} are issued together, the
softmax of tile i runs under the latter. The wait for the next keys stands between softmax and the wait for the product:
without a barrier there ptxas moves the latter wait above the softmax, and nothing overlaps. Two tokens make the
consumers take turns, so that one's softmax runs under the other's products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from path_attention.ops.kernels.hopper.gluon_names import async_load, async_store, reinterpret, thread_barrier
from path_attention.ops.kernels.tiles import COUNTS

LOG2_E = gl.constexpr(1.4426950408889634)
LEAF = gl.constexpr(64)
PAIR = gl.constexpr(128)  # rows of a program, and of a tile of keys
# Sums of weights are below these, or a program begins anew: all weights are numbers of their type then, and their
# products with values as far below the largest float32 as bfloat16 values may be.
LARGEST_SUM = gl.constexpr(2.0**100)
LARGEST_SUM_FLOAT16 = gl.constexpr(2.0**15)
# Beside nothing, the weights of a row's own leaf sum to 2^-64 at least: what float32 rounds to zero is less than 2^-62
# of them. And to 2^64 at most, 2^36 below LARGEST_SUM.
LARGEST_LOG = gl.constexpr(64.0)
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # of a number that all threads have
NUMBERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def within(i_leaf, level):
    """``within`` of tiles.py."""
    return ((i_leaf >> (level + 1)) << level) | (i_leaf & ((1 << level) - 1))


@gluon.jit
def _node(i_first, level):
    """``node`` of tiles.py."""
    return 2 * i_first + (1 << level) - 1


@gluon.jit
def gates_of_head(i_query_head, num_levels, slots):
    """``gates_of_head`` of tiles.py."""
    return gl.cast(i_query_head, gl.int64) * (num_levels * slots * LEAF)


@gluon.jit
def turn_and_head(i, num_turns, num_groups, s_each, s_section):
    """Turn, sequence and head of piece i of the work; the head is one of s_each of the sequence.

    Pieces go in sections of s_section of the num_groups heads of all sequences, and turn by turn within a section.
    """
    i_section = i // (s_section * num_turns)
    s_heads = gl.minimum(s_section, num_groups - i_section * s_section)
    i -= i_section * s_section * num_turns
    i_head_of_all = i_section * s_section + i % s_heads
    i_sequence = i_head_of_all // s_each
    return i // s_heads, i_sequence, i_head_of_all - i_sequence * s_each


@gluon.jit
def place_of_pair(i_turn, i_pairs, p_table, table_leaves, table_length, table_queries, table_keys):
    """First leaf's row, tokens of both leaves, index of the first, its sequence's leaves, first query and key slots.

    Without a table turn and sequence say which pair, the one with the most work first; with one the turn is a leaf, and
    leaves at odd indices have no tokens here.
    """
    if p_table is None:
        i_index = 2 * ((table_leaves + 1) // 2 - 1 - i_turn)
        s_tokens = gl.minimum(PAIR, table_length - i_index * LEAF)
        i_row = i_pairs * table_length + i_index * LEAF
        return i_row, s_tokens, i_index, table_leaves, i_pairs * table_queries, i_pairs * table_keys
    else:
        p = p_table + i_turn * 8  # COLUMNS of leaf_table.py
        i_index = gl.load(p + 2)
        s_count = gl.load(p + 3)
        s_tokens = gl.load(p + 1)
        if i_index + 1 < s_count:
            s_tokens += gl.load(p + 9)
        s_tokens = gl.where(i_index % 2 == 0, s_tokens, 0)
        return gl.load(p), s_tokens, i_index, s_count, gl.load(p + 4), gl.load(p + 5)


@gluon.jit
def _advance(i_stage, s_phase, STAGES: gl.constexpr):
    i_stage += 1
    is_round = i_stage == STAGES
    return gl.where(is_round, 0, i_stage), gl.where(is_round, s_phase ^ 1, s_phase)


@gluon.jit
def _beginning(s_phase):
    """Where a partition is in the rings of keys, of values and of queries, each with the phase to be waited for, and
    which buffer has a level's gates of queries and the place where its queries are kept.
    """
    i_first = gl.to_tensor(0)
    s_phase = gl.to_tensor(s_phase)
    return (i_first, s_phase, i_first, s_phase, i_first, s_phase, i_first)


@gluon.jit
def _uniform(b_x):
    """The number b_x of all threads, int32, as one of the warp: what is computed from it needs no register a thread,
    and ptxas knows that all threads go the same way.
    """
    b_x = gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [b_x], gl.int32, True, 1)
    return gl.max(b_x, 0)


@gluon.jit
def _verdict(s_verdict):
    """Whether one of the consumers, which have both said so, wants to begin anew."""
    return _uniform(s_verdict.load(ONE)) != 0


@gluon.jit
def _hand_on(s_piece, piece_full, piece_empty, s_phase, s_tokens, i_row, i_index, i_query_head):
    """The producer tells both consumers which piece of the work comes next; without tokens none does."""
    mbarrier.wait(piece_empty, s_phase)
    s_piece.slice(0, 1, 0).store(gl.full([1], s_tokens, gl.int32, ONE))
    s_piece.slice(1, 1, 0).store(gl.full([1], i_row, gl.int32, ONE))
    s_piece.slice(2, 1, 0).store(gl.full([1], i_index, gl.int32, ONE))
    s_piece.slice(3, 1, 0).store(gl.full([1], i_query_head, gl.int32, ONE))
    mbarrier.arrive(piece_full, count=1)


@gluon.jit
def _next_piece(s_piece, piece_full, piece_empty, s_phase):
    """What the producer tells a consumer, in its order."""
    mbarrier.wait(piece_full, s_phase)
    s_tokens = _uniform(s_piece.slice(0, 1, 0).load(ONE))
    i_row = _uniform(s_piece.slice(1, 1, 0).load(ONE))
    i_index = _uniform(s_piece.slice(2, 1, 0).load(ONE))
    i_query_head = _uniform(s_piece.slice(3, 1, 0).load(ONE))
    mbarrier.arrive(piece_empty, count=1)
    return s_tokens, i_row, i_index, i_query_head


@gluon.jit
def _produce(
    t_q_left, t_nodes, t_key_rows, t_values, t_gate_query, t_gate_key, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place,
    s_verdict, s_piece, q_full, q_empty, k_full, k_empty, v_full, v_empty, verdict, piece_full, piece_empty, p_next,
    p_table, table_leaves, table_length, table_queries, table_keys, num_turns, num_groups, HQ, s_section, num_levels,
    query_slots, key_slots, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, KEEPS: gl.constexpr
):  # fmt: skip
    """Tiles of one piece after another, and once more if a consumer asks for it."""
    at = _beginning(1)
    s_verdict_phase = gl.to_tensor(0)
    s_piece_phase = gl.to_tensor(1)
    s_pieces = num_turns * num_groups
    i_piece = gl.program_id(0)
    while i_piece < s_pieces:
        i_turn, i_sequence, i_query_head = turn_and_head(i_piece, num_turns, num_groups, HQ, s_section)
        i_row, s_tokens, i_index, _, i_query_base, i_key_base = place_of_pair(
            i_turn, i_sequence, p_table, table_leaves, table_length, table_queries, table_keys
        )
        i_leaf = _number_of_leaf(i_turn, i_sequence, i_index, p_table, table_leaves)
        has_right = gl.where(s_tokens > LEAF, 1, 0)
        is_any = (s_tokens > 0) & (i_index + has_right > 0)  # else nothing lies to the left of it
        if is_any:
            _hand_on(s_piece, piece_full, piece_empty, s_piece_phase, s_tokens, i_row, i_index, i_query_head)
            s_piece_phase ^= 1
            at = _produce_tiles(
                t_q_left, t_nodes, t_key_rows, t_values, t_gate_query, t_gate_key, s_q, s_k, s_v, s_gate_q, s_gate_k,
                s_place, q_full, q_empty, k_full, k_empty, v_full, v_empty, at, i_row, i_leaf, i_index, has_right,
                i_query_base, i_key_base, i_query_head, HQ, num_levels, query_slots, key_slots, GROUP, D, DV, STAGES,
                GATED, KEEPS
            )  # fmt: skip
        # Asked for while the consumers still have tiles.
        i_piece = gl.num_programs(0) + gl.atomic_add(p_next, 1, sem="relaxed")
        if is_any & (i_index > 0):
            mbarrier.wait(verdict, s_verdict_phase)
            if _verdict(s_verdict.index(s_verdict_phase)):
                at = _produce_tiles(
                    t_q_left, t_nodes, t_key_rows, t_values, t_gate_query, t_gate_key, s_q, s_k, s_v, s_gate_q,
                    s_gate_k, s_place, q_full, q_empty, k_full, k_empty, v_full, v_empty, at, i_row, i_leaf, i_index,
                    has_right, i_query_base, i_key_base, i_query_head, HQ, num_levels, query_slots, key_slots, GROUP, D,
                    DV, STAGES, GATED, KEEPS
                )  # fmt: skip
            s_verdict_phase ^= 1
    _hand_on(s_piece, piece_full, piece_empty, s_piece_phase, 0, 0, 0, 0)


@gluon.jit
def _number_of_leaf(i_turn, i_sequence, i_index, p_table, table_leaves):
    """Of the pair's first leaf, among those of all sequences."""
    if p_table is None:
        return i_sequence * table_leaves + i_index
    else:
        return i_turn


@gluon.jit
def _produce_tiles(
    t_q_left, t_nodes, t_key_rows, t_values, t_gate_query, t_gate_key, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, at, i_row, i_leaf, i_index, has_right, i_query_base, i_key_base,
    i_query_head, HQ, num_levels, query_slots, key_slots, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, GATED: gl.constexpr, KEEPS: gl.constexpr
):  # fmt: skip
    """The pair's queries as its leaves have them. Then, for every level that it has a left sibling at, level 1 first,
    the matrix by which queries come to that level, in a stage of the keys, and that sibling's keys and values. Level 0
    last.
    """
    i_stage, s_phase, i_v, s_v_phase, i_q, s_q_phase, i_gates = at
    GATES: gl.constexpr = PAIR * 4 if GATED else 0  # bytes that come with a tile
    H = HQ // GROUP
    i_head = i_query_head // GROUP
    i_query_column = i_query_head * D
    i_key_column = i_head * D
    i_value_column = i_head * DV
    i_leaf_row = i_leaf * LEAF
    if i_index > 0:
        mbarrier.wait(q_empty.index(i_q), s_q_phase)
        mbarrier.expect(q_full.index(i_q), PAIR * D * 2)
        async_load(t_q_left, [i_leaf_row, i_query_column], q_full.index(i_q), s_q.index(2 * i_q))
        # Without a right leaf those of the left one: nobody reads what becomes of them.
        i_right_row = i_leaf_row + has_right * LEAF
        async_load(t_q_left, [i_right_row, i_query_column], q_full.index(i_q), s_q.index(2 * i_q + 1))
        i_q, s_q_phase = _advance(i_q, s_q_phase, 2)
    i_node = 2 * i_leaf  # first the left leaf's, by which the right one's queries move
    for level in range(1, num_levels):
        if ((i_index >> level) & 1) == 1:
            i_first = ((i_index >> level) - 1) << level
            i_query_row = (level * query_slots + i_query_base + within(i_index, level)) * LEAF
            mbarrier.wait(k_empty.index(i_stage), s_phase)
            if KEEPS:
                s_place.index(i_gates).store(gl.full([1], i_query_row, gl.int32, ONE))
            mbarrier.expect(k_full.index(i_stage), D * D * 2 + GATES)
            s_matrix = _matrix_of(s_k.index(i_stage))
            async_load(t_nodes, [(i_node * H + i_head) * D, 0], k_full.index(i_stage), s_matrix)
            i_node = 2 * (i_leaf - i_index) + _node(i_first, level)
            if GATED:
                for i_side in gl.static_range(2):
                    async_load(
                        t_gate_query, [i_query_head, i_query_row + i_side * LEAF], k_full.index(i_stage),
                        s_gate_q.index(2 * i_gates + i_side)
                    )  # fmt: skip
            i_gates ^= 1
            i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
            i_key_row = (level * key_slots + i_key_base + within(i_first, level)) * LEAF
            i_value_row = i_row - (i_index - i_first) * LEAF
            for i in range(1 << (level - 1)):
                mbarrier.wait(k_empty.index(i_stage), s_phase)
                mbarrier.expect(k_full.index(i_stage), PAIR * D * 2 + GATES)
                async_load(t_key_rows, [i_key_row + i * PAIR, i_key_column], k_full.index(i_stage), s_k.index(i_stage))
                if GATED:
                    async_load(
                        t_gate_key, [i_query_head, i_key_row + i * PAIR], k_full.index(i_stage), s_gate_k.index(i_stage)
                    )
                mbarrier.wait(v_empty.index(i_v), s_v_phase)
                mbarrier.expect(v_full.index(i_v), PAIR * DV * 2)
                async_load(t_values, [i_value_row + i * PAIR, i_value_column], v_full.index(i_v), s_v.index(i_v))
                i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
                i_v, s_v_phase = _advance(i_v, s_v_phase, STAGES)
    if has_right == 1:
        # Whole tiles, of which the first leaf's rows count.
        i_query_row = (i_query_base + i_index // 2) * LEAF
        i_key_row = (i_key_base + i_index // 2) * LEAF
        mbarrier.wait(q_empty.index(i_q), s_q_phase)
        if KEEPS:
            s_place.index(i_gates).store(gl.full([1], i_query_row, gl.int32, ONE))
        mbarrier.expect(q_full.index(i_q), LEAF * D * 2 + GATES // 2)
        async_load(t_q_left, [i_leaf_row + LEAF, i_query_column], q_full.index(i_q), s_q.index(2 * i_q + 1))
        mbarrier.wait(k_empty.index(i_stage), s_phase)
        mbarrier.expect(k_full.index(i_stage), PAIR * D * 2 + GATES)
        async_load(t_key_rows, [i_key_row, i_key_column], k_full.index(i_stage), s_k.index(i_stage))
        if GATED:
            async_load(t_gate_query, [i_query_head, i_query_row], q_full.index(i_q), s_gate_q.index(2 * i_gates + 1))
            async_load(t_gate_key, [i_query_head, i_key_row], k_full.index(i_stage), s_gate_k.index(i_stage))
        mbarrier.wait(v_empty.index(i_v), s_v_phase)
        mbarrier.expect(v_full.index(i_v), PAIR * DV * 2)
        async_load(t_values, [i_row, i_value_column], v_full.index(i_v), s_v.index(i_v))
        i_q, s_q_phase = _advance(i_q, s_q_phase, 2)
        i_gates ^= 1
        i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
        i_v, s_v_phase = _advance(i_v, s_v_phase, STAGES)
    return (i_stage, s_phase, i_v, s_v_phase, i_q, s_q_phase, i_gates)


@gluon.jit
def _matrix_of(s_k):
    """A matrix in the place of a tile of keys, whose columns are as many."""
    D: gl.constexpr = s_k.shape[1]
    return reinterpret(s_k, s_k.dtype, [D, D], s_k.layout)


@gluon.jit
def _move(s_q, s_matrix):
    """A leaf's rows, in place, times the matrix P of a span: a warp's rows are its own."""
    D: gl.constexpr = s_q.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_rows = s_q.load(gl.DotOperandLayout(0, L, 2))
    for i in gl.static_range(D // 64):
        b_zero = gl.full([LEAF, 64], 0.0, gl.float32, L)
        b_moved = warpgroup_mma(b_rows, s_matrix.slice(i * 64, 64, 1), b_zero, use_acc=False)
        s_q.slice(i * 64, 64, 1).store(b_moved.to(s_q.dtype))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _bias(s_gate_q, S: gl.constexpr, GATED: gl.constexpr):
    """The gates of a leaf's rows, of logits in layout S."""
    b_bias = gl.full([LEAF], 0.0, gl.float32, gl.SliceLayout(1, S))
    if GATED:
        b_bias = gl.max(s_gate_q.permute((1, 0)).load(S), 1)  # of one column
    return b_bias


@gluon.jit
def _softmax(b_s, b_bias, s_gate_k, b_max, b_sum, KEYS: gl.constexpr, S: gl.constexpr, UNIT: gl.constexpr,
             GATED: gl.constexpr):  # fmt: skip
    """Weights of a tile of logits of KEYS keys, what earlier sums are multiplied by, and the new maximum and sum.
    UNIT turns logits, gates and maxima to base 2.
    """
    if GATED:
        b_s += s_gate_k.slice(0, KEYS, 1).load(S)
        b_new = gl.maximum(b_max, gl.max(b_s, 1) + b_bias)
        b_shift = (b_new - b_bias) * UNIT
        b_decay = gl.exp2((b_max - b_new) * UNIT)
    else:
        b_new = gl.maximum(b_max, gl.max(b_s, 1))
        b_shift = b_new * UNIT
        b_decay = gl.exp2(b_max * UNIT - b_shift)
    b_p = gl.exp2(b_s * UNIT - b_shift[:, None])
    return b_p, b_decay, b_new, b_sum * b_decay + gl.sum(b_p, 1)


@gluon.jit
def _in_pairs(b_x, dtype: gl.constexpr):
    """b_x in half precision, two numbers an instruction and a register: converted one by one, those that wait for the
    next round of a loop change places in their registers there, an instruction each.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [b_x], gl.bfloat16, True, 2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [b_x], gl.float16, True, 2)


@gluon.jit
def _attend_left_leaf(
    b_max, b_sum, b_o, s_q, s_k, s_v, s_gate_q, s_gate_k, v_full, s_phase, DV: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Level 0: the pair's right leaf goes on over the left one's keys, the first rows of a tile. All in base 2."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LEAF, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])  # noqa: E741
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    OF_TILES: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIR, 16]))
    b_zero = gl.full([LEAF, LEAF], 0.0, gl.float32, S)
    b_s = warpgroup_mma(s_q, s_k.slice(0, LEAF, 0).permute((1, 0)), b_zero, use_acc=False)
    b_max = gl.convert_layout(b_max, ROW)
    b_sum = gl.convert_layout(b_sum, ROW)
    b_bias = _bias(s_gate_q, S, GATED)
    b_p, b_decay, b_max, b_sum = _softmax(b_s, b_bias, s_gate_k, b_max, b_sum, LEAF, S, 1.0, GATED)
    b_o = b_o * gl.convert_layout(b_decay, gl.SliceLayout(1, O))[:, None]
    b_weights = gl.convert_layout(b_p.to(s_v.dtype), gl.DotOperandLayout(0, O, 2))
    mbarrier.wait(v_full, s_phase)
    b_o = warpgroup_mma(b_weights, s_v.slice(0, LEAF, 0), b_o)
    return gl.convert_layout(b_max, OF_TILES), gl.convert_layout(b_sum, OF_TILES), b_o


@gluon.jit
def _addend(b_zero, b_max, b_bias, s_gate_k, S: gl.constexpr, BEGUN: gl.constexpr):
    """What logits are added to if that is BEGUN, for weights beside b_max: a row's gate and a key's."""
    if BEGUN:
        return s_gate_k.slice(0, PAIR, 1).load(S) - (b_max - b_bias)[:, None]
    else:
        return b_zero


@gluon.jit
def _next_keys(k_full, k_empty, i_stage, s_phase, STAGES: gl.constexpr):
    """Gives back a matrix's stage and waits for the level's first keys; returns their stage and its phase."""
    mbarrier.arrive(k_empty.index(i_stage), count=1)
    i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
    mbarrier.wait(k_full.index(i_stage), s_phase)
    return i_stage, s_phase


@gluon.jit
def _keep(t_query_rows, s_q, s_place, i_gates, i_side, i_query_head):
    """A leaf's queries as they are at a level to where they are kept: rows of a pair are one behind the other, but at
    level 0, whose slots right leaves have alone, i_side is 0 for these.
    """
    i_row = _uniform(s_place.index(i_gates).load(ONE)) + i_side * LEAF
    async_store(t_query_rows, [i_row, i_query_head * s_q.shape[1]], s_q)


@gluon.jit
def _attend_left_spans(
    b_max, b_sum, b_own, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, turn, at, s_turn, s_tiles, has_right, i_side, i_query_head, C: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr, GATED: gl.constexpr, ONE_LEVEL: gl.constexpr, FIXED: gl.constexpr,
    BARE: gl.constexpr
):  # fmt: skip
    """Leaf i_side goes on from its own output b_own, as it was loaded, over s_tiles > 0 tiles of keys from level 1 on;
    FIXED: beside b_max as it is, or BARE: beside nothing, a maximum of zero. Also returns where the next tiles are, and
    the next turn.
    """
    i_stage, s_phase, i_v, s_v_phase, i_q, s_q_phase, i_gates = at
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIR, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    dtype: gl.constexpr = s_v.dtype
    UNIT: gl.constexpr = LOG2_E if ONE_LEVEL else 1.0  # pair_kernels.py has natural logarithms
    KEEPS: gl.constexpr = t_query_rows is not None
    BEGUN: gl.constexpr = FIXED and GATED  # products begin with what is beside their logits
    b_zero = gl.full([LEAF, PAIR], 0.0, gl.float32, S)
    # Bit b of the number of tiles is a level that has 2^b of them, lowest first.
    s_bits = s_tiles & (s_tiles - 1)
    if ONE_LEVEL:  # has all of them
        s_bits *= 0
    s_left = s_tiles - s_bits - 1  # tiles of this level after the current one
    s_own_q = s_q.index(2 * i_q + i_side)
    mbarrier.wait(q_full.index(i_q), s_q_phase)
    mbarrier.wait(k_full.index(i_stage), s_phase)
    if not ONE_LEVEL:
        if has_right & (i_side == 1):
            _move(s_own_q, _matrix_of(s_k.index(i_stage)))
        if KEEPS:
            _keep(t_query_rows, s_own_q, s_place, i_gates, i_side, i_query_head)
        i_stage, s_phase = _next_keys(k_full, k_empty, i_stage, s_phase, STAGES)
    b_bias = _bias(s_gate_q.index(2 * i_gates + i_side), S, GATED)
    b_first = _addend(b_zero, b_max, b_bias, s_gate_k.index(i_stage), S, BEGUN)
    b_s = warpgroup_mma(s_own_q, s_k.index(i_stage).permute((1, 0)), b_first, use_acc=BEGUN)
    b_decay = b_sum
    if BARE:
        b_decay = gl.exp2(b_max)
        b_max = b_max * 0.0
        b_sum = b_decay
    if FIXED:
        b_p = gl.exp2(b_s if BARE or GATED else b_s - b_max[:, None])
        b_sum = b_sum + gl.sum(b_p, 1)
    else:
        b_p, b_decay, b_max, b_sum = _softmax(b_s, b_bias, s_gate_k.index(i_stage), b_max, b_sum, PAIR, S, UNIT, GATED)
    # Behind the first tile, under which it comes.
    b_o = gl.convert_layout(b_own, O).to(gl.float32)
    if BARE or not FIXED:
        b_o = b_o * gl.convert_layout(b_decay, gl.SliceLayout(1, O))[:, None]
    mbarrier.arrive(k_empty.index(i_stage), count=1)
    b_weights = gl.convert_layout(_in_pairs(b_p, dtype), P)
    i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
    mbarrier.wait(k_full.index(i_stage), s_phase, pred=s_tiles > 1)
    for i in range(1, s_tiles):
        if s_left == 0:
            s_next = s_bits & (s_bits - 1)
            s_left = s_bits - s_next
            s_bits = s_next
            if not ONE_LEVEL:
                i_gates ^= 1
                if KEEPS:  # those of the level before have been read
                    tma.store_wait(0)
                    thread_barrier()
                _move(s_own_q, _matrix_of(s_k.index(i_stage)))
                if KEEPS:
                    _keep(t_query_rows, s_own_q, s_place, i_gates, i_side, i_query_head)
                i_stage, s_phase = _next_keys(k_full, k_empty, i_stage, s_phase, STAGES)
        s_left -= 1
        b_bias = _bias(s_gate_q.index(2 * i_gates + i_side), S, GATED)
        b_first = _addend(b_zero, b_max, b_bias, s_gate_k.index(i_stage), S, BEGUN)
        if TURNS:
            mbarrier.wait(turn.index(C), s_turn)
        t_s = warpgroup_mma(s_own_q, s_k.index(i_stage).permute((1, 0)), b_first, use_acc=BEGUN, is_async=True)
        mbarrier.wait(v_full.index(i_v), s_v_phase)
        t_o = warpgroup_mma(b_weights, s_v.index(i_v), b_o, is_async=True)
        if TURNS:
            mbarrier.arrive(turn.index(1 - C), count=1)
            s_turn ^= 1
        b_s = warpgroup_mma_wait(1, (t_s,))
        if FIXED:
            mbarrier.arrive(k_empty.index(i_stage), count=1)
            b_p = gl.exp2(b_s if BARE or GATED else b_s - b_max[:, None])
            b_sum += gl.sum(b_p, 1)
        else:
            b_p, b_decay, b_max, b_sum = _softmax(
                b_s, b_bias, s_gate_k.index(i_stage), b_max, b_sum, PAIR, S, UNIT, GATED
            )
            mbarrier.arrive(k_empty.index(i_stage), count=1)
        i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
        mbarrier.wait(k_full.index(i_stage), s_phase, pred=i + 1 < s_tiles)
        b_o, _ = warpgroup_mma_wait(0, (t_o, b_weights))
        mbarrier.arrive(v_empty.index(i_v), count=1)
        i_v, s_v_phase = _advance(i_v, s_v_phase, STAGES)
        if not FIXED:
            b_o = b_o * gl.convert_layout(b_decay, gl.SliceLayout(1, O))[:, None]
        b_weights = gl.convert_layout(_in_pairs(b_p, dtype), P)
    if KEEPS:
        tma.store_wait(0)
    mbarrier.arrive(q_empty.index(i_q), count=1)
    mbarrier.wait(v_full.index(i_v), s_v_phase)
    b_o = warpgroup_mma(b_weights, s_v.index(i_v), b_o)
    mbarrier.arrive(v_empty.index(i_v), count=1)
    i_v, s_v_phase = _advance(i_v, s_v_phase, STAGES)
    i_q, s_q_phase = _advance(i_q, s_q_phase, 2)
    return b_max, b_sum, b_o, (i_stage, s_phase, i_v, s_v_phase, i_q, s_q_phase, i_gates ^ 1), s_turn


@gluon.jit
def _attend(
    p_out, p_log_sum_exp, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, turn, at, s_turn, i_row, s_tokens, s_tiles, i_side, i_query_head, s_query_heads, out_stride,
    C: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, GATED: gl.constexpr,
    ONE_LEVEL: gl.constexpr, FIXED: gl.constexpr, BARE: gl.constexpr
):  # fmt: skip
    """What leaf i_side of the pair has of itself in memory, joined with s_tiles tiles of keys. Nothing is written. Also
    returns whether numbers are too far out, as only those that are FIXED can be. The maximum is of base 2, but with
    ONE_LEVEL of base e.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIR, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])  # noqa: E741
    LARGEST: gl.constexpr = LARGEST_SUM_FLOAT16 if s_v.dtype == gl.float16 else LARGEST_SUM
    p_lse, m_row = _numbers_of(p_log_sum_exp, i_row, s_tokens, i_side, i_query_head, s_query_heads)
    p_tile, m_out = _rows_of(p_out, i_row, s_tokens, i_side, i_query_head, out_stride, DV)
    b_max = gl.load(p_lse, mask=m_row, other=0.0)
    b_own = gl.load(p_tile, mask=m_out, other=0.0)
    if not ONE_LEVEL:
        b_max = b_max * LOG2_E
    b_own_max = b_max
    b_sum = gl.full([LEAF], 1.0, gl.float32, gl.SliceLayout(1, S))
    s_too_far = gl.to_tensor(0)
    if s_tiles > 0:
        b_max, b_sum, b_o, at, s_turn = _attend_left_spans(
            b_max, b_sum, b_own, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty, k_full,
            k_empty, v_full, v_empty, turn, at, s_turn, s_tiles, s_tokens > LEAF, i_side, i_query_head, C, DV, STAGES,
            TURNS, GATED, ONE_LEVEL, FIXED, BARE
        )  # fmt: skip
        if FIXED:
            m_good = b_sum < LARGEST
            if BARE:
                m_good = m_good & (gl.abs(b_own_max) < LARGEST_LOG)
            # Or no number at all. Rows that are not there have numbers too, but nobody reads those.
            s_too_far = gl.max(gl.where(m_good, 0, gl.where(m_row, 1, 0)), 0)
    else:
        b_o = gl.convert_layout(b_own, O).to(gl.float32)
    return b_max, b_sum, b_o, s_too_far, at, s_turn


@gluon.jit
def _attend_lowest(
    b_max, b_sum, b_o, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, at, i_side, i_query_head, DV: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Level 0, if this is the right leaf. Also returns where the next tiles are."""
    i_stage, s_phase, i_v, s_v_phase, i_q, s_q_phase, i_gates = at
    # The left leaf waits for all the same: a barrier that is a phase behind would let the next wait pass.
    mbarrier.wait(q_full.index(i_q), s_q_phase)
    mbarrier.wait(k_full.index(i_stage), s_phase)
    if i_side == 1:
        if t_query_rows is not None:
            _keep(t_query_rows, s_q.index(2 * i_q + 1), s_place, i_gates, 0, i_query_head)
        b_max, b_sum, b_o = _attend_left_leaf(
            b_max, b_sum, b_o, s_q.index(2 * i_q + 1), s_k.index(i_stage), s_v.index(i_v),
            s_gate_q.index(2 * i_gates + 1), s_gate_k.index(i_stage), v_full.index(i_v), s_v_phase, DV, GATED
        )  # fmt: skip
    else:
        mbarrier.wait(v_full.index(i_v), s_v_phase)
    if t_query_rows is not None:
        tma.store_wait(0)
    mbarrier.arrive(q_empty.index(i_q), count=1)
    mbarrier.arrive(k_empty.index(i_stage), count=1)
    mbarrier.arrive(v_empty.index(i_v), count=1)
    i_q, s_q_phase = _advance(i_q, s_q_phase, 2)
    i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
    i_v, s_v_phase = _advance(i_v, s_v_phase, STAGES)
    return b_max, b_sum, b_o, (i_stage, s_phase, i_v, s_v_phase, i_q, s_q_phase, i_gates ^ 1)


@gluon.jit
def _numbers_of(p_log_sum_exp, i_row, s_tokens, i_side, i_query_head, s_query_heads):
    """Where the log-sum-exps of leaf i_side of the pair are, and which there are."""
    o = gl.arange(0, LEAF, gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIR, 16])))
    p = p_log_sum_exp + gl.cast(i_row + i_side * LEAF + o, gl.int64) * s_query_heads + i_query_head
    return p, i_side * LEAF + o < s_tokens


@gluon.jit
def _rows_of(p_out, i_row, s_tokens, i_side, i_query_head, out_stride, DV: gl.constexpr):
    """The same of its output, 16 bytes a thread."""
    M: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    o_row = gl.arange(0, LEAF, gl.SliceLayout(1, M))
    o_column = gl.arange(0, DV, gl.SliceLayout(0, M))
    p_tile = p_out + (gl.cast(i_row + i_side * LEAF, gl.int64) * out_stride + i_query_head * DV)
    return p_tile + (o_row[:, None] * out_stride + o_column[None, :]), (i_side * LEAF + o_row < s_tokens)[:, None]


@gluon.jit
def _store(
    b_max, b_sum, b_o, p_out, p_log_sum_exp, i_row, s_tokens, i_side, i_query_head, s_query_heads, out_stride,
    DV: gl.constexpr, ONE_LEVEL: gl.constexpr
):  # fmt: skip
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])  # noqa: E741
    p_lse, m_row = _numbers_of(p_log_sum_exp, i_row, s_tokens, i_side, i_query_head, s_query_heads)
    p_tile, m_out = _rows_of(p_out, i_row, s_tokens, i_side, i_query_head, out_stride, DV)
    b_o = b_o * (1.0 / gl.convert_layout(b_sum, gl.SliceLayout(1, O)))[:, None]
    M: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    gl.store(p_tile, gl.convert_layout(b_o.to(p_out.dtype.element_ty), M), mask=m_out)
    if not ONE_LEVEL:
        b_max = b_max / LOG2_E
    gl.store(p_lse, b_max + gl.log2(b_sum) / LOG2_E, mask=m_row)


@gluon.jit
def attend_one_level(
    p_out, p_log_sum_exp, s_q, s_k, s_v, s_gate_q, s_gate_k, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    i_row, s_tokens, s_tiles, i_query_head, s_query_heads, out_stride, C: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Leaf C of the pair goes on from what is in memory over s_tiles tiles of keys; beside the maximum, for what is in
    memory need not be of its own leaf.
    """
    b_max, b_sum, b_o, _far, _at, _turn = _attend(
        p_out, p_log_sum_exp, None, s_q, s_k, s_v, s_gate_q, s_gate_k, s_q, q_full, q_empty, k_full, k_empty, v_full,
        v_empty, turn, _beginning(0), gl.to_tensor(0), i_row, s_tokens, s_tiles, C, i_query_head, s_query_heads,
        out_stride, C, DV, STAGES, TURNS, GATED, True, False, False
    )  # fmt: skip
    _store(
        b_max, b_sum, b_o, p_out, p_log_sum_exp, i_row, s_tokens, C, i_query_head, s_query_heads, out_stride, DV, True
    )


@gluon.jit
def _consume(
    p_out, p_log_sum_exp, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, s_verdict, s_piece, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, turn, verdict, piece_full, piece_empty, s_query_heads, out_stride,
    C: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, GATED: gl.constexpr,
    BARE: gl.constexpr
):  # fmt: skip
    """One leaf of each piece, the left and the right one in turn, for which there is more to do: go on from what is in
    memory over all tiles and, if it is a right one, the left leaf. Once more beside the maximum, if either leaf's
    numbers were too far out. BARE: in the first pass beside nothing.
    """
    at = _beginning(0)
    s_turn = gl.to_tensor(0)
    s_verdict_phase = gl.to_tensor(0)
    s_piece_phase = gl.to_tensor(0)
    i_side = gl.to_tensor(C)
    s_tokens, i_row, i_index, i_query_head = _next_piece(s_piece, piece_full, piece_empty, s_piece_phase)
    while s_tokens > 0:
        s_tiles = i_index // 2
        b_max, b_sum, b_o, s_too_far, at, s_turn = _attend(
            p_out, p_log_sum_exp, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty, k_full,
            k_empty, v_full, v_empty, turn, at, s_turn, i_row, s_tokens, s_tiles, i_side, i_query_head, s_query_heads,
            out_stride, C, DV, STAGES, TURNS, GATED, False, True, BARE
        )  # fmt: skip
        # Two pairs of them: the other consumer may still read those of the piece before.
        s_verdicts = s_verdict.index(s_verdict_phase)
        if s_tiles > 0:
            s_verdicts.slice(C, 1, 0).store(gl.full([1], s_too_far, gl.int32, ONE))
            mbarrier.arrive(verdict, count=1)
        if s_tokens > LEAF:
            b_max, b_sum, b_o, at = _attend_lowest(
                b_max, b_sum, b_o, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, at, i_side, i_query_head, DV, STAGES, GATED
            )  # fmt: skip
        if s_tiles > 0:
            mbarrier.wait(verdict, s_verdict_phase)
            s_verdict_phase ^= 1
            if _verdict(s_verdicts):
                b_max, b_sum, b_o, _far, at, s_turn = _attend(
                    p_out, p_log_sum_exp, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty,
                    k_full, k_empty, v_full, v_empty, turn, at, s_turn, i_row, s_tokens, s_tiles, i_side, i_query_head,
                    s_query_heads, out_stride, C, DV, STAGES, TURNS, GATED, False, False, False
                )  # fmt: skip
                if s_tokens > LEAF:
                    b_max, b_sum, b_o, at = _attend_lowest(
                        b_max, b_sum, b_o, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, q_full, q_empty,
                        k_full, k_empty, v_full, v_empty, at, i_side, i_query_head, DV, STAGES, GATED
                    )  # fmt: skip
        _store(
            b_max, b_sum, b_o, p_out, p_log_sum_exp, i_row, s_tokens, i_side, i_query_head, s_query_heads, out_stride,
            DV, False
        )  # fmt: skip
        i_side = 1 - i_side
        s_piece_phase ^= 1
        s_tokens, i_row, i_index, i_query_head = _next_piece(s_piece, piece_full, piece_empty, s_piece_phase)


@gluon.jit
def barriers_of_queries(STAGES: gl.constexpr, TURNS: gl.constexpr):
    """q_full, q_empty, k_full, k_empty, v_full, v_empty and turn, for two consumers that hold queries: two
    buffers of these, STAGES of keys and of values.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i_stage in gl.static_range(2):
        mbarrier.init(q_full.index(i_stage), count=1)
        mbarrier.init(q_empty.index(i_stage), count=2)
        mbarrier.init(turn.index(i_stage), count=1)
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i_stage), count=1)
        mbarrier.init(v_full.index(i_stage), count=1)
        mbarrier.init(k_empty.index(i_stage), count=2)
        mbarrier.init(v_empty.index(i_stage), count=2)
    fence_async_shared()
    if TURNS:
        mbarrier.arrive(turn.index(0), count=1)
    return q_full, q_empty, k_full, k_empty, v_full, v_empty, turn


@gluon.jit(do_not_specialize=(*COUNTS, "HQ"))
def dense_forward_kernel(
    t_q_left,  # descriptor of (N * 64, HQ * D) in tiles of a leaf: queries at its left edge, times log2(e)
    t_nodes,  # descriptor of (2 N * H * D, D) in tiles of D rows: P of all spans, by which they move
    t_key_rows,  # descriptor of (levels * key_slots * 64, H * D) in tiles of a pair
    t_values,  # descriptor of (T, H * DV) in tiles of a pair
    t_gate_query,  # descriptor of (HQ, levels * query_slots * 64) float32 in tiles of a leaf, times log2(e), or None
    t_gate_key,  # descriptor of (HQ, levels * key_slots * 64), likewise in tiles of a pair
    t_query_rows,  # descriptor of (levels * query_slots * 64, HQ * D) in tiles of a leaf: out, moved rows; or None
    p_out,  # (T, HQ, DV): in, attention within the leaf; out, the whole attention
    p_log_sum_exp,  # (T, HQ) float32, likewise
    p_next,  # (1,) int32, 0: the next piece of the work, less the number of programs
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    num_turns,  # pairs of a sequence, or leaves in the table
    num_groups,  # query heads of all sequences, or of the one row that the table cuts up
    num_levels,
    query_slots,
    key_slots,
    HQ,
    token_heads,  # key heads of a token in t_values and p_out, of which these are some
    s_section,  # heads whose keys and values fit the L2 cache: their programs run side by side
    GROUP: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    TURNS: gl.constexpr,
    BARE: gl.constexpr,  # weights are beside nothing, if they can be
):
    """All levels of one pair of leaves and one query head, and then of another: whoever is done takes the next."""
    # A level's gates of queries, and the place where these are kept, give way two levels on: nothing but the wait for a
    # stage keeps the producer from writing there while they are read.
    gl.static_assert(STAGES == 2)
    out_stride = token_heads * GROUP * DV
    s_q = gl.allocate_shared_memory(t_q_left.dtype, [4, LEAF, D], t_q_left.layout)
    s_k = gl.allocate_shared_memory(t_key_rows.dtype, [STAGES, PAIR, D], t_key_rows.layout)
    s_v = gl.allocate_shared_memory(t_values.dtype, [STAGES, PAIR, DV], t_values.layout)
    GATED: gl.constexpr = t_gate_key is not None
    KEEPS: gl.constexpr = t_query_rows is not None
    s_gate_q = s_q  # stand-ins that nobody reads: a partition takes no variable that is None
    s_gate_k = s_k
    if GATED:
        s_gate_q = gl.allocate_shared_memory(gl.float32, [4, 1, LEAF], t_gate_query.layout)
        s_gate_k = gl.allocate_shared_memory(gl.float32, [STAGES, 1, PAIR], t_gate_key.layout)
    s_place = gl.allocate_shared_memory(gl.int32, [2, 1], NUMBERS)
    s_verdict = gl.allocate_shared_memory(gl.int32, [2, 2], NUMBERS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    s_piece = gl.allocate_shared_memory(gl.int32, [4], NUMBERS)
    verdict = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    piece_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    piece_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(verdict, count=2)
    mbarrier.init(piece_full, count=1)
    mbarrier.init(piece_empty, count=2)
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers_of_queries(STAGES, TURNS)
    # Arguments are written in place: a tuple held in a variable would make tensors of its constexprs.
    gl.warp_specialize(
        [
            (
                _produce,
                (
                    t_q_left, t_nodes, t_key_rows, t_values, t_gate_query, t_gate_key, s_q, s_k, s_v,
                    s_gate_q, s_gate_k, s_place, s_verdict, s_piece, q_full, q_empty, k_full, k_empty, v_full,
                    v_empty, verdict, piece_full, piece_empty, p_next, p_table, table_leaves, table_length,
                    table_queries, table_keys, num_turns, num_groups, HQ, s_section, num_levels, query_slots, key_slots,
                    GROUP, D, DV, STAGES, GATED, KEEPS
                ),
            ),
            (
                _consume,
                (
                    p_out, p_log_sum_exp, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, s_verdict, s_piece,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, verdict, piece_full, piece_empty, HQ,
                    out_stride, 0, DV, STAGES, TURNS, GATED, BARE
                ),
            ),
            (
                _consume,
                (
                    p_out, p_log_sum_exp, t_query_rows, s_q, s_k, s_v, s_gate_q, s_gate_k, s_place, s_verdict, s_piece,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, verdict, piece_full, piece_empty, HQ,
                    out_stride, 1, DV, STAGES, TURNS, GATED, BARE
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
