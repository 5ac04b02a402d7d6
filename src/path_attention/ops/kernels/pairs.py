"""Launchers of softmax attention with gates and without a mask: a pair of pieces of a split sequence.

    queries     (batch, HQ, rows, D)       times scale           gate_query  (batch, HQ, rows) float32
    keys        (batch, H, keys, D)                              gate_key    (batch, HQ, keys) float32
    values      (batch, H, keys, DV)

all contiguous. HQ is a multiple of H. Results are those of torch's kernels in engines/dense.py, with gates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.ops.kernels import dense
from path_attention.ops.kernels.launch import launch_kernel
from path_attention.ops.kernels.leaf_table import LEAF
from path_attention.ops.kernels.pair_kernels import (
    pair_backward_keys_kernel,
    pair_backward_queries_kernel,
    pair_forward_kernel,
)

# Rows, and keys: whole tiles of the widest options, so that no loop needs a mask.
ROWS, KEYS = LEAF, 2 * LEAF
# Row lengths that tensor descriptors and asynchronous copies take in half precision.
COLUMNS = 16
MAX_DIM = 128


class Operands(NamedTuple):
    queries: Tensor
    keys: Tensor
    values: Tensor
    gate_query: Tensor
    gate_key: Tensor


class Gradients(NamedTuple):
    """In float32."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    gate_row: Tensor  # (batch, HQ, rows): row sums of dS
    gate_column: Tensor  # (batch, HQ, keys): its column sums


def unsupported_reason(dtype: torch.dtype, rows: int, keys: int, dim: int, value_dim: int, total: int) -> str | None:
    """Why these kernels cannot serve a pair, or None. ``total``: rows of all heads, or keys if they are more."""
    if dtype != torch.bfloat16:
        return f"rows are {dtype}, not bfloat16"
    if rows % ROWS or keys % KEYS or not rows or not keys:
        return f"{rows} rows and {keys} keys are not multiples of {ROWS} and {KEYS}"
    if dim % COLUMNS or value_dim % COLUMNS or max(dim, value_dim) > MAX_DIM:
        return f"head_dim {dim} and value_dim {value_dim} are not multiples of {COLUMNS} up to {MAX_DIM}"
    if total >= 2**31:
        return f"{total} rows of all heads, which descriptors cannot count"
    return None


def _descriptor(x: Tensor, launch: dense.Launch) -> object:
    return dense._descriptor(x.view(-1, 1, x.shape[-1]), x.shape[-1], launch)


def _launches(x: Operands) -> dense.Launches:
    """Of half precision, which is what these kernels take; tests run them in float32 too."""
    return dense.launches(x.queries.shape[3], x.values.shape[3], gates=True, dtype=torch.bfloat16)


def _arguments(x: Operands) -> dict[str, object]:
    return {
        "p_queries": x.queries,
        "p_keys": x.keys,
        "p_values": x.values,
        "p_gate_query": x.gate_query,
        "p_gate_key": x.gate_key,
        "s_rows": x.queries.shape[2],
        "s_keys": x.keys.shape[2],
        "GROUP": x.queries.shape[1] // x.keys.shape[1],
        "D": x.queries.shape[3],
        "DV": x.values.shape[3],
    }


def forward(x: Operands) -> tuple[Tensor, Tensor]:
    """out (batch, HQ, rows, DV) in the dtype of the values and log_sum_exp (batch, HQ, rows) float32, with gates."""
    batch, query_heads, rows, _ = x.queries.shape
    out = x.values.new_empty(batch, query_heads, rows, x.values.shape[3])
    log_sum_exp = torch.empty_like(x.gate_query)
    launch = _launches(x).forward
    launch_kernel(
        pair_forward_kernel,
        (rows // LEAF, batch * query_heads),
        **_arguments(x),
        t_keys=_descriptor(x.keys, launch),
        t_values=_descriptor(x.values, launch),
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        KEYS=launch.tile,
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        num_stages=1,
    )
    return out, log_sum_exp


def backward(x: Operands, d_out: Tensor, log_sum_exp: Tensor, delta: Tensor) -> Gradients:
    """d_out (batch, HQ, rows, DV) in the dtype of the queries; log_sum_exp, and delta = rowsum(d_out * out), of the
    whole attention, (batch, HQ, rows) float32.
    """
    batch, query_heads, rows, _ = x.queries.shape
    found = Gradients(
        queries=torch.empty(x.queries.shape, dtype=torch.float32, device=d_out.device),
        keys=torch.empty(x.keys.shape, dtype=torch.float32, device=d_out.device),
        values=torch.empty(x.values.shape, dtype=torch.float32, device=d_out.device),
        gate_row=torch.empty_like(x.gate_query),
        gate_column=torch.empty_like(x.gate_key),
    )
    launches = _launches(x)
    of_output = {"p_d_out": d_out, "p_log_sum_exp": log_sum_exp, "p_delta": delta}
    launch = launches.backward_queries
    launch_kernel(
        pair_backward_queries_kernel,
        (rows // LEAF, batch * query_heads),
        **_arguments(x),
        **of_output,
        t_keys=_descriptor(x.keys, launch),
        t_values=_descriptor(x.values, launch),
        p_d_queries=found.queries,
        p_gate_row=found.gate_row,
        KEYS=launch.tile,
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        num_stages=1,
    )
    launch = launches.backward_keys
    launch_kernel(
        pair_backward_keys_kernel,
        (x.keys.shape[2] // LEAF, batch * x.keys.shape[1]),
        **_arguments(x),
        **of_output,
        t_queries=_descriptor(x.queries, launch),
        t_d_out=_descriptor(d_out, launch),
        p_d_keys=found.keys,
        p_d_values=found.values,
        p_gate_column=found.gate_column,
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        num_stages=1,
    )
    return found
