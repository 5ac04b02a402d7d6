"""The generator of random numbers: the same numbers wherever they are made."""

import numpy as np
import pytest
import torch

from path_attention.tasks.random import integers, philox_uniform, uniform


# Counts around a block of four numbers; seeds and streams up to the width of a word.
@pytest.mark.parametrize("count", [1, 4, 5, 1000])
@pytest.mark.parametrize("seed, stream", [(0, 0), (1, 3), (2**63 + 5, 2**40)])
def test_torch_and_numpy_make_the_same_numbers(seed: int, stream: int, count: int) -> None:
    indices = torch.tensor([0, 1, 7, 2**40])
    assert torch.equal(philox_uniform(seed, stream, indices, count), uniform(seed, stream, indices, count))


def test_numbers_are_those_of_numpys_philox() -> None:
    expected = np.random.Generator(np.random.Philox(key=(5, 2), counter=(0, 0, 0, 9))).random(11)
    np.testing.assert_array_equal(uniform(5, 2, torch.tensor([9]), 11)[0].numpy(), expected)


def test_integers_are_below_their_bound() -> None:
    draws = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert integers(draws, 10).tolist() == [0, 5, 9]
