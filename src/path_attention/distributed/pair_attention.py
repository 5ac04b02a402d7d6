"""Attention of a pair of pieces, without a mask: by torch's kernels, or by ours.

Kernels of ours for Hopper (ops/kernels/hopper/pairs.py) take rows as they come, a token after the other, and go on from
what there is. Of torch's kernels each pair has its own result, which is merged; they take gates as further columns of
queries and keys, in float32, for half precision has too few bits for them. In bfloat16 on a GPU portable kernels of
ours (ops/kernels/pairs.py) take the gates beside the rows instead.

Legend: B batch, L tokens of this process, H key/value heads, G query heads for each, HQ = H * G.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from path_attention.distributed.edges import AtEdges, Shard, moved, pair_operands
from path_attention.distributed.pairs import Call, Pair
from path_attention.ops import dyadic
from path_attention.ops.backends import has_triton
from path_attention.ops.columns import fold_queries, unfold_queries
from path_attention.ops.engines import dense

# From so many keys on cuDNN's forward kernel, which takes no gates, makes up for a result of its own that has to be
# merged: 32,768 queries and keys of 32 heads of 64 take it 17.5 ms on an H200 and ours 20.2; a forward pass that has
# them takes 84.7 and 90.2 (results/h200_context_parallel_profile.json). Wider heads were not compared.
CUDNN_KEYS, CUDNN_DIM = 16384, 64


@dataclass(frozen=True)
class Whole:
    """Of the whole attention of our tokens."""

    d_out: Tensor  # (B, L, HQ, DV)
    out: Tensor  # (B, L, HQ, DV)
    log_sum_exp: Tensor  # (B, L, HQ)

    def rows(self, call: Call, pair: Pair) -> list[Tensor]:
        """The pair's rows of each, views (H, G, B, rows, dim); dim is 1 in the last one."""
        of_tokens = (self.d_out, self.out, self.log_sum_exp[..., None])
        return [call.query_rows(call.by_piece(x), pair) for x in of_tokens]


@dataclass
class Visit:
    """A process's pieces on their way through here in the backward pass."""

    shard: Shard
    gradients: Shard
    # rowsum(d_out * out) of our tokens (B * L, HQ) and the factor of gradients, what delta_and_factor gives.
    numbers: tuple[Tensor, Tensor] | None = None


class PairGradients(NamedTuple):
    """Of our side of a pair."""

    moved: Tensor  # (H, G, B, rows, D): of the queries at the right edge of the pair's keys
    row_sums: Tensor | None  # (H, G, B, rows, 1): of dS, where there are gates
    factor: Tensor | None  # (1,): what ``moved`` was multiplied by; None for 1


def forward(call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair, out: Tensor, log_sum_exp: Tensor) -> None:
    """Join the pair's attention to what there is, in place: out (B, L, HQ, DV) and log_sum_exp (B, L, HQ)."""
    if not _faster_by_cudnn(visitor) and (hopper := _hopper(call, visitor, pair)) is not None:
        hopper.forward(_hopper_operands(hopper, at_edges, visitor, pair), out, log_sum_exp, pair.own * call.length)
        return
    rows, sums = (call.query_rows(call.by_piece(x), pair) for x in (out, log_sum_exp[..., None]))
    dyadic.merge(rows, sums, *_part(call, at_edges, visitor, pair))


def _part(call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair) -> tuple[Tensor, Tensor]:
    """out (H, G, B, rows, DV) and log_sum_exp (H, G, B, rows, 1) over the pair's keys alone, gates included."""
    if (kernels := _kernels(call, visitor, pair)) is not None:
        out, log_sum_exp = kernels.forward(_kernel_operands(kernels, at_edges, visitor, pair))
        return _by_heads(call, out), _by_heads(call, log_sum_exp[..., None])
    operands = pair_operands(call, at_edges, visitor, pair)
    out, log_sum_exp = dense.select(operands.q).forward(*operands[:3])
    log_sum_exp = log_sum_exp[..., None]
    if operands.gate is not None:
        log_sum_exp = log_sum_exp + operands.gate
    value_dim = visitor.v.shape[-1]
    return unfold_queries(out[..., :value_dim], call.group), unfold_queries(log_sum_exp, call.group)


def backward(call: Call, at_edges: AtEdges, visit: Visit, pair: Pair, whole: Whole) -> PairGradients:
    """The pair's share of the gradients of the whole attention; that of the visitor is added to its gradients."""
    if (hopper := _hopper(call, visit.shard, pair, is_backward=True)) is not None:
        return _hopper_backward(hopper, call, at_edges, visit, pair, whole)
    found, d_k, d_v, d_gate = _part_backward(call, at_edges, visit.shard, pair, whole)
    so_far = visit.gradients.keys(pair)
    for x, add in zip(so_far, (d_k, d_v, d_gate), strict=True):
        if x is not None and add is not None:
            x += add
    return found


def _part_backward(
    call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair, whole: Whole
) -> tuple[PairGradients, Tensor, Tensor, Tensor | None]:
    """Also gradients of the pair's keys (B, H, keys, D) and values (B, H, keys, DV), and, where there are gates,
    column sums of dS (B, H, keys, G).
    """
    d_out, out, log_sum_exp = whole.rows(call, pair)
    if (kernels := _kernels(call, visitor, pair)) is not None:
        delta = (d_out.float() * out.float()).sum(-1)
        rows = (d_out.to(visitor.v.dtype), log_sum_exp.squeeze(-1).float(), delta)
        found = kernels.backward(_kernel_operands(kernels, at_edges, visitor, pair), *(_by_rows(x) for x in rows))
        row_sums = _by_heads(call, found.gate_row[..., None])
        column_sums = found.gate_column.unflatten(1, (call.heads, call.group)).movedim(2, 3)
        return PairGradients(_by_heads(call, found.queries), row_sums, None), found.keys, found.values, column_sums
    columns, operands = call.columns, pair_operands(call, at_edges, visitor, pair)
    log_sum_exp = fold_queries(log_sum_exp)
    if operands.gate is not None:
        log_sum_exp = log_sum_exp - operands.gate
    d_rows, d_keys, d_values = dense.select(operands.q).backward(
        columns.fill(fold_queries(d_out)), *operands[:3], columns.fill(fold_queries(out)), log_sum_exp.squeeze(-1)
    )
    of_rows = PairGradients(
        moved=unfold_queries(d_rows[..., : columns.dim], call.group).to(call.dtype),
        row_sums=columns.row_sums(d_rows) if columns.gated else None,
        factor=None,
    )
    column_sums = columns.column_sums(d_keys) if columns.gated else None
    return of_rows, d_keys[..., : columns.dim], d_values[..., : visitor.v.shape[-1]], column_sums


# --- our kernels for Hopper -------------------------------------------------------------------------------------------


def _faster_by_cudnn(visitor: Shard) -> bool:
    """A forward pass, beside our kernels for Hopper."""
    keys, dim = visitor.k.shape[2], visitor.k.shape[4]
    is_long = visitor.gate is None and keys >= CUDNN_KEYS and dim <= CUDNN_DIM
    return is_long and dense.select(visitor.v) is dense.CUDNN


def _hopper(call: Call, visitor: Shard, pair: Pair, *, is_backward: bool = False) -> Any:
    """The module of kernels for Hopper that serves a pair, or None. Their gradients are sums in no fixed order."""
    if visitor.k.dtype != torch.float16 or not call.wants_hopper:
        return None
    if (is_backward and torch.are_deterministic_algorithms_enabled()) or not _has_hopper(visitor):
        return None
    from path_attention.ops.kernels.hopper import pairs  # only some versions of Triton have Gluon

    return pairs if pairs.unsupported_reason(visitor.k.shape[2], pair.first_key) is None else None


def _has_hopper(visitor: Shard) -> bool:
    if not _has_kernels(visitor.k):
        return False
    from path_attention.ops.engines import cuda

    return cuda.unsupported_reason("hopper", visitor.k[0], visitor.v[0], visitor.k[:, :1], None, None) is None


def _hopper_operands(kernels: Any, at_edges: AtEdges, visitor: Shard, pair: Pair) -> Any:
    way = at_edges.ways[pair.own][pair.piece]
    gate_query = gate_key = None
    if at_edges.gate_q is not None and way.gate is not None and visitor.gate is not None:
        gate_query = at_edges.gate_q[:, :, :, pair.own, : pair.rows, 0] + way.gate[..., None]
        gate_query = gate_query.permute(2, 3, 0, 1).flatten(2)
        gate_key = visitor.gate[pair.visiting].flatten(0, 1)
    return kernels.Operands(
        queries=moved(at_edges, pair).permute(2, 3, 0, 1, 4).flatten(2, 3),
        keys=visitor.k[pair.visiting],
        values=visitor.v[pair.visiting],
        gate_query=gate_query,
        gate_key=gate_key,
        first_key=pair.first_key,
    )


def _hopper_backward(
    kernels: Any, call: Call, at_edges: AtEdges, visit: Visit, pair: Pair, whole: Whole
) -> PairGradients:
    from path_attention.ops.engines import cuda

    if visit.numbers is None:
        of_tokens = (whole.out.flatten(0, 1), whole.d_out.flatten(0, 1), visit.shard.v.flatten(0, 2))
        delta, factor = cuda.delta_and_factor(*of_tokens)
        assert factor is not None, "rows are float16"
        visit.numbers = delta, factor
    delta, factor = visit.numbers
    d_gate = visit.gradients.gate
    d_queries, row_sums = kernels.backward(
        _hopper_operands(kernels, at_edges, visit.shard, pair),
        whole.d_out,
        whole.log_sum_exp,
        delta.view(whole.log_sum_exp.shape),
        factor,
        pair.own * call.length,
        visit.gradients.k[pair.visiting],
        visit.gradients.v[pair.visiting],
        None if d_gate is None else d_gate[pair.visiting].flatten(0, 1),
    )
    d_moved = d_queries.unflatten(2, (call.heads, call.group)).permute(2, 3, 0, 1, 4)
    if row_sums is not None:
        row_sums = (row_sums / factor).unflatten(2, (call.heads, call.group)).permute(2, 3, 0, 1)[..., None]
    return PairGradients(d_moved, row_sums, factor)


# --- our portable kernels -------------------------------------------------------------------------------------------


def _kernels(call: Call, visitor: Shard, pair: Pair) -> Any:
    """The module of portable kernels that serves a pair with gates, or None. They give the same bits on every run."""
    if visitor.gate is None or call.backend == "torch" or not _has_kernels(visitor.k):
        return None
    from path_attention.ops.kernels import pairs

    keys = visitor.k.shape[2] - pair.first_key
    total = call.batch * call.heads * call.group * max(pair.rows, keys)
    dims = visitor.k.shape[-1], visitor.v.shape[-1]
    return pairs if pairs.unsupported_reason(visitor.v.dtype, pair.rows, keys, *dims, total) is None else None


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and has_triton()


def _kernel_operands(kernels: Any, at_edges: AtEdges, visitor: Shard, pair: Pair) -> Any:
    way = at_edges.ways[pair.own][pair.piece]
    k, v, gate_k = visitor.keys(pair)
    assert at_edges.gate_q is not None
    assert way.gate is not None
    assert gate_k is not None
    gate_q = at_edges.gate_q[:, :, :, pair.own, : pair.rows, 0] + way.gate[..., None]
    return kernels.Operands(
        queries=_by_rows(moved(at_edges, pair).to(v.dtype)),
        keys=k.to(v.dtype).contiguous(),
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
