"""Where leaves and spans stand in memory on the device: the one thing all kernels agree on.

Tokens of a batch (B, L, ...) or of a packed row are one row of T = B * L tokens. Leaves of LEAF tokens are numbered
through, sequence after sequence; a leaf's index i is counted within its sequence, where bit l of i says which sibling
it belongs to at level l: 0 the left one, 1 the right one. The tables are made on the device without the host waiting:
for packed batches the number of leaves is an upper bound and the leaves past the last have length 0.

Rows moved to the edges of level l are kept for the siblings that use them, compactly: with

    within(i, l) = ((i >> (l + 1)) << l) | (i & (2^l - 1))          (i with bit l taken out)

a query leaf (bit l of i set) stands at slot ``query_base + within`` and a key leaf (bit l clear, a right sibling
exists) at slot ``key_base + within`` of its level, so that a span's leaves are consecutive. A span's transition matrix
stands at node 2 * first + 2^l - 1 of its sequence's 2 * count nodes (the in-order numbering of a binary tree), where
first is its first leaf.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens a leaf on CUDA: 64 rows are one warpgroup's matrix instruction, and the leaf's inverse stays in registers.
LEAF = 64


@dataclass(frozen=True)
class LeafTable:
    """One int32 entry for each of N leaves, on the device, and the sizes the host needs to allocate."""

    start: Tensor  # row of the leaf's first token among T tokens
    length: Tensor  # tokens in the leaf, 0 for no leaf
    index: Tensor  # i, its index in its sequence
    count: Tensor  # leaves in its sequence
    query_base: Tensor  # first query slot of its sequence, at every level
    key_base: Tensor  # first key slot of its sequence, at every level
    num_leaves: int  # N
    num_levels: int
    query_slots: int  # leaves in a level's query buffer
    key_slots: int  # leaves in a level's key buffer


def _levels(leaves: int) -> int:
    return max(0, leaves - 1).bit_length()


def batch_leaf_table(batch: int, length: int, device: torch.device) -> LeafTable:
    """The table of ``batch`` sequences of ``length`` tokens each."""
    leaves = -(-length // LEAF)
    levels = _levels(leaves)
    # Left siblings at level l come in whole spans: the widest level decides.
    keys = max((-(-(leaves - 2**level) // 2 ** (level + 1)) * 2**level for level in range(levels)), default=0)
    sequence = torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(leaves)
    index = torch.arange(leaves, dtype=torch.int32, device=device).repeat(batch)
    return LeafTable(
        start=sequence * length + index * LEAF,
        length=(length - index * LEAF).clamp_max(LEAF),
        index=index,
        count=torch.full_like(index, leaves),
        query_base=sequence * (leaves // 2),
        key_base=sequence * keys,
        num_leaves=batch * leaves,
        num_levels=levels,
        query_slots=max(1, batch * (leaves // 2)),
        key_slots=max(1, batch * keys),
    )


def packed_leaf_table(cu_seqlens: Tensor, length: int, device: torch.device) -> LeafTable:
    """The table of sequences packed into one row of ``length`` tokens by cu_seqlens (sequences + 1,).

    Boundaries on the host give exact sizes; boundaries on the device give upper bounds, and the host does not wait.
    """
    sequences = cu_seqlens.numel() - 1
    ends = cu_seqlens.to(torch.int64)
    lengths = ends[1:] - ends[:-1]
    leaves = (lengths + (LEAF - 1)) // LEAF
    last = leaves.cumsum(0)  # leaves up to and including this sequence
    if cu_seqlens.device.type == "cpu":
        bound, longest = max(1, int(last[-1])), int(leaves.max())
    else:
        # Every sequence may leave one leaf partly empty.
        longest = -(-length // LEAF)
        bound = longest + sequences
    number = torch.arange(bound, device=cu_seqlens.device)
    sequence = torch.searchsorted(last, number, right=True).clamp_max(sequences - 1)
    first = (last - leaves)[sequence]
    index = number - first
    start = ends[:-1][sequence] + index * LEAF
    present = number < last[-1]
    tokens = torch.where(present, (ends[1:][sequence] - start).clamp(0, LEAF), 0)
    columns = torch.stack([start, tokens, index, leaves[sequence], first // 2, first])
    columns = columns.to(torch.int32).to(device, non_blocking=True)
    return LeafTable(
        start=columns[0],
        length=columns[1],
        index=columns[2],
        count=columns[3],
        query_base=columns[4],
        key_base=columns[5],
        num_leaves=bound,
        num_levels=_levels(longest),
        query_slots=max(1, bound // 2),
        key_slots=bound,
    )
