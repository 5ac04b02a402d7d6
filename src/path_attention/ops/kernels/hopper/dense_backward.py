"""Attention between sibling spans on Hopper, backward: all levels above the lowest in one pass over the logits.

A program has one pair of leaves as 128 keys of one key head, two consumer warp groups of 64 keys each, and goes through
the right siblings' queries in tiles of ROWS:

    S^T = K Q^T - log_sum_exp      P = exp2(S)      dV += P^T dO      dP^T = V dO^T - delta      dS = P dP

    dK_l += dS^T Q      dQ_l += dS K_l

The rows' numbers are what the products begin with, so that nothing is subtracted afterwards. Query rows are times
log2(e), which dK_l loses again; dQ_l is of rows without it.

dV stays in registers over all levels and query heads, dK over one level, whose keys a second buffer lets the producer
fetch ahead; a tile's share of dQ is added to float32 memory by the copy engine. All gradients carry the power of two
that log_sum_exp is shifted by, so that dS is an operand in float16. Rows that no token stands at have a log_sum_exp of
plus infinity: no tile needs a mask. With gates that number is another one at every level, less the row's gate there;
sums of dS over keys are products with ones. Level 0 is a kernel of its own
(dense_kernels.py): in this one it would cost registers that the loop does not have.
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

from path_attention.ops.kernels.hopper.dense_forward import (
    LEAF,
    LOG2_E,
    PAIR,
    _advance,
    gates_of_head,
    turn_and_head,
    within,
)
from path_attention.ops.kernels.hopper.gluon_names import async_load, async_store, reinterpret, tma_reduce_add
from path_attention.ops.kernels.tiles import COUNTS


@gluon.jit
def place_of_keys(i_turn, i_sequence, p_table, table_leaves, table_length, table_queries, table_keys):
    """First leaf's row, index, its sequence's leaves, first query, key and row slots; the first pairs, which have the
    most queries, come first. Without a pair the index is that of the last leaf.
    """
    if p_table is None:
        i_index = 2 * i_turn
        i_row = i_sequence * table_length + i_index * LEAF
        s_even = table_leaves + table_leaves % 2
        return i_row, i_index, table_leaves, i_sequence * table_queries, i_sequence * table_keys, i_sequence * s_even
    else:
        p = p_table + i_turn * 8  # COLUMNS of leaf_table.py
        i_index = gl.load(p + 2)
        s_count = gl.load(p + 3)
        i_index = gl.where((i_index % 2 == 0) & (gl.load(p + 1) > 0), i_index, s_count)
        return gl.load(p), i_index, s_count, gl.load(p + 4), gl.load(p + 5), gl.load(p + 6)


@gluon.jit
def right_sibling(i_index, s_count, level):
    """First leaf and number of leaves of the right sibling of the span that leaf i_index is in; 0 if there is none or
    the leaf is itself in a right sibling.
    """
    i_first = ((i_index >> level) + 1) << level
    s_leaves = gl.maximum(gl.minimum(1 << level, s_count - i_first), 0)
    return i_first, gl.where(((i_index >> level) & 1) == 0, s_leaves, 0)


@gluon.jit
def _produce(
    t_query_rows, t_key_rows, t_values, t_d_out, t_log_sum_exp, t_delta, s_k, s_v, s_q, s_do, s_lse, s_delta, k_full,
    k_empty, v_full, q_full, q_empty, do_full, do_empty, i_row, i_index, s_count, i_query_base, i_key_base, i_row_base,
    i_head, num_levels, query_slots, key_slots, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    mbarrier.expect(v_full, PAIR * DV * 2)
    async_load(t_values, [i_row, i_head * DV], v_full, s_v)
    i_stage = 0
    s_phase = 1
    i_k = 0
    s_k_phase = 1
    for level in range(1, num_levels):
        i_first, s_leaves = right_sibling(i_index, s_count, level)
        if s_leaves > 0:
            i_key_row = (level * key_slots + i_key_base + within(i_index, level)) * LEAF
            mbarrier.wait(k_empty.index(i_k), s_k_phase)
            mbarrier.expect(k_full.index(i_k), PAIR * D * 2)
            async_load(t_key_rows, [i_key_row, i_head * D], k_full.index(i_k), s_k.index(i_k))
            i_k, s_k_phase = _advance(i_k, s_k_phase, 2)
            i_query_row = (level * query_slots + i_query_base + within(i_first, level)) * LEAF
            i_out_row = i_row + (i_first - i_index) * LEAF
            s_tiles = (s_leaves * LEAF + ROWS - 1) // ROWS
            i_query_head = i_head * GROUP
            i_tile = 0
            for _ in range(s_tiles * GROUP):
                i_number = (i_row_base + i_first) * LEAF + i_tile * ROWS
                mbarrier.wait(q_empty.index(i_stage), s_phase)
                mbarrier.expect(q_full.index(i_stage), ROWS * D * 2 + ROWS * 8)
                async_load(
                    t_query_rows,
                    [i_query_row + i_tile * ROWS, i_query_head * D],
                    q_full.index(i_stage),
                    s_q.index(i_stage),
                )
                i_lse = i_query_row + i_tile * ROWS if GATED else i_number
                async_load(t_log_sum_exp, [i_query_head, i_lse], q_full.index(i_stage), s_lse.index(i_stage))
                async_load(t_delta, [i_query_head, i_number], q_full.index(i_stage), s_delta.index(i_stage))
                mbarrier.wait(do_empty.index(i_stage), s_phase)
                mbarrier.expect(do_full.index(i_stage), ROWS * DV * 2)
                async_load(
                    t_d_out, [i_out_row + i_tile * ROWS, i_query_head * DV], do_full.index(i_stage), s_do.index(i_stage)
                )
                i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
                i_tile += 1
                is_last = i_tile == s_tiles  # of a query head
                i_query_head += gl.where(is_last, 1, 0)
                i_tile = gl.where(is_last, 0, i_tile)


# Registers of a product with eight columns, the fewest there are.
EIGHT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.jit
def no_columns(COLUMNS: gl.constexpr, D: gl.constexpr):
    """Sums of dS of 64 keys over queries before the first: at head_dim 128 what products with ones add to, elsewhere
    sums of registers.
    """
    if D == 128:
        return gl.full([LEAF, 8], 0.0, gl.float32, EIGHT)
    else:
        S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
        return gl.full([LEAF], 0.0, gl.float32, gl.SliceLayout(1, S))


@gluon.jit
def columns_and_places(b_column, COLUMNS: gl.constexpr, D: gl.constexpr):
    """The sums, and 0 to 63 in their layout."""
    if D == 128:
        # The sum of equal columns is eight times one, exactly.
        return gl.sum(b_column, 1) * 0.125, gl.arange(0, LEAF, gl.SliceLayout(1, EIGHT))
    else:
        S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
        return b_column, gl.arange(0, LEAF, gl.SliceLayout(1, S))


@gluon.jit
def _weigh(
    b_dv, b_column, b_k, b_v, s_q, s_do, s_lse, s_delta, s_ds, do_full, p_gate_key, s_phase, COLUMNS: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, UNIT: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """dS of 64 keys and COLUMNS queries, to shared memory and as an operand. dV is still under way. UNIT turns logits,
    gates and s_lse to base 2.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    b_zero = gl.full([LEAF, COLUMNS], 0.0, gl.float32, S)
    if GATED:
        b_gate = gl.load(p_gate_key + gl.arange(0, LEAF, gl.SliceLayout(1, S)))
    b_lse, _ = gl.broadcast(s_lse.load(S), b_zero)
    if GATED:
        b_lse = b_lse + b_gate[:, None]
    b_delta, _ = gl.broadcast(s_delta.load(S), b_zero)
    mbarrier.wait(do_full, s_phase)
    t_s = warpgroup_mma(b_k, s_q.permute((1, 0)), b_lse, is_async=True)
    t_dp = warpgroup_mma(b_v, s_do.permute((1, 0)), b_delta, is_async=True)
    b_s = warpgroup_mma_wait(1, (t_s,))
    b_p = gl.exp2(b_s * UNIT)
    b_weights = gl.convert_layout(b_p.to(s_do.dtype), gl.DotOperandLayout(0, V, 2))
    t_dv = warpgroup_mma(b_weights, s_do, b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(1, (t_dp,))
    b_ds = (b_p * b_dp).to(s_q.dtype)
    if GATED and D < 128:
        # Of what the other sums are of, rounded: a gate's gradient is the sum of all differences from its token on, and
        # half of every rounding would add up along the sequence.
        b_column += gl.sum(b_ds.to(gl.float32), 1)
    s_ds.store(b_ds)
    return t_dv, b_weights, gl.convert_layout(b_ds, gl.DotOperandLayout(0, K, 2)), b_column


@gluon.jit
def _step(
    b_dk, b_dv, b_column, b_k, b_v, s_k, s_q, s_do, s_lse, s_delta, s_ds, s_dq, s_ones, q_full, q_empty, do_full,
    do_empty, ds_full, t_d_query_rows, i_d_row, i_d_column, p_gate_key, p_gate, s_phase, s_ds_phase, C: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, UNIT: gl.constexpr,
    GATED: gl.constexpr
):  # fmt: skip
    """One tile of queries. The products are issued ahead of the arithmetic that does not need them.

    p_gate_key: the gates of this group's keys; p_gate: where sums of dS over keys are added for this group's queries.
    """
    Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    # Two buffers of dS: whoever is a tile ahead writes to the one that no product still reads.
    s_own_ds = s_ds.slice(C * LEAF, LEAF, 0)
    BY_PRODUCT: gl.constexpr = GATED and D == 128
    ONES: gl.constexpr = gl.DotOperandLayout(0, EIGHT, 2)
    mbarrier.wait(q_full, s_phase)
    for i in gl.static_range(ROWS // COLUMNS):
        s_part = s_q.slice(i * COLUMNS, COLUMNS, 0)
        t_dv, b_weights, b_ds_operand, b_column = _weigh(
            b_dv, b_column, b_k, b_v, s_part, s_do.slice(i * COLUMNS, COLUMNS, 0),
            s_lse.slice(i * COLUMNS, COLUMNS, 1), s_delta.slice(i * COLUMNS, COLUMNS, 1),
            s_own_ds.slice(i * COLUMNS, COLUMNS, 1), do_full, p_gate_key, s_phase, COLUMNS, D, DV, UNIT, GATED
        )  # fmt: skip
        if i < ROWS // COLUMNS - 1:  # the last part's products go on below
            t_dk = warpgroup_mma(b_ds_operand, s_part, b_dk, is_async=True)
            if BY_PRODUCT:
                b_terms = gl.convert_layout(b_ds_operand, ONES)
                t_column = warpgroup_mma(b_terms, s_ones.slice(0, COLUMNS, 0), b_column, is_async=True)
                b_dv, b_dk, b_column, _, _, _ = warpgroup_mma_wait(
                    0, (t_dv, t_dk, t_column, b_weights, b_ds_operand, b_terms)
                )
            else:
                b_dv, b_dk, _, _ = warpgroup_mma_wait(0, (t_dv, t_dk, b_weights, b_ds_operand))
    fence_async_shared()
    mbarrier.arrive(ds_full, count=1)
    mbarrier.wait(ds_full, s_ds_phase)
    if GATED:
        # All rows, of this group's keys, or 64 of the rows, of all keys.
        s_terms = s_own_ds if ROWS == 64 else s_ds.slice(C * 64, 64, 1)
        b_none = gl.full([LEAF, 8], 0.0, gl.float32, EIGHT)
        t_row = warpgroup_mma(s_terms.permute((1, 0)), s_ones, b_none, use_acc=False, is_async=True)
    b_zero = gl.full([LEAF, 64], 0.0, gl.float32, Q)
    if ROWS == 64:  # 128 columns of dQ: half of them for each consumer
        t_dq = warpgroup_mma(s_ds.permute((1, 0)), s_k.slice(C * 64, 64, 1), b_zero, use_acc=False, is_async=True)
    else:  # 128 rows
        t_dq = warpgroup_mma(s_ds.slice(C * 64, 64, 1).permute((1, 0)), s_k, b_zero, use_acc=False, is_async=True)
    if GATED:
        b_dv, b_row, _ = warpgroup_mma_wait(1, (t_dv, t_row, b_weights))
        # The sum of equal columns is eight times one, exactly.
        gl.atomic_add(p_gate + gl.arange(0, LEAF, gl.SliceLayout(1, EIGHT)), gl.sum(b_row, 1) * 0.125, sem="relaxed")
    else:
        b_dv, _ = warpgroup_mma_wait(1, (t_dv, b_weights))
    mbarrier.arrive(do_empty, count=1)
    t_dk = warpgroup_mma(b_ds_operand, s_part, b_dk, is_async=True)
    if BY_PRODUCT:
        b_terms = gl.convert_layout(b_ds_operand, ONES)
        t_column = warpgroup_mma(b_terms, s_ones.slice(0, COLUMNS, 0), b_column, is_async=True)
    b_dq = warpgroup_mma_wait(2 if BY_PRODUCT else 1, (t_dq,))
    tma.store_wait(0)
    s_dq.store(b_dq)
    fence_async_shared()
    tma_reduce_add(t_d_query_rows, [i_d_row, i_d_column], s_dq)
    if BY_PRODUCT:
        b_dk, b_column, _, _ = warpgroup_mma_wait(0, (t_dk, t_column, b_ds_operand, b_terms))
    else:
        b_dk, _ = warpgroup_mma_wait(0, (t_dk, b_ds_operand))
    mbarrier.arrive(q_empty, count=1)
    return b_dk, b_dv, b_column


@gluon.jit
def _consume(
    t_d_query_rows, t_d_key_rows, t_d_values, p_d_key_rows, p_gate_key, p_gate, s_k, s_v, s_q, s_do, s_lse, s_delta,
    s_ds, s_dq, s_ones, k_full, k_empty, v_full, q_full, q_empty, do_full, do_empty, ds_full, done, i_row, i_index,
    s_count, i_query_base, i_key_base, i_row_base, i_head, H, num_levels, query_slots, key_slots, row_slots,
    C: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, HELD: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Keys of leaf C of the pair."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    b_dv = gl.full([LEAF, DV], 0.0, gl.float32, V)
    mbarrier.wait(v_full, 0)
    b_v = s_v.slice(C * LEAF, LEAF, 0)
    if HELD:
        b_v = b_v.load(OPERAND)
    i_stage = 0
    s_phase = 0
    i_k = 0
    s_k_phase = 0
    s_steps = 0
    for level in range(1, num_levels):
        i_first, s_leaves = right_sibling(i_index, s_count, level)
        if s_leaves > 0:
            i_query_row = (level * query_slots + i_query_base + within(i_first, level)) * LEAF
            s_tiles = (s_leaves * LEAF + ROWS - 1) // ROWS
            mbarrier.wait(k_full.index(i_k), s_k_phase)
            s_keys = s_k.index(i_k)
            b_k = s_keys.slice(C * LEAF, LEAF, 0)
            if HELD:
                b_k = b_k.load(OPERAND)
            i_key_row = (level * key_slots + i_key_base + within(i_index, level) + C) * LEAF
            b_dk = gl.full([LEAF, D], 0.0, gl.float32, K)
            b_column = no_columns(COLUMNS, D)
            i_query_head = i_head * GROUP
            i_tile_row = 0
            for _ in range(s_tiles * GROUP):
                i_row_of_all = i_tile_row
                i_d_row = i_query_row + i_tile_row
                i_d_column = i_query_head * D
                if ROWS == 64:
                    i_d_column += C * 64
                else:
                    i_d_row += C * 64
                    i_row_of_all += C * 64
                p_gates_of_keys = p_gate_key
                p_gate_of_head = p_gate
                p_gate_of_tile = p_gate
                if GATED:
                    p_gates_of_keys += gates_of_head(i_query_head, num_levels, key_slots) + i_key_row
                    p_gate_of_head += gates_of_head(i_query_head, 1, row_slots) + i_row_base * LEAF
                    p_gate_of_tile = p_gate_of_head + i_first * LEAF + i_row_of_all
                b_dk, b_dv, b_column = _step(
                    b_dk, b_dv, b_column, b_k, b_v, s_keys, s_q.index(i_stage), s_do.index(i_stage),
                    s_lse.index(i_stage), s_delta.index(i_stage), s_ds.index(s_steps & 1), s_dq.index(C), s_ones,
                    q_full.index(i_stage), q_empty.index(i_stage), do_full.index(i_stage), do_empty.index(i_stage),
                    ds_full, t_d_query_rows, i_d_row, i_d_column, p_gates_of_keys, p_gate_of_tile, s_phase,
                    s_steps & 1, C, ROWS, COLUMNS, D, DV, 1.0, GATED
                )  # fmt: skip
                i_tile_row += ROWS
                is_last = i_tile_row == s_tiles * ROWS  # of a query head
                if GATED:  # noqa: SIM102  known to the compiler, the other condition is not
                    if is_last:
                        b_sums, o_key = columns_and_places(b_column, COLUMNS, D)
                        p_gates = p_gate_of_head + (i_index + C) * LEAF + o_key
                        gl.atomic_add(p_gates, -b_sums, sem="relaxed")
                        b_column = b_column * 0.0
                i_query_head += gl.where(is_last, 1, 0)
                i_tile_row = gl.where(is_last, 0, i_tile_row)
                s_steps += 1
                i_stage, s_phase = _advance(i_stage, s_phase, STAGES)
            mbarrier.arrive(k_empty.index(i_k), count=1)
            i_k, s_k_phase = _advance(i_k, s_k_phase, 2)
            b_dk = b_dk * (1 / LOG2_E)
            if p_d_key_rows is None:
                tma.store_wait(0)
                s_dk = reinterpret(s_dq.index(C), t_d_key_rows.dtype, [128 // D, LEAF, D], t_d_key_rows.layout).index(0)
                s_dk.store(b_dk.to(t_d_key_rows.dtype))
                fence_async_shared()
                async_store(t_d_key_rows, [i_key_row, i_head * D], s_dk)
            else:
                p_rows = p_d_key_rows + (gl.cast(i_key_row, gl.int64) * H + i_head) * D
                o_row = gl.arange(0, LEAF, gl.SliceLayout(1, K))[:, None]
                o_column = gl.arange(0, D, gl.SliceLayout(0, K))[None, :]
                gl.store(p_rows + (o_row * (H * D) + o_column), b_dk)
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)  # the other consumer may still read the last queries
    s_tiles_read = s_q if C == 0 else s_do
    s_dv = reinterpret(s_tiles_read, gl.float32, [128 // DV, LEAF, DV], t_d_values.layout).index(0)
    s_dv.store(b_dv)
    fence_async_shared()
    tma_reduce_add(t_d_values, [i_row + C * LEAF, i_head * DV], s_dv)
    tma.store_wait(0)


@gluon.jit
def buffers_of_queries(
    t_query_rows, t_d_out, t_log_sum_exp, t_delta, t_d_query_rows, ROWS: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """s_q, s_do, s_lse, s_delta, s_ds, s_dq and s_ones: STAGES tiles of what comes, and what two consumers share."""
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAIR, ROWS], t_query_rows.dtype)
    s_q = gl.allocate_shared_memory(t_query_rows.dtype, [STAGES, ROWS, D], t_query_rows.layout)
    s_do = gl.allocate_shared_memory(t_d_out.dtype, [STAGES, ROWS, DV], t_d_out.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], t_log_sum_exp.layout)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], t_delta.layout)
    s_ds = gl.allocate_shared_memory(t_query_rows.dtype, [2, PAIR, ROWS], DS)
    s_dq = gl.allocate_shared_memory(gl.float32, [2, 64, 64], t_d_query_rows.layout)
    s_ones = s_ds  # a stand-in that nobody reads
    if GATED:
        ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, ROWS], t_query_rows.dtype)
        s_eight = gl.allocate_shared_memory(t_query_rows.dtype, [8, ROWS], ONES)
        s_eight.store(gl.full([8, ROWS], 1.0, t_query_rows.dtype, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
        s_ones = s_eight.permute((1, 0))
    return s_q, s_do, s_lse, s_delta, s_ds, s_dq, s_ones


@gluon.jit
def barriers_of_tiles(STAGES: gl.constexpr):
    """q_full, q_empty, do_full and do_empty of STAGES tiles of queries, for two consumers."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i_stage), count=1)
        mbarrier.init(q_empty.index(i_stage), count=2)
        mbarrier.init(do_full.index(i_stage), count=1)
        mbarrier.init(do_empty.index(i_stage), count=2)
    return q_full, q_empty, do_full, do_empty


@gluon.jit(do_not_specialize=COUNTS)
def dense_backward_kernel(
    t_query_rows,  # descriptor of (levels * query_slots * 64, HQ * D) in tiles of ROWS, times log2(e)
    t_key_rows,  # descriptor of (levels * key_slots * 64, H * D) in tiles of a pair
    t_values,  # descriptor of (T, H * DV) in tiles of a pair
    t_d_out,  # descriptor of (T, HQ * DV) in tiles of ROWS
    t_log_sum_exp,  # descriptor of (HQ, row_slots * 64), with gates (HQ, levels * query_slots * 64): output_rows_kernel
    t_delta,  # descriptor of (HQ, row_slots * 64); both float32 in tiles of ROWS
    t_d_query_rows,  # descriptor of float32 zeros like the query rows in tiles of 64 x 64
    t_d_key_rows,  # descriptor of out (levels * key_slots * 64, H * D) in tiles of a leaf, in half precision; or None
    t_d_values,  # descriptor of (T, H * DV) float32 in tiles of a leaf: added to
    p_d_key_rows,  # out (levels, key_slots, 64, H, D) float32 or None: a tile has no room for its rows
    p_gate_key,  # (HQ, levels, key_slots, 64) float32, base 2; None without gates
    p_gate,  # (HQ, row_slots, 64) float32 or None: row sums less column sums of dS are added to it
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    num_turns,
    num_groups,  # key heads of all sequences, or of the one row that the table cuts up
    num_levels,
    query_slots,
    key_slots,
    row_slots,
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
    """Levels from 1 on of one pair of leaves as keys, and one key head with its query heads."""
    i_turn, i_sequence, i_head = turn_and_head(gl.program_id(0), num_turns, num_groups, H, s_section)
    i_row, i_index, s_count, i_query_base, i_key_base, i_row_base = place_of_keys(
        i_turn, i_sequence, p_table, table_leaves, table_length, table_queries, table_keys
    )
    if i_index + 2 >= s_count:
        return
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    s_k = gl.allocate_shared_memory(t_key_rows.dtype, [2, PAIR, D], t_key_rows.layout)
    s_v = gl.allocate_shared_memory(t_values.dtype, [PAIR, DV], t_values.layout)
    GATED: gl.constexpr = p_gate is not None
    s_q, s_do, s_lse, s_delta, s_ds, s_dq, s_ones = buffers_of_queries(
        t_query_rows, t_d_out, t_log_sum_exp, t_delta, t_d_query_rows, ROWS, D, DV, STAGES, GATED
    )
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(v_full, count=1)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(done, count=2)
    for i_k in gl.static_range(2):
        mbarrier.init(k_full.index(i_k), count=1)
        mbarrier.init(k_empty.index(i_k), count=2)
    q_full, q_empty, do_full, do_empty = barriers_of_tiles(STAGES)
    fence_async_shared()
    # Arguments are written in place: a tuple held in a variable would make tensors of its constexprs.
    gl.warp_specialize(
        [
            (
                _produce,
                (
                    t_query_rows, t_key_rows, t_values, t_d_out, t_log_sum_exp, t_delta, s_k, s_v, s_q, s_do, s_lse,
                    s_delta, k_full, k_empty, v_full, q_full, q_empty, do_full, do_empty, i_row, i_index, s_count,
                    i_query_base, i_key_base, i_row_base, i_head, num_levels, query_slots, key_slots, GROUP, ROWS,
                    D, DV, STAGES, GATED
                ),
            ),
            (
                _consume,
                (
                    t_d_query_rows, t_d_key_rows, t_d_values, p_d_key_rows, p_gate_key, p_gate, s_k, s_v, s_q, s_do,
                    s_lse, s_delta, s_ds, s_dq, s_ones, k_full, k_empty, v_full, q_full, q_empty, do_full, do_empty,
                    ds_full, done, i_row, i_index, s_count, i_query_base, i_key_base, i_row_base, i_head, H,
                    num_levels, query_slots, key_slots, row_slots, 0, GROUP, ROWS, COLUMNS, D, DV, STAGES, HELD, GATED
                ),
            ),
            (
                _consume,
                (
                    t_d_query_rows, t_d_key_rows, t_d_values, p_d_key_rows, p_gate_key, p_gate, s_k, s_v, s_q, s_do,
                    s_lse, s_delta, s_ds, s_dq, s_ones, k_full, k_empty, v_full, q_full, q_empty, do_full, do_empty,
                    ds_full, done, i_row, i_index, s_count, i_query_base, i_key_base, i_row_base, i_head, H,
                    num_levels, query_slots, key_slots, row_slots, 1, GROUP, ROWS, COLUMNS, D, DV, STAGES, HELD, GATED
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
