"""Variable tracking: which variables have a value, through assignments of variables to variables (RULER)."""

import string
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from path_attention.evaluation.questions.base import NOISE, Kind, Question, register, spread


@dataclass(kw_only=True)
class VariableTracking(Kind):
    """Chains of assignments, spread over a haystack in their order: ``VAR A = 12345``, ``VAR B = VAR A``, ...

    Asked are all variables of the first chain, by its value.

    Args:
        chains: with values of their own.
        hops: assignments of a chain after its first.
    """

    chains: int = 1
    hops: int = 4
    haystack: tuple[str, ...] = NOISE
    new_tokens: int = 30

    def make(self, random: Random, size: int) -> Question:
        text, value, names, place = self._text(random, self.chains, self.hops, self.sentences(random, size))
        example, known, found, _ = self._text(random, 1, 2, self.sentences(random, 3))
        return Question(
            self._ask(example, known) + self._begin(known) + " " + " ".join(found) + "\n\n" + self._ask(text, value),
            self._begin(value),
            tuple(names),
            place,
        )

    def _text(self, random: Random, chains: int, hops: int, hay: list[str]) -> tuple[str, str, list[str], float]:
        names = self._names(random, chains * (hops + 1))
        values = [str(n) for n in random.sample(range(10000, 100000), chains)]
        lines: list[list[str]] = []
        for chain, value in enumerate(values):
            own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
            told = [f"VAR {own[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(own))]
            lines.append(told)
        # Chains are mixed, each in its order.
        order = [chain for chain in range(chains) for _ in range(hops + 1)]
        random.shuffle(order)
        hidden = [lines[chain].pop(0) for chain in order]
        sentences, place = spread(random, hay, hidden)
        return " ".join(sentences), values[0], names[: hops + 1], place

    @staticmethod
    def _names(random: Random, count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found["".join(random.choices(string.ascii_uppercase, k=5))] = None
        return list(found)

    @staticmethod
    def _ask(text: str, value: str) -> str:
        return (
            "Variables are assigned in the text below, some of them the value of another one. Keep track of them."
            f"\n\n{text}\n\nWhich variables have the value {value} in the end?"
        )

    @staticmethod
    def _begin(value: str) -> str:
        return f" The variables with the value {value} are:"


register("variable_tracking", VariableTracking)
register("variable_tracking_4", lambda: VariableTracking(chains=4))
