"""Flip-flop language modelling: remember one bit through any number of distractions.

Source: Liu et al., "Exposing Attention Glitches with Flip-Flop Language Modeling" (arXiv 2306.00946); used for table 1
of the PaTH paper (arXiv 2505.16381).

A sequence is T/2 pairs of an instruction and a bit. Instructions are ``w`` (write), ``r`` (read) and ``i`` (ignore):
the first is always w, the last always r, the others are independent with P(i) = p_i and P(w) = P(r) = (1 - p_i) / 2.
Bits after w and i are fair coins; the bit after r is the last bit written, and predicting it is the task.
"""

from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from path_attention.tasks.base import IGNORED, TRAIN, Sequences, Task, register
from path_attention.tasks.random import uniform

TOKENS = ("w", "r", "i", "0", "1")
WRITE, READ, IGNORE, ZERO, ONE = range(len(TOKENS))

# Liu et al. train on FFL(0.8); the PaTH paper confirms the sparse and the dense evaluation.
IGNORE_PROBABILITY = MappingProxyType({"in_distribution": 0.8, "sparse": 0.98, "dense": 0.1})


@register("flip_flop")
@dataclass(frozen=True, kw_only=True)
class FlipFlop(Task):
    """The task of this module's docstring.

    Args:
        length: tokens T of a sequence, even and at least 4 (one write, one read).
        ignore_probability: p_i of the training sequences, in [0, 1].
        clean: True puts labels only on the bits after r; False on every token but the first ("noisy" in Liu et al.).

    Raises:
        ValueError: for a length that is odd or below 4, or a probability outside [0, 1].
    """

    length: int = 512
    ignore_probability: float = 0.8
    clean: bool = True

    vocab_size: int = field(default=len(TOKENS), init=False)
    tokens: tuple[str, ...] = field(default=TOKENS, init=False)
    splits: tuple[str, ...] = field(default=("in_distribution", "sparse", "dense"), init=False)

    def __post_init__(self) -> None:
        if self.length < 4 or self.length % 2:
            raise ValueError(f"flip_flop: length must be even and at least 4, got {self.length}")
        if not 0 <= self.ignore_probability <= 1:
            raise ValueError(f"flip_flop: ignore_probability must be in [0, 1], got {self.ignore_probability}")

    def generate(self, seed: int, indices: Tensor, split: str = TRAIN) -> Sequences:
        """As :meth:`Task.generate`; answers are the bits after r, labels those too, or all tokens but the first."""
        stream, p_ignore = self._stream(split), self._ignore_probability(split)
        pairs = self.length // 2
        draws = uniform(seed, stream, indices, 2 * pairs).unflatten(1, (2, pairs))
        instruction = torch.where(
            draws[:, 0] < p_ignore, IGNORE, torch.where(draws[:, 0] < (1 + p_ignore) / 2, WRITE, READ)
        )
        instruction[:, 0], instruction[:, -1] = WRITE, READ
        bit = (draws[:, 1] < 0.5).long()
        # The pair of the last write up to each pair: a running maximum over the pairs that write.
        number = torch.arange(pairs, device=indices.device)
        last_write = torch.where(instruction == WRITE, number, 0).cummax(1).values
        bit = torch.where(instruction == READ, bit.gather(1, last_write), bit)
        input_ids = torch.stack([instruction, ZERO + bit], dim=2).flatten(1)
        answers = torch.full_like(input_ids, IGNORED)
        answers[:, 1::2] = torch.where(instruction == READ, ZERO + bit, IGNORED)
        labels = answers
        if not self.clean:
            labels = input_ids.clone()
            labels[:, 0] = IGNORED
        return Sequences(input_ids, labels, answers)

    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right bit after every r, -100 elsewhere, (N, T) like ``input_ids``: a plain scan, token by token.

        Raises:
            ValueError: if a sequence reads before it writes or is not made of pairs of instruction and bit.
        """
        answers = np.full_like(input_ids, IGNORED)
        for n, sequence in enumerate(input_ids.tolist()):
            memory = None
            for t in range(0, len(sequence), 2):
                instruction, bit = sequence[t], sequence[t + 1]
                if instruction not in (WRITE, READ, IGNORE) or bit not in (ZERO, ONE):
                    raise ValueError(f"flip_flop: sequence {n} has no pair of instruction and bit at position {t}")
                if instruction == WRITE:
                    memory = bit
                elif instruction == READ:
                    if memory is None:
                        raise ValueError(f"flip_flop: sequence {n} reads at position {t} before anything is written")
                    answers[n, t + 1] = memory
        return answers

    def expected_count(self, split: str) -> float:
        """Mean number of reads of a sequence: the last pair, and (1 - p_i) / 2 of the T/2 - 2 in the middle."""
        return 1 + (self.length // 2 - 2) * (1 - self._ignore_probability(split)) / 2

    def _ignore_probability(self, split: str) -> float:
        return self.ignore_probability if split == TRAIN else IGNORE_PROBABILITY[split]
