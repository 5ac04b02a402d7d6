"""Phone books: the number of a name (Jelassi et al.; table 3 of the PaTH paper)."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from path_attention.evaluation.questions.base import Kind, Question, register
from path_attention.tasks.phone_book import FIRST, LAST


@dataclass(kw_only=True)
class PhoneBook(Kind):
    """Lines ``First Last: 7012345678``, two of them again as solved examples, and the name of a third.

    Names repeat no other; numbers have ten digits, the first of them 6 to 9. Scored by exact match of the first line.
    """

    new_tokens: int = 50
    until: tuple[str, ...] = ("\n",)

    @property
    def smallest(self) -> int:
        return 3

    def make(self, random: Random, size: int) -> Question:
        names = self._names(random, size)
        book = {name: f"{random.randrange(6, 10)}{random.randrange(10**9):09}" for name in names}
        one, two, asked = random.sample(names, 3)
        lines = "\n".join(f"{name}: {number}" for name, number in book.items())
        shown = f"{one}: {book[one]}\n{two}: {book[two]}"
        return Question(f"{lines}\n\n{shown}\n\n{asked}", ":", (book[asked],), names.index(asked) / size)

    @staticmethod
    def _names(random: Random, count: int) -> list[str]:
        """Different ones; with middle initials where first and last names are too few."""
        plain = len(FIRST) * len(LAST)
        found = []
        for n in random.sample(range(27 * plain), count) if count > plain // 2 else random.sample(range(plain), count):
            initial = "" if n < plain else f" {chr(ord('A') + n // plain - 1)}."
            n %= plain
            found.append(f"{FIRST[n // len(LAST)]}{initial} {LAST[n % len(LAST)]}")
        return found

    def score(self, output: str, answers: Sequence[str]) -> float:
        lines = output.strip().splitlines()
        return float(bool(lines) and lines[0].strip() == answers[0])


register("phone_book", PhoneBook)
