"""What the processes know of each other's pieces: rows at the edges of pieces, and the ways between the edges.

The way from the left edge of piece a to the right edge of an earlier piece b is the product of the pieces in between,

    way(a, b) = P_{a-1} ... P_{b+1} ,        way(a, a-1) = I ,        way(a, b-1) = way(a, b) P_b

and for gates the sum of theirs.

Legend: B batch, p pieces of this process, C tokens of a piece, H key/value heads, G query heads for each.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from path_attention.distributed.pairs import Call, Pair
from path_attention.ops import dyadic
from path_attention.ops.arguments import LOWEST_GATE
from path_attention.ops.columns import fold_queries


class Shard(NamedTuple):
    """What of a process's pieces goes round: k and v in the dtype of the inputs, the gate in that of the computation.

    Its gradients have the same shapes, and the dtype of the computation.
    """

    k: Tensor  # (p, B, H, C, D), at the right edges
    v: Tensor  # (p, B, H, C, DV)
    gate: Tensor | None  # (p, B, H, C, G): sum of g from the token after this one to the piece's last

    def tensors(self) -> list[Tensor]:
        return [x for x in self if x is not None]

    def keys(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
        """The pair's keys, values and gates: views."""
        keys = (pair.visiting, slice(None), slice(None), slice(pair.first_key, None))
        return self.k[keys], self.v[keys], None if self.gate is None else self.gate[keys]

    @classmethod
    def of_tensors(cls, tensors: Any) -> "Shard":
        return cls(*tensors, *[None] * (3 - len(tensors)))


class Way(NamedTuple):
    """From the left edge of one of our pieces to the right edge of an earlier one."""

    product: Tensor  # (H, B, D, D)
    gate: Tensor | None  # (H, G, B), the sum of g


@dataclass
class AtEdges:
    """Our side of the pairs."""

    q: Tensor  # (H, G, B, p, C, D), at the left edges
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
            gate_k = sums_after(gates).permute(3, 2, 0, 4, 1)
            gate_spans = context.gather_pieces(gate_q[..., -1, 0].movedim(3, 0))
        shard = Shard(
            k=edges.k_right.unflatten(1, per_batch).permute(2, 1, 0, 3, 4).to(k.dtype).contiguous(),
            v=call.by_piece(v).permute(1, 0, 3, 2, 4).contiguous(),
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


def pair_operands(call: Call, at_edges: AtEdges, visitor: Shard, pair: Pair) -> Operands:
    way, columns, gate = at_edges.ways[pair.own][pair.piece], call.columns, None
    if at_edges.gate_q is not None and way.gate is not None:
        gate = fold_queries(at_edges.gate_q[:, :, :, pair.own, : pair.rows] + way.gate[..., None, None])
    k, v, gate_k = visitor.keys(pair)
    return Operands(
        q=columns.queries(at_edges.q[:, :, :, pair.own, : pair.rows] @ way.product[:, None]),
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
