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
    dense_dtype: torch.dtype  # what the dense attentions run in
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
        return cls(plan, leaf, masks, heads, group, _dense_dtype(q, gate), gate)

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


# --- rows of a level as the dense attention takes them ---------------------------------------------------------------
#
# The G query heads of a group attend to the same keys, so they are extra rows of the same dense attention: no key is
# copied. The key's part of the gate, a number per query head and key, rides along as G extra columns: the query of head
# g has a one in column g, the key has its gate there, and the gradient of the key's columns is the column sum of dS.
# One more column, ones in the key and zeros in the query, gives the row sum of dS in the query's gradient. The gates
# of the right sibling take the one, those of the left sibling the other.


def _dense_dtype(q: Tensor, gate: Tensor | None) -> torch.dtype:
    """What the dense attentions run in: the dtype of q, but float32 where half precision would not do."""
    if q.dtype in (torch.float16, torch.bfloat16):
        if gate is not None:
            return torch.float32  # the gate's columns and their gradient need more than the 8 or 11 bits of a half
        if q.dtype == torch.float16 and q.device.type == "cpu":
            return torch.float32  # torch's CPU kernel takes 9 times as long to go backward in float16 as in float32
    return q.dtype


def _fold_queries(x: Tensor) -> Tensor:
    """(H, G, pairs, rows, dim) -> (pairs, H, G * rows, dim)."""
    return x.permute(2, 0, 1, 3, 4).flatten(2, 3)


def _unfold_queries(x: Tensor, group: int) -> Tensor:
    """(pairs, H, G * rows, dim) -> (H, G, pairs, rows, dim)."""
    return x.unflatten(2, (group, -1)).permute(1, 2, 0, 3, 4)


def _pad_columns(x: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[-1])) if x.shape[-1] < columns else x


def _query_columns(problem: Problem, x: Tensor, columns: int) -> Tensor:
    """(H, G, pairs, rows, D) -> (pairs, H, G * rows, columns) in the dense dtype, with the gate's ones."""
    if problem.gate is not None:
        ones = torch.eye(problem.group, problem.group + 1, dtype=x.dtype, device=x.device)
        x = torch.cat([x, ones[None, :, None, None, :].expand(*x.shape[:-1], -1)], dim=-1)
    return _pad_columns(_fold_queries(x).to(problem.dense_dtype), columns)


def _key_columns(problem: Problem, x: Tensor, gate: Tensor | None, columns: int) -> Tensor:
    """(H, pairs, keys, D) and (H, G, pairs, keys, 1) -> (pairs, H, keys, columns) in the dense dtype."""
    rows = x.transpose(0, 1).to(problem.dense_dtype)
    if gate is not None:
        columns_gate = gate.squeeze(-1).permute(2, 0, 3, 1)  # (pairs, H, keys, G)
        rows = torch.cat([rows, columns_gate, torch.ones_like(columns_gate[..., :1])], dim=-1)
    return _pad_columns(rows, columns)


def _dense_columns(problem: Problem) -> int:
    """Columns of every operand of the dense attention: torch's kernels want one width for q, k and v."""
    dim, value_dim = problem.leaf.k.shape[-1], problem.leaf.v.shape[-1]
    columns = max(dim + (0 if problem.gate is None else problem.group + 1), value_dim)
    multiple = dense.CUDA_COLUMNS if problem.leaf.k.is_cuda else 1
    return -(-columns // multiple) * multiple


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
            tree.gate_q = problem.gate.cumsum(-2)
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
    columns = values.shape[-1]
    gate_k = None if tree.gate_k is None else pairs.left.take(tree.gate_k)
    return _Operands(
        q=_query_columns(problem, pairs.right.take(tree.q), columns),
        k=_key_columns(problem, pairs.left.take(tree.k), gate_k, columns),
        v=pairs.left.take(values).transpose(0, 1),
        gate_q=None if tree.gate_q is None else _fold_queries(pairs.right.take(tree.gate_q)),
    )


def _values(problem: Problem) -> Tensor:
    """v as rows (H, N, B, columns) in the dense dtype."""
    return _pad_columns(problem.key_rows(problem.leaf.v).to(problem.dense_dtype), _dense_columns(problem))


# Leaves worked on at once: bounds the B x B temporaries of the leaf stage whatever the length, some 20 of 16 KB a leaf
# in float32 at B = 64. On a CPU they should stay in cache: on 2 cores with 1 MB of L2 each, 16 to 64 leaves took equal
# times and 128 a fifth more for the whole operator at length 4096. A GPU wants many, to be worth a launch.
_LEAF_CHUNK_CPU = 32
_LEAF_CHUNK_GPU = 1024


def _in_chunks(stage: Callable[..., Any], inputs: LeafInputs, masks: LeafMasks, *rows: Tensor) -> list[Any]:
    """The results of a leaf stage for all leaves, worked out a chunk of leaves at a time."""
    count = inputs.q.shape[0]
    chunk_size = _LEAF_CHUNK_CPU if inputs.q.device.type == "cpu" else _LEAF_CHUNK_GPU
    whole: list[Any] = []
    for start in range(0, count, chunk_size):
        part = slice(start, start + chunk_size)
        chunk = inputs._replace(**{name: x[part] for name, x in inputs._asdict().items() if x is not None})
        results = stage(chunk, masks, *(x[part] for x in rows))
        if not whole:
            whole = [None if x is None else x.new_empty(count, *x.shape[1:]) for x in results]
        for target, result in zip(whole, results, strict=True):
            if result is not None:
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
            part = _unfold_queries(part[..., :value_dim], problem.group)
            part_log_sum_exp = _unfold_queries(part_log_sum_exp, problem.group)
            _merge(out, log_sum_exp, pairs, part, part_log_sum_exp)
            tree.ascend(pairs)
    return out.flatten(0, 1), log_sum_exp.flatten(0, 1)


def _merge(out: Tensor, log_sum_exp: Tensor, pairs: SiblingPairs, part: Tensor, part_log_sum_exp: Tensor) -> None:
    """Join a partial attention over further keys to the rows of the right siblings, in place."""
    before = pairs.right.take(log_sum_exp)
    total = torch.logaddexp(before, part_log_sum_exp)
    rows = pairs.right.take(out)
    rows.mul_((before - total).exp()).addcmul_(part.to(rows.dtype), (part_log_sum_exp - total).exp())
    pairs.right.put(out, rows)
    pairs.right.put(log_sum_exp, total)


# --- backward --------------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Rows of leaves, in the dtype of the computation."""

    q: Tensor  # (HQ, N, B, D), of the scaled query
    k: Tensor  # (H, N, B, D)
    v: Tensor  # (H, N, B, DV)
    w: Tensor  # (H, N, B, R * D)
    beta: Tensor  # (H, N, B, R)
    g: Tensor | None  # (HQ, N, B, 1)


class _Climbed(NamedTuple):
    """What the way down needs of one group of pairs."""

    pairs: SiblingPairs
    operands: _Operands
    q: Tensor  # right siblings' rows before they moved on
    k: Tensor  # left siblings' rows before they moved on
    left: Tensor  # P_left
    right: Tensor | None  # P_right, where the keys move on


def _climb(problem: Problem, tree: _Tree, values: Tensor) -> list[_Climbed]:
    climbed = []
    for level in problem.plan.levels:
        for pairs in level:
            operands = _operands(problem, tree, values, pairs)
            # ascend() writes over the rows that its operands may be views of.
            operands = operands._replace(q=_own(operands.q, tree.q), k=_own(operands.k, tree.k))
            operands = operands._replace(gate_q=None if operands.gate_q is None else operands.gate_q.clone())
            climbed.append(
                _Climbed(
                    pairs,
                    operands,
                    q=_rows_of_operand(problem, operands.q, tree.q),
                    k=operands.k[..., : tree.k.shape[-1]].transpose(0, 1),
                    left=pairs.left_root.take(tree.product).clone(),
                    right=pairs.right_root.take(tree.product).clone() if pairs.keys_move_on else None,
                )
            )
            tree.ascend(pairs)
    return climbed


def _own(x: Tensor, source: Tensor) -> Tensor:
    return x.clone() if x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else x


def _rows_of_operand(problem: Problem, q: Tensor, rows: Tensor) -> Tensor:
    return _unfold_queries(q[..., : rows.shape[-1]], problem.group)


def backward(problem: Problem, out: Tensor, log_sum_exp: Tensor, d_out: Tensor) -> Gradients:
    """Gradients of :func:`forward` from its saved results.

    out and d_out (HQ, N, B, DV) in the dense dtype, log_sum_exp (HQ, N, B, 1). The dense attentions take the final
    log-sum-exp and output, so each gives its share of the gradient by itself; what is left is the way down the tree:
    x' = x P gives dx = dx' P^T and dP += x^T dx', and P_parent = P_right P_left.
    """
    heads, group = problem.heads, problem.group
    dtype = problem.leaf.q.dtype
    out, d_out = (x.to(problem.dense_dtype).unflatten(0, (heads, group)) for x in (out, d_out))
    log_sum_exp = log_sum_exp.unflatten(0, (heads, group))
    *edges, t_inverse, u, y = _in_chunks(leaf_edges, problem.leaf, problem.masks)
    tree = _Tree.grow(problem, LeafEdges(*edges))
    del edges
    values = _values(problem)
    climbed = _climb(problem, tree, values)
    d_q, d_k, d_product = torch.zeros_like(tree.q), torch.zeros_like(tree.k), torch.zeros_like(tree.product)
    gate = problem.gate
    d_v, d_gate = torch.zeros_like(values, dtype=dtype), None if gate is None else torch.zeros_like(gate)
    del tree
    while climbed:
        _descend(problem, climbed.pop(), values, out, log_sum_exp, d_out, d_q, d_k, d_v, d_product, d_gate)

    rows = [problem.leaf_rows(x) for x in (out, log_sum_exp, d_out, d_q)]
    rows += [d_k.flatten(0, 1), d_product.flatten(0, 1), t_inverse, u, y]
    leaf = LeafGradients(*_in_chunks(leaf_backward, problem.leaf, problem.masks, *rows))
    d_v = d_v[..., : leaf.v.shape[-1]].add_(problem.key_rows(leaf.v))
    if d_gate is not None and leaf.g is not None:
        d_gate += problem.query_rows(leaf.g.flatten(1)[..., None])
    return Gradients(
        q=problem.query_rows(leaf.q).flatten(0, 1),
        k=problem.key_rows(leaf.k),
        v=d_v,
        w=leaf.w.view(*d_k.shape[:3], -1),
        beta=leaf.beta.view(*d_k.shape[:3], -1),
        g=None if d_gate is None else d_gate.flatten(0, 1),
    )


def _descend(
    problem: Problem,
    climbed: _Climbed,
    values: Tensor,
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
    pairs, operands = climbed.pairs, climbed.operands
    dim, columns = d_q.shape[-1], values.shape[-1]
    rows_log_sum_exp = _fold_queries(pairs.right.take(log_sum_exp))
    if operands.gate_q is not None:
        rows_log_sum_exp = rows_log_sum_exp - operands.gate_q
    d_rows, d_keys, d_values = dense.select(operands.q).backward(
        _pad_columns(_fold_queries(pairs.right.take(d_out)), columns),
        operands.q,
        operands.k,
        operands.v,
        _pad_columns(_fold_queries(pairs.right.take(out)), columns),
        rows_log_sum_exp.squeeze(-1),
    )
    pairs.left.add(d_v, d_values.transpose(0, 1))
    if d_gate is not None:
        # A gate of the right sibling is in the logits of all queries from its token on, one of the left sibling in
        # those of all keys before its token. Row sums less column sums, added up to the sequence's end, would say the
        # same, with the rounding of everything on the way.
        columns_sum = d_keys[..., dim : dim + problem.group].permute(1, 3, 0, 2)[..., None]  # (H, G, pairs, keys, 1)
        pairs.left.add(d_gate, torch.nn.functional.pad(columns_sum[..., :-1, :], (0, 0, 1, 0)).cumsum(-2))
        rows_sum = _unfold_queries(d_rows[..., dim + problem.group :][..., :1], problem.group)
        pairs.right.add(d_gate, sum_from_here(rows_sum))

    left, right = climbed.left, climbed.right
    d_rows = _unfold_queries(d_rows[..., :dim], problem.group).to(d_q.dtype)
    d_keys = d_keys[..., :dim].transpose(0, 1).to(d_k.dtype)
    d_left = None
    if pairs.queries_move_on:
        moved = pairs.right.take(d_q)
        d_left = (climbed.q.to(moved.dtype).mT @ moved).sum(1)
        d_rows = d_rows + moved @ left[:, None].mT
    if right is not None:
        moved = pairs.left.take(d_k)
        d_parent = pairs.left_root.take(d_product)
        d_right = moved.mT @ climbed.k.to(moved.dtype) + d_parent @ left.mT
        d_keys = d_keys + moved @ right
        pairs.right_root.add(d_product, d_right)
        d_left = right.mT @ d_parent if d_left is None else d_left + right.mT @ d_parent
    pairs.right.put(d_q, d_rows)
    pairs.left.put(d_k, d_keys)
    if d_left is not None:
        pairs.left_root.put(d_product, d_left)
