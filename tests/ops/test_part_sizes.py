"""Parts of a call on CUDA: all of it, no more than the limits, and as few as there can be."""

import itertools

import pytest

from path_attention.ops.engines.part_sizes import TIMES_SOFTMAX, Limits, Shape, backward_limits, evenly, sizes

# PART of engines/cuda.py in these units, at head_dim 64 and 128.
MOST = {64: 4096, 128: 2048}
BATCH_LENGTH_HEADS = [
    (2, 8192, 32),
    (4, 4096, 24),
    (8, 2048, 32),
    (1, 32768, 32),
    (1, 131072, 8),
    (32, 512, 32),
    (3, 5000, 20),
]


@pytest.mark.parametrize(("first", "later"), itertools.combinations_with_replacement(range(9, 0, -1), 2))
@pytest.mark.parametrize("unit", [1, 2])
def test_as_few_parts_as_there_can_be(first: int, later: int, unit: int) -> None:
    for count in range(1, 30):
        found = sizes(count, unit, Limits(first, later))
        # The fewest that hold all, filled to the limits.
        held = [first // unit + i * (later // unit) for i in range(count + 1)]
        fewest = next((i + 1 for i, x in enumerate(held) if x >= count), None)
        if found is None:
            assert fewest is None
            continue
        assert len(found) == fewest
        assert sum(found) == count
        assert min(found) > 0
        assert found[0] * unit <= first
        assert all(x * unit <= later for x in found[1:])
        if max(found) - min(found) > 1:  # only where the later ones are full
            assert set(found[1:]) == {later // unit}


def test_evenly() -> None:
    assert evenly(7, 3) == [3, 2, 2]
    assert evenly(6, 3) == [2, 2, 2]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("batch", "length", "heads"), BATCH_LENGTH_HEADS)
def test_a_backward_pass_keeps_within_its_memory(
    batch: int, length: int, heads: int, dim: int, group: int, gated: bool
) -> None:
    shape = Shape(batch, length, group * heads, heads, dim, 4, gated)
    limits = backward_limits(shape, MOST[dim])
    if shape.units <= MOST[dim]:
        assert limits == (MOST[dim], MOST[dim])
        return
    room, buffers = TIMES_SOFTMAX * shape.softmax_bytes(), shape.buffer_bytes()
    assert 0 < limits.later <= limits.first
    assert shape.out_bytes() + buffers * limits.first / shape.units <= room
    assert shape.result_bytes() + buffers * limits.later / shape.units <= room


def test_a_part_is_not_cut_for_memory_alone_where_all_fits() -> None:
    """Forward and backward over 32,768 tokens take four parts, as PART alone would have it."""
    shape = Shape(1, 32768, 32, 32, 64, 4, gated=False)
    assert sizes(32, shape.leaves, backward_limits(shape, MOST[64])) == [8, 8, 8, 8]


def test_a_first_part_that_is_larger_spares_a_third_one() -> None:
    shape = Shape(2, 8192, 32, 32, 64, 4, gated=False)
    assert sizes(32, 2 * shape.leaves, backward_limits(shape, MOST[64])) == [18, 14]
