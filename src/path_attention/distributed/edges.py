"""What the processes know of each other's pieces: rows at the edges of pieces, and the ways between the edges.

The way from the left edge of piece a to the right edge of an earlier piece b is the product of the pieces in between,

    way(a, b) = P_{a-1} ... P_{b+1} ,        way(a, a-1) = I ,        way(a, b-1) = way(a, b) P_b

and for gates the sum of theirs.

Legend: B batch, p pieces of this process, C tokens of a piece, H key/value heads, G query heads for each.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from path_attention.autocast import with_tf32
from path_attention.distributed.pairs import Call, Pair
from path_attention.ops import dyadic
from path_attention.ops.arguments import LOWEST_GATE
from path_attention.ops.columns import fold_queries


class Shard(NamedTuple):
    """What of a process's pieces goes round, contiguous: v in the dtype of the inputs, the gate in that of the
    computation, and k in that of the inputs, or in float16 where kernels made it of inputs in half precision.

    Its gradients have the same shapes, and the dtype of the computation.
    """

    k: Tensor  # (p, B, C, H, D), at the right edges
    v: Tensor  # (p, B, C, H, DV)
    gate: Tensor | None  # (p, H, G, B, C): sum of g from the token after this one to the piece's last

    def tensors(self) -> list[Tensor]:
        return [x for x in self if x is not None]

    def keys(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
        """The pair's keys (B, H, keys, D), values (B, H, keys, DV) and gates (B, H, keys, G): views."""
        k, v = (x[pair.visiting, :, pair.first_key :].transpose(1, 2) for x in (self.k, self.v))
        gate = None if self.gate is None else self.gate[pair.visiting, ..., pair.first_key :].permute(2, 0, 3, 1)
        return k, v, gate

    @classmethod
    def of_tensors(cls, tensors: Any) -> "Shard":
        return cls(*tensors, *[None] * (3 - len(tensors)))


class Way(NamedTuple):
    """From the left edge of one of our pieces to the right edge of an earlier one."""

    product: Tensor  # (H, B, D, D)
    gate: Tensor | None  # (H, G, B), the sum of g


@dataclass
class AtEdges:
    """Our side of the pairs. Rows are in the dtype of the computation, or float16 where kernels made them of inputs in
    half precision.
    """

    q: Tensor  # (H, G, B, p, C, D), at the left edges; heads lie together
    gate_q: Tensor | None  # (H, G, B, p, C, 1): sum of g from the piece's first token to this one
    products: Tensor  # (all pieces, H, B, D, D)
    gate_spans: Tensor | None  # (all pieces, H, G, B)
    shard: Shard
    ways: list[list[Way]]  # for each of our pieces, by the position of the earlier one

    @classmethod
    def of(cls, call: Call, edges: dyadic.Edges, k: Tensor, v: Tensor, g: Tensor | None) -> "AtEdges":
        context, per_batch = call.context, (call.batch, call.context.pieces_each)
        products = context.gather_pieces(edges.product.unflatten(1, per_batch).movedim(2, 0))
        gate_q = gate_k = gate_spans = None
        if g is not None:
            gates = call.by_piece(g.to(call.dtype).clamp(min=LOWEST_GATE)).unflatten(
                3, (call.heads, call.group)
            )  # (B, p, C, H, G)
            gates = gates.permute(3, 4, 0, 1, 2)  # (H, G, B, p, C)
            gate_q = gates.cumsum(-1)[..., None]
            gate_k = sums_after(gates).permute(3, 0, 1, 2, 4)
            gate_spans = context.gather_pieces(gate_q[..., -1, 0].movedim(3, 0))
        k_right = edges.k_right if edges.k_right.dtype == torch.float16 else edges.k_right.to(k.dtype)
        shard = Shard(
            k=k_right.unflatten(1, per_batch).permute(2, 1, 3, 0, 4).contiguous(),
            v=call.by_piece(v).transpose(0, 1).contiguous(),
            gate=None if gate_k is None else gate_k.contiguous(),
        )
        ways = [_ways(products, gate_spans, piece) for piece in context.pieces]
        return cls(edges.q_left.unflatten(2, per_batch), gate_q, products, gate_spans, shard, ways)


def sums_before(x: Tensor) -> Tensor:
    """(..., C) -> for each the sum of those before it. Not a running sum less the number itself: nothing cancels."""
    return torch.nn.functional.pad(x[..., :-1], (1, 0)).cumsum(-1)


def sums_after(x: Tensor) -> Tensor:
    """(..., C) -> for each the sum of those after it."""
    return sums_before(x.flip(-1)).flip(-1)


def _ways(products: Tensor, gate_spans: Tensor | None, piece: int) -> list[Way]:
    """The ways from the left edge of ``piece`` to the right edges of all pieces before it, by their position."""
    product = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device).expand_as(products[0])
    gate = None if gate_spans is None else torch.zeros_like(gate_spans[0])
    found: list[Way] = []
    for other in reversed(range(piece)):
        found.append(Way(product, gate))
        product = product @ products[other]
        gate = None if gate is None or gate_spans is None else gate + gate_spans[other]
    return found[::-1]


class Operands(NamedTuple):
    """A pair's dense attention."""

    q: Tensor  # (B, H, G * rows, columns)
    k: Tensor  # (B, H, keys, columns)
    v: Tensor
    gate: Tensor | None  # (B, H, G * rows, 1), to be added to every logit of the row


def _by_query_head(x: Tensor) -> Tensor:
    """(H, G, rows, D) -> (H * G, rows, D), a view."""
    return x.view(-1, *x.shape[2:])


def _for_queries(product: Tensor, group: int) -> Tensor:
    """(H, D, D) -> (H * G, D, D)."""
    return product.repeat_interleave(group, 0)


def moved(at_edges: AtEdges, pair: Pair) -> Tensor:
    """The pair's queries at the right edge of its keys, (H, G, B, rows, D); heads lie together."""
    x = at_edges.q[:, :, :, pair.own, : pair.rows]
    heads, group, batch, rows, dim = x.shape
    product = at_edges.ways[pair.own][pair.piece].product.to(x.dtype)
    found = x.new_empty(batch, rows, heads, group, dim).permute(2, 3, 0, 1, 4)
    for i in range(batch):
        torch.bmm(_by_query_head(x[:, :, i]), _for_queries(product[:, i], group), out=_by_query_head(found[:, :, i]))
    return found


def move_back(at_edges: AtEdges, pair: Pair, d_moved: Tensor, factor: Tensor | None, d_q: Tensor) -> Tensor:
    """Back through :func:`moved`: add to d_q (H, G, B, rows, D); returns the gradient of the way (H, B, D, D).

    d_moved: of the computation's dtype, times factor (1,), if there is one.
    """
    x = at_edges.q[:, :, :, pair.own, : pair.rows]
    product, (heads, group) = at_edges.ways[pair.own][pair.piece].product.mT, x.shape[:2]
    d_product = torch.empty_like(product, memory_format=torch.contiguous_format)
    if factor is not None:
        product = product / factor
    # Rows in half precision were products of numbers with 11 bits; so may these be.
    with with_tf32(x.device) if x.dtype == torch.float16 else nullcontext():
        for i in range(x.shape[2]):
            d_rows = d_moved[:, :, i].flatten(0, 1)
            _by_query_head(d_q[:, :, i]).baddbmm_(d_rows, _for_queries(product[:, i], group))
            shares = _by_query_head(x[:, :, i]).to(d_rows.dtype).mT @ d_rows
            d_product[:, i] = shares.unflatten(0, (heads, group)).sum(1)
    return d_product if factor is None else d_product.div_(factor)


def pair_operands(call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair) -> Operands:
    way, columns, gate = at_edges.ways[pair.own][pair.piece], call.columns, None
    if at_edges.gate_q is not None and way.gate is not None:
        gate = fold_queries(at_edges.gate_q[:, :, :, pair.own, : pair.rows] + way.gate[..., None, None])
    k, v, gate_k = visitor.keys(pair)
    return Operands(
        q=columns.queries(moved(at_edges, pair)),
        k=columns.keys(k, gate_k),
        v=columns.fill(v),
        gate=gate,
    )


def ways_backward(
    products: Tensor, ways: list[Way], d_ways: list[Way], d_products: Tensor, d_spans: Tensor | None
) -> None:
    """Gradients of the pieces that the ways of one of our pieces lead through: the ways are products of one another,
    way(b - 1) = way(b) P_b.
    """
    further: Way | None = None  # gradient of the way to the piece before
    for other, (way, d_way) in enumerate(zip(ways, d_ways, strict=True)):
        if further is not None:
            d_products[other] += way.product.mT @ further.product
            d_way.product.add_(further.product @ products[other].mT)
            if d_spans is not None and d_way.gate is not None and further.gate is not None:
                d_spans[other] += further.gate
                d_way.gate.add_(further.gate)
        further = d_way
