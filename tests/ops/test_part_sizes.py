"""Parts of a call on CUDA: all of it, no more than the limits, and as few as there can be."""

import itertools

import pytest

from path_attention.ops.engines.part_sizes import TIMES_SOFTMAX, Cut, Limits, Shape, backward_cut, cut, evenly, sizes

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


def peak(shape: Shape, found: Cut) -> float:
    """Times softmax attention's."""
    first, *later = [
        shape.buffer_bytes() * s * h / (shape.batch * shape.heads) for s in found.sequences for h in found.heads
    ]
    return max([shape.out_bytes() + first] + [shape.result_bytes() + x for x in later]) / shape.softmax_bytes()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("batch", "length", "heads"), BATCH_LENGTH_HEADS)
def test_memory_shapes_parts_and_makes_no_more_of_them(
    batch: int, length: int, heads: int, dim: int, group: int, gated: bool
) -> None:
    shape = Shape(batch, length, group * heads, heads, dim, 4, gated)
    most = MOST[dim]
    found = backward_cut(shape, most)
    plain = cut(batch, shape.leaves, heads, Limits(most, most), in_place=True)
    assert sum(found.sequences) == batch
    assert sum(found.heads) == heads
    assert found.parts == plain.parts
    assert peak(shape, found) <= max(TIMES_SOFTMAX, peak(shape, plain))
    if peak(shape, plain) <= TIMES_SOFTMAX and found.parts > 1:
        assert max(found.heads) - min(found.heads) <= 1


# Equal parts would take 3.5 times as much at the last one (results/h200_parts.json), and three parts 8% longer.
@pytest.mark.parametrize(
    ("shape", "heads", "times"),
    [
        ((2, 8192, 32, 32, 64), [18, 14], 3.0),
        ((4, 4096, 24, 24, 64), [13, 11], 3.0),
        ((1, 32768, 32, 32, 64), [8, 8, 8, 8], 3.0),
        ((2, 8192, 32, 8, 128), [8], 3.0),
        ((4, 4096, 16, 16, 128), [9, 7], 3.0),
        ((2, 8192, 16, 16, 128), [9, 7], 3.25),
    ],
    ids=str,
)
def test_a_first_part_that_is_larger_spares_another_one(
    shape: tuple[int, int, int, int, int], heads: list[int], times: float
) -> None:
    described = Shape(*shape, 4, gated=False)
    found = backward_cut(described, MOST[shape[4]])
    assert found == ([shape[0]], heads)
    assert peak(described, found) <= times
