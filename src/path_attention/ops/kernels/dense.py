"""Launchers of the attention between sibling spans: one forward kernel, and two deterministic backward kernels.

The operands come from the linear stages (linear.py), laid out as leaf_table.py says, contiguous:

    query_rows  (levels, query_slots, 64, HQ, D)           times scale; in every leaf's slot all 64 rows are finite
    key_rows    (levels, key_slots, 64, H, D)
    values      (T, H, DV)
    gate_query  (levels, query_slots, 64, HQ) float32      added to the logits of a row; None without gates
    gate_key    (levels, key_slots, 64, HQ) float32        added to the logits of a key; None without gates

Slots that no leaf stands at are neither read for any result nor written.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from path_attention.ops.kernels.dense_kernels import (
    block_of,
    dense_backward_keys_kernel,
    dense_backward_queries_kernel,
    dense_forward_kernel,
)
from path_attention.ops.kernels.launch import launch_kernel
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, token_heads

# First compute capability whose copy engine reads tensor descriptors.
DESCRIPTOR_CAPABILITY = (9, 0)
# What it asks of the length of a row of memory, in bytes.
DESCRIPTOR_ALIGNMENT = 16
# What the keys and values of a section of heads may take, in bytes: the L2 cache of an H100 or H200.
L2_CACHE = 50 * 2**20


@dataclass(frozen=True)
class Launch:
    """Tile and launch options of one kernel."""

    leaves: int  # of 64 rows each that a program keeps in registers
    tile: int  # rows that one step of its loop reads
    num_warps: int
    num_stages: int  # tiles in shared memory: the one worked on and those on their way
    piece: int | None = None  # columns of a product of float32 rows at a time


@dataclass(frozen=True)
class Launches:
    """The three kernels' options for one width of tile."""

    forward: Launch
    backward_queries: Launch
    backward_keys: Launch


# By widest row; the fastest of those tried on one H200 at 2 x 8192 tokens of 2048 channels (docs/kernels.md).
_LAUNCHES = {
    64: Launches(
        forward=Launch(1, 64, 4, 3),
        backward_queries=Launch(1, 64, 4, 3),
        backward_keys=Launch(1, LEAF, 4, 3),
    ),
    128: Launches(
        forward=Launch(1, 64, 4, 2),
        backward_queries=Launch(1, 64, 4, 2),
        backward_keys=Launch(1, LEAF, 4, 2),
    ),
    256: Launches(
        forward=Launch(1, 64, 8, 2),
        backward_queries=Launch(1, 64, 8, 1),
        backward_keys=Launch(1, LEAF, 8, 1),
    ),
}
# With gates a tile's keys bring a number each, loaded and added: fewer, larger tiles.
_LAUNCHES_WITH_GATES = _LAUNCHES | {
    64: Launches(
        forward=Launch(1, 128, 4, 2),
        backward_queries=Launch(1, 128, 4, 2),
        backward_keys=Launch(1, LEAF, 4, 3),
    ),
}
# Float32 rows always go in pieces: whole tiles of them, each a tensor-float-32 part and the rest, take all registers
# and spill tens of KB. Chosen by what the compiler says for compute capability 8.0 and 9.0: the fewest spills.
_LAUNCHES_FLOAT32 = {
    64: Launches(*[Launch(1, 32, 4, 1, piece=32)] * 3),
    256: Launches(*[Launch(1, 32, 8, 1, piece=16)] * 3),
}


def launches(dim: int, value_dim: int, gates: bool, dtype: torch.dtype) -> Launches:
    """The options for rows of these widths."""
    of_half = _LAUNCHES_WITH_GATES if gates else _LAUNCHES
    for width, options in (_LAUNCHES_FLOAT32 if dtype == torch.float32 else of_half).items():
        if max(dim, value_dim) <= width:
            return options
    raise ValueError(f"head_dim {dim} and value_dim {value_dim} must be at most {max(_LAUNCHES)}")


def heads_of_a_section(table: LeafTable, group: int, dim: int, value_dim: int, element_size: int) -> int:
    """Query heads whose keys and values fit the L2 cache together: their programs run side by side."""
    columns = dim * table.num_levels / 2 + value_dim  # half of all leaves have keys at a level
    heads = L2_CACHE / ((LEAF << table.num_levels) * columns * element_size)
    return group * (1 << max(0, int(heads).bit_length() - 1))


def _descriptor(x: Tensor, dims: int, launch: Launch) -> TensorDescriptor | None:
    """A descriptor of x (..., heads, dim) in tiles of rows of one head, or None where there can or need be none."""
    if launch.piece is not None:
        return None
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < DESCRIPTOR_CAPABILITY:
        return None
    columns = x.shape[-2] * x.shape[-1]
    if columns * x.element_size() % DESCRIPTOR_ALIGNMENT or x.data_ptr() % DESCRIPTOR_ALIGNMENT:
        return None
    return TensorDescriptor.from_tensor(x.view(-1, columns), [launch.tile, block_of(dims)])


def _arguments(
    table: LeafTable,
    query_rows: Tensor,
    key_rows: Tensor,
    values: Tensor,
    gate_query: Tensor | None,
    gate_key: Tensor | None,
) -> dict[str, object]:
    """What all three kernels take."""
    query_heads, heads = query_rows.shape[3], key_rows.shape[3]
    dim, value_dim = query_rows.shape[4], values.shape[2]
    # Triton 3.6 makes an illegal instruction of asynchronous copies of rows that start at less than 16 bytes.
    assert not values.is_cuda or all(x * values.element_size() % DESCRIPTOR_ALIGNMENT == 0 for x in (dim, value_dim))
    return {
        "p_query_rows": query_rows,
        "p_key_rows": key_rows,
        "p_values": values,
        "p_gate_query": gate_query,
        "p_gate_key": gate_key,
        **table.arguments,
        "num_leaves": table.num_leaves,
        "num_levels": table.num_levels,
        "query_slots": table.query_slots,
        "key_slots": table.key_slots,
        "H": heads,
        "GROUP": query_heads // heads,
        "D": dim,
        "DV": value_dim,
    }


def dense_forward(
    table: LeafTable,
    query_rows: Tensor,
    key_rows: Tensor,
    values: Tensor,
    gate_query: Tensor | None,
    gate_key: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Go on from the leaves' own attention, out (T, HQ, DV) and log_sum_exp (T, HQ) float32, to the whole, in place.

    values and out may be some heads of tensors that have more of them.
    """
    if table.num_levels == 0:
        return
    query_heads, dim, value_dim = query_rows.shape[3], query_rows.shape[4], values.shape[2]
    launch = launches(dim, value_dim, gate_key is not None, values.dtype).forward
    launch_kernel(
        dense_forward_kernel,
        (table.num_leaves * query_heads,),
        **_arguments(table, query_rows, key_rows, values, gate_query, gate_key),
        t_key_rows=_descriptor(key_rows, dim, launch),
        t_values=_descriptor(values, value_dim, launch),
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        token_heads=token_heads(values),
        LEAVES=launch.leaves,
        KEYS=launch.tile,
        STAGES=launch.num_stages,
        PIECE=launch.piece,
        s_section=heads_of_a_section(table, query_heads // key_rows.shape[3], dim, value_dim, values.element_size()),
        num_warps=launch.num_warps,
        num_stages=1,
    )


def dense_backward_queries(
    table: LeafTable,
    query_rows: Tensor,
    key_rows: Tensor,
    values: Tensor,
    gate_query: Tensor | None,
    gate_key: Tensor | None,
    d_out: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    d_query_rows: Tensor,
    gate_row: Tensor | None,
) -> None:
    """Write d_query_rows, like query_rows, and with gates gate_row (T, HQ) float32, the sums of each row of dS.

    d_out is (T, HQ, DV); log_sum_exp, of the whole attention, and delta = rowsum(d_out * out) are (T, HQ) float32.
    """
    if table.num_levels == 0:
        if gate_row is not None:
            gate_row.zero_()
        return
    query_heads, dim, value_dim = query_rows.shape[3], query_rows.shape[4], values.shape[2]
    launch = launches(dim, value_dim, gate_key is not None, values.dtype).backward_queries
    launch_kernel(
        dense_backward_queries_kernel,
        (table.num_leaves * query_heads,),
        **_arguments(table, query_rows, key_rows, values, gate_query, gate_key),
        t_key_rows=_descriptor(key_rows, dim, launch),
        t_values=_descriptor(values, value_dim, launch),
        p_d_out=d_out,
        p_log_sum_exp=log_sum_exp,
        p_delta=delta,
        p_d_query_rows=d_query_rows,
        p_gate_row=gate_row,
        LEAVES=launch.leaves,
        KEYS=launch.tile,
        STAGES=launch.num_stages,
        PIECE=launch.piece,
        s_section=heads_of_a_section(table, query_heads // key_rows.shape[3], dim, value_dim, values.element_size()),
        num_warps=launch.num_warps,
        num_stages=1,
    )


def dense_backward_keys(
    table: LeafTable,
    query_rows: Tensor,
    key_rows: Tensor,
    values: Tensor,
    gate_query: Tensor | None,
    gate_key: Tensor | None,
    d_out: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    d_key_rows: Tensor,
    d_values: Tensor,
    gate_column: Tensor | None,
) -> None:
    """Write d_key_rows, like key_rows, d_values (T, H, DV) float32, summed over the levels, and with gates gate_column
    (T, HQ) float32, the sums of each column of dS. The rest as for :func:`dense_backward_queries`.
    """
    if table.num_levels == 0:
        for x in (d_values, gate_column):
            if x is not None:
                x.zero_()
        return
    query_heads, heads = query_rows.shape[3], key_rows.shape[3]
    dim, value_dim = query_rows.shape[4], values.shape[2]
    launch = launches(dim, value_dim, gate_key is not None, values.dtype).backward_keys
    launch_kernel(
        dense_backward_keys_kernel,
        (table.num_leaves * heads,),
        **_arguments(table, query_rows, key_rows, values, gate_query, gate_key),
        t_query_rows=_descriptor(query_rows, dim, launch),
        t_d_out=_descriptor(d_out, value_dim, launch),
        p_d_out=d_out,
        p_log_sum_exp=log_sum_exp,
        p_delta=delta,
        p_d_key_rows=d_key_rows,
        p_d_values=d_values,
        p_gate_column=gate_column,
        LEAVES=launch.leaves,
        QUERIES=launch.tile,
        STAGES=launch.num_stages,
        PIECE=launch.piece,
        s_section=heads_of_a_section(table, 1, dim, value_dim, values.element_size() * query_heads // heads),
        num_warps=launch.num_warps,
        num_stages=1,
    )
