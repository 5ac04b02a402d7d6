"""What a synthetic task is, and the table of those there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

# The label that cross entropy skips, as everywhere in PyTorch and transformers.
IGNORED = -100


class Examples(NamedTuple):
    """N sequences of T tokens: ``input_ids`` and ``labels``, both int64 (N, T), labels unshifted, -100 where none."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


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


class Task(Protocol):
    """A synthetic task: sequences from a seed, the right answers, a score.

    A task is a frozen dataclass whose fields are what a recipe may set. It holds no state: sequence n of a split
    is a function of (seed, split, n).
    """

    @property
    def length(self) -> int:
        """Tokens of a sequence."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; ids are 0 .. vocab_size - 1."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """How each token is written, by id."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the evaluation splits; "train" is a further one."""

    def examples(self, seed: int, indices: Sequence[int], split: str = "train") -> Examples:
        """Sequences number ``indices`` of a split."""

    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right answers of given sequences by the plainest program that solves the task, -100 where none."""

    def score(self, input_ids: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64]) -> Score:
        """Compares the likeliest next token after each position with the answers."""

    def expected_count(self, split: str) -> float:
        """Mean number of answers of a sequence of a split."""


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
