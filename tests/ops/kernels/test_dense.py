"""The dense part between sibling spans against plain attention in float64 over the same random rows.

Cases: no level, one, several; an odd number of leaves, right siblings cut short, a last leaf of one token; batches and
packed sequences, empty ones and single leaves among them; grouped queries; gates; widths that need masks, D unlike DV,
and one that no tensor descriptor can have. All memory that the kernels must not read, or must write, is poisoned.

On a CPU the kernels run in Triton's interpreter in float32; on a GPU in bfloat16.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from path_attention.ops.kernels import dense
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, batch_leaf_table, packed_leaf_table

CUDA = torch.cuda.is_available()
NAN = float("nan")


@dataclass
class Pair:
    """One query leaf and its left sibling at one level: slots and rows, by the leaf table's own description."""

    level: int
    query_slot: int
    rows: slice
    key_slots: slice
    keys: slice

    @property
    def length(self) -> int:
        return self.rows.stop - self.rows.start


def within(leaf: int, level: int) -> int:
    return ((leaf >> (level + 1)) << level) | (leaf & ((1 << level) - 1))


def pairs(table: LeafTable) -> list[Pair]:
    found = []
    start, length, index, _, query_base, key_base, _ = table.written_out().T.tolist()
    for leaf in range(table.num_leaves):
        for level in range(table.num_levels):
            if length[leaf] and index[leaf] >> level & 1:
                first = ((index[leaf] >> level) - 1) << level
                slot = key_base[leaf] + within(first, level)
                left = start[leaf] - (index[leaf] - first) * LEAF
                found.append(
                    Pair(
                        level=level,
                        query_slot=query_base[leaf] + within(index[leaf], level),
                        rows=slice(start[leaf], start[leaf] + length[leaf]),
                        key_slots=slice(slot, slot + 2**level),
                        keys=slice(left, left + (LEAF << level)),
                    )
                )
    return found


@dataclass
class Problem:
    """Operands in the kernels' dtype; the leaves' own attention is over one made-up logit and value a row."""

    table: LeafTable
    query_rows: Tensor
    key_rows: Tensor
    values: Tensor
    gate_query: Tensor | None
    gate_key: Tensor | None
    own_out: Tensor
    own_log_sum_exp: Tensor
    d_out: Tensor

    @property
    def operands(self) -> tuple[LeafTable, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.table, self.query_rows, self.key_rows, self.values, self.gate_query, self.gate_key

    @property
    def group(self) -> int:
        return self.query_rows.shape[3] // self.key_rows.shape[3]


def problem(
    length: int,
    batch: int = 1,
    ends: list[int] | None = None,
    heads: int = 1,
    group: int = 1,
    dim: int = 16,
    value_dim: int | None = None,
    gate: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    value_dim = value_dim or dim
    if ends is None:
        table = batch_leaf_table(batch, length)
    else:
        table = packed_leaf_table(torch.tensor(ends, device=device), length, torch.device(device))
    tokens, query_heads = batch * length, heads * group

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    queries = (table.num_levels, table.query_slots, LEAF)
    keys = (table.num_levels, table.key_slots, LEAF)
    x = Problem(
        table=table,
        query_rows=normal(*queries, query_heads, dim) * dim**-0.5,
        key_rows=normal(*keys, heads, dim),
        values=normal(tokens, heads, value_dim),
        gate_query=-normal(query_heads, *queries, dtype=torch.float32).abs() if gate else None,
        gate_key=-normal(query_heads, *keys, dtype=torch.float32).abs() if gate else None,
        own_out=normal(tokens, query_heads, value_dim),
        own_log_sum_exp=normal(tokens, query_heads, dtype=torch.float32) + 4,
        d_out=normal(tokens, query_heads, value_dim),
    )
    return poison_unused_slots(x)


def poison_unused_slots(x: Problem) -> Problem:
    used_queries = torch.zeros(x.query_rows.shape[:2], dtype=torch.bool)
    used_keys = torch.zeros(x.key_rows.shape[:2], dtype=torch.bool)
    for pair in pairs(x.table):
        used_queries[pair.level, pair.query_slot] = True
        used_keys[pair.level, pair.key_slots] = True
    for rows, gates, used in (
        (x.query_rows, x.gate_query, used_queries),
        (x.key_rows, x.gate_key, used_keys),
    ):
        rows[~used.to(rows.device)] = NAN
        if gates is not None:
            gates[:, ~used.to(gates.device)] = NAN
    return x


@dataclass
class Expected:
    out: Tensor
    log_sum_exp: Tensor
    d_query_rows: Tensor
    d_key_rows: Tensor
    d_values: Tensor
    gate_row: Tensor
    gate_column: Tensor


def scores(x: Problem, pair: Pair) -> Tensor:
    """(HQ, rows, keys)."""
    q = x.query_rows[pair.level, pair.query_slot, : pair.length]
    k = x.key_rows[pair.level, pair.key_slots].flatten(0, 1).repeat_interleave(x.group, 1)
    logits = torch.einsum("ihd,jhd->hij", q, k)
    if x.gate_query is not None and x.gate_key is not None:
        logits = logits + x.gate_query[:, pair.level, pair.query_slot, : pair.length, None]
        logits = logits + x.gate_key[:, pair.level, pair.key_slots].flatten(1)[:, None]
    return logits


def exact(x: Problem) -> Expected:
    """Level by level in float64; NaN wherever nothing is to be written."""
    doubles = {name: value.double() for name, value in vars(x).items() if isinstance(value, Tensor)}
    x = replace(x, **doubles)
    total = x.own_log_sum_exp.clone()
    for pair in pairs(x.table):
        total[pair.rows] = torch.logaddexp(total[pair.rows], scores(x, pair).logsumexp(-1).T)
    out = x.own_out * (x.own_log_sum_exp - total).exp()[..., None]
    weights = [(scores(x, pair) - total[pair.rows].T[..., None]).exp() for pair in pairs(x.table)]
    for pair, p in zip(pairs(x.table), weights, strict=True):
        out[pair.rows] += torch.einsum("hij,jhd->ihd", p, x.values[pair.keys].repeat_interleave(x.group, 1))
    delta = (out * x.d_out).sum(-1)
    result = Expected(
        out=out,
        log_sum_exp=total,
        d_query_rows=torch.full_like(x.query_rows, NAN),
        d_key_rows=torch.full_like(x.key_rows, NAN),
        d_values=torch.zeros_like(x.values),
        gate_row=torch.zeros_like(total),
        gate_column=torch.zeros_like(total),
    )
    for pair, p in zip(pairs(x.table), weights, strict=True):
        v = x.values[pair.keys].repeat_interleave(x.group, 1)
        d_scores = p * (torch.einsum("ihd,jhd->hij", x.d_out[pair.rows], v) - delta[pair.rows].T[..., None])
        q = x.query_rows[pair.level, pair.query_slot, : pair.length]
        k = x.key_rows[pair.level, pair.key_slots].flatten(0, 1).repeat_interleave(x.group, 1)
        d_query = result.d_query_rows[pair.level, pair.query_slot]
        d_query[:] = 0  # past the sequence's end too
        d_query[: pair.length] = torch.einsum("hij,jhd->ihd", d_scores, k)
        d_key = result.d_key_rows[pair.level, pair.key_slots]
        d_keys = torch.einsum("hij,ihd->jhd", d_scores, q).unflatten(1, (-1, x.group)).sum(2)
        d_key[:] = d_key.nan_to_num(0) + d_keys.view_as(d_key)
        d_v = torch.einsum("hij,ihd->jhd", p, x.d_out[pair.rows])
        result.d_values[pair.keys] += d_v.unflatten(1, (-1, x.group)).sum(2)
        result.gate_row[pair.rows] += d_scores.sum(2).T
        result.gate_column[pair.keys] += d_scores.sum(1).T
    return result


def run(x: Problem) -> Expected:
    """The kernels, each with the exact results of the one before; delta as the caller of the kernels makes it."""
    gate = x.gate_query is not None
    out, log_sum_exp = x.own_out.clone(), x.own_log_sum_exp.clone()
    dense.dense_forward(*x.operands, out, log_sum_exp)
    delta = (out.float() * x.d_out.float()).sum(-1)
    result = Expected(
        out=out,
        log_sum_exp=log_sum_exp,
        d_query_rows=torch.full_like(x.query_rows, NAN),
        d_key_rows=torch.full_like(x.key_rows, NAN),
        d_values=torch.full_like(x.values, NAN, dtype=torch.float32),
        gate_row=torch.full_like(log_sum_exp, NAN),
        gate_column=torch.full_like(log_sum_exp, NAN),
    )
    rest = (x.d_out, log_sum_exp, delta)
    dense.dense_backward_queries(*x.operands, *rest, result.d_query_rows, result.gate_row if gate else None)
    dense.dense_backward_keys(
        *x.operands, *rest, result.d_key_rows, result.d_values, result.gate_column if gate else None
    )
    return result


def compare(x: Problem, tolerance: float) -> None:
    result, expected = run(x), exact(x)
    for name, right in vars(expected).items():
        if name.startswith("gate") and x.gate_query is None:
            continue
        left = getattr(result, name).double()
        assert torch.equal(left.isnan(), right.isnan()), name
        error, size = (left - right).nan_to_num(0).norm(), right.nan_to_num(0).norm()
        assert error <= tolerance * size, (name, float(error / size))


CASES = {
    "one leaf": {"length": 40, "gate": True},
    "one level": {"length": 65},
    "two full leaves": {"length": 128, "heads": 2, "gate": True},
    "three leaves": {"length": 190, "group": 2, "value_dim": 32},
    "five leaves, batch": {"batch": 2, "length": 257, "heads": 2, "group": 2, "gate": True},
    "seven leaves": {"length": 400, "value_dim": 24, "dim": 32},
    "packed": {"length": 500, "ends": [0, 0, 130, 131, 131, 400, 500, 500], "heads": 2, "gate": True},
    "packed, odd leaves side by side": {"length": 470, "ends": [0, 150, 300, 364, 470]},
    "dim 24": {"length": 200, "heads": 2, "dim": 24, "gate": True},
    "no descriptor": {"length": 200, "dim": 18, "value_dim": 22},
}


@pytest.mark.skipif(CUDA, reason="float32 is for the interpreter")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("leaves", [1, 2])
def test_kernels_equal_plain_attention(case: dict, leaves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both numbers of leaves a program, whichever a width of tile uses by itself."""
    options = dense.Launch(leaves, LEAF * leaves, 4, 1)
    keys = replace(options, tile=LEAF)
    monkeypatch.setattr(dense, "launches", lambda *_: dense.Launches(options, options, keys))
    compare(problem(**case), 2e-6)  # float32: some ten roundings of 6e-8 in a row


@pytest.mark.skipif(CUDA, reason="float32 is for the interpreter")
@pytest.mark.parametrize("dim", [16, 72, 136])  # in float32 in pieces
def test_each_width_with_its_own_options(dim: int) -> None:
    compare(problem(length=330, dim=dim, gate=True), 2e-6)


@pytest.mark.skipif(CUDA, reason="float32 is for the interpreter")
def test_extreme_logits() -> None:
    """Weights that underflow and weights of one; a row whose own leaf weighs nothing and one where it weighs all."""
    x = problem(length=330)
    x.query_rows.mul_(30)
    x.own_log_sum_exp[::2] = -1e4
    x.own_log_sum_exp[1::4] = 1e4
    compare(x, 3e-5)  # logits of 300 carry 300 * 6e-8 into the exponent


@pytest.mark.skipif(CUDA, reason="no launch is made")
def test_too_wide() -> None:
    with pytest.raises(ValueError, match="head_dim 64 and value_dim 300 must be at most 256"):
        dense.launches(64, 300, gates=False, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (128, 128), (24, 40), (256, 256)])
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 2, "length": 1500, "heads": 2, "group": 2},
        {"length": 1200, "ends": [0, 0, 130, 131, 700, 1200], "heads": 3},
    ],
    ids=["batch", "packed"],
)
def test_half_precision_on_gpu(shape: dict, dim: int, value_dim: int, gate: bool) -> None:
    # bfloat16: weights and dS are rounded to 8 bits, so are the results, and delta is made of a rounded output.
    compare(problem(**shape, dim=dim, value_dim=value_dim, gate=gate, dtype=torch.bfloat16, device="cuda"), 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
def test_without_descriptors_on_gpu(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs before Hopper."""
    monkeypatch.setattr(dense, "DESCRIPTOR_CAPABILITY", (99, 0))
    compare(problem(length=1500, heads=2, dim=dim, gate=True, dtype=torch.bfloat16, device="cuda"), 1e-2)
