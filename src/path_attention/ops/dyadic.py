"""The dyadic algorithm in torch: PaTH attention for the price of one softmax attention, memory linear in the length.

Leaves by :mod:`leaf`; everything else by dense attention between sibling spans (:mod:`spans`). At the boundary m of a
pair

    logit(i, j) = scale * (q_i moved to m) . (k_j moved to m)  +  (G_i - G_m)  +  (G_m - G_j)

because both rows can be moved to the SAME boundary; G is the running sum of the log forget gates. One level up

    queries of the right sibling:  x <- x P_left         keys of the left sibling:  x <- x P_right^T
    P_parent = P_right P_left

Rows and products are kept in float32 (float64 for float64 inputs) and rounded to the input's dtype once for each
level's dense attention, never from level to level. The backward pass computes the leaves and levels again instead of
saving them.

Layout inside this module ("rows"): (H, G, N, B, dim) for queries, (H, N, B, dim) for keys, with N leaves of B tokens,
so that a run of leaves is contiguous. One name per quantity: docs/math.md lists symbol, name and shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from path_attention.ops.arguments import LOWEST_GATE
from path_attention.ops.columns import Columns, fold_queries, unfold_queries
from path_attention.ops.engines import dense
from path_attention.ops.leaf import (
    LeafEdges,
    LeafGradients,
    LeafInputs,
    LeafMasks,
    LeafOutputs,
    leaf_backward,
    leaf_edges,
    leaf_forward,
    sum_from_here,
)
from path_attention.ops.spans import SiblingPairs, SpanPlan
from path_attention.ops.sums import running_sum

# Tokens a leaf. 64: on CPUs the leaf stage costs O(L B (B + D)) and the dense kernels lose little at spans of 64.
LEAF = 64


@dataclass(frozen=True)
class Problem:
    """One call of the operator, packed into leaves, in the dtype it is computed in."""

    plan: SpanPlan
    leaf: LeafInputs  # all leaves of all heads, M = H * N
    masks: LeafMasks
    heads: int  # H
    group: int  # G
    columns: Columns  # of the dense attentions' operands
    gate: Tensor | None  # g, (H, G, N, B, 1)

    @classmethod
    def pack(
        cls,
        plan: SpanPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,  # (batch, L, R, H, D)
        beta: Tensor,  # (batch, L, R, H)
        g: Tensor | None,
        scale: float,
    ) -> "Problem":
        heads, group, reflections = k.shape[2], q.shape[2] // k.shape[2], w.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        leaves = heads * plan.num_leaves
        q_rows = plan.pack(q, dtype).mul_(scale)
        w_rows = plan.pack(w.transpose(2, 3).flatten(3), dtype)  # (H, N, B, R * D): the R steps of a token in a row
        beta_rows = plan.pack(beta.transpose(2, 3), dtype)
        gate = None
        if g is not None:
            gate = plan.pack(g[..., None], dtype).clamp_(min=LOWEST_GATE)
            gate = gate.view(heads, group, plan.num_leaves, plan.leaf, 1)
        leaf = LeafInputs(
            q=_group_last(q_rows, group).reshape(leaves, group * plan.leaf, -1),
            k=plan.pack(k, dtype).flatten(0, 1),
            v=plan.pack(v, dtype).flatten(0, 1),
            w=w_rows.view(leaves, plan.leaf * reflections, -1),
            beta=beta_rows.view(leaves, plan.leaf * reflections),
            g=None if gate is None else gate.squeeze(-1).transpose(1, 2).flatten(0, 1),
        )
        masks = LeafMasks.build(plan.leaf, group, reflections, leaf.q)
        columns = Columns.of(q, v, group, gated=gate is not None)
        return cls(plan, leaf, masks, heads, group, columns, gate)

    def query_rows(self, x: Tensor) -> Tensor:
        """(M, G*B, dim) of the leaf stage -> (H, G, N, B, dim), contiguous."""
        x = x.view(self.heads, self.plan.num_leaves, self.group, self.plan.leaf, -1)
        return x.transpose(1, 2).contiguous()

    def leaf_rows(self, x: Tensor) -> Tensor:
        """(H, G, N, B, dim) -> (M, G*B, dim): the inverse of :meth:`query_rows`."""
        return x.transpose(1, 2).reshape(self.heads * self.plan.num_leaves, self.group * self.plan.leaf, -1)

    def key_rows(self, x: Tensor) -> Tensor:
        """(M, B, dim) of the leaf stage -> (H, N, B, dim)."""
        return x.view(self.heads, self.plan.num_leaves, self.plan.leaf, -1)


def _group_last(x: Tensor, group: int) -> Tensor:
    """(HQ, N, B, dim) -> (H, N, G, B, dim)."""
    return x.unflatten(0, (-1, group)).transpose(1, 2)


# --- going up the tree -----------------------------------------------------------------------------------------------


@dataclass
class _Tree:
    """What moves up: queries at their span's left edge, keys at their span's right edge, and the spans' products."""

    q: Tensor  # (H, G, N, B, D)
    k: Tensor  # (H, N, B, D)
    product: Tensor  # (H, N, D, D); a span's P stands at its first leaf
    gate_q: Tensor | None = None  # (H, G, N, B, 1): sum of g from the span's first token to this one
    gate_k: Tensor | None = None  # (H, G, N, B, 1): sum of g from the token after this one to the span's last
    gate_span: Tensor | None = None  # (H, G, N, 1, 1): sum of g over the span that starts at this leaf

    @classmethod
    def grow(cls, problem: Problem, edges: LeafEdges) -> "_Tree":
        tree = cls(
            q=problem.query_rows(edges.q_left),
            k=problem.key_rows(edges.k_right),
            product=edges.product.view(problem.heads, problem.plan.num_leaves, *edges.product.shape[1:]),
        )
        if problem.gate is not None:
            tree.gate_q = running_sum(problem.gate, -2)
            tree.gate_span = tree.gate_q[..., -1:, :].clone()
            # Not the span's sum less gate_q: small gates would be lost beside a large one.
            tree.gate_k = sum_from_here(torch.nn.functional.pad(problem.gate[..., 1:, :], (0, 0, 0, 1)))
        return tree

    def ascend(self, pairs: SiblingPairs) -> None:
        """Move the rows of these pairs to the edges of their parents, and make the parents' products."""
        left = pairs.left_root.take(self.product)
        if pairs.queries_move_on:
            pairs.right.put(self.q, pairs.right.take(self.q) @ left[:, None])
            if self.gate_q is not None and self.gate_span is not None:
                pairs.right.add(self.gate_q, pairs.left_root.take(self.gate_span))
        if pairs.keys_move_on:
            right = pairs.right_root.take(self.product)
            pairs.left.put(self.k, pairs.left.take(self.k) @ right.mT)
            pairs.left_root.put(self.product, right @ left)
            if self.gate_k is not None and self.gate_span is not None:
                pairs.left.add(self.gate_k, pairs.right_root.take(self.gate_span))
                pairs.left_root.add(self.gate_span, pairs.right_root.take(self.gate_span))


class _Operands(NamedTuple):
    """One level's dense attention, ready for an engine."""

    q: Tensor  # (pairs, H, G * rows, columns)
    k: Tensor  # (pairs, H, keys, columns)
    v: Tensor  # (pairs, H, keys, columns)
    gate_q: Tensor | None  # (pairs, H, G * rows, 1): to be added to every logit of the row


def _operands(problem: Problem, tree: _Tree, values: Tensor, pairs: SiblingPairs) -> _Operands:
    gate_k = None
    if tree.gate_k is not None:
        gate_k = pairs.left.take(tree.gate_k).squeeze(-1).permute(2, 0, 3, 1)  # (pairs, H, keys, G)
    return _Operands(
        q=problem.columns.queries(pairs.right.take(tree.q)),
        k=problem.columns.keys(pairs.left.take(tree.k).transpose(0, 1), gate_k),
        v=pairs.left.take(values).transpose(0, 1),
        gate_q=None if tree.gate_q is None else fold_queries(pairs.right.take(tree.gate_q)),
    )


def _values(problem: Problem) -> Tensor:
    """v as rows (H, N, B, columns) in the dense dtype."""
    return problem.columns.fill(problem.key_rows(problem.leaf.v))


# Leaves worked on at once: bounds the B x B temporaries of the leaf stage whatever the length, some 20 of 16 KB a leaf
# in float32 at B = 64. On a CPU they should stay in cache: on 2 cores with 1 MB of L2 each, 16 to 64 leaves took equal
# times and 128 a fifth more for the whole operator at length 4096. A GPU wants many, to be worth a launch.
_LEAF_CHUNK_CPU = 32
_LEAF_CHUNK_GPU = 1024


def _chunks(device: torch.device, leaves: int) -> list[slice]:
    size = _LEAF_CHUNK_CPU if device.type == "cpu" else _LEAF_CHUNK_GPU
    return [slice(start, start + size) for start in range(0, leaves, size)]


def _in_chunks(
    stage: Callable[..., Any], inputs: LeafInputs, masks: LeafMasks, *rows: Tensor | list[Tensor], pieces: int = 0
) -> list[Any]:
    """The results of a leaf stage for all leaves, worked out a chunk of leaves at a time.

    The last so many ``pieces`` of the results are left as lists, a tensor a chunk, which is how ``rows`` takes them.
    """
    count = inputs.q.shape[0]
    whole: list[Any] = []
    for i, part in enumerate(_chunks(inputs.q.device, count)):
        chunk = inputs._replace(**{name: x[part] for name, x in inputs._asdict().items() if x is not None})
        results = stage(chunk, masks, *(x[i] if isinstance(x, list) else x[part] for x in rows))
        if not whole:
            joined = results[: len(results) - pieces]
            whole = [None if x is None else x.new_empty(count, *x.shape[1:]) for x in joined]
            whole += [[] for _ in range(pieces)]
        for target, result in zip(whole, results, strict=True):
            if isinstance(target, list):
                target.append(result)
            elif result is not None:
                target[part] = result
    return whole


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out (HQ, N, B, DV) and log_sum_exp (HQ, N, B, 1), both in the dtype of the computation."""
    leaves = LeafOutputs(*_in_chunks(leaf_forward, problem.leaf, problem.masks))
    out, log_sum_exp = problem.query_rows(leaves.out), problem.query_rows(leaves.log_sum_exp)
    tree = _Tree.grow(problem, LeafEdges(*leaves[2:]))
    del leaves
    values = _values(problem)
    value_dim = out.shape[-1]
    for level in problem.plan.levels:
        for pairs in level:
            operands = _operands(problem, tree, values, pairs)
            part, part_log_sum_exp = dense.select(operands.q).forward(*operands[:3])
            part_log_sum_exp = part_log_sum_exp[..., None]
            if operands.gate_q is not None:
                part_log_sum_exp = part_log_sum_exp + operands.gate_q
            part = unfold_queries(part[..., :value_dim], problem.group)
            part_log_sum_exp = unfold_queries(part_log_sum_exp, problem.group)
            _merge(out, log_sum_exp, pairs, part, part_log_sum_exp)
            tree.ascend(pairs)
    return out.flatten(0, 1), log_sum_exp.flatten(0, 1)


def _merge(out: Tensor, log_sum_exp: Tensor, pairs: SiblingPairs, part: Tensor, part_log_sum_exp: Tensor) -> None:
    """Join a partial attention over further keys to the rows of the right siblings, in place."""
    rows, rows_log_sum_exp = pairs.right.take(out), pairs.right.take(log_sum_exp)
    merge(rows, rows_log_sum_exp, part, part_log_sum_exp)
    pairs.right.put(out, rows)
    pairs.right.put(log_sum_exp, rows_log_sum_exp)


def merge(out: Tensor, log_sum_exp: Tensor, part: Tensor, part_log_sum_exp: Tensor) -> None:
    """Join the partial attention of the same rows over further keys, in place: out (..., DV), log_sum_exp (..., 1)."""
    total = torch.logaddexp(log_sum_exp, part_log_sum_exp)
    out.mul_((log_sum_exp - total).exp()).addcmul_(part.to(out.dtype), (part_log_sum_exp - total).exp())
    log_sum_exp.copy_(total)


# --- backward --------------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Rows of leaves, in the dtype of the computation."""

    q: Tensor  # (HQ, N, B, D), of the scaled query
    k: Tensor  # (H, N, B, D)
    v: Tensor  # (H, N, B, DV)
    w: Tensor  # (H, N, B, R * D)
    beta: Tensor  # (H, N, B, R)
    g: Tensor | None  # (HQ, N, B, 1)

    def tokens(self, plan: SpanPlan, batch: int, reflections: int, scale: float) -> "Gradients":
        """In the layout of the operator's arguments, q's of the query before it was scaled."""
        return Gradients(
            q=plan.unpack(self.q.mul_(scale), batch),  # in place: these gradients end here
            k=plan.unpack(self.k, batch),
            v=plan.unpack(self.v, batch),
            w=plan.unpack(self.w, batch).unflatten(-1, (reflections, -1)).transpose(2, 3),
            beta=plan.unpack(self.beta, batch).transpose(2, 3),
            g=None if self.g is None else plan.unpack(self.g, batch).squeeze(-1),
        )


class _Move(NamedTuple):
    """What the way down needs of one group of pairs whose rows moved on."""

    pairs: SiblingPairs
    q: Tensor  # right siblings' rows before they moved on
    k: Tensor  # left siblings' rows before they moved on
    left: Tensor  # P_left
    right: Tensor | None  # P_right, where the keys move on

    @classmethod
    def of(cls, tree: _Tree, pairs: SiblingPairs, q: Tensor, k: Tensor) -> "_Move":
        right = pairs.right_root.take(tree.product).clone() if pairs.keys_move_on else None
        return cls(pairs, q, k, pairs.left_root.take(tree.product).clone(), right)


def _climb(problem: Problem, tree: _Tree, values: Tensor) -> list[tuple[_Move, _Operands]]:
    climbed = []
    for level in problem.plan.levels:
        for pairs in level:
            operands = _operands(problem, tree, values, pairs)
            # ascend() writes over the rows that its operands may be views of.
            operands = operands._replace(q=_own(operands.q, tree.q), k=_own(operands.k, tree.k))
            operands = operands._replace(gate_q=None if operands.gate_q is None else operands.gate_q.clone())
            q, k = operands.q[..., : tree.q.shape[-1]], operands.k[..., : tree.k.shape[-1]]
            move = _Move.of(tree, pairs, unfold_queries(q, problem.group), k.transpose(0, 1))
            climbed.append((move, operands))
            tree.ascend(pairs)
    return climbed


def _own(x: Tensor, source: Tensor) -> Tensor:
    return x.clone() if x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else x


def backward(problem: Problem, out: Tensor, log_sum_exp: Tensor, d_out: Tensor) -> Gradients:
    """Gradients of :func:`forward` from its saved results.

    out and d_out (HQ, N, B, DV) in the dense dtype, log_sum_exp (HQ, N, B, 1). The dense attentions take the final
    log-sum-exp and output, so each gives its share of the gradient by itself; what is left is the way down the tree:
    x' = x P gives dx = dx' P^T and dP += x^T dx', and P_parent = P_right P_left.
    """
    heads, group = problem.heads, problem.group
    dtype = problem.leaf.q.dtype
    out, d_out = (x.to(problem.columns.dtype).unflatten(0, (heads, group)) for x in (out, d_out))
    log_sum_exp = log_sum_exp.unflatten(0, (heads, group))
    *edges, t_inverse, u, y = _in_chunks(leaf_edges, problem.leaf, problem.masks, pieces=3)
    tree = _Tree.grow(problem, LeafEdges(*edges))
    del edges
    values = _values(problem)
    climbed = _climb(problem, tree, values)
    d_q, d_k, d_product = torch.zeros_like(tree.q), torch.zeros_like(tree.k), torch.zeros_like(tree.product)
    gate = problem.gate
    d_v, d_gate = torch.zeros_like(values, dtype=dtype), None if gate is None else torch.zeros_like(gate)
    del tree
    while climbed:
        _descend(problem, *climbed.pop(), out, log_sum_exp, d_out, d_q, d_k, d_v, d_product, d_gate)

    rows: list[Any] = [problem.leaf_rows(x) for x in (out, log_sum_exp, d_out, d_q)]
    rows += [d_k.flatten(0, 1), d_product.flatten(0, 1), t_inverse, u, y]
    leaf = LeafGradients(*_in_chunks(leaf_backward, problem.leaf, problem.masks, *rows))
    d_v = d_v[..., : leaf.v.shape[-1]].add_(problem.key_rows(leaf.v))
    if d_gate is not None and leaf.g is not None:
        d_gate += problem.query_rows(leaf.g.flatten(1)[..., None])
    return _of_tokens(problem, leaf, d_v, d_gate)


def _of_tokens(problem: Problem, leaf: LeafGradients, d_v: Tensor, d_gate: Tensor | None) -> Gradients:
    d_k = problem.key_rows(leaf.k)
    return Gradients(
        q=problem.query_rows(leaf.q).flatten(0, 1),
        k=d_k,
        v=d_v,
        w=leaf.w.view(*d_k.shape[:3], -1),
        beta=leaf.beta.view(*d_k.shape[:3], -1),
        g=None if d_gate is None else d_gate.flatten(0, 1),
    )


def _descend(
    problem: Problem,
    move: _Move,
    operands: _Operands,
    out: Tensor,
    log_sum_exp: Tensor,
    d_out: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_product: Tensor,
    d_gate: Tensor | None,
) -> None:
    """One group of pairs on the way down: d_q and what follows hold the parents' gradients and take the pairs'."""
    pairs, columns = move.pairs, problem.columns
    rows_log_sum_exp = fold_queries(pairs.right.take(log_sum_exp))
    if operands.gate_q is not None:
        rows_log_sum_exp = rows_log_sum_exp - operands.gate_q
    d_rows, d_keys, d_values = dense.select(operands.q).backward(
        columns.fill(fold_queries(pairs.right.take(d_out))),
        operands.q,
        operands.k,
        operands.v,
        columns.fill(fold_queries(pairs.right.take(out))),
        rows_log_sum_exp.squeeze(-1),
    )
    pairs.left.add(d_v, d_values.transpose(0, 1))
    if d_gate is not None:
        # A gate of the right sibling is in the logits of all queries from its token on, one of the left sibling in
        # those of all keys before its token. Row sums less column sums, added up to the sequence's end, would say the
        # same, with the rounding of everything on the way.
        columns_sum = columns.column_sums(d_keys).permute(1, 3, 0, 2)[..., None]  # (H, G, pairs, keys, 1)
        pairs.left.add(d_gate, running_sum(torch.nn.functional.pad(columns_sum[..., :-1, :], (0, 0, 1, 0)), -2))
        pairs.right.add(d_gate, sum_from_here(columns.row_sums(d_rows)))
    d_rows = unfold_queries(d_rows[..., : columns.dim], columns.group).to(d_q.dtype)
    _move_back(move, d_rows, d_keys[..., : columns.dim].transpose(0, 1).to(d_k.dtype), d_q, d_k, d_product)


def _move_back(
    move: _Move, d_rows: Tensor | None, d_keys: Tensor | None, d_q: Tensor, d_k: Tensor, d_product: Tensor
) -> None:
    """From the parents' edges to the pairs'; d_rows and d_keys are what the rows' gradients are there already."""
    pairs, left, right = move.pairs, move.left, move.right
    d_left = None
    if pairs.queries_move_on:
        moved = pairs.right.take(d_q)
        d_left = (move.q.to(moved.dtype).mT @ moved).sum(1)
        moved = moved @ left[:, None].mT
        d_rows = moved if d_rows is None else d_rows + moved
    if right is not None:
        moved = pairs.left.take(d_k)
        d_parent = pairs.left_root.take(d_product)
        d_right = moved.mT @ move.k.to(moved.dtype) + d_parent @ left.mT
        moved = moved @ right
        d_keys = moved if d_keys is None else d_keys + moved
        pairs.right_root.add(d_product, d_right)
        d_left = right.mT @ d_parent if d_left is None else d_left + right.mT @ d_parent
    if d_rows is not None:
        pairs.right.put(d_q, d_rows)
    if d_keys is not None:
        pairs.left.put(d_k, d_keys)
    if d_left is not None:
        pairs.left_root.put(d_product, d_left)


# --- whole sequences as spans ----------------------------------------------------------------------------------------


class Edges(NamedTuple):
    """Whole sequences, S of them, as spans of something longer: what meets at their edges."""

    q_left: Tensor  # (H, G, S, length, D), times the scale
    k_right: Tensor  # (H, S, length, D)
    product: Tensor  # P, (H, S, D, D)


def edges(problem: Problem) -> Edges:
    """Rows at the edges of their sequences. The plan goes ``to_edges`` and its sequences have one length."""
    tree = _Tree.grow(problem, LeafEdges(*_in_chunks(leaf_edges, problem.leaf, problem.masks)[:3]))
    for level in problem.plan.levels:
        for pairs in level:
            tree.ascend(pairs)
    return Edges(_by_sequence(problem, tree.q), _by_sequence(problem, tree.k), tree.product[:, _first_leaves(problem)])


def edges_backward(problem: Problem, d_edges: Edges) -> Gradients:
    """Gradients of :func:`edges`; that of v is 0."""
    *found, t_inverse, u, y = _in_chunks(leaf_edges, problem.leaf, problem.masks)
    tree = _Tree.grow(problem, LeafEdges(*found))
    del found
    moves = []
    for level in problem.plan.levels:
        for pairs in level:
            q, k = pairs.right.take(tree.q).clone(), pairs.left.take(tree.k).clone()  # ascend() writes over the rows
            moves.append(_Move.of(tree, pairs, q, k))
            tree.ascend(pairs)
    d_q, d_k = _by_leaf(problem, d_edges.q_left, tree.q), _by_leaf(problem, d_edges.k_right, tree.k)
    d_product = torch.zeros_like(tree.product)
    d_product[:, _first_leaves(problem)] = d_edges.product
    del tree
    while moves:
        _move_back(moves.pop(), None, None, d_q, d_k, d_product)
    # No attention in here: its output has no gradient, and a log-sum-exp of infinity makes every weight 0.
    count, rows = problem.leaf.q.shape[:2]
    nothing = d_q.new_zeros(()).expand(count, rows, problem.leaf.v.shape[-1])
    everything = d_q.new_full((), float("inf")).expand(count, rows, 1)
    at_edges = [problem.leaf_rows(d_q), d_k.flatten(0, 1), d_product.flatten(0, 1), t_inverse, u, y]
    leaf = LeafGradients(
        *_in_chunks(leaf_backward, problem.leaf, problem.masks, nothing, everything, nothing, *at_edges)
    )
    return _of_tokens(problem, leaf, problem.key_rows(leaf.v), None)


def _first_leaves(problem: Problem) -> slice:
    return slice(0, None, problem.plan.num_leaves // len(problem.plan.lengths))


def _by_sequence(problem: Problem, x: Tensor) -> Tensor:
    """(..., N, B, D) -> (..., S, length, D)."""
    lengths = problem.plan.lengths
    return x.flatten(-3, -2).unflatten(-2, (len(lengths), -1))[..., : lengths[0], :]


def _by_leaf(problem: Problem, x: Tensor, like: Tensor) -> Tensor:
    """(..., S, length, D) -> (..., N, B, D), zeros where a leaf is not full: the inverse of :func:`_by_sequence`."""
    rows = torch.zeros_like(like)
    _by_sequence(problem, rows).copy_(x)
    return rows
