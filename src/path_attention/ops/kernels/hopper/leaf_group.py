"""The leaves' backward pass on Hopper for several query heads a key head, and at head_dim 128 for one.

Gradients of what the heads share are summed over them in registers: five accumulators of 64 x 64 at head_dim 64, nine
at 128, for which a program has two warp groups. Both have all rows of a product and half of its columns each, so both
operands of every product lie in shared memory, where either group finds what the other one wrote. Tiles are as wide as
the head. All that a program reads comes by asynchronous copies: what the first head wants at once, the next head's rows
while one is computed, and what is wanted behind the last one while that is.

Waiting for a product in flight is an affair of each warp group by itself, which Triton 3.6 takes for one of all (its
issue 11047). So a tile that such a product has read is written only after a barrier behind the wait: thread_barrier, or
one that Triton puts before a product or load of something stored. gluon_emulator.py fails where none is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from path_attention.ops.kernels.hopper.dense_forward import LEAF, LOG2_E
from path_attention.ops.kernels.hopper.gluon_names import async_load_numbers, reinterpret, thread_barrier
from path_attention.ops.kernels.hopper.leaf import (
    CLOSED,
    NUMBERS,
    TILE,
    TILE_FLOAT32,
    copy_tile,
    place_of_leaf,
    power_of_two,
    put,
    scale_tile,
    store_tile,
)
from path_attention.ops.kernels.tiles import COUNTS

# Registers of an accumulator of 64 x 64, and of a tile as memory has it, 16 bytes a thread.
NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
MEMORY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
MEMORY_FLOAT32 = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0]))
ROW = gl.constexpr(gl.SliceLayout(1, NARROW))
COLUMN = gl.constexpr(gl.SliceLayout(0, NARROW))
ROWS_OF_WARP = gl.constexpr(gl.BlockedLayout([2], [32], [8], [0]))  # the same 64 numbers in each warp

# Registers of a thread: at head_dim 64 two programs share a multiprocessor, at 128 it has room for the sums of one. For
# one query head, where nothing is a loop, 560 bytes are spilled there.
_REGISTERS = {64: 128, 128: 255}


def backward_options(dim: int) -> dict[str, int]:
    """Launch options of :func:`leaf_backward_group_kernel`."""
    return {"num_warps": 8, "maxnreg": _REGISTERS[dim]}


@gluon.jit
def _zeros(COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.full([LEAF, COLUMNS], 0.0, gl.float32, LAYOUT)


@gluon.jit
def _anew(o_x):
    """o_x, but the compiler does not know: what follows from it within a loop is computed there, instead of before it,
    from where dozens of addresses and masks would be kept in registers.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [o_x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _largest(b_x):
    """Of all in one reduction: each has the warps wait for one another twice."""
    return gl.max(gl.ravel(gl.abs(b_x)), 0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _numbers(p_log_sum_exp, p_delta, p_power, o_number, m_row, i_group):
    """Log-sum-exp and delta of a head's rows, and the power of two of its d_q_left."""
    b_log_sum_exp = gl.load(p_log_sum_exp + o_number, mask=m_row, other=0.0)
    return b_log_sum_exp, gl.load(p_delta + o_number, mask=m_row, other=0.0), gl.load(p_power + i_group)


@gluon.jit
def _gates_between(b_g, s_free):
    """_gates_between of leaf.py by running sums, which each warp makes of all rows by itself; they go by s_free."""
    s_sums = reinterpret(s_free, gl.float32, [2, LEAF], NUMBERS)
    s_sums.index(0).store(gl.associative_scan(gl.where(b_g < CLOSED, 0.0, b_g * LOG2_E), 0, _add))
    s_sums.index(1).store(gl.associative_scan(gl.where(b_g < CLOSED, 1.0, 0.0), 0, _add))
    # The same numbers for rows and columns: a query's own key has exactly 0.
    b_between = s_sums.index(0).load(ROW)[:, None] - s_sums.index(0).load(COLUMN)[None, :]
    same = s_sums.index(1).load(ROW)[:, None] == s_sums.index(1).load(COLUMN)[None, :]
    return gl.where(same, b_between, float("-inf"))


@gluon.jit
def _normalise(s_x, b_x):
    """b_x / p to s_x, for the power of two p of the tile; returns p and 1 / p."""
    b_x = b_x.to(gl.float32)
    s_power, s_inverse = power_of_two(_largest(b_x))
    s_x.store((b_x * s_inverse).to(gl.float16))
    return s_power, s_inverse


@gluon.jit(do_not_specialize=COUNTS)
def leaf_backward_group_kernel(
    p_q,
    p_k,
    p_v,
    p_w,
    p_beta,
    p_g,
    p_inverse,
    p_y,
    p_u,
    p_log_sum_exp,
    p_delta,
    p_d_out,
    p_d_q_left,
    p_d_q_left_power,
    p_d_k_right,
    p_d_k_right_power,
    p_d_node,
    p_d_node_power,
    p_d_values,
    p_factor,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_d_q,
    p_d_k,
    p_d_v,
    p_d_w,
    p_d_beta,
    p_d_gate,
    scale,
    H,
    token_heads,
    GROUP: gl.constexpr,
    D: gl.constexpr,
):
    """leaf_backward_kernel of leaf_kernels.py for D = DV: its arguments, and what it computes, but with Y and U, their
    gradients, E, F and dT negated, so that every product is added. The comments say what the tiles of shared memory
    hold.
    """
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    HEADROOM: gl.constexpr = 0.0625  # as there
    HALF: gl.constexpr = p_q.dtype.element_ty
    HQ = H * GROUP
    i_leaf = gl.program_id(0) // H
    i_head = gl.program_id(0) % H
    i_row, s_rows, i_index, s_count = place_of_leaf(i_leaf, p_table, table_leaves, table_length)
    if s_rows == 0:
        return
    has_right = i_index + 1 < s_count
    i_tile = i_leaf * H + i_head
    i_node = 2 * i_leaf * H + i_head
    i_first = i_head * GROUP  # of the group's query heads
    key_stride = token_heads * D
    query_stride = token_heads * GROUP * D
    own_key_stride = H * D  # of what lies between the kernels
    own_query_stride = HQ * D
    o_query = gl.cast(i_row, gl.int64) * query_stride + i_first * D
    p_q += o_query
    p_d_out += o_query
    p_d_q += o_query
    p_d_q_left += gl.cast(i_leaf * LEAF, gl.int64) * own_query_stride + i_first * D
    p_k += i_head * D
    p_v += i_head * D
    p_w += i_head * D
    p_d_k_right += i_head * D
    p_d_values += i_head * D
    p_d_k += i_head * D
    p_d_v += i_head * D
    p_d_w += i_head * D
    # The next head's rows of q and d_q_left as they come; behind the last head dP, which is as large as both at 128 and
    # leaves room for dk_right at 64; dk.
    s_next = gl.allocate_shared_memory(gl.float16, [2, LEAF, D], TILE)
    s_q = gl.allocate_shared_memory(gl.float16, [LEAF, D], TILE)  # then E, dw
    s_do = gl.allocate_shared_memory(HALF, [LEAF, D], TILE)  # then dv, dU, beta dT
    # W as it comes; d_q_left, and dq on its way out.
    s_dq = gl.allocate_shared_memory(gl.float16, [2, LEAF, D], TILE)
    s_w = gl.allocate_shared_memory(gl.float16, [LEAF, D], TILE)
    s_k = gl.allocate_shared_memory(gl.float16, [LEAF, D], TILE)
    s_u = gl.allocate_shared_memory(gl.float16, [LEAF, D], TILE)
    s_v = gl.allocate_shared_memory(HALF, [LEAF, D], TILE)  # then T^-1
    s_y = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_x = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)  # then beta F
    s_ds = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)  # sums of gates first; then dY, dT
    s_dx = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)  # the weights first; then F
    s_next_q = reinterpret(s_next.index(0), HALF, [LEAF, D], TILE)
    s_next_dq_left = s_next.index(1)
    s_dq_left = s_dq.index(0)
    s_out = reinterpret(s_dq.index(1), HALF, [LEAF, D], TILE)
    s_matrix = reinterpret(s_next, gl.float16, [D, D], TILE)
    s_edge = s_next_dq_left
    if D == 128:
        s_edge = gl.allocate_shared_memory(gl.float16, [LEAF, D], TILE)  # dk_right
    s_inverse = reinterpret(s_v, gl.float16, [LEAF, 64], TILE)
    dtype: gl.constexpr = p_w.dtype.element_ty
    s_given = reinterpret(s_dq, dtype, [LEAF, D], TILE_FLOAT32 if dtype == gl.float32 else TILE)
    o_tile_row = gl.arange(0, LEAF, gl.SliceLayout(1, MEMORY))
    o_tile_column = gl.arange(0, D, gl.SliceLayout(0, MEMORY))
    o_first = o_tile_row[:, None] * query_stride + o_tile_column[None, :]
    o_keys = o_tile_row[:, None] * key_stride + o_tile_column[None, :]
    m_first = (o_tile_row < s_rows)[:, None]
    o_leaf = gl.cast(i_row, gl.int64) * key_stride
    async_load_numbers(reinterpret(s_k, HALF, [LEAF, D], TILE), p_k + o_leaf + o_keys, mask=m_first)
    W_LAYOUT: gl.constexpr = MEMORY_FLOAT32 if dtype == gl.float32 else MEMORY
    o_w_row = gl.arange(0, LEAF, gl.SliceLayout(1, W_LAYOUT))[:, None]
    o_w = o_w_row * key_stride + gl.arange(0, D, gl.SliceLayout(0, W_LAYOUT))[None, :]
    async_load_numbers(s_given, p_w + o_leaf + o_w, mask=o_w_row < s_rows)
    copy_tile(s_u, p_u, i_tile * LEAF, LEAF, D, LEAF, D, MEMORY)
    copy_tile(s_y, p_y, i_tile * LEAF, LEAF, 64, LEAF, 64, MEMORY)
    async_load_numbers(s_next_q, p_q + o_first, mask=m_first)
    async_copy.commit_group()
    async_load_numbers(s_v, p_v + o_leaf + o_keys, mask=m_first)
    async_load_numbers(s_do, p_d_out + o_first, mask=m_first)
    o_left = o_tile_row[:, None] * own_query_stride + o_tile_column[None, :]
    async_load_numbers(s_next_dq_left, p_d_q_left + o_left)
    async_copy.commit_group()
    o_row = gl.arange(0, LEAF, ROW)
    o_column = gl.arange(0, 64, COLUMN)
    o_wide_row = gl.arange(0, LEAF, gl.SliceLayout(1, WIDE))
    o_wide_column = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    p_values = p_d_values + gl.cast(i_row, gl.int64) * own_key_stride
    o_values = o_wide_row[:, None] * own_key_stride + o_wide_column[None, :]
    b_dv = gl.load(p_values + o_values, mask=o_wide_row[:, None] < s_rows, other=0.0)
    s_factor = gl.load(p_factor)
    s_dk_power = gl.load(p_d_k_right_power + i_tile, mask=has_right, other=0.0)
    s_dp_power = gl.load(p_d_node_power + i_node, mask=has_right, other=0.0)
    i_number = gl.cast(i_row, gl.int64) * HQ + i_first
    p_log_sum_exp += i_number
    p_delta += i_number
    p_d_q_left_power += i_leaf * HQ + i_first
    if p_g is not None:
        p_g += i_number
        p_d_gate += i_number
    async_copy.wait_group(1)
    thread_barrier()
    s_k_power, s_k_inverse = _normalise(s_k, reinterpret(s_k, HALF, [LEAF, D], TILE).load(MEMORY))
    s_w.store(s_given.load(MEMORY).to(gl.float16))
    scale_tile(s_u, -1.0, MEMORY)
    scale_tile(s_y, -s_k_inverse, MEMORY)
    b_dv = b_dv.to(gl.float32) * (1.0 / s_factor)
    b_dk = _zeros(D, WIDE)
    b_dw = _zeros(D, WIDE)
    b_du = _zeros(D, WIDE)
    b_dy = _zeros(64, NARROW)
    # A head's numbers are loaded while the one before it is computed where registers do not keep the accumulators of
    # 128 columns (2 x 8192 x 32/8 heads on an H200: 0.50 to 0.46 ms at 64, 0.60 to 0.63 at 128).
    AHEAD: gl.constexpr = D == 64
    b_next_shift, b_next_delta, s_next_power = _numbers(
        p_log_sum_exp, p_delta, p_d_q_left_power, o_row * HQ, o_row < s_rows, 0
    )  # fmt: skip
    # One unit for all gradients, which the heads may raise one after another.
    s_dk_power *= s_k_power
    s_unit = gl.maximum(2.0**-100, gl.maximum(s_dk_power, s_dp_power))
    for i_group in range(GROUP):
        o_row = _anew(o_row)
        o_number = o_row * HQ + i_group
        m_query = o_row < s_rows
        causal = o_row[:, None] >= o_column[None, :]
        if not AHEAD:
            b_next_shift, b_next_delta, s_next_power = _numbers(
                p_log_sum_exp, p_delta, p_d_q_left_power, o_number, m_query, i_group
            )  # fmt: skip
        b_shift = b_next_shift * LOG2_E
        b_delta = b_next_delta
        s_dq_power = s_next_power
        if p_g is not None:
            o_of_warp = gl.arange(0, LEAF, ROWS_OF_WARP)
            b_g = gl.load(p_g + i_group + o_of_warp * HQ, mask=o_of_warp < s_rows, other=0.0).to(gl.float32)
            b_d_gate = gl.load(p_d_gate + o_number, mask=m_query, other=0.0)
        async_copy.wait_group(0)
        thread_barrier()  # with all products of the head before done
        s_q_power, s_q_inverse = _normalise(s_q, s_next_q.load(MEMORY))
        fence_async_shared()
        thread_barrier()  # what was stored first is behind a barrier already: Triton would put none behind its fence
        # The leaf's own attention again.
        b_x = warpgroup_mma(s_q, s_w.permute((1, 0)), _zeros(64, NARROW), use_acc=False)
        put(s_x, gl.where(causal, b_x, 0.0))
        t_s = warpgroup_mma(s_q, s_k.permute((1, 0)), _zeros(64, NARROW), use_acc=False, is_async=True)
        t_s = warpgroup_mma(s_x, s_y.permute((1, 0)), t_s, is_async=True)
        if p_g is not None:
            b_between = _gates_between(b_g, s_ds)
        b_s = warpgroup_mma_wait(0, (t_s,))
        b_s *= s_q_power * s_k_power * scale * LOG2_E
        if p_g is not None:
            b_s += b_between
        b_p = gl.exp2(b_s - b_shift[:, None])
        b_p = gl.where(causal & m_query[:, None], b_p, 0.0)
        s_weights = reinterpret(s_dx, HALF, [LEAF, 64], TILE)
        put(s_weights, b_p)
        t_dp = warpgroup_mma(s_do, s_v.permute((1, 0)), _zeros(64, NARROW), use_acc=False, is_async=True)
        t_dv = warpgroup_mma(s_weights.permute((1, 0)), s_do, b_dv, is_async=True)
        b_dp, b_dv = warpgroup_mma_wait(0, (t_dp, t_dv))
        b_ds = b_p * (b_dp - b_delta[:, None])
        if p_g is not None:
            b_d_gate += gl.sum(b_ds, 1) - gl.convert_layout(gl.sum(b_ds, 0), ROW)
            gl.store(p_d_gate + o_number, b_d_gate, mask=m_query)
        s_dq_power *= s_q_power * scale
        s_ds_power, _inverse = power_of_two(_largest(b_ds))
        s_ds_scale = s_q_power * s_k_power * scale
        s_raised = gl.maximum(s_unit, gl.maximum(s_ds_power * s_ds_scale, s_dq_power))
        s_ratio = s_unit / s_raised
        s_unit = s_raised
        s_gradient = HEADROOM / s_unit
        if GROUP > 1:  # there are sums by now
            b_dk *= s_ratio
            b_dw *= s_ratio
            b_du *= s_ratio
            b_dy *= s_ratio
        s_ds.store((b_ds * (s_ds_scale * s_gradient)).to(gl.float16))
        put(s_dq_left, s_next_dq_left.load(MEMORY).to(gl.float32) * (s_dq_power * s_gradient))
        t_dx = warpgroup_mma(s_ds, s_y, _zeros(64, NARROW), use_acc=False, is_async=True)
        t_dx = warpgroup_mma(s_dq_left, s_u.permute((1, 0)), t_dx, is_async=True)
        t_dk = warpgroup_mma(s_ds.permute((1, 0)), s_q, b_dk, is_async=True)
        t_du = warpgroup_mma(s_x.permute((1, 0)), s_dq_left, b_du, is_async=True)
        t_dy = warpgroup_mma(s_ds.permute((1, 0)), s_x, b_dy, is_async=True)
        b_dx = warpgroup_mma_wait(3, (t_dx,))
        b_dx = gl.where(causal, b_dx, 0.0)
        # All threads met before these products, with dV done and what had come read: the next head's rows may come.
        o_tile_row = _anew(o_tile_row)
        o_tile = o_tile_row[:, None] * query_stride + (o_tile_column[None, :] + i_group * D)
        m_tile = (o_tile_row < s_rows)[:, None]
        p_edge = p_d_k_right + gl.cast(i_leaf * LEAF, gl.int64) * own_key_stride
        o_edge = o_tile_row[:, None] * own_key_stride + o_tile_column[None, :]
        s_right_rows = gl.where(has_right, D, 0)  # of the last leaf nobody uses k_right and P: nothing is there
        m_edge = (o_tile_row < s_right_rows)[:, None]
        # GROUP > 1 is a constant: Triton 3.6 fails at copies that only turn out never to be made.
        if GROUP > 1 and i_group + 1 < GROUP:
            o_next = o_tile + D
            async_load_numbers(s_next_q, p_q + o_next, mask=m_tile)
            async_load_numbers(s_do, p_d_out + o_next, mask=m_tile)
            o_left = o_tile_row[:, None] * own_query_stride + (o_tile_column[None, :] + i_group * D)
            async_load_numbers(s_next_dq_left, p_d_q_left + (o_left + D))
            if AHEAD:
                b_next_shift, b_next_delta, s_next_power = _numbers(
                    p_log_sum_exp, p_delta, p_d_q_left_power, o_number + 1, m_query, i_group + 1
                )  # fmt: skip
        else:
            copy_tile(s_inverse, p_inverse, i_tile * LEAF, LEAF, 64, LEAF, 64, MEMORY)
            async_load_numbers(s_edge, p_edge + o_edge, mask=m_edge)
            copy_tile(s_matrix, p_d_node, i_node * D, s_right_rows, D, D, D, MEMORY)
        async_copy.commit_group()
        put(s_dx, b_dx)
        t_dq = warpgroup_mma(s_ds, s_k, s_dq_left.load(WIDE).to(gl.float32), is_async=True)
        t_dq = warpgroup_mma(s_dx, s_w, t_dq, is_async=True)
        t_dw = warpgroup_mma(s_dx.permute((1, 0)), s_q, b_dw, is_async=True)
        b_dk, b_du, b_dy, b_dq = warpgroup_mma_wait(1, (t_dk, t_du, t_dy, t_dq))
        s_out.store((b_dq * (s_q_inverse / s_gradient)).to(HALF))
        gl.store(p_d_q + o_tile, s_out.load(MEMORY), mask=m_tile)
        b_dw = warpgroup_mma_wait(0, (t_dw,))
    p_leaf_beta = p_beta + gl.cast(i_row, gl.int64) * H + i_head
    b_beta = gl.load(p_leaf_beta + o_row * H, mask=o_row < s_rows, other=0.0).to(gl.float32)
    async_copy.wait_group(0)
    thread_barrier()
    s_gradient = HEADROOM / s_unit
    scale_tile(s_edge, s_dk_power * s_gradient, MEMORY)
    for i in gl.static_range(D // 64):
        scale_tile(s_matrix.slice(i * 64, 64, 0), s_dp_power * s_gradient, MEMORY)
    fence_async_shared()
    thread_barrier()
    t_dy = warpgroup_mma(s_edge, s_w.permute((1, 0)), b_dy, is_async=True)
    t_dw = warpgroup_mma(s_y.permute((1, 0)), s_edge, b_dw, is_async=True)
    t_du = warpgroup_mma(s_w, s_matrix, b_du, is_async=True)
    t_dw = warpgroup_mma(s_u, s_matrix.permute((1, 0)), t_dw, is_async=True)
    store_tile(p_d_v, b_dv, s_do, i_row, s_rows, key_stride, D, WIDE, MEMORY)
    b_dk += s_edge.load(WIDE).to(gl.float32)
    b_dy, b_du, b_dw = warpgroup_mma_wait(0, (t_dy, t_du, t_dw))
    # E = T^-T dU, F = T^-T dY; dT from both.
    s_ds.store(b_dy.to(gl.float16))
    s_du = reinterpret(s_do, gl.float16, [LEAF, D], TILE)
    put(s_du, b_du)
    t_f = warpgroup_mma(s_ds, s_inverse, _zeros(64, NARROW), use_acc=False, is_async=True)
    t_e = warpgroup_mma(s_inverse.permute((1, 0)), s_du, _zeros(D, WIDE), use_acc=False, is_async=True)
    b_f, b_e = warpgroup_mma_wait(0, (t_f, t_e))
    s_dx.store(b_f.to(gl.float16))
    s_e = s_q
    put(s_e, b_e)
    t_dt = warpgroup_mma(s_dx.permute((1, 0)), s_y, _zeros(64, NARROW), use_acc=False, is_async=True)
    t_dt = warpgroup_mma(s_e, s_u.permute((1, 0)), t_dt, is_async=True)
    b_f = gl.where(o_row[:, None] < o_column[None, :], b_f, 0.0)
    b_dt = warpgroup_mma_wait(0, (t_dt,))
    b_dt = gl.where(o_row[:, None] > o_column[None, :], b_dt, 0.0)
    thread_barrier()
    # Gradient of each row of D times what D multiplies: W, and below the diagonals W W^T and W K^T.
    s_dt = s_ds
    s_dt_beta = reinterpret(s_do, gl.float16, [LEAF, 64], TILE)
    s_f = s_dx
    s_f_beta = s_x
    s_dt.store(b_dt.to(gl.float16))
    s_dt_beta.store((b_dt * -b_beta[:, None]).to(gl.float16))
    s_f.store(b_f.to(gl.float16))
    put(s_f_beta, b_f * -gl.convert_layout(b_beta, COLUMN)[None, :])
    t_e = warpgroup_mma(s_dt, s_w, b_e, is_async=True)
    t_e = warpgroup_mma(s_f.permute((1, 0)), s_k, t_e, is_async=True)
    t_dw = warpgroup_mma(s_dt_beta.permute((1, 0)), s_w, b_dw, is_async=True)
    t_dk = warpgroup_mma(s_f_beta, s_w, b_dk, is_async=True)
    b_e, b_dw, b_dk = warpgroup_mma_wait(0, (t_e, t_dw, t_dk))
    b_d_beta = gl.sum(b_e * s_w.load(WIDE).to(gl.float32), 1) * (-1.0 / s_gradient)
    m_wide_row = o_wide_row < s_rows
    gl.store(p_d_beta + (gl.cast(i_row, gl.int64) * H + i_head) + o_wide_row * H, b_d_beta, mask=m_wide_row)
    b_dw -= gl.convert_layout(b_beta, gl.SliceLayout(1, WIDE))[:, None] * b_e
    # Both tiles were free before the last barriers.
    store_tile(p_d_w, b_dw / s_gradient, s_q, i_row, s_rows, key_stride, D, WIDE, MEMORY)
    b_dk *= s_k_inverse / s_gradient
    store_tile(p_d_k, b_dk, s_next_q, i_row, s_rows, key_stride, D, WIDE, MEMORY)
