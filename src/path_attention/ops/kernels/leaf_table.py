"""Where leaves and spans stand in memory on the device: the one thing all kernels agree on.

Tokens of a batch (B, L, ...) or of a packed row are one row of T = B * L tokens. Leaves of LEAF tokens are numbered
through, sequence after sequence; a leaf's index i is counted within its sequence, where bit l of i says which sibling
it belongs to at level l: 0 the left one, 1 the right one. Sequences of one length need no table: a kernel computes
where a leaf stands. Tables of packed batches are made on the device without the host waiting: the number of leaves is
an upper bound and the leaves past the last have no tokens.

Rows moved to the edges of level l are kept for the siblings that use them, compactly: with

    within(i, l) = ((i >> (l + 1)) << l) | (i & (2^l - 1))          (i with bit l taken out)

a query leaf (bit l of i set) stands at slot ``query_base + within`` and a key leaf (bit l clear, a right sibling
exists) at slot ``key_base + within`` of its level, so that a span's leaves are consecutive. Bases are even: from level
1 on, so are the slots of leaves at even indices. A span's transition matrix stands at node 2 * first + 2^l - 1 of its
sequence's 2 * count nodes (the in-order numbering of a binary tree), where first is its first leaf.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

# Tokens a leaf on CUDA: 64 rows are one warpgroup's matrix instruction, and the leaf's inverse stays in registers.
LEAF = 64
# Columns of a table that is written out: those of LeafTable.written_out, and one to make a row 32 bytes.
COLUMNS = 8


@dataclass(frozen=True)
class LeafTable:
    """Where each of N leaves stands, and the sizes the host needs to allocate."""

    # (N, COLUMNS) int32, on the device; None where all sequences are alike, as the next four numbers say.
    columns: Tensor | None
    leaves: int  # of each sequence
    length: int  # tokens of each sequence
    queries: int  # query slots of each sequence
    keys: int  # key slots of each sequence
    num_leaves: int  # N
    num_levels: int
    query_slots: int  # leaves in a level's query buffer
    key_slots: int  # leaves in a level's key buffer
    row_slots: int  # leaves in a buffer of one number a token, where every sequence starts at an even slot

    @cached_property
    def arguments(self) -> dict[str, object]:
        """What every kernel takes to find a leaf's place: ``place`` of tiles.py."""
        return {
            "p_table": self.columns,
            "table_leaves": self.leaves,
            "table_length": self.length,
            "table_queries": self.queries,
            "table_keys": self.keys,
        }

    def written_out(self) -> Tensor:
        """(N, 7): row of the leaf's first token among T tokens; tokens in the leaf, 0 for no leaf; its index in its
        sequence; leaves in its sequence; first query slot and first key slot of its sequence, at every level; first row
        slot of its sequence.
        """
        if self.columns is not None:
            return self.columns[:, : COLUMNS - 1]
        leaf = torch.arange(self.num_leaves)
        sequence, index = leaf // self.leaves, leaf % self.leaves
        tokens = (self.length - index * LEAF).clamp_max(LEAF)
        count = torch.full_like(leaf, self.leaves)
        bases = (sequence * x for x in (self.queries, self.keys, self.leaves + self.leaves % 2))
        return torch.stack([sequence * self.length + index * LEAF, tokens, index, count, *bases], dim=1)


def token_heads(rows: Tensor) -> int:
    """Heads from one token to the next in memory, of rows (T, heads, dim) that may be some heads of a tensor."""
    return rows.stride(0) // rows.shape[2]


def levels_above(leaves: int) -> int:
    """Levels of a sequence's tree over so many leaves."""
    return max(0, leaves - 1).bit_length()


def _even(x: Tensor) -> Tensor:
    return x + x % 2


@lru_cache(maxsize=256)
def batch_leaf_table(batch: int, length: int) -> LeafTable:
    """The table of ``batch`` sequences of ``length`` tokens each."""
    leaves = -(-length // LEAF)
    levels = levels_above(leaves)
    # Left siblings at level l come in whole spans: the widest level decides.
    keys = max((-(-(leaves - 2**level) // 2 ** (level + 1)) * 2**level for level in range(levels)), default=0)
    queries, keys = leaves // 2 + leaves // 2 % 2, keys + keys % 2
    return LeafTable(
        columns=None,
        leaves=leaves,
        length=length,
        queries=queries,
        keys=keys,
        num_leaves=batch * leaves,
        num_levels=levels,
        query_slots=max(2, batch * queries),
        key_slots=max(2, batch * keys),
        row_slots=batch * (leaves + leaves % 2),
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
        bound, longest = _most_leaves(sequences, length)
    number = torch.arange(bound, device=cu_seqlens.device)
    sequence = torch.searchsorted(last, number, right=True).clamp_max(sequences - 1)
    first = (last - leaves)[sequence]
    queries, keys = _even(leaves // 2), _even(leaves)  # slots of each sequence
    index = number - first
    start = ends[:-1][sequence] + index * LEAF
    present = number < last[-1]
    tokens = torch.where(present, (ends[1:][sequence] - start).clamp(0, LEAF), 0)
    bases = [(x.cumsum(0) - x)[sequence] for x in (queries, keys)]
    # The slots of keys serve for rows too: those of every leaf, rounded up.
    rows = torch.stack([start, tokens, index, leaves[sequence], *bases, bases[1], index], dim=1)
    return _packed(rows.to(torch.int32).to(device, non_blocking=True), bound, longest, sequences)


def packed_leaf_bounds(sequences: int, length: int) -> LeafTable:
    """The sizes, without the columns, of the largest table of so many sequences in a row of ``length`` tokens."""
    return _packed(None, *_most_leaves(sequences, length), sequences)


def _most_leaves(sequences: int, length: int) -> tuple[int, int]:
    """Of all sequences, each of which may leave one leaf partly empty, and of one."""
    longest = -(-length // LEAF)
    return longest + sequences, longest


def _packed(columns: Tensor | None, bound: int, longest: int, sequences: int) -> LeafTable:
    """Of ``bound`` leaves, ``longest`` of a sequence at most."""
    return LeafTable(
        columns=columns,
        leaves=1,
        length=1,
        queries=1,
        keys=1,
        num_leaves=bound,
        num_levels=levels_above(longest),
        query_slots=bound // 2 + bound // 2 % 2 + 2 * sequences,
        key_slots=bound + bound % 2 + 2 * sequences,
        row_slots=bound + bound % 2 + 2 * sequences,
    )
