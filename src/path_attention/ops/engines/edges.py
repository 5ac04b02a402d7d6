"""Rows at the edges of whole pieces, and the pieces' products, by the linear stages' Triton kernels: ops/dyadic.py's
``edges`` for pieces of 64 * 2^m tokens.

The kernels move a leaf's queries as far as there is a left sibling, and its keys as far as there is a right one. So
every piece is told to be half of a sequence twice its length: for its queries the right half (leaves n to 2n - 1 of
2n), for its keys the left one (leaves 0 to n - 1). At level m both halves are siblings: there its rows stand at the
piece's edges. The other half does not exist, and nothing ever looks at it. Lower levels are steps on the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from path_attention.ops import dyadic
from path_attention.ops.engines import cuda
from path_attention.ops.kernels import linear
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable
from path_attention.ops.kernels.linear import Inputs

# Leaves times key heads that go through the stages together. Backward rows of all levels are held for them, twice as
# many as the operator's own parts hold of theirs, and no gradients but those of the uppermost level. Forward nothing is
# held but the leaves' rows and matrices, an eighth of that; matrices grow with the square of the head dim.
PART = cuda.PART
FORWARD_PART = 8 * PART


def unsupported_reason(q: Tensor, w: Tensor, length: int) -> str | None:
    """Why pieces of this length cannot be served, or None. w is (B, L, R, H, D)."""
    leaves = length // LEAF
    if length % LEAF or leaves < 2 or leaves & (leaves - 1):
        return f"pieces of {length} tokens are not {LEAF} times a power of two from 2 on"
    if q.shape[3] % cuda.COLUMNS:
        return f"head_dim {q.shape[3]} is not a multiple of {cuda.COLUMNS}"
    if reason := cuda.unsupported_reason("triton", q, q, w, None, None):
        return reason
    if cuda._leaves_by("triton", q, q, w) == "torch":
        return "its leaves are computed in torch, and so are rows at its edges"
    return None


@dataclass(frozen=True)
class _Part:
    """Some key heads of all pieces, and the tables of both halves."""

    inputs: Inputs
    right: LeafTable  # of the queries, the leaves and the tree
    left: LeafTable  # of the keys
    heads: slice

    @property
    def top(self) -> int:
        """The level at which rows stand at the edges of pieces."""
        return self.right.num_levels - 1

    @property
    def leaves_each(self) -> int:
        return 1 << self.top

    def roots(self) -> slice:
        """Nodes of the pieces' products."""
        return slice(self.leaves_each - 1, None, 2 * self.leaves_each)


@lru_cache(maxsize=256)  # a call of few tokens is bound by the host
def _tables(pieces: int, length: int, device: torch.device) -> tuple[LeafTable, LeafTable]:
    leaves = length // LEAF
    number = torch.arange(pieces * leaves)
    piece, index = number // leaves, number % leaves
    slots = piece * leaves
    whole = torch.full_like(number, LEAF)

    def table(first: int, count: int, keys: Tensor) -> LeafTable:
        columns = [number * LEAF, whole, index + first, torch.full_like(number, count), slots, keys, slots, index]
        return LeafTable(
            columns=torch.stack(columns, dim=1).to(torch.int32).to(device),
            leaves=1,
            length=1,
            queries=1,
            keys=1,
            num_leaves=pieces * leaves,
            num_levels=leaves.bit_length(),  # m + 1
            query_slots=pieces * leaves,
            key_slots=pieces * leaves,
            row_slots=pieces * leaves,
        )

    # The right half is said to have something to its right, or the products at its end would be left out. Its keys'
    # slots, which the tree asks for, are those of the left half: half of the leaves less at every level below m.
    return table(leaves, 2 * leaves + 2, slots - leaves // 2), table(0, 2 * leaves, slots)


def _parts(
    q: Tensor, k: Tensor, w: Tensor, beta: Tensor, length: int, scale: float, by_hopper: bool, most: int
) -> Iterator[_Part]:
    """q (B, L, HQ, D), k (B, L, H, D), w (B, L, 1, H, D), beta (B, L, 1, H); L a multiple of the piece's length."""
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    pieces = k.shape[0] * k.shape[1] // length
    right, left = _tables(pieces, length, q.device)
    each = max(1, min(heads, most // right.num_leaves))
    for first in range(0, heads, each):
        some = slice(first, min(first + each, heads))
        queries = slice(some.start * group, some.stop * group)
        keys = k[:, :, some].flatten(0, 1).contiguous()
        inputs = Inputs(
            q=q[:, :, queries].flatten(0, 1).contiguous(),
            k=keys,
            v=keys,  # no attention in here: values play no part
            w=w[:, :, 0, some].flatten(0, 1).contiguous(),
            beta=beta[:, :, 0, some].flatten(0, 1).contiguous(),
            g=None,
            scale=scale,
            # Without attention the backward kernel for groups and wide rows on Hopper is not made.
            leaves="hopper" if by_hopper and group == 1 and q.shape[3] <= LEAF else "triton",
        )
        yield _Part(inputs, right, left, some)


def edges(
    q: Tensor, k: Tensor, w: Tensor, beta: Tensor, length: int, scale: float, by_hopper: bool = False
) -> dyadic.Edges:
    """Of pieces one after another; rows are views of what lies token after token, in float16 for inputs in half
    precision, and products in float32.
    """
    batch, heads, dim = k.shape[0] * k.shape[1] // length, k.shape[2], k.shape[3]
    group = q.shape[2] // heads
    product = torch.empty(heads, batch, dim, dim, dtype=torch.float32, device=q.device)
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    most = FORWARD_PART * cuda.PART_DIM**2 // max(cuda.PART_DIM, dim) ** 2
    for part in _parts(q, k, w, beta, length, scale, by_hopper, most):
        leaves = linear.new_leaves(part.inputs, part.right, with_factors=False)
        rest = torch.empty_like(leaves.nodes)
        q_leaf, k_leaf, _ = linear._leaves(part.inputs, part.right, None, None, leaves, rest)
        levels = _transport(part, leaves.nodes, q_leaf, k_leaf, only_top=True)
        queries.append(levels.query_rows.view(batch, length, part.inputs.heads, group, dim))
        keys.append(levels.key_rows.view(batch, length, part.inputs.heads, dim))
        whole = leaves.nodes[part.roots()].float()
        if part.inputs.work_dtype != torch.float32:
            whole += rest[part.roots()]
        product[part.heads] = whole.transpose(0, 1)
    q_left, k_right = (x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in (queries, keys))
    return dyadic.Edges(q_left.permute(2, 3, 0, 1, 4), k_right.permute(2, 0, 1, 3), product)


def _transport(part: _Part, nodes: Tensor, q_leaf: Tensor, k_leaf: Tensor, *, only_top: bool) -> linear.Levels:
    inputs = part.inputs
    return linear._levels(
        inputs, part.right, nodes, q_leaf, k_leaf, None, inputs.work_dtype, part.left, only_top=only_top
    )


def add_backward(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    beta: Tensor,
    length: int,
    scale: float,
    d_edges: dyadic.Edges,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    by_hopper: bool = False,
) -> None:
    """Add to gradients of q, k, w and beta, like these, what comes from those of :func:`edges`' results, in float32."""
    group = q.shape[2] // k.shape[2]
    for part in _parts(q, k, w, beta, length, scale, by_hopper, PART):
        found = _part_backward(part, d_edges)
        queries = slice(part.heads.start * group, part.heads.stop * group)
        places = (
            gradients[0][:, :, queries],
            gradients[1][:, :, part.heads],
            *(x[:, :, 0, part.heads] for x in gradients[2:]),
        )
        for place, x in zip(places, found, strict=True):
            place += x.view(place.shape)


def _part_backward(part: _Part, d_edges: dyadic.Edges) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = part.inputs
    leaves = linear.new_leaves(inputs, part.right, with_factors=True)
    q_leaf, k_leaf, _ = linear._leaves(inputs, part.right, None, None, leaves)
    levels = _transport(part, leaves.nodes, q_leaf, k_leaf, only_top=False)
    at_leaves = _levels_backward(part, levels, leaves, d_edges)
    del levels, q_leaf, k_leaf
    q, k, w, beta = (
        torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (inputs.q, inputs.k, inputs.w, inputs.beta)
    )
    no_attention = (None,) * 6
    linear.leaves_backward(inputs, part.right, leaves, at_leaves, *no_attention, linear.Gradients(q, k, None, w, beta))
    return q, k, w, beta


def _levels_backward(
    part: _Part, levels: linear.Levels, leaves: linear.Leaves, d_edges: dyadic.Edges
) -> linear.EdgeGradients:
    """linear.levels_backward of gradients at the edges of pieces alone and of the pieces' products."""
    inputs = part.inputs
    d_queries = d_edges.q_left[part.heads].permute(2, 3, 0, 1, 4).reshape(levels.query_rows.shape[1:])
    d_keys = d_edges.k_right[part.heads].permute(1, 2, 0, 3).reshape(levels.key_rows.shape[1:])
    d_nodes = linear.scaled_matrices(inputs, 2 * part.right.num_leaves, inputs.heads)
    _store_scaled(d_nodes, part.roots(), d_edges.product[part.heads].transpose(0, 1))
    no_values = d_queries.new_empty(0)
    of_rows = linear.DenseGradients(d_queries.contiguous(), d_keys.contiguous(), no_values, gate=None, factor=None)
    return linear.levels_backward(inputs, part.right, levels, leaves, of_rows, part.left, d_nodes)


def _store_scaled(place: linear.Scaled, where: slice, x: Tensor) -> None:
    """As store_square_scaled of tiles.py: matrices by the largest power of two that their entries reach, and that."""
    if place.tiles.dtype == torch.float32:
        place.tiles[where] = x
        return
    largest = x.abs().amax((-1, -2))
    power = torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.float() - 1), 0.0)
    place.power[where] = power
    place.tiles[where] = (x / power.clamp(min=torch.finfo(torch.float32).tiny)[..., None, None]).to(place.tiles.dtype)
