"""A sequence split over a process group: which piece lies where, and what crosses between the processes.

The sequence is cut into pieces of equal length. Causal attention gives later pieces more to do, so by default the n
processes hold two each, process r the pieces r and 2n - 1 - r ("zigzag"): at every step of a ring each of them then has
two pairs of pieces to attend over. With one piece each ("contiguous") process r has r pairs in all, and the last one as
many as all zigzag steps together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Layout = Literal["zigzag", "contiguous"]


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The processes that share a sequence.

    Args:
        group: a process group, or a DeviceMesh of one dimension.
        layout: "zigzag", balanced: two pieces a process; "contiguous": one.

    Raises:
        ValueError: no such layout, or what is given is no group of which this process is a member.
    """

    group: Any
    layout: Layout = "zigzag"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout: got {self.layout!r}; wanted one of {', '.join(get_args(Layout))}")
        group = self.group
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group: got a mesh of {group.ndim} dimensions; wanted one dimension, as mesh['context']"
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            raise ValueError(f"group: got {group!r}; wanted a process group, or a mesh, that this process is in")
        object.__setattr__(self, "group", group)

    @classmethod
    def of(cls, group: Any, layout: Layout | None = None) -> "ContextParallel":
        """From whatever names the processes; a ContextParallel is itself.

        Raises:
            ValueError: as the class, or a ContextParallel of another layout than the one that is asked for.
        """
        if not isinstance(group, cls):
            return cls(group, layout or "zigzag")
        if layout not in (None, group.layout):
            raise ValueError(f"layout: got {layout!r}; wanted {group.layout!r}, that of group, or None")
        return group

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextParallel":
        return self  # a copy of a model belongs to the same processes

    @property
    def size(self) -> int:
        """Number of processes, n."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def pieces_each(self) -> int:
        """Pieces that a process holds."""
        return 2 if self.layout == "zigzag" else 1

    @property
    def num_pieces(self) -> int:
        return self.size * self.pieces_each

    def pieces_of(self, rank: int) -> tuple[int, ...]:
        """The pieces, by position in the sequence, that a process holds one after another."""
        return (rank, self.num_pieces - 1 - rank) if self.layout == "zigzag" else (rank,)

    @property
    def pieces(self) -> tuple[int, ...]:
        """The pieces of this process."""
        return self.pieces_of(self.rank)

    # --- tensors whole and split -----------------------------------------------------------------------------------

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of a tensor that every process has whole: its pieces, one after another.

        Raises:
            ValueError: the length is no multiple of the number of pieces. Padding at the end changes nothing before it.
        """
        if x.shape[dim] % self.num_pieces:
            raise ValueError(
                f"x: got length {x.shape[dim]}; wanted a multiple of {self.num_pieces}, the pieces of {self.size} "
                f"processes in layout {self.layout!r}; padding at the end changes nothing before it"
            )
        pieces = x.movedim(dim, 0).unflatten(0, (self.num_pieces, -1))
        return torch.cat([pieces[p] for p in self.pieces]).movedim(0, dim).contiguous()

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor on every process: the inverse of :meth:`shard`. Differentiable: what the processes do with
        their copies adds up.
        """
        return self.gather(self.split(x, dim)).flatten(0, 1).movedim(0, dim)

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """(..., local length, ...) -> (pieces of this process, tokens of a piece, ...)."""
        return x.movedim(dim, 0).unflatten(0, (self.pieces_each, -1))

    # --- what crosses ------------------------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """(pieces of this process, ...) -> (all pieces, ...), by position in the sequence. Differentiable."""
        return _Gather.apply(x, self)

    def gather_pieces(self, x: Tensor) -> Tensor:
        """:meth:`gather`, without derivative."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous(), group=self.group)
        held = parts.flatten(0, 1).unbind()
        return torch.stack([held[place] for place in _inverse(self._order)])  # an index would make the host wait

    def sum_home(self, x: Tensor) -> Tensor:
        """(all pieces, ...) of every process -> their sum for the pieces of this one; the adjoint of :meth:`gather`.

        Added up here in the order of the processes: a reduction inside the network would keep no order.
        """
        pieces = x.unbind()
        parts = torch.stack([pieces[piece] for piece in self._order]).unflatten(0, (self.size, self.pieces_each))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received.sum(0)

    @property
    def _order(self) -> list[int]:
        """Pieces in the order in which the processes hold them."""
        return [piece for rank in range(self.size) for piece in self.pieces_of(rank)]

    def visit(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Every process's tensors in turn, with its rank, this one's first; the next are under way meanwhile."""
        for step in range(self.size):
            arriving = PassedOn(self, tensors) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, tensors
            if arriving is not None:
                tensors = arriving.wait()

    # --- neighbours in the sequence ----------------------------------------------------------------------------------

    def before(self, x: Tensor, count: int) -> Tensor:
        """(B, L, ...) -> (pieces, B, count, ...): the tokens just before each of our pieces, zeros before the first.

        Differentiable.

        Raises:
            ValueError: a piece has fewer tokens.
        """
        pieces = self.split(x)
        if pieces.shape[1] < count:
            raise ValueError(f"x: got pieces of {pieces.shape[1]} tokens; wanted at least the {count} that others need")
        ends = self.gather(pieces[:, pieces.shape[1] - count :])
        ends = torch.cat([torch.zeros_like(ends[:1]), ends])  # what lies before piece p is now in place p
        return torch.stack([ends[piece] for piece in self.pieces]).transpose(1, 2)

    def next_tokens(self, x: Tensor, last: int) -> Tensor:
        """(B, L) of integers -> (B, L): the one after each in the whole sequence, ``last`` after its last."""
        pieces = self.split(x)
        starts = self.gather_pieces(pieces[:, :1])
        starts = torch.cat([starts[1:], torch.full_like(starts[:1], last)])
        following = torch.stack([starts[piece] for piece in self.pieces])
        return torch.cat([pieces[:, 1:], following], dim=1).flatten(0, 1).transpose(0, 1).contiguous()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, on each of them. Differentiable."""
        return _Sum.apply(x, self)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


class PassedOn:
    """Tensors under way to the next process, and their likes from the one before."""

    def __init__(self, context: ContextParallel, tensors: Sequence[Tensor]) -> None:
        self._sent = [x.contiguous() for x in tensors]  # held until they have left
        self._received = [torch.empty_like(x) for x in self._sent]
        after, before = (context.rank + 1) % context.size, (context.rank - 1) % context.size
        operations = [
            operation
            for sent, received in zip(self._sent, self._received, strict=True)
            for operation in (
                dist.P2POp(dist.isend, sent, group=context.group, group_peer=after),
                dist.P2POp(dist.irecv, received, group=context.group, group_peer=before),
            )
        ]
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        return context.gather_pieces(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.context.sum_home(gradients[0]), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        return _sum(x, context)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every process's result depends on every process's x.
        return _sum(gradients[0], ctx.context), None


def _sum(x: Tensor, context: ContextParallel) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=context.group)
    return total
