"""output_rows_kernel in Triton's interpreter: numbers of tokens by head and leaf, and of places without a token."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, batch_leaf_table, packed_leaf_table
from path_attention.ops.kernels.merge_kernels import output_rows_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, BLOCK_HEADS = 3, 2  # two programs a leaf, the second with a head that there is not
FACTOR = 8.0


def rows(table: LeafTable, log_sum_exp: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = [torch.full((HEADS, table.row_slots, LEAF), float("nan"), device=DEVICE) for _ in range(2)]
    output_rows_kernel[(table.num_leaves, -(-HEADS // BLOCK_HEADS))](
        p_log_sum_exp=log_sum_exp,
        p_delta=delta,
        p_factor=torch.tensor([FACTOR], device=DEVICE),
        p_log_sum_exp_rows=found[0],
        p_delta_rows=found[1],
        **table.arguments,
        HQ=HEADS,
        row_slots=table.row_slots,
        BLOCK_HEADS=BLOCK_HEADS,
    )
    return found[0].cpu(), found[1].cpu()


# Three leaves with a last one of 12 tokens, three such sequences; packed: none, three, one, two leaves; one whole leaf.
@pytest.mark.parametrize("case", ["batch", "packed"])
def test_places_without_a_token_have_no_weight(case: str) -> None:
    """A weight is exp2(s - log_sum_exp) whatever s is, so 0 by infinity; and dS = weight * (... - delta) is then 0
    where delta is finite: one that nobody wrote would make NaN of it.
    """
    if case == "batch":
        tokens, table = 3 * 140, batch_leaf_table(3, 140)
    else:
        tokens, table = 340, packed_leaf_table(torch.tensor([0, 0, 140, 150, 276, 340]), 340, DEVICE)
    torch.manual_seed(0)
    log_sum_exp, delta = (torch.randn(tokens, HEADS, device=DEVICE) for _ in range(2))
    log_sum_exp_rows, delta_rows = rows(table, log_sum_exp, delta)
    expected = [torch.full((HEADS, table.row_slots, LEAF), x) for x in (math.inf, 0.0)]
    pairs = torch.zeros(table.row_slots, dtype=torch.bool)  # that have a leaf: the others nobody reads
    for start, length, index, _, _, _, base in table.written_out().tolist():
        place = (slice(None), base + index, slice(0, length))
        if length:
            expected[0][place] = log_sum_exp[start : start + length].T.cpu() / math.log(2) - math.log2(FACTOR)
            expected[1][place] = delta[start : start + length].T.cpu()
            pairs[base + index - index % 2 :][:2] = True
    torch.testing.assert_close(log_sum_exp_rows[:, pairs], expected[0][:, pairs])
    assert torch.equal(delta_rows[:, pairs], expected[1][:, pairs])
