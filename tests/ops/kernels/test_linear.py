"""The Triton kernels of the linear stages, in Triton's interpreter, float32: with a plain attention between siblings in
place of the engine's, output and all gradients must be the definition's.

Shapes: one leaf and a part of one; odd and even numbers of leaves, so that right siblings are cut short at several
levels; several sequences, batched and packed, empty ones among them; GQA; dims that need masks; repeated w with
beta = 2, where a leaf's inverse has no room for cancellation.
"""

import os

import pytest
import torch
from torch import Tensor

from path_attention import path_attention_reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cuda.py runs the kernels", allow_module_level=True)

from path_attention.ops.kernels import linear
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, batch_leaf_table, packed_leaf_table


def within(leaf: int, level: int) -> int:
    return ((leaf >> (level + 1)) << level) | (leaf & ((1 << level) - 1))


class Pair:
    """One query leaf and its left sibling at one level: rows and slots by the leaf table's own description."""

    def __init__(self, table: LeafTable, leaf: int, level: int) -> None:
        start, length, index, _, query_base, key_base, _ = table.written_out()[leaf].tolist()
        first = ((index >> level) - 1) << level
        self.query_slot = query_base + within(index, level)
        key_slot = key_base + within(first, level)
        self.key_slots = slice(key_slot, key_slot + 2**level)
        self.rows = slice(start, start + length)
        left = start - (index - first) * LEAF
        self.keys = slice(left, left + (LEAF << level))
        self.level, self.length = level, length


def pairs(table: LeafTable) -> list[Pair]:
    return [
        Pair(table, leaf, level)
        for leaf in range(table.num_leaves)
        for level in range(table.num_levels)
        if int(table.written_out()[leaf, 1]) and int(table.written_out()[leaf, 2]) >> level & 1
    ]


def logits(levels: linear.Levels, pair: Pair, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(HQ, rows, keys) with the rows of the queries and of the keys, the latter one for each query head."""
    q = levels.query_rows[pair.level, pair.query_slot, : pair.length]
    k = levels.key_rows[pair.level, pair.key_slots].flatten(0, 1).repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k)
    if levels.gate_query is not None and levels.gate_key is not None:
        scores = scores + levels.gate_query[:, pair.level, pair.query_slot, : pair.length, None]
        scores = scores + levels.gate_key[:, pair.level, pair.key_slots].flatten(1)[:, None]
    return scores, q, k


def attend(inputs: linear.Inputs, table: LeafTable) -> tuple[linear.Levels, Tensor, Tensor]:
    out = torch.full((*inputs.q.shape[:2], inputs.v.shape[2]), float("nan"))
    log_sum_exp = torch.full(inputs.q.shape[:2], float("nan"))
    levels = linear.forward(inputs, table, out, log_sum_exp, inputs.work_dtype).levels
    group = inputs.query_heads // inputs.heads
    for pair in pairs(table):
        scores, _, _ = logits(levels, pair, group)
        part = torch.einsum("hij,jhd->ihd", scores.softmax(-1), inputs.v[pair.keys].repeat_interleave(group, 1))
        own, other = log_sum_exp[pair.rows], scores.logsumexp(-1).T
        total = torch.logaddexp(own, other)
        out[pair.rows] = out[pair.rows] * (own - total).exp()[..., None] + part * (other - total).exp()[..., None]
        log_sum_exp[pair.rows] = total
    return levels, out, log_sum_exp


def attend_backward(
    inputs: linear.Inputs, table: LeafTable, out: Tensor, log_sum_exp: Tensor, d_out: Tensor
) -> tuple[linear.Gradients, Tensor | None]:
    levels, leaves = linear.recompute(inputs, table, inputs.q.dtype)
    group = inputs.query_heads // inputs.heads
    dense = linear.DenseGradients(
        query_rows=torch.full_like(levels.query_rows, float("nan")),
        key_rows=torch.zeros_like(levels.key_rows),
        values=torch.zeros_like(inputs.v),
        gate=None if inputs.g is None else torch.zeros_like(log_sum_exp),
        factor=None,
    )
    delta = (d_out * out).sum(-1)

    def by_head(x: Tensor) -> Tensor:  # (keys, HQ, dim) -> (keys, H, dim)
        return x.unflatten(1, (inputs.heads, group)).sum(2)

    for pair in pairs(table):
        scores, q, k = logits(levels, pair, group)
        weights = (scores - log_sum_exp[pair.rows].T[..., None]).exp()
        d_rows = d_out[pair.rows]
        values = inputs.v[pair.keys].repeat_interleave(group, 1)
        d_scores = weights * (torch.einsum("ihd,jhd->hij", d_rows, values) - delta[pair.rows].T[..., None])
        dense.values[pair.keys] += by_head(torch.einsum("hij,ihd->jhd", weights, d_rows))
        dense.query_rows[pair.level, pair.query_slot, : pair.length] = torch.einsum("hij,jhd->ihd", d_scores, k)
        d_keys = by_head(torch.einsum("hij,ihd->jhd", d_scores, q))
        dense.key_rows[pair.level, pair.key_slots] += d_keys.unflatten(0, (-1, LEAF))
        if dense.gate is not None:
            dense.gate[pair.rows] += d_scores.sum(2).T
            dense.gate[pair.keys] -= d_scores.sum(1).T
    edges = linear.levels_backward(inputs, table, levels, leaves, dense)
    largest = (levels.query_rows, dense.query_rows, *((levels.key_rows, dense.key_rows) if table.num_levels else ()))
    assert not any(x.numel() for x in largest), "buffers that are not needed any more are still alive"
    of_dense = (dense.values, dense.factor, dense.gate)
    gradients = linear.Gradients(
        *(torch.full_like(getattr(inputs, x), float("nan")) for x in ["q", "k", "v", "w", "beta"])
    )
    linear.leaves_backward(inputs, table, leaves, edges, *of_dense, log_sum_exp, delta, d_out, gradients)
    return gradients, dense.gate


def from_running_sum(d_gate: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([x.flip(0).cumsum(0).flip(0) for x in d_gate.split(lengths)])


CASES = {
    "one leaf": {"length": 64, "dim": 16},
    "part of a leaf, gate": {"length": 40, "group": 2, "value_dim": 24, "gate": True},
    "odd leaves": {"length": 300, "dim": 16},
    "batch, grouped queries, gate": {"batch": 2, "length": 400, "heads": 2, "group": 2, "value_dim": 8, "gate": True},
    "three query heads a key head, dim 24": {"length": 200, "group": 3, "dim": 24, "gate": True},
    "packed": {"length": 500, "ends": [0, 0, 130, 131, 131, 400, 500, 500], "gate": True},
    "repeated w, beta 2": {"length": 260, "dim": 32, "beta": 2.0},
    "ten leaves": {"length": 64 * 9 + 1, "gate": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_linear_stages_equal_the_definition(case: dict) -> None:
    batch, length, heads, group = case.get("batch", 1), case["length"], case.get("heads", 1), case.get("group", 1)
    dim, ends = case.get("dim", 16), case.get("ends")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, generator=generator)

    q, k, v = normal(heads * group, dim), normal(heads, dim), normal(heads, case.get("value_dim", dim))
    w = torch.nn.functional.normalize(normal(heads, dim), dim=-1)
    beta = 2 * torch.rand(batch, length, heads, generator=generator)
    if "beta" in case:
        w, beta = w[:, :1].expand_as(w).contiguous(), torch.full_like(beta, case["beta"])
    g = torch.nn.functional.logsigmoid(normal(heads * group) + 2) if case.get("gate") else None
    cu_seqlens = None if ends is None else torch.tensor(ends)
    exact = [None if x is None else x.double().requires_grad_() for x in (q, k, v, w, beta, g)]
    expected = path_attention_reference(*exact, cu_seqlens=cu_seqlens)
    d_out = normal(heads * group, v.shape[-1])
    expected.backward(d_out.double())

    table = batch_leaf_table(batch, length) if ends is None else packed_leaf_table(cu_seqlens, length, q.device)
    rows = [None if x is None else x.flatten(0, 1).contiguous() for x in (q, k, v, w, beta, g)]
    inputs = linear.Inputs(*rows, scale=dim**-0.5)
    _, out, log_sum_exp = attend(inputs, table)
    gradients, d_gate = attend_backward(inputs, table, out, log_sum_exp, d_out.flatten(0, 1))
    lengths = [length] * batch if ends is None else cu_seqlens.diff().tolist()
    found = [out, gradients.q, gradients.k, gradients.v, gradients.w, gradients.beta]
    found += [] if d_gate is None else [from_running_sum(d_gate, lengths)]
    # float32: some hundred roundings of 6e-8 in a row. For repeated reflections in one direction the leaf's triangular
    # matrix T, 2 everywhere below its diagonal, has a condition number of 7e3, which gradients meet twice.
    tolerance = 2 * 7e3 * 6e-8 if "beta" in case else 3e-6
    for x, y in zip(found, [expected.detach(), *(e.grad for e in exact if e is not None)], strict=True):
        assert (x.double().flatten() - y.flatten()).norm() <= tolerance * y.norm()


def matrices(inputs: linear.Inputs, number: int) -> Tensor:
    """(number, H, D, D) in float64, near enough to the identity for the product of many of them not to vanish."""
    heads, dim = inputs.heads, inputs.q.shape[2]
    noise = torch.randn(number, heads, dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.eye(dim, dtype=torch.float64) + noise / (3 * dim**0.5)


@pytest.mark.parametrize("all_rests", [False, True])
@pytest.mark.parametrize(("dim", "programs"), [(16, 1), (16, 40), (80, 1)], ids=["two levels a launch", "one", "wide"])
@pytest.mark.parametrize("ends", [None, [0, 19 * LEAF, 19 * LEAF, 27 * LEAF - 3, 32 * LEAF, 34 * LEAF]])
def test_tree_of_half_precision(
    ends: list[int] | None, dim: int, programs: int, all_rests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices and gates of all spans that something lies to the right of, from those of the leaves; other places keep
    what they had. Where a launch ends the rests are there too, or all of them.
    """
    monkeypatch.setattr(linear, "TREE_PROGRAMS", programs)
    length, heads, group = 17 * LEAF, 2, 3
    cu_seqlens = torch.tensor([0, length] if ends is None else ends)
    table = batch_leaf_table(2, length) if ends is None else packed_leaf_table(cu_seqlens, ends[-1], cu_seqlens.device)
    half = {"dtype": torch.float16}
    q, k = torch.zeros(1, heads * group, dim, **half), torch.zeros(1, heads, dim, **half)
    inputs = linear.Inputs(q, k, k, k, k[:, :, 0], torch.zeros(1, heads * group), scale=1.0)
    exact = matrices(inputs, table.num_leaves)
    gates = torch.randn(table.num_leaves, heads * group, generator=torch.Generator().manual_seed(2))
    nodes = torch.full((2 * table.num_leaves, heads, dim, dim), float("nan"), **half)
    rests, gate_nodes = torch.full_like(nodes, float("nan")), torch.full(nodes.shape[:1] + gates.shape[1:], torch.nan)
    nodes[::2] = exact.half()
    rests[::2] = (exact - nodes[::2].double()).half()
    gate_nodes[::2] = gates
    linear._tree(inputs, table, nodes, rests, gate_nodes, all_rests=all_rests)

    made = set(range(0, 2 * table.num_leaves, 2))
    tops = [first + levels for first, levels in linear._tree_launches(inputs, table)]
    for leaf, (_, _, index, count, *_) in enumerate(table.written_out().tolist()):
        product, gate = exact[leaf], gates[leaf]
        for level in range(1, table.num_levels):
            span = 1 << level
            if index % span or index + span >= count:
                break
            for i in range(leaf + span // 2, leaf + span):
                product, gate = exact[i] @ product, gate + gates[i]
            node = 2 * leaf + span - 1
            made.add(node)
            assert (nodes[node].double() - product).norm() <= 4e-4 * product.norm()
            torch.testing.assert_close(gate_nodes[node], gate, rtol=1e-5, atol=1e-5)
            if all_rests or level in tops:
                both = nodes[node].double() + rests[node].double()
                assert (both - product).norm() <= 2e-6 * product.norm()
    others = [i for i in range(2 * table.num_leaves) if i not in made]
    assert others
    assert nodes[others].isnan().all()
    assert gate_nodes[others].isnan().all()


@pytest.mark.parametrize(
    ("dim", "batch", "leaves", "heads", "launches"),
    [
        (64, 1, 128, 32, [(0, 2), (2, 2), (4, 1), (5, 1)]),
        (64, 1, 512, 8, [(0, 2), (2, 2), (4, 1), (5, 2), (7, 1)]),
        (64, 32, 8, 16, [(0, 2)]),
        (64, 1, 16, 2, [(0, 2), (2, 1)]),
        (64, 1, 2, 32, []),
        (128, 1, 128, 16, [(0, 2), (2, 2), (4, 2)]),
        (128, 1, 64, 16, [(0, 2), (2, 1), (3, 2)]),
    ],
)
def test_launches_of_the_tree(dim: int, batch: int, leaves: int, heads: int, launches: list[tuple[int, int]]) -> None:
    """Of parts as they are, and less: pairs run side by side as long as there are any."""
    x = torch.empty(0, heads, dim, dtype=torch.bfloat16)
    inputs = linear.Inputs(x, x, x, x, x[:, :, 0], None, scale=1.0)
    assert linear._tree_launches(inputs, batch_leaf_table(batch, leaves * LEAF)) == launches
