"""The leaves on Hopper: the kernels of leaf_kernels.py with what waits kept in shared memory.

A program is one warp group; every product has its second operand, and most have both, in tiles of 64 x 64 in shared
memory, and registers hold little beside one or two accumulators, so that three programs share a multiprocessor: while
one waits for a product or for memory, another computes. All that a program reads is asked for at its beginning, or as
soon as there is room, and comes to shared memory by asynchronous copies: a load where it is wanted would have the
whole chain of products wait for memory, once for each. Forward, head dims above 64 are worked through in parts of 64
columns; backward they take the two warp groups of leaf_group.py, whose registers hold the sums that wait.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from path_attention.ops.kernels import leaf_kernels
from path_attention.ops.kernels.hopper.dense_forward import LEAF, LOG2_E
from path_attention.ops.kernels.hopper.gluon_names import async_load_numbers, reinterpret, thread_barrier
from path_attention.ops.kernels.tiles import COUNTS

# Registers of an accumulator of 64 x 64, the first operand made of one, and a tile as memory has it, 16 bytes a thread.
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, ACC, 2))
MEMORY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
MEMORY_FLOAT32 = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
# The 16 x 16 blocks on the diagonal of an accumulator as (4, 16, 16), each in the warp that has it, and as operands.
BLOCKS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
BLOCKS_LEFT = gl.constexpr(gl.DotOperandLayout(0, BLOCKS, 2))
BLOCKS_RIGHT = gl.constexpr(gl.DotOperandLayout(1, BLOCKS, 2))
BLOCK_NUMBERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
ROW = gl.constexpr(gl.SliceLayout(1, ACC))  # a number for each row of an accumulator
COLUMN = gl.constexpr(gl.SliceLayout(0, ACC))
CLOSED = gl.constexpr(leaf_kernels.CLOSED.value)
TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16))
TILE_FLOAT32 = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 64], gl.float32))
NUMBERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


# Registers of a thread. Forward at head_dim 64 three programs share a multiprocessor (0.41 ms against 0.43 with two, at
# 2 x 8192 x 32 heads on an H200, when loads were where their values are wanted); the others have shared memory for two.
_FORWARD_REGISTERS = {64: 168, 128: 255}
_BACKWARD_REGISTERS = 255


def forward_options(dim: int) -> dict[str, int]:
    """Launch options of :func:`leaf_forward_kernel`."""
    return {"num_warps": 4, "maxnreg": _FORWARD_REGISTERS[dim]}


def backward_options() -> dict[str, int]:
    """Launch options of :func:`leaf_backward_kernel`."""
    return {"num_warps": 4, "maxnreg": _BACKWARD_REGISTERS}


@gluon.jit
def place_of_leaf(i_leaf, p_table, table_leaves, table_length):
    """First row, tokens, index and sequence's leaves: ``place`` of tiles.py."""
    if p_table is None:
        i_sequence = i_leaf // table_leaves
        i_index = i_leaf - i_sequence * table_leaves
        s_tokens = gl.minimum(LEAF, table_length - i_index * LEAF)
        return i_sequence * table_length + i_index * LEAF, s_tokens, i_index, table_leaves
    else:
        p = p_table + i_leaf * 8  # COLUMNS of leaf_table.py
        return gl.load(p), gl.load(p + 1), gl.load(p + 2), gl.load(p + 3)


@gluon.jit
def _zeros():
    return gl.full([LEAF, 64], 0.0, gl.float32, ACC)


@gluon.jit
def _operand(b_x):
    """An accumulator as the first operand of a product."""
    return gl.convert_layout(b_x.to(gl.float16), OPERAND)


@gluon.jit
def copy_tile(
    s_x,
    p_x,
    i_row,
    s_rows,
    row_stride,
    ROWS: gl.constexpr = LEAF,
    COLUMNS: gl.constexpr = 64,
    LAYOUT: gl.constexpr = MEMORY,
    LAYOUT_FLOAT32: gl.constexpr = MEMORY_FLOAT32,
):
    """Have ROWS rows from i_row on come to s_x, zeros from i_row + s_rows on, in the type of p_x."""
    dtype: gl.constexpr = p_x.dtype.element_ty
    FROM: gl.constexpr = LAYOUT_FLOAT32 if dtype == gl.float32 else LAYOUT
    SHARED: gl.constexpr = TILE_FLOAT32 if dtype == gl.float32 else TILE
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, FROM))[:, None]
    o_column = gl.arange(0, COLUMNS, gl.SliceLayout(0, FROM))[None, :]
    p = p_x + gl.cast(i_row, gl.int64) * row_stride + (o_row * row_stride + o_column)
    async_load_numbers(reinterpret(s_x, dtype, [ROWS, COLUMNS], SHARED), p, mask=o_row < s_rows)


@gluon.jit
def copied(s_x, p_x):
    """What copy_tile brought."""
    dtype: gl.constexpr = p_x.dtype.element_ty
    SHARED: gl.constexpr = TILE_FLOAT32 if dtype == gl.float32 else TILE
    return reinterpret(s_x, dtype, [LEAF, 64], SHARED).load(MEMORY)


@gluon.jit
def write_tile(p_x, s_x, i_row, s_rows, row_stride, COLUMNS: gl.constexpr = 64, LAYOUT: gl.constexpr = MEMORY):
    """A tile of shared memory to rows i_row .. i_row + s_rows."""
    o_row = gl.arange(0, LEAF, gl.SliceLayout(1, LAYOUT))[:, None]
    o_column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))[None, :]
    p = p_x + gl.cast(i_row, gl.int64) * row_stride + (o_row * row_stride + o_column)
    gl.store(p, s_x.load(LAYOUT), mask=o_row < s_rows)


@gluon.jit
def store_tile(
    p_x,
    b_x,
    s_free,
    i_row,
    s_rows,
    row_stride,
    COLUMNS: gl.constexpr = 64,
    FROM: gl.constexpr = ACC,
    LAYOUT: gl.constexpr = MEMORY,
):
    """An accumulator to rows i_row .. i_row + s_rows, in the type of p_x. A thread's 8 bytes of a row make whole
    sectors of memory with its neighbours'; its 4 bytes in half precision do not, and go by the tile s_free if given.
    """
    dtype: gl.constexpr = p_x.dtype.element_ty
    if dtype == gl.float32 or s_free is None:
        o_row = gl.arange(0, LEAF, gl.SliceLayout(1, FROM))[:, None]
        o_column = gl.arange(0, COLUMNS, gl.SliceLayout(0, FROM))[None, :]
        p = p_x + gl.cast(i_row, gl.int64) * row_stride + (o_row * row_stride + o_column)
        gl.store(p, b_x.to(dtype), mask=o_row < s_rows)
    else:
        s_tile = reinterpret(s_free, dtype, [LEAF, COLUMNS], TILE)
        s_tile.store(b_x.to(dtype))
        write_tile(p_x, s_tile, i_row, s_rows, row_stride, COLUMNS, LAYOUT)


@gluon.jit
def put(s_tile, b_x):
    """To shared memory, for the products that follow: the barrier before them is the compiler's affair."""
    s_tile.store(b_x.to(s_tile.dtype))
    fence_async_shared()


@gluon.jit
def _gates_between(b_g):
    """(64, 64), base 2, from the log gates of the leaf's rows: _gates_between of leaf_kernels.py."""
    earlier = gl.arange(0, LEAF, ROW)[:, None] >= gl.arange(0, 64, COLUMN)[None, :]
    b_is_closed = gl.where(b_g < CLOSED, 1.0, 0.0)
    b_g_column = gl.convert_layout(gl.where(b_g < CLOSED, 0.0, b_g * LOG2_E), COLUMN)
    b_sum = gl.sum(gl.where(earlier, b_g_column[None, :], 0.0), 1)
    b_closed = gl.sum(gl.where(earlier, gl.convert_layout(b_is_closed, COLUMN)[None, :], 0.0), 1)
    # The same numbers for rows and columns: a query's own key has exactly 0.
    b_between = b_sum[:, None] - gl.convert_layout(b_sum, COLUMN)[None, :]
    same = b_closed[:, None] == gl.convert_layout(b_closed, COLUMN)[None, :]
    return gl.where(same, b_between, float("-inf"))


@gluon.jit
def _block_product(b_a, b_b_transposed, b_c):
    """a b + c of the blocks; registers of b^T are those of b as the second operand."""
    b_left = gl.convert_layout(b_a.to(gl.float16), BLOCKS_LEFT)
    b_right = gl.convert_layout(b_b_transposed.to(gl.float16).permute((0, 2, 1)), BLOCKS_RIGHT)
    return mma_v2(b_left, b_right, b_c)


@gluon.jit
def _inverse_blocks(b_gram, s_beta):
    """The 16 x 16 blocks on the diagonal of (I + n)^-1 as (64, 64), with zeros beside them; n as for the whole inverse.

    A block is one warp's: its products wait for no other warp, and for no memory. A second operand is what registers
    have of its transpose, so inverse and transpose go along together; that of n comes from the Gram matrix, which is
    its own.
    """
    o_row = gl.arange(0, LEAF, ROW)[:, None]
    o_column = gl.arange(0, 64, COLUMN)[None, :]
    on_diagonal = o_row // 16 == o_column // 16
    b_picked = gl.where(on_diagonal, b_gram, 0.0).reshape([4, 16, 4, 16])
    PICKED: gl.constexpr = b_picked.type.layout
    b_blocks = gl.convert_layout(gl.sum(b_picked, 2), BLOCKS)
    s_block_beta = reinterpret(s_beta, gl.float32, [4, 16], BLOCK_NUMBERS)
    b_n = -s_block_beta.load(gl.SliceLayout(2, BLOCKS))[:, :, None] * b_blocks
    b_n_transposed = -s_block_beta.load(gl.SliceLayout(1, BLOCKS))[:, None, :] * b_blocks
    o_row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, BLOCKS)))[None, :, None]
    o_column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, BLOCKS)))[None, None, :]
    pair = o_row // 2 == o_column // 2
    b_one = gl.where(o_row == o_column, 1.0, 0.0)
    b_x = b_one + gl.where(pair & (o_row > o_column), b_n, 0.0)
    b_x_transposed = b_one + gl.where(pair & (o_row < o_column), b_n_transposed, 0.0)
    b_zeros = gl.full([4, 16, 16], 0.0, gl.float32, BLOCKS)
    for doubling in gl.static_range(1, 4):
        pair = o_row >> doubling + 1 == o_column >> doubling + 1
        b_below = gl.where(pair & (o_row >> doubling > o_column >> doubling), b_n, 0.0)
        b_above = gl.where(pair & (o_row >> doubling < o_column >> doubling), b_n_transposed, 0.0)
        b_t = _block_product(b_x, b_above, b_zeros)
        b_t_transposed = _block_product(b_x_transposed, b_below, b_zeros)
        b_joined = _block_product(b_t, b_x_transposed, b_x)
        b_x_transposed = _block_product(b_t_transposed, b_x, b_x_transposed)
        b_x = b_joined
    b_spread = gl.expand_dims(gl.convert_layout(b_x, gl.SliceLayout(2, PICKED)), 2)
    b_spread, _like = gl.broadcast(b_spread, b_picked)
    return gl.where(on_diagonal, gl.convert_layout(b_spread.reshape([LEAF, 64]), ACC), 0.0)


@gluon.jit
def _unit_lower_inverse(b_gram, s_beta, s_n, s_x):
    """(I + n)^-1 in float32, as _unit_lower_inverse of leaf_kernels.py, for the n = strictLower(D gram), D of beta,
    that s_n holds; s_x is left with rubbish.
    """
    o_row = gl.arange(0, LEAF, ROW)[:, None]
    o_column = gl.arange(0, 64, COLUMN)[None, :]
    b_x = _inverse_blocks(b_gram, s_beta)
    for doubling in gl.static_range(4, 6):
        o_row_block = o_row >> doubling
        o_column_block = o_column >> doubling
        pair = (o_row_block > o_column_block) & (o_row_block >> 1 == o_column_block >> 1)
        put(s_x, b_x)
        b_t = warpgroup_mma(_operand(b_x), s_n, _zeros(), use_acc=False)
        b_x = warpgroup_mma(_operand(gl.where(pair, -b_t, 0.0)), s_x, b_x)
    return b_x


@gluon.jit(do_not_specialize=COUNTS)
def leaf_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_w,
    p_beta,
    p_g,
    p_table,
    table_leaves,
    table_length,
    table_queries,
    table_keys,
    p_q_left,
    p_k_right,
    p_node,
    p_node_rest,
    p_gate_node,
    p_out,
    p_log_sum_exp,
    p_inverse,
    p_y,
    p_u,
    scale,
    row_scale,
    H,
    token_heads,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    SPLIT_W: gl.constexpr,
):
    """leaf_forward_kernel of leaf_kernels.py, D = DV: its arguments, and what it computes."""
    PARTS: gl.constexpr = D // 64
    HQ = H * GROUP
    key_stride = token_heads * D
    query_stride = token_heads * GROUP * D
    i_leaf = gl.program_id(0) // H
    i_head = gl.program_id(0) % H
    i_row, s_rows, _, _ = place_of_leaf(i_leaf, p_table, table_leaves, table_length)
    if s_rows == 0:
        return
    s_w = gl.allocate_shared_memory(gl.float16, [PARTS, LEAF, 64], TILE)
    s_k = gl.allocate_shared_memory(gl.float16, [PARTS, LEAF, 64], TILE)
    s_q = gl.allocate_shared_memory(gl.float16, [PARTS, LEAF, 64], TILE)
    s_us = gl.allocate_shared_memory(gl.float16, [2 * PARTS, LEAF, 64], TILE)  # W as it comes; U, and its rest; v there
    s_n = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_a = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_beta = gl.allocate_shared_memory(gl.float32, [LEAF], NUMBERS)
    s_w_rest = s_w
    if SPLIT_W:
        s_w_rest = gl.allocate_shared_memory(gl.float16, [PARTS, LEAF, 64], TILE)
    dtype: gl.constexpr = p_w.dtype.element_ty
    s_given = reinterpret(s_us, dtype, [PARTS, LEAF, 64], TILE_FLOAT32 if dtype == gl.float32 else TILE)
    for i in gl.static_range(PARTS):
        copy_tile(s_given.index(i), p_w + i_head * D + i * 64, i_row, s_rows, key_stride)
        copy_tile(s_k.index(i), p_k + i_head * D + i * 64, i_row, s_rows, key_stride)
        copy_tile(s_q.index(i), p_q + i_head * GROUP * D + i * 64, i_row, s_rows, query_stride)
    async_copy.commit_group()
    o_row = gl.arange(0, LEAF, ROW)
    o_column = gl.arange(0, 64, COLUMN)
    p_leaf_beta = p_beta + gl.cast(i_row, gl.int64) * H + i_head
    b_beta = gl.load(p_leaf_beta + o_row * H, mask=o_row < s_rows, other=0.0).to(gl.float32)
    s_beta.store(b_beta)
    async_copy.wait_group(0)
    thread_barrier()
    for i in gl.static_range(PARTS):
        b_w = copied(s_given.index(i), p_w)
        b_w_rounded = b_w.to(gl.float16)
        s_w.index(i).store(b_w_rounded)
        if SPLIT_W:
            s_w_rest.index(i).store((b_w - b_w_rounded.to(gl.float32)).to(gl.float16))
        b_k = copied(s_k.index(i), p_k)
        if GROUP == 1:
            b_q = copied(s_q.index(i), p_q)
            s_q.index(i).store(b_q.to(gl.float16))
        s_k.index(i).store(b_k.to(gl.float16))
    fence_async_shared()
    thread_barrier()  # the first product reads none of what was stored last: Triton would put its own before the fence
    below = o_row[:, None] > o_column[None, :]
    # Waited for after two products: with other splits ptxas serialises all products of some variants (C7511).
    b_gram = _zeros()
    for i in gl.static_range(PARTS):
        t_gram = warpgroup_mma(s_w.index(i), s_w.index(i).permute((1, 0)), b_gram, is_async=True)
        if SPLIT_W:
            t_gram = warpgroup_mma(s_w.index(i), s_w_rest.index(i).permute((1, 0)), t_gram, is_async=True)
        b_gram = warpgroup_mma_wait(0, (t_gram,))
        if SPLIT_W:
            b_gram = warpgroup_mma(s_w_rest.index(i), s_w.index(i).permute((1, 0)), b_gram)
    b_n = gl.where(below, b_beta[:, None] * b_gram, 0.0)
    put(s_n, b_n)
    b_inverse = _unit_lower_inverse(b_gram, s_beta, s_n, s_a)
    s_n_rest = s_us.index(PARTS)  # free until U has a rest
    put(s_n_rest, b_n - b_n.to(gl.float16).to(gl.float32))
    i_tile = i_leaf * H + i_head
    if p_inverse is not None:
        store_tile(p_inverse, b_inverse, s_a, i_tile * LEAF, LEAF, 64)
    put(s_a, b_inverse * s_beta.load(COLUMN)[None, :])
    b_inverse_operand = _operand(b_inverse)
    # U and its correction by the residual D W - T U, part by part.
    for i in gl.static_range(PARTS):
        b_u = warpgroup_mma(s_a, s_w.index(i), _zeros(), use_acc=False)
        put(s_us.index(i), b_u)
    for i in gl.static_range(PARTS):
        t_product = warpgroup_mma(s_n, s_us.index(i), _zeros(), use_acc=False, is_async=True)
        t_product = warpgroup_mma(s_n_rest, s_us.index(i), t_product, is_async=True)
        b_w = s_w.index(i).load(ACC).to(gl.float32)
        if SPLIT_W:
            b_w += s_w_rest.index(i).load(ACC).to(gl.float32)
        b_product = warpgroup_mma_wait(0, (t_product,))
        b_residual = b_beta[:, None] * b_w - s_us.index(i).load(ACC).to(gl.float32) - b_product
        s_residual = s_us.index(2 * PARTS - 1 - i)  # n's rest lies in the first, which is the last one taken
        put(s_residual, b_residual)
        b_u_rest = warpgroup_mma(b_inverse_operand, s_residual, _zeros(), use_acc=False)
        if PARTS == 1:
            put(s_us.index(PARTS), b_u_rest)
        else:
            put(s_residual, b_u_rest)
    for i in gl.static_range(PARTS):
        for j in gl.static_range(PARTS):
            t_p = warpgroup_mma(s_w.index(i).permute((1, 0)), s_us.index(j), _zeros(), use_acc=False, is_async=True)
            t_p = warpgroup_mma(s_w.index(i).permute((1, 0)), s_us.index(2 * PARTS - 1 - j), t_p, is_async=True)
            if SPLIT_W:
                t_p = warpgroup_mma(s_w_rest.index(i).permute((1, 0)), s_us.index(j), t_p, is_async=True)
            b_p = -warpgroup_mma_wait(0, (t_p,))
            if i == j:
                b_p += gl.where(o_row[:, None] == o_column[None, :], 1.0, 0.0)
            b_p_rounded = b_p.to(gl.float16)
            o_node = (gl.cast(2 * i_leaf, gl.int64) * H + i_head) * D * D + j * 64
            store_tile(p_node + o_node, b_p_rounded, s_n, i * 64, 64, D)
            store_tile(p_node_rest + o_node, b_p - b_p_rounded.to(gl.float32), s_n, i * 64, 64, D)
    for i in gl.static_range(PARTS):
        b_u = s_us.index(i).load(ACC).to(gl.float32) + s_us.index(2 * PARTS - 1 - i).load(ACC).to(gl.float32)
        put(s_us.index(i), b_u)
        if p_u is not None:
            write_tile(p_u + i * 64, s_us.index(i), i_tile * LEAF, LEAF, D)
    if p_out is not None:
        thread_barrier()  # U's rest has been read
        for i in gl.static_range(PARTS):
            copy_tile(s_us.index(PARTS + i), p_v + i_head * D + i * 64, i_row, s_rows, key_stride)
        async_copy.commit_group()
    # Keys.
    b_z = _zeros()
    for i in gl.static_range(PARTS):
        b_z = warpgroup_mma(s_k.index(i), s_w.index(i).permute((1, 0)), b_z)
    b_z = gl.where(o_row[:, None] < o_column[None, :], b_z, 0.0)
    b_y = warpgroup_mma(_operand(b_z), s_a.permute((1, 0)), _zeros(), use_acc=False)
    s_y = s_n
    put(s_y, b_y)
    if p_y is not None:
        write_tile(p_y, s_y, i_tile * LEAF, LEAF, 64)
    b_y_operand = _operand(-b_y)
    for i in gl.static_range(PARTS):
        b_k_right = warpgroup_mma(b_y_operand, s_w.index(i), s_k.index(i).load(ACC).to(gl.float32))
        store_tile(p_k_right + i_head * D + i * 64, b_k_right, s_a, i_leaf * LEAF, LEAF, H * D)
    for i_group in range(GROUP):
        i_query_head = i_head * GROUP + i_group
        if GROUP > 1:
            async_copy.wait_group(0)
            thread_barrier()
            for i in gl.static_range(PARTS):
                put(s_q.index(i), copied(s_q.index(i), p_q))
        t_x = warpgroup_mma(s_q.index(0), s_w.index(0).permute((1, 0)), _zeros(), use_acc=False, is_async=True)
        if PARTS == 2:
            t_x = warpgroup_mma(s_q.index(1), s_w.index(1).permute((1, 0)), t_x, is_async=True)
        b_x = warpgroup_mma_wait(0, (t_x,))
        b_x_operand = _operand(gl.where(o_row[:, None] >= o_column[None, :], -b_x, 0.0))
        for i in gl.static_range(PARTS):
            b_q_left = warpgroup_mma(b_x_operand, s_us.index(i), s_q.index(i).load(ACC).to(gl.float32))
            store_tile(p_q_left + i_query_head * D + i * 64, b_q_left * row_scale, s_a, i_leaf * LEAF, LEAF, HQ * D)
        p_row = gl.cast(i_row, gl.int64) * HQ + i_query_head
        if p_g is not None:
            b_g = gl.load(p_g + p_row + o_row * HQ, mask=o_row < s_rows, other=0.0).to(gl.float32)
            gl.store(p_gate_node + gl.cast(2 * i_leaf, gl.int64) * HQ + i_query_head, gl.sum(b_g, 0))
        if p_out is not None:
            t_s = warpgroup_mma(s_q.index(0), s_k.index(0).permute((1, 0)), _zeros(), use_acc=False, is_async=True)
            if PARTS == 2:
                t_s = warpgroup_mma(s_q.index(1), s_k.index(1).permute((1, 0)), t_s, is_async=True)
            t_s = warpgroup_mma(b_x_operand, s_y.permute((1, 0)), t_s, is_async=True)
            b_s, _kept = warpgroup_mma_wait(0, (t_s, b_x_operand))
        # GROUP > 1 is a constant: Triton 3.6 fails at copies that only turn out never to be made.
        if GROUP > 1 and i_group + 1 < GROUP:
            thread_barrier()  # the products with this head's rows are done
            for i in gl.static_range(PARTS):
                copy_tile(s_q.index(i), p_q + (i_query_head + 1) * D + i * 64, i_row, s_rows, query_stride)
            async_copy.commit_group()
        if p_out is not None:
            b_s *= scale * LOG2_E
            if p_g is not None:
                b_s += _gates_between(b_g)
            b_s = gl.where(o_row[:, None] >= o_column[None, :], b_s, float("-inf"))
            b_max = gl.max(b_s, 1)
            b_p = gl.exp2(b_s - b_max[:, None])
            b_sum = gl.sum(b_p, 1)
            b_weights = gl.convert_layout(b_p.to(p_v.dtype.element_ty), OPERAND)
            b_inverse_sum = 1.0 / b_sum
            if GROUP == 1:
                async_copy.wait_group(0)
                fence_async_shared()
                thread_barrier()
            for i in gl.static_range(PARTS):
                s_v = reinterpret(s_us.index(PARTS + i), p_v.dtype.element_ty, [LEAF, 64], TILE)
                b_out = warpgroup_mma(b_weights, s_v, _zeros(), use_acc=False) * b_inverse_sum[:, None]
                store_tile(p_out + i_query_head * D + i * 64, b_out, s_a, i_row, s_rows, query_stride)
            gl.store(p_log_sum_exp + p_row + o_row * HQ, (b_max + gl.log2(b_sum)) / LOG2_E, mask=o_row < s_rows)


@gluon.jit
def power_of_two(s_x):
    """(p, 1 / p) for the largest power of two p that s_x > 0 reaches: power_of_two of tiles.py."""
    s_bits = s_x.to(gl.int32, bitcast=True) & 0x7F800000
    s_bits = gl.minimum(s_bits, 253 << 23)
    return s_bits.to(gl.float32, bitcast=True), ((254 << 23) - s_bits).to(gl.float32, bitcast=True)


@gluon.jit
def _largest(b_x):
    return gl.max(gl.max(gl.abs(b_x).to(gl.float32), 1), 0)


@gluon.jit
def scale_tile(s_x, scale, LAYOUT: gl.constexpr = MEMORY):
    """A float16 tile times scale, in its place."""
    s_x.store((s_x.load(LAYOUT).to(gl.float32) * scale).to(gl.float16))


@gluon.jit(do_not_specialize=COUNTS)
def leaf_backward_kernel(
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
    D: gl.constexpr,
):
    """leaf_backward_kernel of leaf_kernels.py for D = DV = 64 and a query head a key head: its arguments, and what it
    computes, dX, dY, dU, E and F negated. The comments say what the tiles of shared memory hold.
    """
    ATTENTION: gl.constexpr = p_d_out is not None
    HEADROOM: gl.constexpr = 0.0625  # as there
    HALF: gl.constexpr = p_v.dtype.element_ty
    i_leaf = gl.program_id(0) // H
    i_head = gl.program_id(0) % H
    i_row, s_rows, i_index, s_count = place_of_leaf(i_leaf, p_table, table_leaves, table_length)
    if s_rows == 0:
        return
    has_right = i_index + 1 < s_count
    stride = token_heads * D
    own_stride = H * D  # of what lies between the kernels
    i_tile = i_leaf * H + i_head
    i_node = 2 * i_leaf * H + i_head
    p_q += i_head * D
    p_k += i_head * D
    p_v += i_head * D
    p_w += i_head * D
    p_d_q_left += i_head * D
    p_d_k_right += i_head * D
    p_d_q += i_head * D
    p_d_k += i_head * D
    p_d_w += i_head * D
    if ATTENTION:
        p_d_out += i_head * D
        p_d_values += i_head * D
        p_d_v += i_head * D
    s_w = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_k = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_q = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)  # then dk
    s_v = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)  # then F where Z is
    s_do = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)  # then dU
    s_y = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_u = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_inverse = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_dq_left = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_dk_right = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)
    s_dp = gl.allocate_shared_memory(gl.float16, [64, 64], TILE)
    s_dx = gl.allocate_shared_memory(gl.float16, [LEAF, 64], TILE)  # the weights first; dX; dw
    s_pair = gl.allocate_shared_memory(gl.float16, [2, LEAF, 64], TILE)  # W as it comes
    s_x = s_pair.index(0)
    s_ds = s_pair.index(1)  # then F, beta dT
    copy_tile(s_k, p_k, i_row, s_rows, stride)
    copy_tile(s_q, p_q, i_row, s_rows, stride)
    copy_tile(s_pair, p_w, i_row, s_rows, stride)
    copy_tile(s_y, p_y, i_tile * LEAF, LEAF, 64)
    async_copy.commit_group()
    if ATTENTION:
        copy_tile(s_v, p_v, i_row, s_rows, stride)
        copy_tile(s_do, p_d_out, i_row, s_rows, stride)
    copy_tile(s_u, p_u, i_tile * LEAF, LEAF, D)
    copy_tile(s_inverse, p_inverse, i_tile * LEAF, LEAF, 64)
    copy_tile(s_dq_left, p_d_q_left, i_leaf * LEAF, LEAF, own_stride)
    s_right_rows = gl.where(has_right, LEAF, 0)  # of the last leaf nobody uses k_right and P: nothing is there
    copy_tile(s_dk_right, p_d_k_right, i_leaf * LEAF, s_right_rows, own_stride)
    copy_tile(s_dp, p_d_node + gl.cast(i_node, gl.int64) * (D * D), 0, s_right_rows, D)
    async_copy.commit_group()
    o_row = gl.arange(0, LEAF, ROW)
    o_column = gl.arange(0, 64, COLUMN)
    causal = o_row[:, None] >= o_column[None, :]
    m_row = o_row < s_rows
    p_number = gl.cast(i_row, gl.int64) * H + i_head
    b_beta = gl.load(p_beta + p_number + o_row * H, mask=m_row, other=0.0).to(gl.float32)
    s_dq_power = gl.load(p_d_q_left_power + i_tile)
    s_dk_power = gl.load(p_d_k_right_power + i_tile, mask=has_right, other=0.0)
    s_dp_power = gl.load(p_d_node_power + i_node, mask=has_right, other=0.0)
    if ATTENTION:
        b_shift = gl.load(p_log_sum_exp + p_number + o_row * H, mask=m_row, other=0.0) * LOG2_E
        b_delta = gl.load(p_delta + p_number + o_row * H, mask=m_row, other=0.0)
        s_factor = gl.load(p_factor)
        p_values = p_d_values + gl.cast(i_row, gl.int64) * own_stride
        b_dv = gl.load(p_values + (o_row[:, None] * own_stride + o_column[None, :]), mask=m_row[:, None], other=0.0)
        if p_g is not None:
            b_g = gl.load(p_g + p_number + o_row * H, mask=m_row, other=0.0).to(gl.float32)
            b_d_gate = gl.load(p_d_gate + p_number + o_row * H, mask=m_row, other=0.0)
    async_copy.wait_group(1)
    thread_barrier()
    b_k = copied(s_k, p_k).to(gl.float32)
    b_q = copied(s_q, p_q).to(gl.float32)
    s_k_power, s_k_inverse = power_of_two(_largest(b_k))
    s_q_power, s_q_inverse = power_of_two(_largest(b_q))
    s_k.store((b_k * s_k_inverse).to(gl.float16))
    s_q.store((b_q * s_q_inverse).to(gl.float16))
    s_w.store(copied(s_pair, p_w).to(gl.float16))
    scale_tile(s_y, s_k_inverse)
    fence_async_shared()
    thread_barrier()  # the first product reads none of what was stored last: Triton would put its own before the fence
    # The leaf's own attention again.
    t_x = warpgroup_mma(s_q, s_w.permute((1, 0)), _zeros(), use_acc=False, is_async=True)
    if ATTENTION:
        t_s = warpgroup_mma(s_q, s_k.permute((1, 0)), _zeros(), use_acc=False, is_async=True)
        b_x, b_s = warpgroup_mma_wait(0, (t_x, t_s))
        b_x = gl.where(causal, b_x, 0.0)
        async_copy.wait_group(0)
        put(s_x, b_x)
        s_values = reinterpret(s_v, HALF, [LEAF, 64], TILE)
        s_d_out = reinterpret(s_do, HALF, [LEAF, 64], TILE)
        thread_barrier()
        b_x_operand = _operand(-b_x)
        t_s = warpgroup_mma(b_x_operand, s_y.permute((1, 0)), b_s, is_async=True)
        t_dp = warpgroup_mma(s_d_out, s_values.permute((1, 0)), _zeros(), use_acc=False, is_async=True)
        b_s, b_dp, b_x_operand = warpgroup_mma_wait(0, (t_s, t_dp, b_x_operand))
        b_s *= s_q_power * s_k_power * scale * LOG2_E
        if p_g is not None:
            b_s += _gates_between(b_g)
        b_p = gl.exp2(b_s - b_shift[:, None])
        b_p = gl.where(causal & m_row[:, None], b_p, 0.0)
        s_weights = reinterpret(s_dx, HALF, [LEAF, 64], TILE)
        put(s_weights, b_p)
        b_dv = b_dv.to(gl.float32) * (1.0 / s_factor)
        t_dv = warpgroup_mma(s_weights.permute((1, 0)), s_d_out, b_dv, is_async=True)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if p_g is not None:
            b_d_gate += gl.sum(b_ds, 1) - gl.convert_layout(gl.sum(b_ds, 0), ROW)
            gl.store(p_d_gate + p_number + o_row * H, b_d_gate, mask=m_row)
        s_ds_power, _inverse = power_of_two(_largest(b_ds))
    else:
        b_x = gl.where(causal, warpgroup_mma_wait(0, (t_x,)), 0.0)
        async_copy.wait_group(0)
        put(s_x, b_x)
        thread_barrier()
    # One unit for all gradients.
    s_dq_power *= s_q_power * scale
    s_dk_power *= s_k_power
    s_unit = gl.maximum(s_dq_power, gl.maximum(s_dk_power, s_dp_power))
    if ATTENTION:
        s_ds_scale = s_q_power * s_k_power * scale
        s_unit = gl.maximum(s_ds_power * s_ds_scale, s_unit)
    s_gradient = HEADROOM / gl.maximum(s_unit, 2.0**-100)
    scale_tile(s_dq_left, s_dq_power * s_gradient)
    scale_tile(s_dk_right, s_dk_power * s_gradient)
    scale_tile(s_dp, s_dp_power * s_gradient)
    if ATTENTION:
        b_ds = b_ds * (s_ds_scale * s_gradient)
        put(s_ds, b_ds)
        b_dv = warpgroup_mma_wait(0, (t_dv,))
        store_tile(p_d_v, b_dv, s_v, i_row, s_rows, stride)
        t_dx = warpgroup_mma(s_ds, s_y, _zeros(), use_acc=False, is_async=True)
        t_dx = warpgroup_mma(s_dq_left, s_u.permute((1, 0)), t_dx, is_async=True)
        t_dq = warpgroup_mma(s_ds, s_k, s_dq_left.load(ACC).to(gl.float32), is_async=True)
        b_dx, b_dq = warpgroup_mma_wait(0, (t_dx, t_dq))
    else:
        fence_async_shared()
        thread_barrier()
        b_dx = warpgroup_mma(s_dq_left, s_u.permute((1, 0)), _zeros(), use_acc=False)
        b_dq = s_dq_left.load(ACC).to(gl.float32)
    b_dx = gl.where(causal, b_dx, 0.0)
    put(s_dx, b_dx)
    b_dx_operand = _operand(-b_dx)
    t_dq = warpgroup_mma(b_dx_operand, s_w, b_dq, is_async=True)
    b_dq, b_dx_operand = warpgroup_mma_wait(0, (t_dq, b_dx_operand))
    store_tile(p_d_q, b_dq * (s_q_inverse / s_gradient), None, i_row, s_rows, stride)
    t_dk = s_dk_right.load(ACC).to(gl.float32)
    t_dy = warpgroup_mma(s_dk_right, s_w.permute((1, 0)), _zeros(), use_acc=False, is_async=True)
    if ATTENTION:
        t_dk = warpgroup_mma(s_ds.permute((1, 0)), s_q, t_dk, is_async=True)
        t_dy = warpgroup_mma(s_ds.permute((1, 0)), s_x, t_dy, is_async=True)
    t_du = warpgroup_mma(s_x.permute((1, 0)), s_dq_left, _zeros(), use_acc=False, is_async=True)
    t_du = warpgroup_mma(s_w, s_dp, t_du, is_async=True)
    t_dw = warpgroup_mma(s_dx.permute((1, 0)), s_q, _zeros(), use_acc=False, is_async=True)
    t_dw = warpgroup_mma(s_y.permute((1, 0)), s_dk_right, t_dw, is_async=True)
    t_dw = warpgroup_mma(s_u, s_dp.permute((1, 0)), t_dw, is_async=True)
    if ATTENTION:
        b_dk, b_dw, b_du, b_dy = warpgroup_mma_wait(0, (t_dk, t_dw, t_du, t_dy))
    else:
        b_dk = t_dk
        b_dw, b_du, b_dy = warpgroup_mma_wait(0, (t_dw, t_du, t_dy))
    # Sums that wait for the rest, rounded as operands are.
    s_q.store(b_dk.to(gl.float16))
    s_dx.store(b_dw.to(gl.float16))
    # E = T^-T dU, F = T^-T dY; dT from both.
    put(s_do, b_du)
    b_dy_operand = _operand(b_dy)
    t_f = warpgroup_mma(b_dy_operand, s_inverse, _zeros(), use_acc=False, is_async=True)
    t_e = warpgroup_mma(s_inverse.permute((1, 0)), s_do, _zeros(), use_acc=False, is_async=True)
    b_f, b_e, b_dy_operand = warpgroup_mma_wait(0, (t_f, t_e, b_dy_operand))
    put(s_ds, b_f)
    b_f = gl.where(o_row[:, None] < o_column[None, :], b_f, 0.0)
    s_f = s_v
    put(s_f, b_f)
    b_e_operand = _operand(b_e)
    t_dt = warpgroup_mma(s_ds.permute((1, 0)), s_y, _zeros(), use_acc=False, is_async=True)
    t_dt = warpgroup_mma(b_e_operand, s_u.permute((1, 0)), t_dt, is_async=True)
    t_e = warpgroup_mma(s_f.permute((1, 0)), s_k, b_e, is_async=True)
    b_dt, b_e, b_e_operand = warpgroup_mma_wait(0, (t_dt, t_e, b_e_operand))
    b_dt = gl.where(o_row[:, None] > o_column[None, :], b_dt, 0.0)
    b_dt_operand = _operand(-b_dt)
    put(s_ds, -b_dt * b_beta[:, None])
    b_f_operand = _operand(-b_f * gl.convert_layout(b_beta, COLUMN)[None, :])
    t_e = warpgroup_mma(b_dt_operand, s_w, b_e, is_async=True)
    t_dw = warpgroup_mma(s_ds.permute((1, 0)), s_w, s_dx.load(ACC).to(gl.float32), is_async=True)
    t_dk = warpgroup_mma(b_f_operand, s_w, s_q.load(ACC).to(gl.float32), is_async=True)
    b_e, b_dw, b_dk, b_dt_operand, b_f_operand = warpgroup_mma_wait(0, (t_e, t_dw, t_dk, b_dt_operand, b_f_operand))
    b_d_beta = gl.sum(b_e * s_w.load(ACC).to(gl.float32), 1)
    b_dw += b_beta[:, None] * b_e
    store_tile(p_d_w, b_dw * (-1.0 / s_gradient), s_x, i_row, s_rows, stride)
    store_tile(p_d_k, b_dk * (s_k_inverse / s_gradient), s_do, i_row, s_rows, stride)
    gl.store(p_d_beta + p_number + o_row * H, b_d_beta * (-1.0 / s_gradient), mask=m_row)
