"""Perplexity by position and by length: how a language model copes with contexts longer than those of its training.

A stretch of L tokens is read in one pass, without a sliding window. The loss of its token t, from 1 to L - 1, is
-log p(token t | tokens 0 ... t - 1) in nats, and is averaged over stretches for each position. From that

    by position   exp(mean of the losses of the positions in a range)
    by length     exp(mean of the losses of the positions below a length), what evaluation at that length would give

Memory is linear in L: logits are made of a few thousand tokens at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Logits that are there at once: 512 MiB in float32.
LOGITS = 2**27
# Positions whose losses are kept apart; finer than any table or plot shows.
WIDTH = 64
# Ranges of positions whose mean loss is kept for every stretch, to tell what is chance.
RANGES = 32


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What a model of a recipe's ``training.precision`` is called in."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor, logits: int = LOGITS) -> Tensor:
    """-log p of every token but the first given those before it, in nats.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        input_ids: (B, L), on its device.
        logits: so many of them are there at once.

    Returns:
        (B, L - 1) float32.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    chunk = max(1, logits // (len(input_ids) * head.weight.shape[0]))
    found = []
    for start in range(0, input_ids.shape[1] - 1, chunk):
        end = min(start + chunk, input_ids.shape[1] - 1)
        scores = head(hidden[:, start:end]).float().transpose(1, 2)
        found.append(torch.nn.functional.cross_entropy(scores, input_ids[:, start + 1 : end + 1], reduction="none"))
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class PositionLosses:
    """Mean losses by position.

    Args:
        length: tokens L of a stretch.
        width: positions in a bucket; bucket n has the positions n * width ... (n + 1) * width - 1, but for position 0,
            which has no loss.
        losses: the mean loss of each bucket, nats, over all stretches.
        by_stretch: for each stretch the mean losses of RANGES ranges of equal size (the first without position 0).
    """

    length: int
    width: int
    losses: list[float]
    by_stretch: list[list[float]]

    @property
    def stretches(self) -> int:
        return len(self.by_stretch)

    def _sums(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Sum of the losses of all positions before the end of each bucket, and how many they are; from nothing on."""
        counts = np.full(len(self.losses), self.width, dtype=np.float64)
        counts[0] -= 1
        sums = counts * np.array(self.losses)
        return tuple(np.concatenate([[0.0], np.cumsum(x)]) for x in (sums, counts))  # type: ignore[return-value]

    def between(self, start: int, end: int) -> float:
        """The mean loss of the positions ``start`` ... ``end`` - 1, both multiples of ``width``.

        Raises:
            ValueError: they are not, or are not within the stretch.
        """
        if start % self.width or end % self.width or not 0 <= start < end <= self.length:
            raise ValueError(f"start, end: wanted multiples of {self.width} up to {self.length}, got {start} and {end}")
        sums, counts = self._sums()
        first, last = start // self.width, end // self.width
        return float((sums[last] - sums[first]) / (counts[last] - counts[first]))

    def by_length(self, lengths: Sequence[int]) -> list[float]:
        """Perplexities of the first so many tokens."""
        return [float(np.exp(self.between(0, length))) for length in lengths]

    def by_position(self, width: int) -> tuple[list[int], list[float]]:
        """Where ranges of ``width`` positions end, and their perplexities."""
        ends = list(range(width, self.length + 1, width))
        return ends, [float(np.exp(self.between(end - width, end))) for end in ends]


def measure_positions(
    model: Any,
    stretches: Iterable[npt.NDArray[np.int64]],
    *,
    precision: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> PositionLosses:
    """Losses by position of a model on stretches of equal length, one pass each.

    Args:
        model: as :func:`token_losses`; its mode is left as it was.
        stretches: each (L,) with L a multiple of WIDTH * RANGES, or of RANGES below that.
        precision: float32, or bfloat16 for autocast.
        progress: called with the number of stretches done.

    Raises:
        ValueError: there is none, or their lengths do not fit.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total: npt.NDArray[np.float64] | None = None
    by_stretch: list[list[float]] = []
    try:
        for stretch in stretches:
            width = bucket_width(len(stretch))
            with precision_context(precision, device):
                losses = token_losses(model, torch.from_numpy(stretch)[None].to(device))[0]
            row = np.concatenate([[0.0], losses.double().cpu().numpy()])
            total = row if total is None else total + row
            by_stretch.append(_means(row, len(row) // RANGES))
            if progress is not None:
                progress(len(by_stretch))
    finally:
        model.train(was_training)
    if total is None:
        raise ValueError("stretches: wanted at least one, got none")
    return PositionLosses(len(total), width, _means(total / len(by_stretch), width), by_stretch)


def stretches_of(
    documents: Iterable[npt.NDArray[np.int64]], separator: int, length: int, wanted: int
) -> list[npt.NDArray[np.int64]]:
    """Stretches of ``length`` tokens, each of one document with the separator before it; evenly chosen from all.

    Raises:
        ValueError: no document is as long.
    """
    found: list[npt.NDArray[np.int64]] = []
    longest = 0
    for document in documents:
        whole = np.concatenate([[separator], document]).astype(np.int64)
        longest = max(longest, len(whole))
        found += [whole[n * length : (n + 1) * length] for n in range(len(whole) // length)]
    if not found:
        raise ValueError(f"--length: wanted at most {longest}, the tokens of the longest document, got {length}")
    count = min(wanted, len(found))
    return [found[n * len(found) // count] for n in range(count)]


def bucket_width(length: int) -> int:
    """Positions in a bucket for stretches of a length.

    Raises:
        ValueError: the length is none that divides into ranges.
    """
    if length >= WIDTH * RANGES and length % (WIDTH * RANGES) == 0:
        return WIDTH
    if length < 2 * RANGES or length % RANGES:
        raise ValueError(f"length: wanted a multiple of {WIDTH * RANGES}, or of {RANGES}, got {length}")
    return length // RANGES


def _means(row: npt.NDArray[np.float64], width: int) -> list[float]:
    """Mean losses of ranges of ``width`` positions; position 0 has none."""
    counts = np.full(len(row) // width, width, dtype=np.float64)
    counts[0] -= 1
    return [round(float(x), 6) for x in row.reshape(-1, width).sum(1) / counts]
