"""Variable tracking: what is the value of a variable, after assignments of values and of other variables?

A sequence is T/4 statements of four tokens:

    a = 7 ;   assigns a value
    b = a ;   assigns the value that another variable has now
    b ? 7 ;   asks: the token after ? is the answer

The first ``num_variables`` statements assign a value to each variable in turn, the last one asks; the others are
independent, their variables and values uniform. A variable may be assigned to itself, which changes nothing. To answer,
a model must follow chains of copies back in time, past assignments that came later than the copy. RULER's variable
tracking (arXiv 2404.06654) asks for chains in a text; here every step of a program may be asked for, and variables
change.
"""

from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from path_attention.tasks.base import IGNORED, TRAIN, Sequences, Task, register
from path_attention.tasks.random import integers, uniform

NAMES = tuple("abcdefghijklmnopqrstuvwxyz")
VALUES = 10
ASSIGN, ASK, END = range(VALUES, VALUES + 3)
_FIRST_NAME = END + 1

# Shares of values and of copies among the statements in between; the rest asks. In chains nearly everything is a copy.
SHARES = MappingProxyType({"in_distribution": (0.4, 0.3), "chains": (0.05, 0.65)})


@register("variable_tracking")
@dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
    """The task of this module's docstring. Every token is one character, so a language model can be asked too.

    Args:
        length: tokens T, a multiple of 4.
        num_variables: from 1 to 26, fewer than T/4.

    Raises:
        ValueError: naming the argument.
    """

    length: int = 256
    num_variables: int = 5

    splits: tuple[str, ...] = field(default=("in_distribution", "chains"), init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.num_variables <= len(NAMES):
            raise ValueError(f"variable_tracking: num_variables must be in 1 ... 26, got {self.num_variables}")
        least = 4 * (self.num_variables + 1)
        if self.length % 4 or self.length < least:
            raise ValueError(f"variable_tracking: length must be a multiple of 4, at least {least}, got {self.length}")

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*"0123456789", "=", "?", ";", *NAMES[: self.num_variables])

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return _FIRST_NAME + self.num_variables

    @property
    def max_labels(self) -> int:
        return self.length // 4 - self.num_variables

    def generate(self, seed: int, indices: Tensor, split: str = TRAIN) -> Sequences:
        stream, statements = self._stream(split), self.length // 4
        valued, copied = SHARES["in_distribution" if split == TRAIN else split]
        draws = uniform(seed, stream, indices, 4 * statements).unflatten(1, (4, statements))
        kind = draws[:, 0]
        left, right = (integers(draws[:, n], self.num_variables) for n in (1, 2))
        value = integers(draws[:, 3], VALUES)
        first = torch.arange(statements, device=indices.device) < self.num_variables
        left = torch.where(first, torch.arange(statements, device=indices.device), left)
        is_value = first | (kind < valued)
        is_copy = ~is_value & (kind < valued + copied)
        is_value[:, -1] = is_copy[:, -1] = False
        state = torch.zeros(len(indices), self.num_variables, dtype=torch.int64, device=indices.device)
        shown = []
        for n in range(statements):  # a statement is a function of all before it
            now = state.gather(1, torch.where(is_copy[:, n], right[:, n], left[:, n])[:, None])
            now = torch.where(is_value[:, n, None], value[:, n, None], now)
            state = state.scatter(1, left[:, n, None], now)  # what is asked for is assigned to itself
            shown.append(now)
        answer = torch.cat(shown, 1)
        asked = ~is_value & ~is_copy
        third = torch.where(is_copy, _FIRST_NAME + right, answer)
        sign = torch.where(asked, ASK, ASSIGN)
        input_ids = torch.stack([_FIRST_NAME + left, sign, third, torch.full_like(left, END)], 2).flatten(1)
        answers = torch.full_like(input_ids, IGNORED)
        answers[:, 2::4] = torch.where(asked, answer, IGNORED)
        return Sequences(input_ids, answers, answers)

    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right answers: the program run, statement by statement."""
        answers = np.full_like(input_ids, IGNORED)
        for n, sequence in enumerate(input_ids.tolist()):
            known: dict[int, int] = {}
            for t in range(0, len(sequence), 4):
                variable, sign, right = sequence[t : t + 3]
                if sign == ASK:
                    answers[n, t + 2] = known[variable]
                else:
                    known[variable] = right if right < VALUES else known[right]
        return answers
