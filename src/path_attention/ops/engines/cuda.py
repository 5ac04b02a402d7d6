"""The operator on CUDA: linear stages by our Triton kernels, the attention between sibling spans by one of two ways.

Same algorithm as ops/dyadic.py, on rows of tokens as they come, (B * L, heads, dim): nothing is packed or transposed.
"""

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from path_attention.ops.engines import dense, siblings
from path_attention.ops.kernels import linear
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, batch_leaf_table, packed_leaf_table
from path_attention.ops.kernels.merge_kernels import delta_kernel

# How the attention between siblings is computed: by our fused kernel, or by torch's fastest one, level by level.
Siblings = Literal["triton", "sdpa"]

# Widest row for which a leaf's tiles fit an SM; wider ones would spill (docs/kernels.md).
MAX_DIM = 128
# Rows are padded to a multiple of this many columns: what tensor descriptors and torch's kernels ask of half precision.
COLUMNS = 16
# Rows of one program of the delta kernel: 64 x 64 tiles keep loads wide and registers few.
DELTA_ROWS = 64


def unsupported_reason(
    siblings_by: Siblings, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """Why this engine cannot serve a call in this way, or None. w is (B, L, R, H, D)."""
    length, dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    if not q.is_cuda:
        return f"q is on {q.device}, not on CUDA"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, not bfloat16 or float16"
    if w.shape[2] != 1:
        return f"{w.shape[2]} reflections a token, not 1"
    if max(dim, value_dim) > MAX_DIM:
        return f"head_dim {dim} and value_dim {value_dim} are not both at most {MAX_DIM}"
    if siblings_by == "triton":
        return None
    leaves = length // LEAF
    if g is not None:
        return "torch's attention kernels take no forget gates"
    if cu_seqlens is not None:
        return "torch's attention kernels take no packed sequences in this layout"
    if dim != value_dim or dim % dense.CUDA_COLUMNS:
        return f"head_dim {dim} and value_dim {value_dim} are not equal and a multiple of {dense.CUDA_COLUMNS}"
    if length % LEAF or leaves & (leaves - 1):
        return f"length {length} is not {LEAF} times a power of two"
    return None


class _Rows(NamedTuple):
    """The call's arguments as the kernels take them."""

    inputs: linear.Inputs
    table: LeafTable


def _pad(x: Tensor) -> Tensor:
    """(B, L, heads, dim) -> (B * L, heads, dim padded to a multiple of COLUMNS), contiguous."""
    return torch.nn.functional.pad(x.flatten(0, 1), (0, -x.shape[-1] % COLUMNS)).contiguous()


def _rows(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> _Rows:
    batch, length = q.shape[:2]
    inputs = linear.Inputs(
        q=_pad(q),
        k=_pad(k),
        v=_pad(v),
        w=_pad(w.squeeze(2)),
        beta=beta.flatten(0, 2).contiguous(),
        g=None if g is None else g.flatten(0, 1).contiguous(),
        scale=scale,
    )
    if cu_seqlens is None:
        return _Rows(inputs, batch_leaf_table(batch, length, q.device))
    return _Rows(inputs, packed_leaf_table(cu_seqlens, length, q.device))


def _like(x: Tensor, shape: torch.Size) -> Tensor:
    """Rows back to an argument's shape (B, L, ...), without the padding."""
    return x[..., : shape[-1]].reshape(shape) if x.shape[-1] != shape[-1] else x.view(shape)


def forward(
    siblings_by: Siblings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, L, HQ, DV) and log_sum_exp (B, L, HQ) float32; w (B, L, 1, H, D), beta (B, L, 1, H)."""
    inputs, table = _rows(q, k, v, w, beta, g, cu_seqlens, scale)
    out = torch.empty(*inputs.q.shape[:2], inputs.v.shape[2], dtype=q.dtype, device=q.device)
    log_sum_exp = torch.empty(out.shape[:2], dtype=torch.float32, device=q.device)
    levels = linear.forward(inputs, table, out, log_sum_exp)
    attend = siblings.triton_forward if siblings_by == "triton" else siblings.sdpa_forward
    attend(inputs, table, levels, out, log_sum_exp)
    return _like(out, torch.Size((*q.shape[:3], v.shape[3]))), log_sum_exp.view(q.shape[:3])


def backward(
    siblings_by: Siblings,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, w, beta and g, in their dtypes."""
    inputs, table = _rows(q, k, v, w, beta, g, cu_seqlens, scale)
    d_out, out, log_sum_exp = _pad(d_out), _pad(out), log_sum_exp.flatten(0, 1).contiguous()
    delta = _delta(out, d_out)
    levels, leaves = linear.recompute(inputs, table)
    if siblings_by == "triton":
        gradients = siblings.triton_backward(inputs, table, levels, d_out, log_sum_exp, delta)
    else:
        gradients = siblings.sdpa_backward(inputs, table, levels, d_out, out, log_sum_exp)
    edges = linear.levels_backward(inputs, table, levels, leaves, gradients)
    d_values, d_gate = gradients.values, gradients.gate
    del levels, gradients  # the largest buffers: their memory serves the leaves' gradients
    result = linear.leaves_backward(inputs, table, leaves, edges, d_values, d_gate, log_sum_exp, delta, d_out)
    return (
        _like(result.q, q.shape),
        _like(result.k, k.shape),
        _like(result.v, v.shape),
        _like(result.w, w.shape[:2] + w.shape[3:]).view(w.shape),
        result.beta.view(beta.shape),
        None if g is None or d_gate is None else _gate_gradient(d_gate.view(g.shape), cu_seqlens).to(g),
    )


def _delta(out: Tensor, d_out: Tensor) -> Tensor:
    """rowsum(d_out * out) of (T, HQ, DV) in float32, (T, HQ)."""
    delta = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    delta_kernel[(triton.cdiv(delta.numel(), DELTA_ROWS),)](
        p_out=out,
        p_d_out=d_out,
        p_delta=delta,
        s_rows=delta.numel(),
        DV=out.shape[2],
        BLOCK_DV=triton.next_power_of_2(out.shape[2]),
        BLOCK_ROWS=DELTA_ROWS,
        num_warps=4,
    )
    return delta


def _gate_gradient(d_gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Row sums less column sums of dS, (B, L, HQ), to the gradient of g: g_s is in the logits of all j < s <= i, so
    its gradient is the sum over the rows from s on, less the columns from s on, to the end of its sequence.
    """
    # float64: what precedes a sequence in a packed row must leave no trace of its rounding.
    total = d_gate.double().cumsum(1)
    from_here = d_gate - total
    if cu_seqlens is None:
        return from_here + total[:, -1:]
    ends = cu_seqlens.to(d_gate.device, torch.int64)
    token = torch.arange(d_gate.shape[1], device=d_gate.device)
    last = ends[torch.searchsorted(ends, token, right=True)] - 1  # of the token's sequence
    return from_here + total[:, last]
