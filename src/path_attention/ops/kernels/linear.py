"""Launchers of the linear-cost stages: what each allocates, and in which order they run.

leaf_transition -> tree, level by level -> leaf_queries and key_transport. What they write is all that the dense
attention between siblings needs; docs/kernels.md lists the buffers with their sizes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from path_attention.ops.kernels.leaf_kernels import (
    key_transport_backward_kernel,
    key_transport_kernel,
    leaf_queries_backward_kernel,
    leaf_queries_kernel,
    leaf_transition_backward_kernel,
    leaf_transition_kernel,
    query_transport_backward_kernel,
    tree_backward_kernel,
    tree_kernel,
)
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable

_HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: None}
# Narrowest tile of the linear stages, in columns.
MIN_BLOCK = 64


@dataclass(frozen=True)
class Inputs:
    """The operator's arguments as rows of tokens, contiguous: T = B * L of them. One reflection a token."""

    q: Tensor  # (T, HQ, D)
    k: Tensor  # (T, H, D)
    v: Tensor  # (T, H, DV)
    w: Tensor  # (T, H, D)
    beta: Tensor  # (T, H)
    g: Tensor | None  # (T, HQ)
    scale: float

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def query_heads(self) -> int:
        return self.q.shape[1]

    @property
    def options(self) -> dict[str, object]:
        """Compile-time arguments and launch options that all kernels of the linear stages take."""
        dim = self.q.shape[2]
        return {
            "GROUP": self.query_heads // self.heads,
            "D": dim,
            # At 32 columns Triton 3.6 makes an illegal memory access of the leaf's backward kernel; 64 is safe.
            "BLOCK_D": max(MIN_BLOCK, triton.next_power_of_2(dim)),
            "HALF": _HALF[self.q.dtype],
            # Loops here run a few times over whole tiles: buffering the next one would only take shared memory.
            "num_stages": 1,
        }

    @property
    def matrix_warps(self) -> int:
        """Warps of the backward kernels that hold two D x D matrices; the others have 4.

        On an H200 at D = 64 4 are 1.1 to 2 times as fast as 8 in every kernel, spills and all. At D = 128 so in every
        kernel but these two (tree_backward 1.65 ms against 1.10, leaf_transition_backward 2.28 against 1.96).
        """
        return 4 if self.q.shape[2] <= 64 else 8


@dataclass(frozen=True)
class Levels:
    """Rows at the edges of every level."""

    query_rows: Tensor  # (levels, query_slots, 64, HQ, D) dtype of q, times scale
    key_rows: Tensor  # (levels, key_slots, 64, H, D) dtype of k
    gate_query: Tensor | None  # (levels, query_slots, 64, HQ) float32
    gate_key: Tensor | None  # (levels, key_slots, 64, HQ) float32


@dataclass(frozen=True)
class Leaves:
    """What the backward pass wants again of the leaves and the tree, float32."""

    inverse: Tensor | None  # (N, H, 64, 64): T^-1; None in the forward pass
    y: Tensor  # (N, H, 64, 64)
    u: Tensor  # (N, H, 64, D)
    nodes: Tensor  # (2 N, H, D, D)


def forward(inputs: Inputs, table: LeafTable, out: Tensor, log_sum_exp: Tensor) -> Levels:
    """Run the forward linear stages; the leaves' own attention goes to out (T, HQ, DV) and log_sum_exp (T, HQ)."""
    return _leaves_and_levels(inputs, table, out, log_sum_exp)[0]


def recompute(inputs: Inputs, table: LeafTable) -> tuple[Levels, Leaves]:
    """The forward linear stages again, for the backward pass: no attention, but all that it needs of the leaves."""
    return _leaves_and_levels(inputs, table, None, None)


def _leaves_and_levels(
    inputs: Inputs, table: LeafTable, out: Tensor | None, log_sum_exp: Tensor | None
) -> tuple[Levels, Leaves]:
    q, k, w, g = inputs.q, inputs.k, inputs.w, inputs.g
    heads, query_heads, dim = inputs.heads, inputs.query_heads, q.shape[2]
    leaves, levels = table.num_leaves, table.num_levels
    options = inputs.options

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    y = float32(leaves, heads, LEAF, LEAF)
    inverse = None if out is not None else torch.empty_like(y)
    u, k_right = float32(leaves, heads, LEAF, dim), float32(leaves, heads, LEAF, dim)
    nodes = float32(2 * leaves, heads, dim, dim)
    gate_nodes = None if g is None else float32(2 * leaves, query_heads)
    result = Levels(
        query_rows=torch.empty(levels, table.query_slots, LEAF, query_heads, dim, dtype=q.dtype, device=q.device),
        key_rows=torch.empty(levels, table.key_slots, LEAF, heads, dim, dtype=k.dtype, device=q.device),
        gate_query=None if g is None else float32(levels, table.query_slots, LEAF, query_heads),
        gate_key=None if g is None else float32(levels, table.key_slots, LEAF, query_heads),
    )
    by_key_head = (leaves * heads,)
    leaf_transition_kernel[by_key_head](
        p_k=k,
        p_w=w,
        p_beta=inputs.beta,
        p_g=g,
        p_start=table.start,
        p_length=table.length,
        p_inverse=inverse,
        p_y=y,
        p_u=u,
        p_k_right=k_right,
        p_node=nodes,
        p_gate_node=gate_nodes,
        H=heads,
        **options,
        num_warps=4,
    )
    for level in range(levels - 1):
        tree_kernel[by_key_head](
            p_index=table.index,
            p_count=table.count,
            p_node=nodes,
            p_gate_node=gate_nodes,
            level=level,
            H=heads,
            **options,
            num_warps=4,
        )
    leaf_queries_kernel[(leaves * query_heads,)](
        p_q=q,
        p_k=k,
        p_v=inputs.v,
        p_w=w,
        p_g=g,
        p_y=y,
        p_u=u,
        p_node=nodes,
        p_gate_node=gate_nodes,
        p_start=table.start,
        p_length=table.length,
        p_index=table.index,
        p_query_base=table.query_base,
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        p_query_rows=result.query_rows,
        p_gate_query=result.gate_query,
        scale=inputs.scale,
        H=heads,
        query_slots=table.query_slots,
        num_levels=levels,
        DV=inputs.v.shape[2],
        BLOCK_DV=max(MIN_BLOCK, triton.next_power_of_2(inputs.v.shape[2])),
        **options,
        num_warps=4,
    )
    key_transport_kernel[by_key_head](
        p_k_right=k_right,
        p_g=g,
        p_node=nodes,
        p_gate_node=gate_nodes,
        p_start=table.start,
        p_length=table.length,
        p_index=table.index,
        p_count=table.count,
        p_key_base=table.key_base,
        p_key_rows=result.key_rows,
        p_gate_key=result.gate_key,
        H=heads,
        key_slots=table.key_slots,
        num_levels=levels,
        BLOCK_GROUP=triton.next_power_of_2(query_heads // heads),
        **options,
        num_warps=4,
    )
    return result, Leaves(inverse, y, u, nodes)


@dataclass(frozen=True)
class DenseGradients:
    """What the backward of the dense attention between siblings hands to the linear stages."""

    query_rows: Tensor  # like Levels.query_rows; overwritten
    key_rows: Tensor  # like Levels.key_rows; overwritten
    values: Tensor  # (T, H, DV) float32
    gate: Tensor | None  # (T, HQ) float32: row sums less column sums of dS


@dataclass(frozen=True)
class Gradients:
    """Where the gradients of :class:`Inputs` go, each like its input; that of g is left in d_gate."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor


@dataclass(frozen=True)
class EdgeGradients:
    """Gradients of the leaves' rows at their edges and of all transitions, float32."""

    q_left: Tensor  # (N, HQ, 64, D)
    k_right: Tensor  # (N, H, 64, D)
    nodes: Tensor  # (2 N, H, D, D)


def levels_backward(
    inputs: Inputs, table: LeafTable, levels: Levels, leaves: Leaves, dense: DenseGradients
) -> EdgeGradients:
    """From the rows at all levels' edges back to the leaves' edges: transports, and the tree from its root down."""
    q = inputs.q
    heads, query_heads, dim = inputs.heads, inputs.query_heads, q.shape[2]
    options = inputs.options
    by_key_head = (table.num_leaves * heads,)
    d_q_left = torch.empty(table.num_leaves, query_heads, LEAF, dim, dtype=torch.float32, device=q.device)
    d_k_right = torch.empty(table.num_leaves, heads, LEAF, dim, dtype=torch.float32, device=q.device)
    d_nodes = torch.empty_like(leaves.nodes)
    query_transport_backward_kernel[(table.num_leaves * query_heads,)](
        p_node=leaves.nodes,
        p_length=table.length,
        p_index=table.index,
        p_query_base=table.query_base,
        p_d_query_rows=dense.query_rows,
        p_d_q_left=d_q_left,
        H=heads,
        query_slots=table.query_slots,
        num_levels=table.num_levels,
        **options,
        num_warps=4,
    )
    key_transport_backward_kernel[by_key_head](
        p_node=leaves.nodes,
        p_length=table.length,
        p_index=table.index,
        p_count=table.count,
        p_key_base=table.key_base,
        p_d_key_rows=dense.key_rows,
        p_d_k_right=d_k_right,
        H=heads,
        key_slots=table.key_slots,
        num_levels=table.num_levels,
        **options,
        num_warps=4,
    )
    for level in reversed(range(table.num_levels)):
        tree_backward_kernel[by_key_head](
            p_index=table.index,
            p_count=table.count,
            p_query_base=table.query_base,
            p_key_base=table.key_base,
            p_query_rows=levels.query_rows,
            p_key_rows=levels.key_rows,
            p_d_query_rows=dense.query_rows,
            p_d_key_rows=dense.key_rows,
            p_node=leaves.nodes,
            p_d_node=d_nodes,
            level=level,
            H=heads,
            query_slots=table.query_slots,
            key_slots=table.key_slots,
            **options,
            num_warps=inputs.matrix_warps,
        )
    return EdgeGradients(d_q_left, d_k_right, d_nodes)


def leaves_backward(
    inputs: Inputs,
    table: LeafTable,
    leaves: Leaves,
    edges: EdgeGradients,
    d_values: Tensor,
    d_gate: Tensor | None,
    log_sum_exp: Tensor,
    delta: Tensor,
    d_out: Tensor,
    result: Gradients,
) -> None:
    """Back through the leaves, to ``result``.

    d_values and d_gate are those of :class:`DenseGradients`; d_gate is added to in place.
    log_sum_exp and delta = rowsum(d_out * out) are (T, HQ) float32, of the whole attention.
    """
    q, k, v, w = inputs.q, inputs.k, inputs.v, inputs.w
    by_key_head = (table.num_leaves * inputs.heads,)

    d_y, d_u = torch.empty_like(leaves.y), torch.empty_like(leaves.u)
    d_w, d_k = torch.empty_like(d_u), torch.empty_like(d_u)
    leaf_queries_backward_kernel[by_key_head](
        p_q=q,
        p_k=k,
        p_v=v,
        p_w=w,
        p_g=inputs.g,
        p_y=leaves.y,
        p_u=leaves.u,
        p_log_sum_exp=log_sum_exp,
        p_delta=delta,
        p_d_out=d_out,
        p_d_q_left=edges.q_left,
        p_d_values=d_values,
        p_start=table.start,
        p_length=table.length,
        p_d_q=result.q,
        p_d_v=result.v,
        p_d_y=d_y,
        p_d_u=d_u,
        p_d_w=d_w,
        p_d_k=d_k,
        p_d_gate=d_gate,
        scale=inputs.scale,
        H=inputs.heads,
        DV=v.shape[2],
        BLOCK_DV=max(MIN_BLOCK, triton.next_power_of_2(v.shape[2])),
        **inputs.options,
        num_warps=4,
    )
    leaf_transition_backward_kernel[by_key_head](
        p_k=k,
        p_w=w,
        p_beta=inputs.beta,
        p_inverse=leaves.inverse,
        p_y=leaves.y,
        p_u=leaves.u,
        p_d_y=d_y,
        p_d_u=d_u,
        p_d_w_queries=d_w,
        p_d_k_queries=d_k,
        p_d_k_right=edges.k_right,
        p_d_node=edges.nodes,
        p_start=table.start,
        p_length=table.length,
        p_index=table.index,
        p_count=table.count,
        p_d_k=result.k,
        p_d_w=result.w,
        p_d_beta=result.beta,
        H=inputs.heads,
        **inputs.options,
        num_warps=inputs.matrix_warps,
    )
