"""Leaves in torch's batched products, where the Triton kernels of the leaves do not serve: several reflections a token,
float32 inputs, rows wider than their tiles.

The mathematics is that of ops/leaf.py, in float32 with T^-1 made in float64; what comes out is laid out and rounded as
leaf_kernels.py has it, so that the tree, the transports and the attention between siblings see no difference. A bounded
number of leaves is worked on at a time, and the factors T^-1, U and Y are made again for the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from path_attention.ops.kernels.leaf_table import LEAF, LeafTable
from path_attention.ops.kernels.linear import EdgeGradients, Gradients, Inputs, Scaled
from path_attention.ops.leaf import LeafInputs, LeafMasks, leaf_backward, leaf_edges, leaf_forward

# Bytes of one float64 matrix of all leaves that are worked on at once, T or P: some ten of them are alive together.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Rows:
    """Which rows of tokens stand in N leaves, all on the device."""

    token: Tensor  # (N, 64): row among T, in bounds also where there is no token
    is_token: Tensor  # (N, 64)
    has_right: Tensor  # (N,): leaves that others of their sequence lie to the right of

    @classmethod
    def of(cls, table: LeafTable, tokens: int, device: torch.device) -> "_Rows":
        if table.columns is not None:
            start, count, index, leaves = table.columns[:, :4].to(torch.int64).unbind(1)
        else:
            leaf = torch.arange(table.num_leaves, device=device)
            sequence, index = leaf // table.leaves, leaf % table.leaves
            start = sequence * table.length + index * LEAF
            count = (table.length - index * LEAF).clamp_max(LEAF)
            leaves = torch.full_like(leaf, table.leaves)
        offset = torch.arange(LEAF, device=device)
        token = (start[:, None] + offset).clamp_max(tokens - 1)
        return cls(token, offset < count[:, None], (index + 1 < leaves) & (count > 0))

    def place_of_token(self, tokens: int) -> Tensor:
        """(T,): where each token stands among all N * 64 rows."""
        rows = torch.arange(self.token.numel(), device=self.token.device)
        place = torch.empty(tokens + 1, dtype=torch.int64, device=rows.device)  # the last takes what is no token
        place[torch.where(self.is_token, self.token, tokens).flatten()] = rows
        return place[:tokens]

    def chunks(self, inputs: Inputs) -> Iterator[slice]:
        """Leaves to be worked on at once."""
        side = max(LEAF * inputs.reflections, inputs.q.shape[2])
        count = max(1, CHUNK_BYTES // (8 * side**2 * inputs.heads))
        for first in range(0, self.token.shape[0], count):
            yield slice(first, min(first + count, self.token.shape[0]))

    def take(self, x: Tensor, leaves: slice) -> Tensor:
        """(T, ...) -> (n, 64, ...) in float32, zeros where there is no token."""
        is_token = self.is_token[leaves].view(-1, LEAF, *[1] * (x.dim() - 1))
        return torch.where(is_token, x[self.token[leaves]].float(), 0.0)


def _of_queries(x: Tensor, heads: int) -> Tensor:
    """(n, 64, H * G, dim) -> (n * H, G * 64, dim)."""
    return x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _to_queries(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_of_queries`."""
    return x.unflatten(1, (-1, LEAF)).unflatten(0, (-1, heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _of_keys(x: Tensor) -> Tensor:
    """(n, 64, H, ...) -> (n * H, 64, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _to_keys(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_of_keys`."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _leaf_inputs(inputs: Inputs, rows: _Rows, leaves: slice) -> LeafInputs:
    heads, dim = inputs.heads, inputs.k.shape[2]
    w = inputs.w.view(-1, heads, inputs.reflections * dim)
    beta = inputs.beta.view(-1, heads, inputs.reflections)
    g = None
    if inputs.g is not None:
        g = _of_queries(rows.take(inputs.g[..., None], leaves), heads).view(-1, inputs.group, LEAF)
    return LeafInputs(
        q=_of_queries(rows.take(inputs.q, leaves), heads) * inputs.scale,
        k=_of_keys(rows.take(inputs.k, leaves)),
        v=_of_keys(rows.take(inputs.v, leaves)),
        w=_of_keys(rows.take(w, leaves)).reshape(-1, LEAF * inputs.reflections, dim),
        beta=_of_keys(rows.take(beta, leaves)).flatten(1),
        g=g,
    )


def _masks(inputs: Inputs) -> LeafMasks:
    like = torch.empty(0, dtype=torch.float32, device=inputs.q.device)
    return LeafMasks.build(LEAF, inputs.group, inputs.reflections, like)


def forward(
    inputs: Inputs,
    table: LeafTable,
    q_left: Tensor,
    k_right: Tensor,
    nodes: Tensor,
    node_rest: Tensor | None,
    gate_nodes: Tensor | None,
    out: Tensor | None,
    log_sum_exp: Tensor | None,
) -> None:
    """What leaf_forward_kernel writes: rows at the leaves' edges, P and gates at the leaves' nodes, and unless out and
    log_sum_exp are None the leaves' own attention.
    """
    tokens, heads, query_heads = inputs.q.shape[0], inputs.heads, inputs.query_heads
    rows, masks = _Rows.of(table, tokens, inputs.q.device), _masks(inputs)
    attended = []
    for leaves in rows.chunks(inputs):
        leaf = _leaf_inputs(inputs, rows, leaves)
        if out is None or log_sum_exp is None:
            edges = leaf_edges(leaf, masks)
        else:
            part, part_log_sum_exp, *rest = leaf_forward(leaf, masks)
            edges = tuple(rest)
            attended.append((_to_queries(part, heads).to(out.dtype), _to_queries(part_log_sum_exp, heads).squeeze(-1)))
        q_left[leaves] = (_to_queries(edges[0], heads) * inputs.unit).to(q_left.dtype)
        k_right[leaves] = _to_keys(edges[1], heads).to(k_right.dtype)
        at = slice(2 * leaves.start, 2 * leaves.stop, 2)
        product = edges[2].unflatten(0, (-1, heads))
        nodes[at] = product.to(nodes.dtype)
        if node_rest is not None:
            node_rest[at] = (product - nodes[at].float()).to(node_rest.dtype)
        if gate_nodes is not None and leaf.g is not None:
            gate_nodes[at] = leaf.g.sum(-1).view(-1, query_heads)
    if out is not None and log_sum_exp is not None:
        place = rows.place_of_token(tokens)
        for result, parts in zip((out, log_sum_exp), zip(*attended, strict=True), strict=True):
            torch.index_select(torch.cat(parts).flatten(0, 1), 0, place, out=result)


def backward(
    inputs: Inputs,
    table: LeafTable,
    edges: EdgeGradients,
    d_values: Tensor,
    factor: Tensor | None,
    d_gate: Tensor | None,
    log_sum_exp: Tensor,
    out: Tensor,
    d_out: Tensor,
    result: Gradients,
) -> None:
    """What leaf_backward_kernel writes: see :func:`path_attention.ops.kernels.linear.leaves_backward`."""
    tokens, heads = inputs.q.shape[0], inputs.heads
    rows, masks = _Rows.of(table, tokens, inputs.q.device), _masks(inputs)
    place = rows.place_of_token(tokens)
    found: list[list[Tensor]] = [[] for _ in range(6)]
    for leaves in rows.chunks(inputs):
        leaf = _leaf_inputs(inputs, rows, leaves)
        *_, t_inverse, u, y = leaf_edges(leaf, masks)
        # A row that is no token gets no weight.
        shift = torch.where(rows.is_token[leaves][..., None], log_sum_exp[rows.token[leaves]], float("inf"))
        is_token, has_right = rows.is_token[leaves][..., None, None], rows.has_right[leaves]
        at = slice(2 * leaves.start, 2 * leaves.stop, 2)
        gradients = leaf_backward(
            leaf,
            masks,
            _of_queries(rows.take(out, leaves), heads),
            _of_queries(shift[..., None], heads),
            _of_queries(rows.take(d_out, leaves), heads),
            _of_queries(torch.where(is_token, _whole(edges.q_left, leaves, row_axis=True), 0.0), heads),
            _of_keys(torch.where(has_right[:, None, None, None], _whole(edges.k_right, leaves, row_axis=True), 0.0)),
            torch.where(has_right[:, None, None, None], _whole(edges.nodes, at), 0.0).flatten(0, 1),
            t_inverse,
            u,
            y,
        )
        w = gradients.w.unflatten(1, (LEAF, -1)).flatten(2)  # (n * H, 64, R * D)
        beta = gradients.beta.unflatten(1, (LEAF, -1))
        results = [_to_queries(gradients.q * inputs.scale, heads)]
        results += [_to_keys(x, heads) for x in (gradients.k, gradients.v, w, beta)]
        if gradients.g is not None:
            # From the gradient of each gate back to row sums less column sums of dS, whose sums from a gate on it is.
            difference = gradients.g - torch.nn.functional.pad(gradients.g[..., 1:], (0, 1))
            results.append(_to_queries(difference.flatten(1)[..., None], heads).squeeze(-1))
        for parts, x, target in zip(found, results, (*_fields(result), d_gate), strict=False):
            assert target is not None
            parts.append(x.to(torch.float32 if target is result.v else target.dtype))

    def of_tokens(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).flatten(0, 1).index_select(0, place)

    for parts, target in zip(found, _fields(result), strict=False):
        x = of_tokens(parts)
        if target is result.v:
            x += d_values.float() if factor is None else d_values.float() / factor
        target.copy_(x.view(target.shape))
    if d_gate is not None:
        d_gate += of_tokens(found[5])


def _fields(result: Gradients) -> tuple[Tensor, ...]:
    assert result.v is not None, "attention in the leaves"
    return result.q, result.k, result.v, result.w, result.beta


def _whole(x: Scaled, index: slice, row_axis: bool = False) -> Tensor:
    """Gradients in float32: tiles (n, heads, ...), or (n, 64, heads, ...) with ``row_axis``, times their powers."""
    tiles = x.tiles[index].float()
    if x.tiles.dtype == torch.float32:
        return tiles
    power = x.power[index]
    return tiles * (power[:, None, :, None] if row_axis else power[:, :, None, None])
