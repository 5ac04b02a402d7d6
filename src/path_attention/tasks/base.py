"""What a synthetic task is, and the table of those there are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# The label that cross entropy skips, as everywhere in PyTorch and transformers.
IGNORED = -100

TRAIN = "train"


class Sequences(NamedTuple):
    """N sequences of T tokens, each int64 (N, T), on one device.

    Labels and answers stand where the token they name would stand: what a model is to say after position t is at t + 1,
    as Hugging Face models expect (they shift them). -100 where there is none.
    """

    input_ids: Tensor
    labels: Tensor  # what is trained on
    answers: Tensor  # what is scored


class Examples(NamedTuple):
    """:class:`Sequences` as NumPy arrays."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """How many answers were asked for and how many were wrong; scores of parts add up."""

    count: int = 0
    errors: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.count + other.count, self.errors + other.errors)

    @property
    def rate(self) -> float:
        """Errors per answer, in [0, 1]; NaN where nothing was asked."""
        return self.errors / self.count if self.count else float("nan")


def wrong(answers: Tensor, predictions: Tensor) -> Tensor:
    """Which answers are wrong, bool (N, T - 1): at t, whether ``answers[:, t + 1]`` is there and not predicted at t."""
    asked = answers[:, 1:]
    return (asked != IGNORED) & (predictions[:, :-1] != asked)


def score(answers: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64]) -> Score:
    """Answers, and those that are wrong.

    Args:
        answers: (N, T), of :class:`Examples`.
        predictions: (N, T), the model's likeliest next token *after* each position (argmax of its logits there).
    """
    errors = wrong(torch.from_numpy(answers), torch.from_numpy(predictions))
    return Score(count=int((answers[:, 1:] != IGNORED).sum()), errors=int(errors.sum()))


class Task(ABC):
    """A synthetic task: sequences from a seed, the right answers, a score.

    A task is a frozen dataclass whose fields are what a recipe may set. It holds no state: sequence n of a split
    is a function of (seed, split, n), never of its neighbours in the batch or of the device.
    """

    length: int  # tokens of a sequence
    vocab_size: int  # number of different tokens; ids are 0 .. vocab_size - 1
    tokens: tuple[str, ...]  # how each token is written, by id
    splits: tuple[str, ...]  # names of the evaluation splits; "train" is a further one

    @property
    def max_labels(self) -> int:
        """No sequence has more labels than this."""
        return self.length - 1

    @abstractmethod
    def generate(self, seed: int, indices: Tensor, split: str = TRAIN) -> Sequences:
        """Sequences number ``indices`` (N,) int64 of a split, made on the device of ``indices``.

        Raises:
            ValueError: there is no such split.
        """

    @abstractmethod
    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right answers of given sequences by the plainest program that solves the task, -100 where none."""

    def examples(self, seed: int, indices: Sequence[int], split: str = TRAIN) -> Examples:
        """As :meth:`generate`, on the CPU and in NumPy."""
        made = self.generate(seed, torch.tensor(list(indices), dtype=torch.int64), split)
        return Examples(*(x.numpy() for x in made))

    def _stream(self, split: str) -> int:
        """The number of a split's stream of random numbers."""
        names = (TRAIN, *self.splits)
        if split not in names:
            raise ValueError(f"split: wanted one of {', '.join(names)}, got {split!r}")
        return names.index(split)


_TASKS: dict[str, Callable[..., Any]] = {}
_T = TypeVar("_T", bound=type)


def register(name: str) -> Callable[[_T], _T]:
    """Class decorator: makes a task available to recipes as ``task: {name: NAME}``."""

    def add(task: _T) -> _T:
        if name in _TASKS:
            raise ValueError(f"a task named {name!r} exists already: {_TASKS[name]}")
        _TASKS[name] = task
        return task

    return add


def task_class(name: str) -> type:
    """The class registered under a name.

    Raises:
        ValueError: naming the tasks there are.
    """
    if name not in _TASKS:
        raise ValueError(f"task.name: no task {name!r}; there are {', '.join(sorted(_TASKS))}")
    found = _TASKS[name]
    assert isinstance(found, type)
    return found


def task_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_TASKS))
