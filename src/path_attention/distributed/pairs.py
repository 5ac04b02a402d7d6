"""One call of the operator on one process: which queries meet which keys, at every step of the ring.

Legend: B batch, p pieces of this process, C tokens of a piece, H key/value heads, G query heads for each.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.distributed.context import ContextParallel
from path_attention.ops import dyadic
from path_attention.ops.backends import AUTO, has_triton, reason_against
from path_attention.ops.columns import Columns
from path_attention.ops.spans import plan_spans


class Pair(NamedTuple):
    """Queries of one of our pieces and keys of an earlier one, the visitor's."""

    own: int  # our piece, by its place on this process
    visiting: int  # the visitor's, by its place there
    piece: int  # that one's position in the sequence
    rows: int  # its queries are our piece's first so many,
    first_key: int  # its keys the visiting piece's from this one on: all, but for packed sequences


@dataclass(frozen=True)
class Call:
    """What is known of a call beside its tensors."""

    context: ContextParallel
    batch: int
    length: int  # C
    heads: int  # H
    group: int  # G
    columns: Columns
    dtype: torch.dtype  # of the computation
    scale: float
    backend: str
    cu_seqlens: tuple[int, ...] | None  # of the whole row
    local_cu_seqlens: Tensor | None  # of our pieces, one after another in a row

    @classmethod
    def of(
        cls,
        context: ContextParallel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        backend: str,
    ) -> "Call":
        length, heads = q.shape[1] // context.pieces_each, k.shape[2]
        group = q.shape[2] // heads
        ends = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
        return cls(
            context=context,
            batch=q.shape[0],
            length=length,
            heads=heads,
            group=group,
            columns=Columns.of(q, v, group, gated=g is not None),
            dtype=torch.promote_types(q.dtype, torch.float32),
            scale=scale,
            backend=backend,
            cu_seqlens=ends,
            local_cu_seqlens=None if ends is None else _local_boundaries(context, length, ends),
        )

    def pairs(self, origin: int) -> list[Pair]:
        """The pairs with the pieces of process ``origin``."""
        found = []
        for own, piece in enumerate(self.context.pieces):
            first_query = piece * self.length
            start, end = self._sequence_of(first_query)
            rows = min(end - first_query, self.length)
            for visiting, other in enumerate(self.context.pieces_of(origin)):
                first_key = max(start - other * self.length, 0)
                if other < piece and first_key < self.length and start < first_query:
                    found.append(Pair(own, visiting, other, rows, first_key))
        return found

    def _sequence_of(self, token: int) -> tuple[int, int]:
        """(start, end) of the packed sequence that a token of the whole row is in."""
        if self.cu_seqlens is None:
            return 0, self.length * self.context.num_pieces
        return max(x for x in self.cu_seqlens if x <= token), min(x for x in self.cu_seqlens if x > token)

    def query_rows(self, x: Tensor, pair: Pair) -> Tensor:
        """The pair's queries of x (B, p, C, HQ, dim), a view (H, G, B, rows, dim)."""
        return x[:, pair.own, : pair.rows].unflatten(2, (self.heads, self.group)).permute(2, 3, 0, 1, 4)

    def problem(self, q: Tensor, k: Tensor, w: Tensor, beta: Tensor) -> dyadic.Problem:
        """Our pieces as spans; their values play no part, one column stands in for them."""
        plan = plan_spans((self.length,) * (self.batch * self.context.pieces_each), dyadic.LEAF, to_edges=True)
        return dyadic.Problem.pack(plan, q, k, k[..., :1], w, beta, None, self.scale)

    def edges(self, q: Tensor, k: Tensor, w: Tensor, beta: Tensor) -> dyadic.Edges:
        """Rows at the edges of our pieces, and the pieces' products."""
        if self._has_kernels(q, w):
            from path_attention.ops.engines import edges

            return edges.edges(q, k, w, beta, self.length, self.scale, self._has_hopper(q, w))
        return dyadic.edges(self.problem(q, k, w, beta))

    def add_edges_backward(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        beta: Tensor,
        d_edges: dyadic.Edges,
        gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> None:
        """Add to the gradients of q, k, w and beta what comes by way of :meth:`edges`."""
        if self._has_kernels(q, w):
            from path_attention.ops.engines import edges

            by_hopper = self._has_hopper(q, w)
            edges.add_backward(q, k, w, beta, self.length, self.scale, d_edges, gradients, by_hopper)
            return
        problem = self.problem(q, k, w, beta)
        found = dyadic.edges_backward(problem, d_edges).tokens(problem.plan, self.batch, w.shape[2], self.scale)
        for x, add in zip(gradients, (found.q, found.k, found.w, found.beta), strict=True):
            x += add

    def _has_kernels(self, q: Tensor, w: Tensor) -> bool:
        if self.backend == "torch" or not q.is_cuda or not has_triton():
            return False
        from path_attention.ops.engines import edges

        return edges.unsupported_reason(q, w, self.length) is None

    @property
    def wants_hopper(self) -> bool:
        """Whether kernels for Hopper may serve pairs and edges."""
        return self.backend in ("hopper", AUTO)

    def _has_hopper(self, q: Tensor, w: Tensor) -> bool:
        """Whether leaves are those for Hopper, which keep what bfloat16 asks for."""
        wanted = q.dtype == torch.bfloat16 and self.wants_hopper
        return wanted and reason_against("hopper", q, q, w, None, None) is None

    def by_row(self, x: Tensor) -> Tensor:
        """(B, p * C, ...) -> the sequences of the attention inside the pieces: (B * p, C, ...), or a packed row."""
        return x if self.local_cu_seqlens is not None else x.reshape(-1, self.length, *x.shape[2:])

    def by_piece(self, x: Tensor) -> Tensor:
        """(B, p * C, ...), or (B * p, C, ...) -> (B, p, C, ...)."""
        return x.reshape(self.batch, -1, self.length, *x.shape[2:])


def _local_boundaries(context: ContextParallel, length: int, ends: tuple[int, ...]) -> Tensor:
    found = [0]
    for place, piece in enumerate(context.pieces):
        inside = [x - piece * length for x in ends if 0 < x - piece * length < length]
        found += [place * length + x for x in (*inside, length)]
    return torch.tensor(found, dtype=torch.int32)
