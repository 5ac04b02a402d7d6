"""Which words come most often: a list of a few common and many rare words, or words that get rarer by rank (RULER)."""

import string
from dataclasses import dataclass
from random import Random

from path_attention.evaluation.questions.base import Kind, Question, pairs, register


@dataclass(kw_only=True)
class CommonWords(Kind):
    """A numbered list in which ten words come thirty times each, the others three times; ten words are asked for.

    In lists of less than ``enough`` other words all come a third as often: there would be no room for them.

    Args:
        common: words asked for.
        often, seldom: times that they, and the others, come.
        enough: other words.
    """

    common: int = 10
    often: int = 30
    seldom: int = 3
    enough: int = 60
    new_tokens: int = 120

    def make(self, random: Random, size: int) -> Question:
        example, known = self._list(random, 10, often=4, seldom=1)
        less = 3 if size < self.enough else 1
        text, wanted = self._list(random, size, self.often // less, self.seldom // less)
        return Question(
            self._ask(example) + self._begin + self._numbered(known) + "\n\n" + self._ask(text),
            self._begin,
            tuple(wanted),
            0.0,
        )

    def _list(self, random: Random, rare: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = pairs(random, self.common + rare)
        common = words[: self.common]
        drawn = common * often + words[self.common :] * seldom
        random.shuffle(drawn)
        return self._numbered(drawn), common

    @staticmethod
    def _numbered(words: list[str]) -> str:
        return "".join(f" {n}. {word}" for n, word in enumerate(words, 1))

    def _ask(self, text: str) -> str:
        return (
            f"Some words come often in the list below, the others seldom.\n\n{text}\n\nWhich {self.common} words come "
            "most often?"
        )

    @property
    def _begin(self) -> str:
        return f" The {self.common} words that come most often are:"


@dataclass(kw_only=True)
class FrequentWords(Kind):
    """A text of made-up words; the word of rank n comes n^-2 as often as the first. The first three are asked for."""

    vocabulary: int = 200
    exponent: float = 2.0
    new_tokens: int = 50

    @property
    def smallest(self) -> int:
        return 100  # below that ranks two and three may change places

    def make(self, random: Random, size: int) -> Question:
        words: dict[str, None] = {}
        while len(words) < self.vocabulary:
            words["".join(random.choices(string.ascii_lowercase, k=6))] = None
        shares = [(n + 1) ** -self.exponent for n in range(self.vocabulary)]
        total = sum(shares)
        # As many as their shares say, not drawn: the order of the first three is certain.
        drawn = [word for word, share in zip(words, shares, strict=True) for _ in range(round(size * share / total))]
        random.shuffle(drawn)
        return Question(
            f"The text below is made of code words.\n\n{' '.join(drawn)}\n\nWhich three code words come most often?",
            " The three code words that come most often are:",
            tuple(words)[:3],
            0.0,
        )


register("common_words", CommonWords)
register("frequent_words", FrequentWords)
