"""Dyadic spans of a batch of sequences: which leaves meet which, at which level.

A sequence is cut into leaves of B tokens; at level l a span holds 2^l leaves and two sibling spans, left and right,
meet at one boundary. Every query of the right sibling attends to every key of the left one with no mask. A left sibling
that has a right one is always complete; a right sibling may be cut short by the end of its sequence.

All sequences (of a batch, or packed by cu_seqlens) lie one after another in one row of leaves, each padded to whole
leaves, so that a batch, a packed batch and a single long sequence are the same problem. Legend: N leaves in the row,
B tokens a leaf, H heads, G query heads per key/value head.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeafRuns:
    """Runs of ``count`` consecutive leaves, one for each entry of ``starts``: the left, or right, siblings of a level.

    Runs at equal distances (every power-of-two batch) are read and written through a strided view, others by index.
    """

    starts: tuple[int, ...]
    count: int

    @property
    def step(self) -> int | None:
        """Distance of neighbouring runs in leaves, None when they are not evenly spaced."""
        steps = {b - a for a, b in pairwise(self.starts)}
        if len(steps) > 1:
            return None
        return steps.pop() if steps else self.count

    def _view(self, x: Tensor, step: int) -> Tensor:
        *lead, _leaves, rows, dim = x.shape
        *lead_strides, leaf_stride, row_stride, dim_stride = x.stride()
        assert leaf_stride == rows * row_stride, "leaves must follow one another in memory"
        return x.as_strided(
            (*lead, len(self.starts), self.count * rows, dim),
            (*lead_strides, step * leaf_stride, row_stride, dim_stride),
            x.storage_offset() + self.starts[0] * leaf_stride,
        )

    def take(self, x: Tensor) -> Tensor:
        """(..., N, B, D) -> (..., runs, count * B, D); a view of x where the runs are evenly spaced."""
        if self.step is not None:
            return self._view(x, self.step)
        return (
            x.index_select(-3, _leaf_index(self, x.device))
            .unflatten(-3, (len(self.starts), self.count))
            .flatten(-3, -2)
        )

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write ``rows`` (..., runs, count * B, D), as :meth:`take` gives them, back into x (..., N, B, D)."""
        if self.step is not None:
            view = self._view(x, self.step)
            if view.data_ptr() != rows.data_ptr():  # else rows is that view, changed in place
                view.copy_(rows)
        else:
            x.index_copy_(x.dim() - 3, _leaf_index(self, x.device), self._by_leaf(x, rows).to(x.dtype))

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add ``rows`` (..., runs, count * B, D), or one row for each run, to those of x (..., N, B, D)."""
        if self.step is not None:
            self._view(x, self.step).add_(rows)
        else:
            x.index_add_(x.dim() - 3, _leaf_index(self, x.device), self._by_leaf(x, rows).to(x.dtype))

    def _by_leaf(self, x: Tensor, rows: Tensor) -> Tensor:
        """(..., runs, count * B or 1, dim) -> (..., runs * count, B, dim)."""
        rows = rows.expand(*rows.shape[:-2], self.count * x.shape[-2], rows.shape[-1])
        return rows.unflatten(-2, (self.count, x.shape[-2])).flatten(-4, -3)


@lru_cache(maxsize=1024)
def _leaf_index(runs: LeafRuns, device: torch.device) -> Tensor:
    starts = torch.tensor(runs.starts)
    return (starts[:, None] + torch.arange(runs.count)).flatten().to(device)


@dataclass(frozen=True)
class SiblingPairs:
    """Pairs of sibling spans of one level whose right siblings hold the same number of leaves."""

    level: int
    left: LeafRuns  # 2^level leaves each
    right: LeafRuns
    queries_move_on: bool  # some right sibling lies to the right of another span further up
    keys_move_on: bool  # some left sibling lies to the left of another span further up (its pair is complete)

    @property
    def left_root(self) -> LeafRuns:
        """First leaf of each left span: where the product P of the span, and later of its parent, is kept."""
        return LeafRuns(self.left.starts, 1)

    @property
    def right_root(self) -> LeafRuns:
        return LeafRuns(self.right.starts, 1)


@dataclass(frozen=True)
class SpanPlan:
    """How the tokens of a call lie in leaves, and the sibling pairs of every level, lowest level first."""

    leaf: int  # B, tokens a leaf
    lengths: tuple[int, ...]  # tokens of each sequence
    num_leaves: int  # N
    levels: tuple[tuple[SiblingPairs, ...], ...]

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    def pack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(batch, L, heads, D) -> (heads, N, B, D) in ``dtype``, zeros where a leaf is not full."""
        heads, dim = x.shape[2:]
        packed = torch.empty(heads, self.num_leaves, self.leaf, dim, dtype=dtype, device=x.device)
        if self.uniform:
            rows = packed.view(heads, len(self.lengths), -1, dim)
            length = self.lengths[0]
            rows[:, :, :length] = x.reshape(len(self.lengths), length, heads, dim).permute(2, 0, 1, 3)
            rows[:, :, length:] = 0
        else:
            rows = packed.zero_().view(heads, -1, dim)
            rows.index_copy_(1, _token_rows(self, x.device), x.reshape(-1, heads, dim).transpose(0, 1).to(dtype))
        return packed

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """(heads, N, B, D) -> (batch, L, heads, D), the tokens only. The inverse of :meth:`pack`."""
        heads, dim = x.shape[0], x.shape[-1]
        if self.uniform:
            rows = x.reshape(heads, len(self.lengths), -1, dim)[:, :, : self.lengths[0]]
            tokens = rows.permute(1, 2, 0, 3)
        else:
            tokens = x.reshape(heads, -1, dim).index_select(1, _token_rows(self, x.device)).transpose(0, 1)
        return tokens.reshape(batch, -1, heads, dim)


@lru_cache(maxsize=256)
def _token_rows(plan: SpanPlan, device: torch.device) -> Tensor:
    """Row of every token in the padded row of N * B."""
    rows, first = [], 0
    for length in plan.lengths:
        rows.append(torch.arange(first, first + length))
        first += -(-length // plan.leaf) * plan.leaf
    return torch.cat(rows).to(device)


@lru_cache(maxsize=256)
def plan_spans(lengths: tuple[int, ...], leaf: int, to_edges: bool = False) -> SpanPlan:
    """The plan of sequences of these lengths (tokens; zero allowed) with leaves of ``leaf`` tokens.

    ``to_edges``: rows move on to the edges of their sequences, for sequences that are spans of something longer.
    """
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(
        list
    )  # (level, right leaves) -> (first leaf, leaves)
    first = 0
    for length in lengths:
        leaves = -(-length // leaf)
        level, span = 0, 1
        while span < leaves:
            for start in range(0, leaves - span, 2 * span):
                found[level, min(span, leaves - start - span)].append((first + start, first + leaves))
            level, span = level + 1, 2 * span
        first += leaves
    levels: list[list[SiblingPairs]] = []
    sequence_start = _sequence_starts(lengths, leaf)
    for (level, right_leaves), pairs in sorted(found.items()):
        span = 2**level
        starts = tuple(start for start, _ in pairs)
        if level == len(levels):
            levels.append([])
        levels[level].append(
            SiblingPairs(
                level=level,
                left=LeafRuns(starts, span),
                right=LeafRuns(tuple(start + span for start in starts), right_leaves),
                queries_move_on=to_edges or any(start not in sequence_start for start in starts),
                keys_move_on=to_edges or any(end > start + 2 * span for start, end in pairs),
            )
        )
    return SpanPlan(leaf=leaf, lengths=lengths, num_leaves=first, levels=tuple(tuple(level) for level in levels))


def _sequence_starts(lengths: tuple[int, ...], leaf: int) -> frozenset[int]:
    """First leaf of every sequence that has one."""
    starts, first = set(), 0
    for length in lengths:
        if length:
            starts.add(first)
        first += -(-length // leaf)
    return frozenset(starts)
