"""Sums by doubling are running sums of every length, along any dimension."""

import pytest
import torch

from path_attention.ops.sums import running_sum_by_doubling


@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 100])
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_doubling_equals_cumsum(length: int, dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = length
    x = torch.arange(max(1, 24 * length)).double()[: torch.Size(shape).numel()].view(shape)  # whole numbers: exact
    assert torch.equal(running_sum_by_doubling(x, dim), x.cumsum(dim))


def test_small_numbers_are_not_lost_beside_one_that_comes_later() -> None:
    """No difference of sums is taken: a closed gate leaves no rounding in what is before it."""
    x = torch.tensor([0.25, 0.125, -1e30])
    assert running_sum_by_doubling(x, 0).tolist()[:2] == [0.25, 0.375]
