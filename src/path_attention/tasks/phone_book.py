"""Phone book lookup: find the number of a name in a book.

Source: Jelassi et al., "Repeat After Me" (arXiv 2402.01032); the PaTH paper (arXiv 2505.16381, table 3) asks it of
language models. Here it is a task to train on, in tokens of its own: first names, last names, digits and three marks.

The book is ``num_entries`` entries ``First Last : d d d d d d d d d d`` and a line end, 14 tokens each, of different
names; the first digit is 6 to 9. A blank line, some entries again as solved examples, a blank line, and the name of
another entry with a colon. The answers are that entry's ten digits. All right one by one, each after the right ones
before it, is the same as all right by greedy generation: the share of sequences without error is the exact match.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from path_attention.tasks.base import IGNORED, TRAIN, Sequences, Task, register
from path_attention.tasks.random import integers, uniform

_FIRST_NAMES = """
Ada Alan Amy Anna Ben Carl Cleo Dan Dora Ed Ella Emma Eric Eva Finn Fred Gail Gus Hal Hanna Ida Igor Ines
Ivan Jack Jane Jim Joan Joe Kai Karl Kate Ken Lea Leo Liam Lisa Lou Luis Mae Marc Maria Max Mia Nell Nina
Noah Nora Olaf Olga Omar Otto Paul Pia Rita Rob Rosa Ruth Sam Sara Tara Tom Vera Zoe
"""
_LAST_NAMES = """
Adler Baker Bell Berg Black Boyd Brown Burke Chen Clark Cole Cook Cox Cruz Dean Diaz Dunn Ellis Fox Frank
Gray Green Grant Hall Hart Hill Hunt Ito Jones Kelly Khan Kim King Klein Kurz Lang Lee Long Lopez Mann
Marsh Mason May Mora Nash Novak Otis Park Perez Quinn Reed Reyes Rossi Ryan Sato Shaw Silva Smith Stone
Vega Wang Weber West Young
"""
FIRST, LAST = tuple(_FIRST_NAMES.split()), tuple(_LAST_NAMES.split())
DIGITS = tuple("0123456789")
_DIGIT = len(FIRST) + len(LAST)
COLON, END, BLANK = range(_DIGIT + 10, _DIGIT + 13)
NUMBER_LENGTH = 10
ENTRY = 2 + 1 + NUMBER_LENGTH + 1


@register("phone_book")
@dataclass(frozen=True, kw_only=True)
class PhoneBook(Task):
    """The task of this module's docstring.

    Labels stand on the digits of the solved examples too, so that a model has more to learn from; the answers, which
    are scored, are those of the last name alone.

    Args:
        num_entries: of the book.
        num_examples: solved examples, fewer than num_entries.

    Raises:
        ValueError: naming the argument.
    """

    num_entries: int = 20
    num_examples: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.num_entries <= len(FIRST) * len(LAST):
            raise ValueError(
                f"phone_book: num_entries must be in 1 ... {len(FIRST) * len(LAST)}, got {self.num_entries}"
            )
        if not 0 <= self.num_examples < self.num_entries:
            raise ValueError(
                f"phone_book: num_examples must be in 0 ... num_entries - 1 = {self.num_entries - 1}, "
                f"got {self.num_examples}"
            )

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("held_out",)

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*FIRST, *LAST, *DIGITS, ":", "/", "//")

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return BLANK + 1

    @property
    def length(self) -> int:  # type: ignore[override]
        return (self.num_entries + self.num_examples + 1) * ENTRY - 1 + 2  # two blank lines; no end after the last

    def generate(self, seed: int, indices: Tensor, split: str = TRAIN) -> Sequences:
        names, size = len(FIRST) * len(LAST), self.num_entries
        draws = uniform(seed, self._stream(split), indices, names + size + size * NUMBER_LENGTH)
        chosen = draws[:, :names].topk(size, dim=1, largest=False).indices
        asked = draws[:, names : names + size].topk(self.num_examples + 1, dim=1, largest=False).indices
        digits = draws[:, names + size :].unflatten(1, (size, NUMBER_LENGTH))
        first_digit, others = 6 + integers(digits[..., :1], 4), integers(digits[..., 1:], 10)
        number = _DIGIT + torch.cat([first_digit, others], dim=2)

        def constant(token: int) -> Tensor:
            return torch.full_like(number[..., :1], token)

        name = torch.stack([chosen // len(LAST), len(FIRST) + chosen % len(LAST)], dim=2)
        book = torch.cat([name, constant(COLON), number, constant(END)], dim=2)  # (N, size, ENTRY)
        lookups = book.gather(1, asked[..., None].expand(-1, -1, ENTRY))
        blank = constant(BLANK)[:, 0]
        input_ids = torch.cat([book.flatten(1), blank, lookups[:, :-1].flatten(1), blank, lookups[:, -1, :-1]], dim=1)
        answers = torch.full_like(input_ids, IGNORED)
        answers[:, -NUMBER_LENGTH:] = input_ids[:, -NUMBER_LENGTH:]
        labels = answers.clone()
        for example in range(self.num_examples):
            start = size * ENTRY + 1 + example * ENTRY + 3
            labels[:, start : start + NUMBER_LENGTH] = input_ids[:, start : start + NUMBER_LENGTH]
        return Sequences(input_ids, labels, answers)

    @property
    def max_labels(self) -> int:
        return (self.num_examples + 1) * NUMBER_LENGTH

    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right answers: the lines of the book, read into a dictionary, and the last name looked up."""
        answers = np.full_like(input_ids, IGNORED)
        for n, sequence in enumerate(input_ids.tolist()):
            text = " ".join(self.tokens[token] for token in sequence)
            book, _, rest = text.partition("//")
            _, _, question = rest.partition("//")
            entries = dict(line.split(" : ") for line in book.split(" / ") if line.strip())
            number = entries[question.partition(" : ")[0].strip()]
            answers[n, -NUMBER_LENGTH:] = [self.tokens.index(digit) for digit in number.split()]
        return answers
