"""Associative recall: which value was a key given? Keys are assigned once (MQAR) or again and again (MQRAR-N-back).

Sources: MQAR is Arora et al., "Zoology" (arXiv 2312.04927); MQRAR, multi-query repeated associative recall, is Tan et
al., "Stick-breaking attention" (arXiv 2410.17980); the question for the N-th last assignment is the PaTH paper's (arXiv
2505.16381, section 4.1).

A sequence is made of pairs of tokens. It begins with ``num_pairs`` pairs of a key and its value. Of the pairs that
follow, ``num_queries`` begin with one of these keys, at places drawn without replacement with probability proportional
to n^(a - 1) for the n-th, so that most come early. Every other token is a random value. Vocabulary: token 0 is not
used, keys are the lower half, values the upper one.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from path_attention.tasks.base import IGNORED, TRAIN, Sequences, Task, register
from path_attention.tasks.random import integers, uniform

# The exponent a of the places of the queries, in all three sources.
PLACE_EXPONENT = 0.01


class _Keys(NamedTuple):
    """The pairs of a sequence that begin with a key, in order: (N, num_pairs + num_queries) each."""

    place: Tensor  # position of the key
    key: Tensor
    value: Tensor  # the token after it


@dataclass(frozen=True, kw_only=True)
class _Recall(Task):
    """What both tasks share.

    Args:
        length: tokens T of a sequence, even.
        num_pairs: pairs of a key and its value at the beginning.
        vocabulary: number of tokens, even.
        num_queries: pairs that begin with a key among the rest, at most (T - 2 num_pairs) / 2.
    """

    length: int = 768
    num_pairs: int = 32
    vocabulary: int = 8192
    num_queries: int = 32

    def __post_init__(self) -> None:
        name = type(self).__name__
        room = self.length // 2 - self.num_pairs
        if self.length < 4 or self.length % 2:
            raise ValueError(f"{name}: length must be even and at least 4, got {self.length}")
        if self.num_pairs < 1 or not 1 <= self.num_queries <= room:
            raise ValueError(
                f"{name}: num_pairs and num_queries must be at least 1 and fit in {self.length // 2} pairs "
                f"together, got {self.num_pairs} and {self.num_queries}"
            )
        if self.vocabulary < 6 or self.vocabulary % 2:
            raise ValueError(f"{name}: vocabulary must be even and at least 6, got {self.vocabulary}")

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("held_out",)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.vocabulary

    @property
    def num_keys(self) -> int:
        """Different keys: tokens 1 ... num_keys; values are the tokens from num_keys + 1 on."""
        return self.vocabulary // 2 - 1

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        values = self.vocabulary - self.num_keys - 1
        return ("-", *(f"k{n}" for n in range(self.num_keys)), *(f"v{n}" for n in range(values)))

    @property
    def max_labels(self) -> int:
        return self.num_pairs + self.num_queries

    def generate(self, seed: int, indices: Tensor, split: str = TRAIN) -> Sequences:
        draws = uniform(seed, self._stream(split), indices, self.length + self.length // 2 + self._key_draws)
        input_ids = self.num_keys + 1 + integers(draws[:, : self.length], self.vocabulary - self.num_keys - 1)
        places = self._places(draws[:, self.length + self.num_pairs : self.length + self.length // 2])
        keys = self._keys(draws[:, draws.shape[1] - self._key_draws :])
        input_ids = input_ids.scatter(1, places, keys)
        found = _Keys(places, keys, input_ids.gather(1, places + 1))
        answers = torch.full_like(input_ids, IGNORED).scatter(1, places + 1, self._answers(found))
        return Sequences(input_ids, answers, answers)

    def _places(self, draws: Tensor) -> Tensor:
        """Positions of the keys, increasing; draws (N, pairs that may be queries).

        Sampling without replacement: the smallest of exponential variables with the weights as rates.
        """
        weight = torch.arange(1, draws.shape[1] + 1, device=draws.device, dtype=torch.float64) ** (PLACE_EXPONENT - 1)
        times = -torch.log1p(-draws) / weight
        queries = times.topk(self.num_queries, dim=1, largest=False).indices.sort(dim=1).values + self.num_pairs
        first = torch.arange(self.num_pairs, device=draws.device).expand(len(draws), -1)
        return 2 * torch.cat([first, queries], dim=1)

    @property
    @abstractmethod
    def _key_draws(self) -> int:
        """How many random numbers make a sequence's keys."""

    @abstractmethod
    def _keys(self, draws: Tensor) -> Tensor:
        """Keys (N, num_pairs + num_queries) from numbers (N, _key_draws) in [0, 1)."""

    @abstractmethod
    def _answers(self, keys: _Keys) -> Tensor:
        """What is to be said after each key, -100 where nothing is."""


@register("mqar")
@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(_Recall):
    """MQAR: different keys, every one of which is asked for once; num_queries must be num_pairs.

    What stands after a query is a random value and means nothing.

    Raises:
        ValueError: naming the argument.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_queries != self.num_pairs:
            raise ValueError(
                f"AssociativeRecall: num_queries must be num_pairs = {self.num_pairs}, got {self.num_queries}"
            )
        if self.num_pairs > self.num_keys:
            raise ValueError(f"AssociativeRecall: num_pairs must be at most {self.num_keys}, got {self.num_pairs}")

    @property
    def _key_draws(self) -> int:
        return self.num_keys + self.num_pairs

    def _keys(self, draws: Tensor) -> Tensor:
        # Different keys: those with the smallest numbers, in their order.
        keys = draws[:, : self.num_keys].topk(self.num_pairs, dim=1, largest=False).indices
        asked = draws[:, self.num_keys :].argsort(dim=1)
        return 1 + torch.cat([keys, keys.gather(1, asked)], dim=1)

    def _answers(self, keys: _Keys) -> Tensor:
        count = self.num_pairs
        same = keys.key[:, count:, None] == keys.key[:, None, :count]
        asked = (same * keys.value[:, None, :count]).sum(2)
        return torch.cat([torch.full_like(asked, IGNORED), asked], dim=1)

    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right answers: a dictionary filled by the first pairs and looked up afterwards."""
        answers = np.full_like(input_ids, IGNORED)
        for n, sequence in enumerate(input_ids.tolist()):
            known = dict(zip(sequence[: 2 * self.num_pairs : 2], sequence[1 : 2 * self.num_pairs : 2], strict=True))
            for t in range(2 * self.num_pairs, len(sequence)):
                if sequence[t] in known:
                    answers[n, t + 1] = known[sequence[t]]
        return answers


@register("mqrar")
@dataclass(frozen=True, kw_only=True)
class RecencyRecall(_Recall):
    """MQRAR-N-back: keys are drawn with replacement, and what stands after a key is its new value.

    After a key that was assigned at least N times before, the answer is its N-th last value; N = 1 is MQRAR. With the
    default 32 queries to 32 pairs few keys come that often: a sequence has 32.1, 11.7, 3.2 and 0.68 answers on average
    for N = 1, 2, 3 and 4. More queries give more to learn from.

    Args:
        back: N.

    Raises:
        ValueError: naming the argument.
    """

    back: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.back < 1:
            raise ValueError(f"RecencyRecall: back must be at least 1, got {self.back}")

    @property
    def _key_draws(self) -> int:
        return self.num_pairs + self.num_queries

    def _keys(self, draws: Tensor) -> Tensor:
        keys = 1 + integers(draws[:, : self.num_pairs], self.num_keys)
        asked = integers(draws[:, self.num_pairs :], self.num_pairs)
        return torch.cat([keys, keys.gather(1, asked)], dim=1)

    def _answers(self, keys: _Keys) -> Tensor:
        same = (keys.key[:, :, None] == keys.key[:, None, :]).tril(-1)
        # How many assignments of the key from this one on: 1 at its last, 2 at its last but one.
        rank = same.flip(2).cumsum(2).flip(2)
        asked = same & (rank == self.back)
        return torch.where(asked.any(2), (asked * keys.value[:, None, :]).sum(2), IGNORED)

    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right answers: a list of values for each key, in one scan."""
        answers = np.full_like(input_ids, IGNORED)
        for n, sequence in enumerate(input_ids.tolist()):
            assigned: dict[int, list[int]] = {}
            for t in range(len(sequence) - 1):
                if 1 <= sequence[t] <= self.num_keys:
                    values = assigned.setdefault(sequence[t], [])
                    if len(values) >= self.back:
                        answers[n, t + 1] = values[-self.back]
                    values.append(sequence[t + 1])
        return answers
