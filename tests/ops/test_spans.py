"""Every query meets every earlier key of its sequence exactly once, in one sibling pair of one level."""

from itertools import product

import pytest
import torch

from path_attention.ops.spans import LeafRuns, SpanPlan, plan_spans

# Leaf counts from 0 to past 2^6, and packed batches whose trees have different heights, empty sequences among them.
BATCHES = [
    *[(length,) for length in (*range(1, 70), 127, 128, 129, 255, 256, 257, 1000)],
    (7, 7, 7),
    (33, 1, 0, 20),
    (0, 0, 65, 0),
    (5, 300, 4, 64, 63, 1),
    (0,),
]
LEAF = 4


def covered(plan: SpanPlan) -> list[tuple[int, int]]:
    """(query leaf, key leaf) of every dense pair, as often as it is attended to."""
    return [
        (right + i, left + j)
        for pairs in (pairs for level in plan.levels for pairs in level)
        for left, right in zip(pairs.left.starts, pairs.right.starts, strict=True)
        for i, j in product(range(pairs.right.count), range(pairs.left.count))
    ]


def leaves_of(lengths: tuple[int, ...]) -> list[range]:
    """The leaves of each sequence."""
    ranges, first = [], 0
    for length in lengths:
        count = -(-length // LEAF)
        ranges.append(range(first, first + count))
        first += count
    return ranges


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_each_pair_of_leaves_meets_exactly_once(lengths: tuple[int, ...]) -> None:
    wanted = [(i, j) for leaves in leaves_of(lengths) for i in leaves for j in leaves if j < i]
    assert sorted(covered(plan_spans(lengths, LEAF))) == wanted


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_shape_of_the_tree(lengths: tuple[int, ...]) -> None:
    """Left siblings are complete, right ones follow them at once, and rows move on exactly where a parent needs it."""
    plan = plan_spans(lengths, LEAF)
    ranges = leaves_of(lengths)
    assert plan.num_leaves == (ranges[-1].stop if ranges else 0)
    for number, level in enumerate(plan.levels):
        for pairs in level:
            assert pairs.level == number
            assert pairs.left.count == 2**number
            assert 1 <= pairs.right.count <= 2**number
            assert pairs.right.starts == tuple(start + 2**number for start in pairs.left.starts)
            sequences = [next(r for r in ranges if start in r) for start in pairs.left.starts]
            assert all(
                (s - r.start) % 2 ** (number + 1) == 0 for s, r in zip(pairs.left.starts, sequences, strict=True)
            )
            # A span further up to the left of the pair means that its queries have keys left to meet.
            assert pairs.queries_move_on == any(s > r.start for s, r in zip(pairs.left.starts, sequences, strict=True))
            ends = [start + pairs.left.count + pairs.right.count for start in pairs.right.starts]
            if pairs.keys_move_on:
                assert pairs.right.count == pairs.left.count
            assert pairs.keys_move_on or all(
                s + 2 * pairs.left.count >= r.stop for s, r in zip(pairs.left.starts, sequences, strict=True)
            ), ends


def test_levels_grow_as_the_logarithm() -> None:
    assert [len(plan_spans((length,), 64).levels) for length in (64, 65, 128, 129, 4096, 4097)] == [0, 1, 1, 2, 6, 7]


@pytest.mark.parametrize("starts", [(0,), (1, 4, 7), (0, 2, 9)], ids=["one", "even steps", "uneven steps"])
def test_runs_take_put_and_add(starts: tuple[int, ...]) -> None:
    """The strided view and the index agree with plain slicing."""
    runs, count = LeafRuns(starts, 2), 2
    x = torch.randn(3, 12, LEAF, 5)
    slices = [x[:, start : start + count].flatten(1, 2) for start in starts]
    assert torch.equal(runs.take(x), torch.stack(slices, dim=1))
    rows = torch.randn(3, len(starts), count * LEAF, 5)
    put, added = x.clone(), x.clone()
    runs.put(put, rows)
    runs.add(added, rows)
    wanted_put, wanted_added = x.clone(), x.clone()
    for n, start in enumerate(starts):
        wanted_put[:, start : start + count] = rows[:, n].unflatten(1, (count, LEAF))
        wanted_added[:, start : start + count] += rows[:, n].unflatten(1, (count, LEAF))
    assert torch.equal(put, wanted_put)
    torch.testing.assert_close(added, wanted_added)


@pytest.mark.parametrize("lengths", [(9, 9), (8,), (5, 0, 12, 1), (0, 0)], ids=str)
def test_unpack_is_the_inverse_of_pack(lengths: tuple[int, ...]) -> None:
    plan = plan_spans(lengths, LEAF)
    batch = len(lengths) if plan.uniform else 1
    x = torch.randn(batch, sum(lengths) // batch, 3, 2)
    packed = plan.pack(x, torch.float64)
    assert packed.shape == (3, plan.num_leaves, LEAF, 2)
    assert torch.equal(plan.unpack(packed, batch).to(x.dtype), x)
    # Rows that no token fills are zeros, whatever memory they were made in.
    torch.testing.assert_close(packed.sum(), x.double().sum())
