"""Attention of a pair of pieces, without a mask: by torch's kernels, or by ours where there are gates.

Torch's kernels take gates as further columns of queries and keys, in float32, for half precision has too few bits for
them. In bfloat16 on a GPU kernels of ours (ops/kernels/pairs.py) take the gates beside the rows instead.

Legend: B batch, H key/value heads, G query heads for each.
"""

from typing import Any, NamedTuple

from torch import Tensor

from path_attention.distributed.edges import AtEdges, Shard, pair_operands
from path_attention.distributed.pairs import Call, Pair
from path_attention.ops.backends import has_triton
from path_attention.ops.columns import fold_queries, unfold_queries
from path_attention.ops.engines import dense


class Whole(NamedTuple):
    """A pair's rows of the whole attention, views (H, G, B, rows, dim); dim is 1 in the last one."""

    d_out: Tensor
    out: Tensor
    log_sum_exp: Tensor

    def delta(self) -> Tensor:
        """rowsum(d_out * out), (H, G, B, rows), in float32."""
        return (self.d_out.float() * self.out.float()).sum(-1)


class PairGradients(NamedTuple):
    """Of the logits' and the output's factors; sums of dS where there are gates."""

    moved: Tensor  # (H, G, B, rows, D): of the queries at the right edge of the pair's keys
    k: Tensor  # (B, H, keys, D)
    v: Tensor  # (B, H, keys, DV)
    row_sums: Tensor | None  # (H, G, B, rows, 1)
    column_sums: Tensor | None  # (B, H, keys, G)


def forward(call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair) -> tuple[Tensor, Tensor]:
    """out (H, G, B, rows, DV) and log_sum_exp (H, G, B, rows, 1), gates included."""
    if (kernels := _kernels(call, visitor, pair)) is not None:
        out, log_sum_exp = kernels.forward(_kernel_operands(kernels, call, at_edges, visitor, pair))
        return _by_heads(call, out), _by_heads(call, log_sum_exp[..., None])
    operands = pair_operands(call, at_edges, visitor, pair)
    out, log_sum_exp = dense.select(operands.q).forward(*operands[:3])
    log_sum_exp = log_sum_exp[..., None]
    if operands.gate is not None:
        log_sum_exp = log_sum_exp + operands.gate
    value_dim = visitor.v.shape[-1]
    return unfold_queries(out[..., :value_dim], call.group), unfold_queries(log_sum_exp, call.group)


def backward(call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair, whole: Whole) -> PairGradients:
    """The pair's share of the gradients of the whole attention."""
    if (kernels := _kernels(call, visitor, pair)) is not None:
        rows = (whole.d_out.to(visitor.v.dtype), whole.log_sum_exp.squeeze(-1).float(), whole.delta())
        found = kernels.backward(_kernel_operands(kernels, call, at_edges, visitor, pair), *(_by_rows(x) for x in rows))
        return PairGradients(
            moved=_by_heads(call, found.queries),
            k=found.keys,
            v=found.values,
            row_sums=_by_heads(call, found.gate_row[..., None]),
            column_sums=found.gate_column.unflatten(1, (call.heads, call.group)).movedim(2, 3),
        )
    columns, operands = call.columns, pair_operands(call, at_edges, visitor, pair)
    log_sum_exp = fold_queries(whole.log_sum_exp)
    if operands.gate is not None:
        log_sum_exp = log_sum_exp - operands.gate
    d_rows, d_keys, d_values = dense.select(operands.q).backward(
        columns.fill(fold_queries(whole.d_out)),
        *operands[:3],
        columns.fill(fold_queries(whole.out)),
        log_sum_exp.squeeze(-1),
    )
    return PairGradients(
        moved=unfold_queries(d_rows[..., : columns.dim], call.group),
        k=d_keys[..., : columns.dim],
        v=d_values[..., : visitor.v.shape[-1]],
        row_sums=columns.row_sums(d_rows) if columns.gated else None,
        column_sums=columns.column_sums(d_keys) if columns.gated else None,
    )


# --- our kernels -----------------------------------------------------------------------------------------------------


def _kernels(call: Call, visitor: Shard, pair: Pair) -> Any:
    """The module of kernels that serves a pair with gates, or None. They give the same bits on every run."""
    if visitor.gate is None or call.backend == "torch" or not _has_kernels(visitor.k):
        return None
    from path_attention.ops.kernels import pairs

    keys = visitor.k.shape[3] - pair.first_key
    total = call.batch * call.heads * call.group * max(pair.rows, keys)
    dims = visitor.k.shape[-1], visitor.v.shape[-1]
    return pairs if pairs.unsupported_reason(visitor.k.dtype, pair.rows, keys, *dims, total) is None else None


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and has_triton()


def _kernel_operands(kernels: Any, call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair) -> Any:
    way = at_edges.ways[pair.own][pair.piece]
    k, v, gate_k = visitor.keys(pair)
    assert at_edges.gate_q is not None
    assert way.gate is not None
    assert gate_k is not None
    gate_q = at_edges.gate_q[:, :, :, pair.own, : pair.rows, 0] + way.gate[..., None]
    moved = at_edges.q[:, :, :, pair.own, : pair.rows] @ way.product[:, None]
    return kernels.Operands(
        queries=_by_rows(moved.to(k.dtype)),
        keys=k.contiguous(),
        values=v.contiguous(),
        gate_query=_by_rows(gate_q),
        gate_key=gate_k.movedim(3, 2).flatten(1, 2).contiguous(),
    )


def _by_rows(x: Tensor) -> Tensor:
    """(H, G, B, rows, ...) -> (B, H * G, rows, ...), contiguous."""
    return x.movedim(2, 0).flatten(1, 2).contiguous()


def _by_heads(call: Call, x: Tensor) -> Tensor:
    """(B, H * G, rows, dim) -> (H, G, B, rows, dim), a view."""
    return x.unflatten(1, (call.heads, call.group)).movedim(0, 2)
