"""Memory in numbered pieces, shared by all forks of a cache: pages of folded tokens, and products of chunks."""

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

# Growing makes room for this fraction more than is asked for. The copy that it takes is then at most 2 x 64 tokens a
# token, where a step reads all of them, and memory that is not used yet at most 1.6 %.
SPARE = 64


class Pool:
    """Tensors that are cut into pieces along one dimension each; counts who uses each piece.

    Args:
        tensors: by name, with the dimension that is cut and the length of a piece.
    """

    def __init__(self, tensors: dict[str, tuple[Tensor, int, int]]) -> None:
        self.tensors = {name: x for name, (x, _, _) in tensors.items()}
        self._cut = {name: (dim, length) for name, (_, dim, length) in tensors.items()}
        first = next(iter(tensors))
        dim, length = self._cut[first]
        self.uses = [0] * (self.tensors[first].shape[dim] // length)

    def take(self, count: int) -> list[int]:
        """The numbers of the ``count`` lowest free pieces, now used once; makes more if there are too few.

        Once for all who want some: growing copies everything, and every piece is looked at for those that are free.
        """
        missing = count - self.uses.count(0)
        if missing > 0:
            self._grow(max(missing, len(self.uses) // SPARE))
        taken = list(islice((piece for piece, uses in enumerate(self.uses) if not uses), count))
        self.share(taken)
        return taken

    def _grow(self, more: int) -> None:
        for name, x in self.tensors.items():
            dim, length = self._cut[name]
            shape = list(x.shape)
            shape[dim] = more * length
            new = x.new_empty(shape)  # nothing is read of a piece but what was written
            self.tensors[name] = torch.cat([x, new], dim) if self.uses else new
        self.uses += [0] * more

    def share(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            self.uses[piece] += 1

    def release(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            self.uses[piece] -= 1

    def copy(self, sources: Sequence[int]) -> list[int]:
        """New pieces with the contents of ``sources``."""
        targets = self.take(len(sources))
        if sources:
            for name, x in self.tensors.items():
                pieces = self._pieces(name, x)
                dim = self._cut[name][0]
                pieces.index_copy_(dim, _index(targets, x), pieces.index_select(dim, _index(sources, x)))
        return targets

    def select(self, pieces: Sequence[int]) -> dict[str, Tensor]:
        """Copies of these pieces, one after another."""
        return {name: self._take_pieces(name, pieces) for name in self.tensors}

    def arrange(self, pieces: Sequence[int]) -> None:
        """Make piece n a copy of piece pieces[n], in place."""
        for name, x in self.tensors.items():
            x.copy_(self._take_pieces(name, pieces))

    def _take_pieces(self, name: str, pieces: Sequence[int]) -> Tensor:
        x, dim = self.tensors[name], self._cut[name][0]
        return self._pieces(name, x).index_select(dim, _index(pieces, x)).flatten(dim, dim + 1)

    def _pieces(self, name: str, x: Tensor) -> Tensor:
        dim, length = self._cut[name]
        return x.unflatten(dim, (-1, length)) if x.numel() else x.unflatten(dim, (len(self.uses), length))

    def to(self, device: torch.device | str) -> None:
        self.tensors = {name: x.to(device) for name, x in self.tensors.items()}


def _index(pieces: Sequence[int], x: Tensor) -> Tensor:
    return torch.tensor(list(pieces), dtype=torch.int64).to(x.device, non_blocking=True)
