"""A call some heads at a time, so that what it holds beside its inputs and results does not grow with the shard.

Attention of different key heads has nothing in common. Parts cost further messages, smaller ones, so small shards are
one part. All processes cut alike, as their shards have one shape.
"""

from dataclasses import replace

from torch import Tensor

from path_attention.distributed.pairs import Call

# Numbers of a part's queries, B * L / n * heads * D, at most, unless one key head has more. Of parts half as large a
# backward pass held 6.6 GiB for one of several beside the whole call's inputs and results, 4.3 for an only one, and two
# of them took 356 ms for 131,072 tokens of 2,048 channels on two H200s; all heads at once took 344 (docs/scaling.md).
PART = 2**27

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, w, beta, g


class Part:
    """Some key heads and their query heads of a call."""

    def __init__(self, whole: Call, first: int, count: int) -> None:
        self.call = replace(whole, heads=count)
        self.key_heads = slice(first, first + count)
        self.query_heads = slice(first * whole.group, (first + count) * whole.group)

    def inputs(self, whole: Inputs) -> Inputs:
        """The part of each, contiguous."""
        q, k, v, w, beta, g = self.views(whole)
        some = (x.contiguous() for x in (q, k, v, w, beta))
        return *some, None if g is None else g.contiguous()  # type: ignore[return-value]

    def views(self, whole: Inputs) -> Inputs:
        """The part of each, or of their gradients: of (B, L, HQ, ...), (B, L, H, ...) or (B, L, R, H, ...)."""
        q, k, v, w, beta, g = whole
        heads = self.key_heads
        return (
            self.queries(q),
            k[:, :, heads],
            v[:, :, heads],
            w[:, :, :, heads],
            beta[:, :, :, heads],
            None if g is None else self.queries(g),
        )

    def queries(self, x: Tensor) -> Tensor:
        """Of x (B, L, HQ, ...), a view."""
        return x[:, :, self.query_heads]


def parts(call: Call, q: Tensor) -> list[Part]:
    """All key heads of the call, in parts of at most PART numbers of q."""
    each = max(1, min(call.heads, PART * call.heads // max(1, q.numel())))
    return [Part(call, first, min(each, call.heads - first)) for first in range(0, call.heads, each)]
