"""Needles in a haystack: what was said once, among much that does not matter (RULER's eight retrieval tasks)."""

import dataclasses
from dataclasses import dataclass
from random import Random
from typing import Literal
from uuid import UUID

from path_attention.evaluation.questions.base import NOISE, Kind, Question, pairs, register, spread

Content = Literal["word", "number", "uuid"]


@dataclass(kw_only=True)
class Needles(Kind):
    """Sentences that give a key a value, in a haystack; the values of some keys are asked for.

    Args:
        key: words or UUIDs.
        value: seven-digit numbers or UUIDs.
        asked: keys whose values are asked for.
        values: of each key that is asked for.
        others: further keys, not asked for.
        of_needles: the haystack is made of further needles.
    """

    key: Content = "word"
    value: Content = "number"
    asked: int = 1
    values: int = 1
    others: int = 0
    of_needles: bool = False
    haystack: tuple[str, ...] = NOISE
    new_tokens: int = 128

    def make(self, random: Random, size: int) -> Question:
        hay = size if self.of_needles else 0
        keys = self._contents(random, self.key, self.asked + self.others + hay)
        asked, rest = keys[: self.asked], keys[self.asked :]
        told = [(k, v) for k in asked for v in self._contents(random, self.value, self.values)]
        needles = [self._needle(k, v) for k, v in told]
        distractors = [self._needle(k, self._contents(random, self.value, 1)[0]) for k in rest]
        sentences = distractors[self.others :] if self.of_needles else self.sentences(random, size)
        hidden = [*needles, *distractors[: self.others]]
        random.shuffle(hidden)
        text, place = spread(random, sentences, hidden)
        names = " and ".join(asked)
        several = self.asked * self.values > 1
        question = (
            f"Some secret codes are told in the text below. Remember them; they will be asked for.\n\n"
            f"{' '.join(text)}\n\nWhat {'are all the secret codes' if several else 'is the secret code'} of {names}?"
        )
        prefix = f" The secret code{'s' if several else ''} of {names} told in the text {'are' if several else 'is'}"
        return Question(question, prefix, tuple(v for _, v in told), place)

    @staticmethod
    def _needle(key: str, value: str) -> str:
        return f"The secret code of {key} is {value}."

    @staticmethod
    def _contents(random: Random, content: Content, count: int) -> list[str]:
        if content == "word":
            return pairs(random, count)
        if content == "number":
            return [str(n) for n in random.sample(range(10**6, 10**7), count)]
        return [str(UUID(int=random.getrandbits(128), version=4)) for _ in range(count)]


_KINDS: dict[str, Needles] = {
    "needle_single": Needles(),
    "needle_single_uuid": Needles(value="uuid"),
    "needle_multikey": Needles(others=3),
    "needle_multikey_line": Needles(of_needles=True),
    "needle_multikey_uuid": Needles(key="uuid", value="uuid", of_needles=True),
    "needle_multivalue": Needles(values=4),
    "needle_multiquery": Needles(asked=4),
}
for _name, _kind in _KINDS.items():
    register(_name, lambda made=_kind: dataclasses.replace(made))  # type: ignore[misc]
