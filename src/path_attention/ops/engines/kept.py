"""What a forward pass keeps for the backward pass, so that it need not compute the linear stages again: one buffer of
bytes for a call, and in it the rows at all levels' edges, all matrices and the leaves' factors, part after part.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.ops.kernels.leaf_table import LeafTable
from path_attention.ops.kernels.linear import Form, Leaves, Levels, factor_forms, level_forms, node_form

# Bytes at a multiple of which every tensor begins: a line of the L2 cache, and more than descriptors ask for.
ALIGNMENT = 128


def _nbytes(form: Form) -> int:
    used = math.prod(form.shape) * form.dtype.itemsize
    return used + -used % ALIGNMENT


@dataclass
class Buffer:
    """Tensors one behind the other."""

    data: Tensor
    used: int = field(default=0, init=False)

    def take(self, form: Form) -> Tensor:
        start, self.used = self.used, self.used + _nbytes(form)
        if self.used > self.data.numel():
            raise RuntimeError(f"more is kept, {self.used} bytes, than there is room for, {self.data.numel()}")
        number = math.prod(form.shape) * form.dtype.itemsize
        return self.data[start : start + number].view(form.dtype).view(form.shape)


class Sizes(NamedTuple):
    """What the sizes of all parts of a call have in common. In half precision."""

    dim: int  # padded
    row_dtype: torch.dtype
    gated: bool

    def nbytes(self, table: LeafTable, query_heads: int, heads: int) -> int:
        return sum(map(_nbytes, self._forms(table, query_heads, heads)))

    def take(self, buffer: Buffer, table: LeafTable, query_heads: int, heads: int) -> tuple[Levels, Leaves]:
        nodes, inverse, y, u, *levels = (buffer.take(form) for form in self._forms(table, query_heads, heads))
        return Levels(*levels), Leaves(nodes, (inverse, y, u))

    def _forms(self, table: LeafTable, query_heads: int, heads: int) -> list[Form]:
        of_part = (table.num_leaves, heads, self.dim, torch.float16)
        levels = level_forms(
            table.num_levels, table.query_slots, table.key_slots, query_heads, heads, self.dim, self.row_dtype
        )
        return [node_form(*of_part), *factor_forms(*of_part), *(levels if self.gated else levels[:2])]
