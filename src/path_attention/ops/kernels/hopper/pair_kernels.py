"""Attention between two pieces of a split sequence on Hopper: one level of dense_forward.py and dense_backward.py.

All queries of one piece meet keys of another, without a mask; gates come with their rows. Forward a program has 128
queries of one head and goes on from the output and log-sum-exp that other keys gave them, so nothing is left to merge.
Backward it has 128 keys of one key head and goes through all queries.

Sequences of a batch are alike. A pair's queries are s_rows rows in all of a sequence's output from row i_first_row on,
which has s_out rows; its keys are the s_tiles tiles of 128 from row i_first_key of s_keys on. Numbers of rows, (HQ,
batch * s_padded), are padded to whole tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from path_attention.ops.kernels.hopper.dense_backward import (
    _step,
    barriers_of_tiles,
    buffers_of_queries,
    columns_and_places,
    no_columns,
)
from path_attention.ops.kernels.hopper.dense_forward import (
    LEAF,
    LOG2_E,
    PAIR,
    _advance,
    attend_one_level,
    barriers_of_queries,
    turn_and_head,
)
from path_attention.ops.kernels.hopper.gluon_names import async_load, reinterpret, tma_reduce_add
from path_attention.ops.kernels.tiles import COUNTS

# Further numbers that programs only count with: COUNTS of tiles.py.
PLACES = (*COUNTS, "HQ", "s_out", "s_padded", "s_tiles", "i_first_row", "i_first_key")


@gluon.jit
def _fetch_keys(
    t_query_rows, t_key_rows, t_values, t_gate_query, t_gate_key, s_q, s_k, s_v, s_gate_q, s_gate_k, q_full, k_full,
    k_empty, v_full, v_empty, i_query_row, i_number, i_key_row, i_query_head, i_head, s_tiles, D: gl.constexpr,
    DV: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Two leaves of queries, then all tiles of keys and values."""
    GATES: gl.constexpr = PAIR * 4 if GATED else 0  # bytes that come with a tile
    mbarrier.expect(q_full.index(0), PAIR * D * 2 + GATES)
    for i in gl.static_range(2):
        async_load(t_query_rows, [i_query_row + i * LEAF, i_query_head * D], q_full.index(0), s_q.index(i))
    if GATED:
        for i in gl.static_range(2):
            async_load(t_gate_query, [i_query_head, i_number + i * LEAF], q_full.index(0), s_gate_q.index(i))
    i_stage = 0
    s_phase = 1
    for i in range(s_tiles):
        i_row = i_key_row + i * PAIR
        mbarrier.wait(k_empty.index(i_stage), s_phase)
        mbarrier.expect(k_full.index(i_stage), PAIR * D * 2 + GATES)
        async_load(t_key_rows, [i_row, i_head * D], k_full.index(i_stage), s_k.index(i_stage))
        if GATED:
            async_load(t_gate_key, [i_query_head, i_row], k_full.index(i_stage), s_gate_k.index(i_stage))
        mbarrier.wait(v_empty.index(i_stage), s_phase)
        mbarrier.expect(v_full.index(i_stage), PAIR * DV * 2)
        async_load(t_values, [i_row, i_head * DV], v_full.index(i_stage), s_v.index(i_stage))
        i_stage, s_phase = _advance(i_stage, s_phase, STAGES)


@gluon.jit(do_not_specialize=PLACES)
def pair_forward_kernel(
    t_query_rows,  # descriptor of (batch * s_rows, HQ * D) in tiles of a leaf
    t_key_rows,  # descriptor of (batch * s_keys, H * D) in tiles of a pair
    t_values,  # descriptor of (batch * s_keys, H * DV) likewise
    t_gate_query,  # descriptor of (HQ, batch * s_padded) float32 in tiles of a leaf; None without gates
    t_gate_key,  # descriptor of (HQ, batch * s_keys), likewise in tiles of a pair
    p_out,  # (batch, s_out, HQ, DV): in, attention over other keys; out, over these too
    p_log_sum_exp,  # (batch, s_out, HQ) float32, likewise
    num_turns,  # programs for the queries of a head
    num_groups,  # query heads of all sequences
    s_rows,
    s_out,
    s_padded,
    s_keys,
    s_tiles,  # > 0
    i_first_row,
    i_first_key,
    HQ,
    s_section,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    TURNS: gl.constexpr,
):
    """128 queries of one head."""
    i_turn, i_sequence, i_query_head = turn_and_head(gl.program_id(0), num_turns, num_groups, HQ, s_section)
    i_head = i_query_head // GROUP
    i_first = i_turn * PAIR
    s_tokens = gl.minimum(PAIR, s_rows - i_first)
    i_row = i_sequence * s_out + i_first_row + i_first
    i_query_row = i_sequence * s_rows + i_first
    i_number = i_sequence * s_padded + i_first
    i_key_row = i_sequence * s_keys + i_first_key
    s_q = gl.allocate_shared_memory(t_query_rows.dtype, [2, LEAF, D], t_query_rows.layout)
    s_k = gl.allocate_shared_memory(t_key_rows.dtype, [STAGES, PAIR, D], t_key_rows.layout)
    s_v = gl.allocate_shared_memory(t_values.dtype, [STAGES, PAIR, DV], t_values.layout)
    GATED: gl.constexpr = t_gate_key is not None
    s_gate_q = s_q  # stand-ins that nobody reads: a partition takes no variable that is None
    s_gate_k = s_k
    if GATED:
        s_gate_q = gl.allocate_shared_memory(gl.float32, [2, 1, LEAF], t_gate_query.layout)
        s_gate_k = gl.allocate_shared_memory(gl.float32, [STAGES, 1, PAIR], t_gate_key.layout)
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers_of_queries(STAGES, TURNS)
    # Arguments are written in place: a tuple held in a variable would make tensors of its constexprs.
    gl.warp_specialize(
        [
            (
                _fetch_keys,
                (
                    t_query_rows, t_key_rows, t_values, t_gate_query, t_gate_key, s_q, s_k, s_v, s_gate_q, s_gate_k,
                    q_full, k_full, k_empty, v_full, v_empty, i_query_row, i_number, i_key_row, i_query_head, i_head,
                    s_tiles, D, DV, STAGES, GATED
                ),
            ),
            (
                attend_one_level,
                (
                    p_out, p_log_sum_exp, s_q, s_k, s_v, s_gate_q, s_gate_k, q_full, q_empty, k_full, k_empty, v_full,
                    v_empty, turn, i_row, s_tokens, s_tiles, i_query_head, HQ, HQ * DV, 0, DV, STAGES, TURNS, GATED
                ),
            ),
            (
                attend_one_level,
                (
                    p_out, p_log_sum_exp, s_q, s_k, s_v, s_gate_q, s_gate_k, q_full, q_empty, k_full, k_empty, v_full,
                    v_empty, turn, i_row, s_tokens, s_tiles, i_query_head, HQ, HQ * DV, 1, DV, STAGES, TURNS, GATED
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit
def _fetch_queries(
    t_query_rows, t_key_rows, t_values, t_d_out, t_log_sum_exp, t_delta, s_q, s_k, s_v, s_do, s_lse, s_delta, k_full,
    v_full, q_full, q_empty, do_full, do_empty, i_key_row, i_query_row, i_out_row, i_number, i_head, s_tiles,
    GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """A pair of leaves as keys and values, then all tiles of queries of all heads of the group."""
    mbarrier.expect(v_full, PAIR * DV * 2)
    async_load(t_values, [i_key_row, i_head * DV], v_full, s_v)
    mbarrier.expect(k_full, PAIR * D * 2)
    async_load(t_key_rows, [i_key_row, i_head * D], k_full, s_k)
    i_stage = 0
    s_phase = 1
    i_query_head = i_head * GROUP
    i_tile_row = 0
    for _ in range(s_tiles * GROUP):
        mbarrier.wait(q_empty.index(i_stage), s_phase)
        mbarrier.expect(q_full.index(i_stage), ROWS * D * 2 + ROWS * 8)
        async_load(
            t_query_rows, [i_query_row + i_tile_row, i_query_head * D], q_full.index(i_stage), s_q.index(i_stage)
        )
        async_load(t_log_sum_exp, [i_query_head, i_number + i_tile_row], q_full.index(i_stage), s_lse.index(i_stage))
        async_load(t_delta, [i_query_head, i_number + i_tile_row], q_full.index(i_stage), s_delta.index(i_stage))
        mbarrier.wait(do_empty.index(i_stage), s_phase)
        mbarrier.expect(do_full.index(i_stage), ROWS * DV * 2)
        async_load(t_d_out, [i_out_row + i_tile_row, i_query_head * DV], do_full.index(i_stage), s_do.index(i_stage))
        i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
        i_tile_row += ROWS
        is_last = i_tile_row == s_tiles * ROWS  # of a query head
        i_query_head += gl.where(is_last, 1, 0)
        i_tile_row = gl.where(is_last, 0, i_tile_row)


@gluon.jit
def _add_tile(t_x, i_row, i_column, b_x, s_x, N: gl.constexpr):
    """Add 64 rows of N columns in float32 to memory, by way of s_x."""
    s_tile = reinterpret(s_x, gl.float32, [128 // N, LEAF, N], t_x.layout).index(0)
    s_tile.store(b_x)
    fence_async_shared()
    tma_reduce_add(t_x, [i_row, i_column], s_tile)
    tma.store_wait(0)


@gluon.jit
def _consume(
    t_d_query_rows, t_d_key_rows, t_d_values, p_factor, p_gate_key, p_gate_row, p_gate_column, s_k, s_v, s_q, s_do,
    s_lse, s_delta, s_ds, s_dq, s_ones, k_full, v_full, q_full, q_empty, do_full, do_empty, ds_full, done, i_key_row,
    i_query_row, i_number, i_head, s_tiles, s_gate_keys, s_gate_rows, C: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Keys of leaf C of the pair. s_gate_keys, s_gate_rows: numbers of a query head."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    b_dk = gl.full([LEAF, D], 0.0, gl.float32, K)
    b_dv = gl.full([LEAF, DV], 0.0, gl.float32, V)
    b_column = no_columns(COLUMNS, D)
    mbarrier.wait(v_full, 0)
    mbarrier.wait(k_full, 0)
    b_v = s_v.slice(C * LEAF, LEAF, 0)
    b_k = s_k.slice(C * LEAF, LEAF, 0)
    if HELD:
        b_v = b_v.load(OPERAND)
        b_k = b_k.load(OPERAND)
    i_stage = 0
    s_phase = 0
    i_query_head = i_head * GROUP
    i_tile_row = 0
    for i in range(s_tiles * GROUP):
        i_row_of_all = i_tile_row
        i_d_row = i_query_row + i_tile_row
        i_d_column = i_query_head * D
        if ROWS == 64:
            i_d_column += C * 64
        else:
            i_d_row += C * 64
            i_row_of_all += C * 64
        p_gates_of_keys = p_gate_key
        p_gate_of_tile = p_gate_row
        if GATED:
            i_gates = gl.cast(i_query_head, gl.int64)
            p_gates_of_keys += i_gates * s_gate_keys + i_key_row + C * LEAF
            p_gate_of_tile += i_gates * s_gate_rows + i_number + i_row_of_all
        b_dk, b_dv, b_column = _step(
            b_dk, b_dv, b_column, b_k, b_v, s_k, s_q.index(i_stage), s_do.index(i_stage), s_lse.index(i_stage),
            s_delta.index(i_stage), s_ds.index(i & 1), s_dq.index(C), s_ones, q_full.index(i_stage),
            q_empty.index(i_stage), do_full.index(i_stage), do_empty.index(i_stage), ds_full, t_d_query_rows, i_d_row,
            i_d_column, p_gates_of_keys, p_gate_of_tile, s_phase, i & 1, C, ROWS, COLUMNS, D, DV, LOG2_E, GATED
        )  # fmt: skip
        i_tile_row += ROWS
        is_last = i_tile_row == s_tiles * ROWS  # of a query head
        if GATED:
            if is_last:
                b_sums, o_key = columns_and_places(b_column, COLUMNS, D)
                p_gates = p_gate_column + i_gates * s_gate_keys + i_key_row + C * LEAF + o_key
                gl.atomic_add(p_gates, b_sums / gl.load(p_factor), sem="relaxed")
                b_column = b_column * 0.0
        i_query_head += gl.where(is_last, 1, 0)
        i_tile_row = gl.where(is_last, 0, i_tile_row)
        i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
    tma.store_wait(0)
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)  # the other consumer may still read the last queries
    s_read = s_q if C == 0 else s_do
    s_inverse = 1.0 / gl.load(p_factor)
    _add_tile(t_d_values, i_key_row + C * LEAF, i_head * DV, b_dv * s_inverse, s_read, DV)
    _add_tile(t_d_key_rows, i_key_row + C * LEAF, i_head * D, b_dk * s_inverse, s_read, D)


@gluon.jit(do_not_specialize=PLACES)
def pair_backward_kernel(
    t_query_rows,  # descriptor of (batch * s_rows, HQ * D) in tiles of ROWS
    t_key_rows,  # descriptor of (batch * s_keys, H * D) in tiles of a pair
    t_values,  # descriptor of (batch * s_keys, H * DV) in tiles of a pair
    t_d_out,  # descriptor of (batch * s_out, HQ * DV) in tiles of ROWS
    t_log_sum_exp,  # descriptor of (HQ, batch * s_padded): -x of the whole attention, plus log of the factor and the
    t_delta,  # row's gate; -infinity in what is padding. Of -delta alike; both float32 in tiles of ROWS
    t_d_query_rows,  # descriptor of float32 zeros like the query rows in tiles of 64 x 64: times the factor
    t_d_key_rows,  # descriptor of (batch * s_keys, H * D) float32 in tiles of a leaf: added to, without the factor
    t_d_values,  # descriptor of (batch * s_keys, H * DV), likewise
    p_factor,  # (1,) float32
    p_gate_key,  # (HQ, batch * s_keys) float32; None without gates
    p_gate_row,  # (HQ, batch * s_padded) float32 or None: row sums of dS times the factor are added to it
    p_gate_column,  # (HQ, batch * s_keys) float32 or None: column sums of dS, without the factor, likewise
    num_turns,  # tiles of keys
    num_groups,  # key heads of all sequences
    s_rows,
    s_out,
    s_padded,
    s_keys,
    s_tiles,  # of queries, > 0
    i_first_row,
    i_first_key,
    H,
    s_section,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,  # of a tile's rows whose logits are held at a time
    HELD: gl.constexpr,  # keys and values stay in registers
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """128 keys of one key head, and all queries of its group."""
    i_turn, i_sequence, i_head = turn_and_head(gl.program_id(0), num_turns, num_groups, H, s_section)
    i_key_row = i_sequence * s_keys + i_first_key + i_turn * PAIR
    i_query_row = i_sequence * s_rows
    i_out_row = i_sequence * s_out + i_first_row
    i_number = i_sequence * s_padded
    s_sequences = num_groups // H
    s_gate_keys = s_sequences * s_keys
    s_gate_rows = s_sequences * s_padded
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    s_k = gl.allocate_shared_memory(t_key_rows.dtype, [PAIR, D], t_key_rows.layout)
    s_v = gl.allocate_shared_memory(t_values.dtype, [PAIR, DV], t_values.layout)
    GATED: gl.constexpr = p_gate_key is not None
    s_q, s_do, s_lse, s_delta, s_ds, s_dq, s_ones = buffers_of_queries(
        t_query_rows, t_d_out, t_log_sum_exp, t_delta, t_d_query_rows, ROWS, D, DV, STAGES, GATED
    )
    k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(done, count=2)
    q_full, q_empty, do_full, do_empty = barriers_of_tiles(STAGES)
    fence_async_shared()
    # Arguments are written in place: a tuple held in a variable would make tensors of its constexprs.
    gl.warp_specialize(
        [
            (
                _fetch_queries,
                (
                    t_query_rows, t_key_rows, t_values, t_d_out, t_log_sum_exp, t_delta, s_q, s_k, s_v, s_do, s_lse,
                    s_delta, k_full, v_full, q_full, q_empty, do_full, do_empty, i_key_row, i_query_row, i_out_row,
                    i_number, i_head, s_tiles, GROUP, ROWS, D, DV, STAGES
                ),
            ),
            (
                _consume,
                (
                    t_d_query_rows, t_d_key_rows, t_d_values, p_factor, p_gate_key, p_gate_row, p_gate_column, s_k, s_v,
                    s_q, s_do, s_lse, s_delta, s_ds, s_dq, s_ones, k_full, v_full, q_full, q_empty, do_full, do_empty,
                    ds_full, done, i_key_row, i_query_row, i_number, i_head, s_tiles, s_gate_keys, s_gate_rows, 0,
                    GROUP, ROWS, COLUMNS, D, DV, STAGES, HELD, GATED
                ),
            ),
            (
                _consume,
                (
                    t_d_query_rows, t_d_key_rows, t_d_values, p_factor, p_gate_key, p_gate_row, p_gate_column, s_k, s_v,
                    s_q, s_do, s_lse, s_delta, s_ds, s_dq, s_ones, k_full, v_full, q_full, q_empty, do_full, do_empty,
                    ds_full, done, i_key_row, i_query_row, i_number, i_head, s_tiles, s_gate_keys, s_gate_rows, 1,
                    GROUP, ROWS, COLUMNS, D, DV, STAGES, HELD, GATED
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
