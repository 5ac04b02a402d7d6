"""output_rows_kernel in Triton's interpreter: numbers of tokens by head and leaf, and of places without a token."""

import math
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, batch_leaf_table, packed_leaf_table
from path_attention.ops.kernels.merge_kernels import output_rows_kernel, token_rows_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, BLOCK_HEADS = 3, 2  # two programs a leaf, the second with a head that there is not
FACTOR = 8.0


def rows(
    table: LeafTable, log_sum_exp: Tensor, delta: Tensor, gate_query: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    delta_rows = torch.full((HEADS, table.row_slots, LEAF), math.nan, device=DEVICE)
    log_sum_exp_rows = torch.full_like(delta_rows if gate_query is None else gate_query, math.nan)
    output_rows_kernel[(table.num_leaves, -(-HEADS // BLOCK_HEADS))](
        p_log_sum_exp=log_sum_exp,
        p_delta=delta,
        p_factor=torch.tensor([FACTOR], device=DEVICE),
        p_gate_query=gate_query,
        p_log_sum_exp_rows=log_sum_exp_rows,
        p_delta_rows=delta_rows,
        **table.arguments,
        HQ=HEADS,
        num_levels=table.num_levels,
        query_slots=table.query_slots,
        row_slots=table.row_slots,
        BLOCK_HEADS=BLOCK_HEADS,
    )
    return log_sum_exp_rows.cpu(), delta_rows.cpu()


def tables(case: str) -> tuple[int, LeafTable]:
    """Three leaves with a last one of 12 tokens, three such sequences; packed: none, three, one, two leaves; one whole
    leaf.
    """
    if case == "batch":
        return 3 * 140, batch_leaf_table(3, 140)
    return 340, packed_leaf_table(torch.tensor([0, 0, 140, 150, 276, 340]), 340, DEVICE)


@pytest.mark.parametrize("case", ["batch", "packed"])
def test_places_without_a_token_have_no_weight(case: str) -> None:
    """A weight is exp2(s + number) whatever s is, so 0 by -infinity; and dS = weight * (... + delta's) is then 0 where
    that is finite: one that nobody wrote would make NaN of it.
    """
    tokens, table = tables(case)
    torch.manual_seed(0)
    log_sum_exp, delta = (torch.randn(tokens, HEADS, device=DEVICE) for _ in range(2))
    log_sum_exp_rows, delta_rows = rows(table, log_sum_exp, delta)
    expected = [torch.full((HEADS, table.row_slots, LEAF), x) for x in (-math.inf, 0.0)]
    pairs = torch.zeros(table.row_slots, dtype=torch.bool)  # that have a leaf: the others nobody reads
    for start, length, index, _, _, _, base in table.written_out().tolist():
        place = (slice(None), base + index, slice(0, length))
        if length:
            expected[0][place] = math.log2(FACTOR) - log_sum_exp[start : start + length].T.cpu() / math.log(2)
            expected[1][place] = -delta[start : start + length].T.cpu()
            pairs[base + index - index % 2 :][:2] = True
    torch.testing.assert_close(log_sum_exp_rows[:, pairs], expected[0][:, pairs])
    assert torch.equal(delta_rows[:, pairs], expected[1][:, pairs])


@pytest.mark.parametrize("case", ["batch", "packed"])
def test_gates_are_added_at_every_level(case: str) -> None:
    """Of a leaf that has a left sibling there, and -infinity beside it where its pair has no other."""
    tokens, table = tables(case)
    torch.manual_seed(0)
    log_sum_exp = torch.randn(tokens, HEADS, device=DEVICE)
    gate = torch.randn(HEADS, table.num_levels, table.query_slots, LEAF, device=DEVICE)
    found, _ = rows(table, log_sum_exp, log_sum_exp, gate)
    expected = torch.full_like(gate.cpu(), math.nan)
    for start, length, index, count, base, _, _ in table.written_out().tolist():
        own = torch.full((HEADS, LEAF), -math.inf)
        own[:, :length] = math.log2(FACTOR) - log_sum_exp[start : start + length].T.cpu() / math.log(2)
        for level in range(table.num_levels if length else 0):
            if (index >> level) & 1:
                slot = base + ((index >> (level + 1)) << level | index & ((1 << level) - 1))
                expected[:, level, slot] = own + gate[:, level, slot].cpu()
                if index % 2 == 0 and index + 1 == count:
                    expected[:, level, slot + 1] = -math.inf
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("case", ["batch", "packed"])
def test_rows_come_back_to_their_tokens(case: str) -> None:
    tokens, table = tables(case)
    torch.manual_seed(0)
    numbers = torch.randn(tokens, HEADS, device=DEVICE)
    _, delta_rows = rows(table, numbers, numbers)
    found = torch.full_like(numbers, math.nan)
    token_rows_kernel[(table.num_leaves, -(-HEADS // BLOCK_HEADS))](
        p_rows=delta_rows.to(DEVICE),
        p_factor=torch.tensor([FACTOR], device=DEVICE),
        p_out=found,
        **table.arguments,
        HQ=HEADS,
        row_slots=table.row_slots,
        BLOCK_HEADS=BLOCK_HEADS,
    )
    assert torch.equal(found, -numbers / FACTOR)
