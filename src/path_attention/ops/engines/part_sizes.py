"""How much of a call goes through the stages on CUDA together: as much as fills the GPU, and fits in memory.

Units are leaves times key heads. What a part's buffers take beside inputs and results is by far the most of a call's
memory, and follows from its shape alone; test_cuda.py holds this file to what is measured.
"""

from typing import NamedTuple

from path_attention.ops.kernels.leaf_table import LEAF

# Times what softmax attention takes beside its inputs, forward and backward, at most: larger calls are cut further.
TIMES_SOFTMAX = 3
# The first part may be this much larger than what all are at most, if others are smaller for it.
FIRST = 1.25
# Bytes of a float16 and of a float32.
HALF, FLOAT = 2, 4


class Limits(NamedTuple):
    """Units of a part at most."""

    first: int
    later: int  # of every other one


class Shape(NamedTuple):
    """Of a backward pass in half precision by the kernels for Hopper."""

    batch: int
    length: int
    query_heads: int
    heads: int
    dim: int  # of keys and of values
    w_bytes: int  # of a number of w
    gated: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def leaves(self) -> int:
        """Of one sequence."""
        return -(-self.length // LEAF)

    @property
    def units(self) -> int:
        return self.batch * self.leaves * self.heads

    def out_bytes(self) -> int:
        """Output, log-sum-exp and delta."""
        return self.tokens * self.query_heads * (HALF * self.dim + 2 * FLOAT)

    def softmax_bytes(self) -> int:
        """Softmax attention: these, the gradients, and cuDNN's sums: of the queries' gradients in float32, of the
        others' one a query head, where these share keys.
        """
        d_query, d_keys = self.query_heads * (HALF + FLOAT) * self.dim, self.heads * 2 * HALF * self.dim
        if self.query_heads > self.heads:
            d_keys += self.query_heads * 2 * HALF * self.dim
        return self.out_bytes() + self.tokens * (d_query + d_keys)

    def result_bytes(self) -> int:
        """Ours: these and the gradients."""
        d_query, d_keys = self.query_heads * HALF * self.dim, self.heads * (2 * HALF + self.w_bytes) * self.dim
        return self.out_bytes() + self.tokens * (d_query + d_keys)

    def buffer_bytes(self) -> int:
        """All buffers of the whole call where most are alive: when moved rows go back, first the keys'."""
        levels = max(0, self.leaves - 1).bit_length()
        matrix = HALF * self.dim * self.dim
        # A token has half a row at a level, a pair of leaves half a share of a gradient: one of two spans is moved.
        row = HALF * self.dim // 2
        rows_of_queries, rows_of_keys = 3 * levels * row, 2 * levels * row  # and their gradients, queries' in float32
        shares = matrix // (2 * LEAF) + max(0, levels - 2) * matrix // (4 * LEAF)
        back = HALF * self.dim + shares  # what a head has of them then
        # Gradients of values in float32; P of a leaf and of a parent; T^-1, Y, U.
        all_along = FLOAT * self.dim + 2 * matrix // LEAF + HALF * (2 * LEAF + self.dim)
        if self.gated:
            rows_of_queries += FLOAT * levels
        keys_go = self.query_heads * rows_of_queries + self.heads * (rows_of_keys + back)
        queries_go = self.query_heads * (rows_of_queries + back) + self.heads * back
        number = self.batch * self.leaves * LEAF
        return number * (max(keys_go, queries_go) + self.heads * all_along)


def backward_limits(shape: Shape, most: int) -> Limits:
    """``most`` units at most; and if all are more, so few that the peak is TIMES_SOFTMAX times softmax attention's.

    While the first part is at its peak there are no results yet, so that it may be larger than the others.
    """
    if shape.units <= most:  # more launches would take such a call longer
        return Limits(most, most)
    room, buffers = TIMES_SOFTMAX * shape.softmax_bytes(), shape.buffer_bytes()
    first = shape.units * (room - shape.out_bytes()) // buffers
    later = shape.units * (room - shape.result_bytes()) // buffers
    return Limits(min(int(FIRST * most), first), min(most, later))


def sizes(count: int, unit: int, limits: Limits) -> list[int] | None:
    """``count`` sequences or heads of so many units each, in as few parts as may be; None if one is too much."""
    first, later = limits.first // unit, limits.later // unit
    if count <= first:
        return [count]
    if later == 0:
        return None
    parts = 1 + -(-(count - first) // later)
    if -(-count // parts) <= later:
        return evenly(count, parts)
    return [count - (parts - 1) * later] + [later] * (parts - 1)


def evenly(count: int, parts: int) -> list[int]:
    """Sizes that differ as little as may be."""
    return [count // parts + (i < count % parts) for i in range(parts)]
