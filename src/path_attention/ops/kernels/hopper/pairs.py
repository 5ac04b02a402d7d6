"""Launchers of attention between two pieces of a split sequence on Hopper.

    queries     (batch, rows, HQ, D)    moved and times scale; values' half or float16
    keys        (batch, keys, H, D)     likewise
    values      (batch, keys, H, D)
    gate_query  (batch, rows, HQ) float32, added to the logits of a row; None without gates
    gate_key    (HQ, batch, keys) float32, added to those of a key

all contiguous. HQ is a multiple of H. Keys before first_key take no part.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from path_attention.ops.kernels.dense import L2_CACHE
from path_attention.ops.kernels.hopper.dense import _OPTIONS, PAIR, Options, _descriptor, _number_descriptor
from path_attention.ops.kernels.hopper.pair_kernels import pair_backward_kernel, pair_forward_kernel
from path_attention.ops.kernels.launch import launch_kernel
from path_attention.ops.kernels.leaf_table import LEAF

# Rows of numbers in float32 that descriptors take begin at 16 bytes.
NUMBERS = 4


@dataclass(frozen=True)
class Operands:
    queries: Tensor
    keys: Tensor
    values: Tensor
    gate_query: Tensor | None
    gate_key: Tensor | None
    first_key: int

    @property
    def tiles(self) -> int:
        """Of keys."""
        return (self.keys.shape[1] - self.first_key) // PAIR

    @property
    def padded(self) -> int:
        """Rows of a sequence in whole tiles."""
        return triton.cdiv(self.queries.shape[1], PAIR) * PAIR

    @property
    def options(self) -> Options:
        return _OPTIONS[self.queries.shape[3]]

    @property
    def group(self) -> int:
        return self.queries.shape[2] // self.keys.shape[2]

    def numbers(self, x: Tensor, fill: float) -> Tensor:
        """(batch, rows, HQ) -> (HQ, batch, padded)."""
        missing = self.padded - x.shape[1]
        return torch.nn.functional.pad(x.permute(2, 0, 1), (0, missing), value=fill).contiguous()

    def arguments(self, of_output: Tensor, first_row: int) -> dict[str, object]:
        """What both kernels take."""
        dim = self.queries.shape[3]
        return {
            "s_rows": self.queries.shape[1],
            "s_out": of_output.shape[1],
            "s_padded": self.padded,
            "s_keys": self.keys.shape[1],
            "i_first_row": first_row,
            "i_first_key": self.first_key,
            "GROUP": self.group,
            "D": dim,
            "DV": dim,
            "REGISTERS": self.options.registers,
            "num_warps": 4,
        }


def _section(rows: int, row_bytes: int) -> int:
    """Heads, a power of two, that share the L2 cache: so many rows of each are read by all programs of its own."""
    return 1 << max(0, (L2_CACHE // (rows * row_bytes)).bit_length() - 1)


def unsupported_reason(keys: int, first_key: int) -> str | None:
    """Why these kernels cannot serve a pair whose rows they serve, or None."""
    if keys % NUMBERS:
        return f"{keys} keys of a piece are not a multiple of {NUMBERS}"
    if (keys - first_key) % PAIR or keys == first_key:
        return f"{keys - first_key} keys are not a multiple of {PAIR}"
    return None


def forward(x: Operands, out: Tensor, log_sum_exp: Tensor, first_row: int) -> None:
    """Go on from attention over other keys, rows first_row .. first_row + rows of out (batch, L, HQ, D), in float32 or
    the values' dtype, and of log_sum_exp (batch, L, HQ) float32, in place.
    """
    assert unsupported_reason(x.keys.shape[1], x.first_key) is None
    batch, rows, query_heads, dim = x.queries.shape
    turns, options = triton.cdiv(rows, PAIR), x.options
    gate_query = None if x.gate_query is None else x.numbers(x.gate_query, 0.0)
    launch_kernel(
        pair_forward_kernel,
        (turns * batch * query_heads,),
        t_query_rows=_descriptor(x.queries, LEAF, dim),
        t_key_rows=_descriptor(x.keys, PAIR, dim),
        t_values=_descriptor(x.values, PAIR, dim),
        t_gate_query=None if gate_query is None else _number_descriptor(gate_query, LEAF),
        t_gate_key=None if x.gate_key is None else _number_descriptor(x.gate_key, PAIR),
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        num_turns=turns,
        num_groups=batch * query_heads,
        s_tiles=x.tiles,
        HQ=query_heads,
        s_section=x.group * _section(x.tiles * PAIR, 2 * dim * x.keys.element_size()),  # keys and values
        STAGES=options.stages,
        TURNS=options.turns,
        **x.arguments(out, first_row),
    )


def backward(
    x: Operands,
    d_out: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    factor: Tensor,
    first_row: int,
    d_keys: Tensor,
    d_values: Tensor,
    d_gate_key: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Add to d_keys and d_values, like keys and values in float32, and with gates to d_gate_key, like gate_key: column
    sums of dS. Returns the gradient of the queries and, with gates, row sums of dS (batch, rows, HQ), both in float32
    and times factor (1,): the power of two that keeps dS in half precision's range, delta_kernel's.

    d_out (batch, L, HQ, D) in the values' dtype; log_sum_exp, and delta = rowsum(d_out * out), of the whole attention,
    (batch, L, HQ) float32; of these the rows from first_row on.
    """
    assert unsupported_reason(x.keys.shape[1], x.first_key) is None
    batch, rows, _, dim = x.queries.shape
    heads, options = x.keys.shape[2], x.options
    own = slice(first_row, first_row + rows)
    shifted = -log_sum_exp[:, own] if x.gate_query is None else x.gate_query - log_sum_exp[:, own]
    of_rows = x.numbers(shifted + factor.log(), float("-inf")), x.numbers(-delta[:, own], 0.0)
    d_queries = torch.zeros(x.queries.shape, dtype=torch.float32, device=d_out.device)
    gate_row = None if x.gate_query is None else torch.zeros_like(of_rows[0])
    launch_kernel(
        pair_backward_kernel,
        (x.tiles * batch * heads,),
        t_query_rows=_descriptor(x.queries, options.rows, dim),
        t_key_rows=_descriptor(x.keys, PAIR, dim),
        t_values=_descriptor(x.values, PAIR, dim),
        t_d_out=_descriptor(d_out, options.rows, dim),
        t_log_sum_exp=_number_descriptor(of_rows[0], options.rows),
        t_delta=_number_descriptor(of_rows[1], options.rows),
        t_d_query_rows=_descriptor(d_queries, 64, 64),
        t_d_key_rows=_descriptor(d_keys, LEAF, dim),
        t_d_values=_descriptor(d_values, LEAF, dim),
        p_factor=factor,
        p_gate_key=x.gate_key,
        p_gate_row=gate_row,
        p_gate_column=d_gate_key,
        num_turns=x.tiles,
        num_groups=batch * heads,
        s_tiles=x.padded // options.rows,
        H=heads,
        # Queries, gradients of the output and those of the queries.
        s_section=_section(x.padded * x.group, 2 * dim * x.queries.element_size() + 4 * dim),
        ROWS=options.rows,
        COLUMNS=options.gated_columns if gate_row is not None else options.columns,
        HELD=options.held and gate_row is None,
        STAGES=options.backward_stages,
        **x.arguments(d_out, first_row),
    )
    return d_queries, None if gate_row is None else gate_row[..., :rows].permute(1, 2, 0)
