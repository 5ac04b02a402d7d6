"""PaTH attention over a sequence that is split over processes (arXiv 2505.16381, section 3.5), forward and backward.

Query i of piece a and key j of an earlier piece b meet at b's right edge, whatever lies between them:

    logit(i, j) = scale * q_i(left edge of a) P_{a-1} ... P_{b+1} . k_j(right edge of b)  +  gates in between

So a pair of pieces is plain softmax attention between moved rows, without a mask, and the parts join by their
log-sum-exp. The products P of all pieces, one D x D matrix a piece and key head, are gathered; keys at their right edge
and values go round a ring. The backward pass sends them round again, with their gradients, and gives the gradient of
every P back to its piece. docs/distributed.md has what moves and how much of it.

Legend: B batch, p pieces of this process, C tokens of a piece, H key/value heads, G query heads for each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from path_attention.checks import bad
from path_attention.distributed import pair_attention
from path_attention.distributed.context import ContextParallel, Layout, PassedOn
from path_attention.distributed.edges import AtEdges, Shard, Way, move_back, sums_after, sums_before, ways_backward
from path_attention.distributed.pair_attention import Visit, Whole
from path_attention.distributed.pairs import Call, Pair
from path_attention.distributed.parts import Inputs, parts
from path_attention.layers.padding import sequence_boundaries
from path_attention.ops import dyadic
from path_attention.ops.arguments import check_values, validate_arguments
from path_attention.ops.autograd import out_of_autocast, path_attention_backward, path_attention_forward
from path_attention.ops.backends import AUTO, Backend
from path_attention.ops.path_attention import check_backend


@torch.compiler.disable
def path_attention_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    group: Any,
    layout: Layout | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check_inputs: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """:func:`path_attention.path_attention` of a sequence that is split over the processes of ``group``.

    Every process passes its shard of the length and gets its shard of the output; :meth:`ContextParallel.shard` cuts
    whole tensors. All processes must call it, forward and backward, with shards of one shape. Outputs and gradients are
    those of one process, where the gradient is that of the sum of what the processes differentiate. Memory is linear in
    the shard's length, plus all pieces' products P; long shards are worked on some heads at a time, so that what lies
    beside inputs and results does not grow with them. Deterministic if the backend is.

    Args:
        q, k, v, w, beta, g: as those of path_attention, of L / n tokens in n processes; the same on every process but
            for the values.
        group: the processes: a ProcessGroup, a DeviceMesh of one dimension, or a :class:`ContextParallel`.
        layout: "zigzag" (None), balanced: process r of n holds pieces r and 2n - 1 - r of the sequence, one after the
            other; "contiguous": piece r of n.
        scale: factor of the q.k part; None means D ** -0.5.
        cu_seqlens: (N + 1,) boundaries of packed sequences in the WHOLE row, the same on every process; last L.
        check_inputs: also look at the values, as path_attention does, and compare the shapes of all processes.
        backend: what computes attention inside the pieces. Between them it is a kernel of ours with "hopper", or None
            where "hopper" can serve, or with gates in bfloat16 on a GPU, else torch's; with "torch" always.

    Returns:
        (B, L / n, HQ, DV) in the dtype of q. Differentiable once in q, k, v, w, beta and g.

    Raises:
        ValueError: naming the argument, what was given and what is wanted, before anything is computed. A local length
            that is not a multiple of the pieces of a process (zigzag: 2) is one.
    """
    context = ContextParallel.of(group, layout)
    arguments = validate_arguments(q, k, v, w, beta, g, scale=scale, cu_seqlens=None)
    q, k, v, _, _, g, scale = arguments
    if q.shape[0] < 1 or q.shape[1] % context.pieces_each:
        wanted = f"a batch and a local length that is a multiple of {context.pieces_each}, the pieces of a process"
        raise bad("q", f"shape {tuple(q.shape)}", wanted)
    cu_seqlens = sequence_boundaries(cu_seqlens, q, context.size)
    if check_inputs:
        check_values(*arguments[:6], None)
        _check_alike(context, q, v, arguments.w, g)
    w, beta = arguments.reflections()
    check_backend(backend, q, v, w, g, cu_seqlens)
    call = Call.of(context, q, k, v, g, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale, backend or AUTO)
    return _ContextParallelAttention.apply(call, q, k, v, w, beta, g)


def _check_alike(context: ContextParallel, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None) -> None:
    """Other shapes elsewhere would leave processes waiting for each other."""
    sizes = [*q.shape, *v.shape[2:], w.dim(), w.shape[2], w.element_size(), q.element_size(), int(g is None)]
    mine = torch.tensor(sizes, device=q.device).expand(context.pieces_each, -1)
    for piece, found in enumerate(context.gather_pieces(mine).tolist()):
        if found != sizes:
            raise ValueError(
                f"q: got sizes {sizes} here and {found} on the process with piece {piece}; wanted the same everywhere "
                "(q's four, v's heads and value_dim, w's dimensions and heads, bytes of w and of q, whether g is None)"
            )


@out_of_autocast
def _forward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """out (B, L, HQ, DV) in the dtype of q and log_sum_exp (B, L, HQ) in that of the computation."""
    at_edges = AtEdges.of(call, call.edges(q, k, w, beta), k, v, g)
    for origin, tensors in call.context.visit(at_edges.shard.tensors()):
        if origin == call.context.rank:  # the first: the next visitor is on its way meanwhile
            rows = [None if x is None else call.by_row(x) for x in (q, k, v, w, beta, g)]
            *inside, _ = path_attention_forward(*rows, call.local_cu_seqlens, call.scale, call.backend)
            out, log_sum_exp = (x.view(*q.shape[:2], *x.shape[2:]).to(call.dtype) for x in inside)
        for pair in call.pairs(origin):
            pair_attention.forward(call, at_edges, Shard.of_tensors(tensors), pair, out, log_sum_exp)
    return out.to(q.dtype), log_sum_exp


@dataclass
class _Gradients:
    """Of our side of the pairs, in the dtype of the computation; zeros to begin with."""

    q: Tensor
    gate_q: Tensor | None
    ways: list[list[Way]]

    @classmethod
    def zeros(cls, at_edges: AtEdges, dtype: torch.dtype) -> "_Gradients":
        def zeros(x: Tensor | None) -> Any:
            return None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)

        ways = [[Way(zeros(way.product), zeros(way.gate)) for way in of_piece] for of_piece in at_edges.ways]
        tokens = at_edges.q.permute(2, 3, 4, 0, 1, 5)
        d_q = torch.zeros(tokens.shape, dtype=dtype, device=tokens.device).permute(3, 4, 0, 1, 2, 5)
        return cls(d_q, zeros(at_edges.gate_q), ways)


@out_of_autocast
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    call: Call,
) -> list[Tensor | None]:
    inputs, context = (q, k, v, w, beta, g), call.context
    at_edges = AtEdges.of(call, call.edges(q, k, w, beta), k, v, g)
    gradients = _Gradients.zeros(at_edges, call.dtype)
    whole = Whole(d_out.contiguous(), out, log_sum_exp)
    on_their_way: PassedOn | None = None
    for origin, tensors in context.visit(at_edges.shard.tensors()):
        d_visitor = [torch.zeros_like(x, dtype=call.dtype) for x in tensors]
        visit = Visit(Shard.of_tensors(tensors), Shard.of_tensors(d_visitor))
        for pair in call.pairs(origin):
            _pair_backward(call, at_edges, visit, pair, whole, gradients)
        # The visitor's gradients so far come in behind it, and go on with it.
        if on_their_way is not None:
            for mine, so_far in zip(d_visitor, on_their_way.wait(), strict=True):
                mine += so_far
        on_their_way = PassedOn(context, d_visitor) if context.size > 1 else None
    # While the last gradients come home.
    rows = [None if x is None else call.by_row(x) for x in (*inputs, out, log_sum_exp)]
    inside = path_attention_backward(call.by_row(d_out), *rows, call.local_cu_seqlens, call.scale, call.backend)
    d_shard = Shard.of_tensors(d_visitor if on_their_way is None else on_their_way.wait())
    found = [None if x is None else part.view(x.shape) for x, part in zip(inputs, inside, strict=True)]
    _add_from_edges(call, (q, k, w, beta), at_edges, gradients, d_shard, found)
    return found


def _pair_backward(
    call: Call,
    at_edges: AtEdges,
    visit: Visit,
    pair: Pair,
    whole: Whole,
    gradients: _Gradients,
) -> None:
    """Add a pair's share to the gradients of our side and to those of the visitor."""
    found = pair_attention.backward(call, at_edges, visit, pair, whole)
    d_q, d_way = gradients.q[:, :, :, pair.own, : pair.rows], gradients.ways[pair.own][pair.piece]
    d_way.product.copy_(move_back(at_edges, pair, found.moved, found.factor, d_q))
    if found.row_sums is not None and gradients.gate_q is not None and d_way.gate is not None:
        gradients.gate_q[:, :, :, pair.own, : pair.rows] += found.row_sums
        d_way.gate.copy_(found.row_sums.sum((-1, -2)))


def _add_from_edges(
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],  # q, k, w, beta
    at_edges: AtEdges,
    gradients: _Gradients,
    d_shard: Shard,
    found: list[Tensor | None],
) -> None:
    """Add to the gradients of q, k, v, w, beta and g what comes through what met at the edges."""
    d_products = torch.zeros_like(at_edges.products)
    d_spans = None if at_edges.gate_spans is None else torch.zeros_like(at_edges.gate_spans)
    for ways, d_ways in zip(at_edges.ways, gradients.ways, strict=True):
        ways_backward(at_edges.products, ways, d_ways, d_products, d_spans)
    d_q, d_k, d_v, d_w, d_beta, d_g = found
    assert d_q is not None
    assert d_k is not None
    assert d_v is not None
    assert d_w is not None
    assert d_beta is not None
    d_v += d_shard.v.transpose(0, 1).flatten(1, 2)
    call.add_edges_backward(
        *inputs,
        dyadic.Edges(
            q_left=gradients.q.flatten(2, 3),
            k_right=d_shard.k.permute(3, 1, 0, 2, 4).flatten(1, 2),
            product=call.context.sum_home(d_products).movedim(0, 2).flatten(1, 2),
        ),
        (d_q, d_k, d_w, d_beta),
    )
    if d_g is not None and gradients.gate_q is not None and d_shard.gate is not None and d_spans is not None:
        # A gate is in the gate_q of its own and all later tokens of the piece, in the gate_k of all earlier ones.
        d_gate_q, d_gate_k = gradients.gate_q.squeeze(-1), d_shard.gate.permute(1, 2, 3, 0, 4)  # (H, G, B, p, C)
        between = d_gate_q + sums_after(d_gate_q) + sums_before(d_gate_k)
        between += call.context.sum_home(d_spans).movedim(0, 3)[..., None]
        d_g += between.permute(2, 3, 4, 0, 1).flatten(3, 4).flatten(1, 2)


def _forward_in_parts(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """:func:`_forward` of some heads at a time."""
    if len(all_parts := parts(call, inputs[0])) == 1:
        return _forward(*inputs, call)
    q, _, v, *_ = inputs
    out, log_sum_exp = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=call.dtype)
    for part in all_parts:
        part.queries(out)[:], part.queries(log_sum_exp)[:] = _forward(*part.inputs(inputs), part.call)
    return out, log_sum_exp


def _backward_in_parts(
    d_out: Tensor, inputs: Inputs, out: Tensor, log_sum_exp: Tensor, call: Call
) -> list[Tensor | None]:
    """:func:`_backward` of some heads at a time."""
    if len(all_parts := parts(call, inputs[0])) == 1:
        return _backward(d_out, *inputs, out, log_sum_exp, call)
    q, k, v, w, beta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])
    found = q, k, v, w, beta, None if inputs[5] is None else torch.empty_like(inputs[5])
    for part in all_parts:
        d_part, of_out, of_sums = (part.queries(x).contiguous() for x in (d_out, out, log_sum_exp))
        gradients = _backward(d_part, *part.inputs(inputs), of_out, of_sums, part.call)
        for x, gradient in zip(part.views(found), gradients, strict=True):
            if x is not None:
                assert gradient is not None
                x[:] = gradient
    return list(found)


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None
    ) -> Tensor:
        out, log_sum_exp = _forward_in_parts((q, k, v, w, beta, g), call)
        ctx.call = call
        ctx.save_for_backward(q, k, v, w, beta, g, out, log_sum_exp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, log_sum_exp = ctx.saved_tensors
        return None, *_backward_in_parts(d_out, (*inputs,), out, log_sum_exp, ctx.call)
