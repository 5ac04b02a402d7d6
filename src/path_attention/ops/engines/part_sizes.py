"""How much of a call goes through the stages on CUDA together: as much as fills the GPU, and fits in memory.

Units are leaves times key heads. What a part's buffers take beside inputs and results is by far the most of a call's
memory, and follows from its shape alone; test_cuda.py holds this file to what is measured.
"""

from functools import partial
from typing import NamedTuple

from path_attention.ops.kernels.leaf_table import LEAF, levels_above

# Times what softmax attention takes beside its inputs, forward and backward: what sizes are chosen for, and steps by
# which they give way where they would ask for a part more. At 2 x 8192 x 16 x 128 a third one takes 8% longer.
TIMES_SOFTMAX, STEP = 3.0, 0.05
# The first part may be this much larger than what all are at most, if others are smaller for it.
FIRST = 1.25
# Bytes of a float16 and of a float32.
HALF, FLOAT = 2, 4


class Limits(NamedTuple):
    """Units of a part at most."""

    first: int
    later: int  # of every other one


class Cut(NamedTuple):
    """A call's parts, each of some sequences and some heads."""

    sequences: list[int]
    heads: list[int]

    @property
    def parts(self) -> int:
        return len(self.sequences) * len(self.heads)


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
        numbers = FLOAT * (self.heads + (self.query_heads if self.gated else 0))  # of beta and of gates
        return self.out_bytes() + self.tokens * (d_query + d_keys + numbers)

    def buffer_bytes(self) -> int:
        """All buffers of the whole call where most are alive: when moved rows go back, first the keys'."""
        levels = levels_above(self.leaves)
        matrix = HALF * self.dim * self.dim
        # A token has half a row at a level, a pair of leaves half a share of a gradient: one of two spans is moved.
        row = HALF * self.dim // 2
        rows_of_queries, rows_of_keys = 3 * levels * row, 2 * levels * row  # and their gradients, queries' in float32
        shares = matrix // (2 * LEAF) + max(0, levels - 2) * matrix // (4 * LEAF)
        back = HALF * self.dim + shares  # what a head has of them then
        # Gradients of values in float32; P of a leaf and of a parent; T^-1, Y, U.
        all_along = FLOAT * self.dim + 2 * matrix // LEAF + HALF * (2 * LEAF + self.dim)
        # A part's own log-sum-exp and beta, gates and their gradients, gates of rows.
        numbers = FLOAT * (self.heads + self.query_heads * (3 if self.gated else 1))
        if self.gated:
            rows_of_queries += FLOAT * levels
        keys_go = self.query_heads * rows_of_queries + self.heads * (rows_of_keys + back)
        queries_go = self.query_heads * (rows_of_queries + back) + self.heads * back
        number = self.batch * self.leaves * LEAF
        return number * (max(keys_go, queries_go) + self.heads * all_along + numbers)


def backward_cut(shape: Shape, most: int) -> Cut:
    """Parts of ``most`` units, but of such sizes that the peak is TIMES_SOFTMAX times softmax attention's, or as little
    above as may be without a further part.

    While the first part is at its peak there are no results yet, so that it may be larger than the others.
    """
    within = partial(cut, shape.batch, shape.leaves, shape.heads, in_place=True)
    plain = within(Limits(most, most))
    if plain.parts == 1:  # more launches would take such a call longer
        return plain
    units_a_byte = shape.units / shape.buffer_bytes()
    times = TIMES_SOFTMAX
    while True:
        room = times * shape.softmax_bytes()
        later = int(units_a_byte * (room - shape.result_bytes()))
        if later >= most:
            return plain
        first = min(int(FIRST * most), int(units_a_byte * (room - shape.out_bytes())))
        found = within(Limits(first, later))
        if found.parts <= plain.parts:
            return found
        times += STEP


def cut(batch: int, leaves: int, heads: int, limits: Limits, *, in_place: bool) -> Cut:
    """Along sequences, and where one alone is too much along its heads. Where heads stay in place, along heads alone if
    that makes fewer parts.
    """
    if (sequences := sizes(batch, leaves * heads, limits)) is not None:
        found = Cut(sequences, [heads])
    else:
        of_one = sizes(heads, leaves, Limits(limits.later, limits.later)) or evenly(heads, heads)
        found = Cut([1] * batch, of_one)
    if in_place and (of_all := sizes(heads, batch * leaves, limits)) and len(of_all) < found.parts:
        found = Cut([batch], of_all)
    return found


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
