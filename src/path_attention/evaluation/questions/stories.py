"""Stories among other sentences: where is Mary, where is the milk, who gave what to whom (bAbI's first five tasks).

BABILong hides the facts of such stories among sentences that have nothing to do with them. Stories are made here, by
keeping a small world and telling what changes in it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from path_attention.evaluation.questions.base import NOISE, Kind, Question, register, spread

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}
_WENT, _TOOK, _LEFT = ("went to", "moved to", "travelled to"), ("took", "picked up"), ("dropped", "put down")

Made = tuple[list[str], str, str]  # facts, question, answer


def one_fact(random: Random) -> Made:
    """Where somebody is, who moves about."""
    where: dict[str, str] = {}
    facts = [_move(random, random.choice(PEOPLE), where) for _ in range(random.randint(4, 10))]
    person = random.choice(list(where))
    return facts, f"Where is {person}?", where[person]


def two_facts(random: Random) -> Made:
    """Where a thing is, which somebody takes along."""
    facts, history = _errands(random)
    thing = random.choice([t for t in THINGS if history[t]])
    return facts, f"Where is the {thing}?", history[thing][-1]


def three_facts(random: Random) -> Made:
    """Where a thing was before it was somewhere."""
    while True:
        facts, history = _errands(random)
        known = [t for t in THINGS if len(history[t]) > 1]
        if known:
            thing = random.choice(known)
            # The last stay at a place counts, where there were several.
            at = random.randrange(1, len(history[thing]))
            place = history[thing][at]
            last = max(n for n, p in enumerate(history[thing]) if p == place)
            if last > 0:
                return facts, f"Where was the {thing} before the {place}?", history[thing][last - 1]


def two_arguments(random: Random) -> Made:
    """What is north of a place, and what it is north of."""
    a, b, c = random.sample(PLACES, 3)
    one, two = random.sample(sorted(DIRECTIONS), 2)
    facts = [f"The {a} is {one} of the {b}.", f"The {b} is {two} of the {c}."]
    if random.random() < 0.5:
        facts.reverse()
    x, direction, y = random.choice([(a, one, b), (b, two, c)])
    if random.random() < 0.5:
        return facts, f"What is {direction} of the {y}?", x
    return facts, f"What is the {x} {direction} of?", y


def three_arguments(random: Random) -> Made:
    """Who gave what to whom, the last time."""
    holder = {thing: random.choice(PEOPLE) for thing in THINGS}
    facts = [f"{person} {random.choice(_TOOK)} the {thing} there." for thing, person in holder.items()]
    gifts: list[tuple[str, str, str]] = []
    for _ in range(random.randint(2, 4)):
        thing = random.choice(THINGS)
        giver = holder[thing]
        taker = random.choice([p for p in PEOPLE if p != giver])
        gifts.append((giver, thing, taker))
        holder[thing] = taker
        facts.append(f"{giver} gave the {thing} to {taker}.")
    giver, thing, taker = gifts[-1]
    question, answer = random.choice(
        [
            (f"Who gave the {thing} to {taker}?", giver),
            (f"What did {giver} give to {taker}?", thing),
            (f"Who received the {thing}?", taker),
        ]
    )
    return facts, f"{question} (the last time)", answer


def _move(random: Random, person: str, where: dict[str, str]) -> str:
    where[person] = random.choice([p for p in PLACES if p != where.get(person)])
    return f"{person} {random.choice(_WENT)} the {where[person]}."


def _errands(random: Random) -> tuple[list[str], dict[str, list[str]]]:
    """People who take things along and leave them; and the places that each thing has been known to be at, in order."""
    where: dict[str, str] = {}
    carried: dict[str, str] = {}
    history: dict[str, list[str]] = {thing: [] for thing in THINGS}
    facts: list[str] = []

    def seen(thing: str, place: str) -> None:
        if not history[thing] or history[thing][-1] != place:
            history[thing].append(place)

    wanted = random.randint(8, 16)
    while len(facts) < wanted or not any(history.values()):
        person = random.choice(PEOPLE)
        own = [t for t, p in carried.items() if p == person]
        # Things lie where they were left: only somebody there may take them.
        near = [
            t
            for t in THINGS
            if t not in carried and person in where and (not history[t] or history[t][-1] == where[person])
        ]
        deed = random.random()
        if near and deed < 0.35:
            thing = random.choice(near)
            carried[thing] = person
            facts.append(f"{person} {random.choice(_TOOK)} the {thing}.")
            seen(thing, where[person])
        elif own and deed < 0.5:
            thing = random.choice(own)
            del carried[thing]
            facts.append(f"{person} {random.choice(_LEFT)} the {thing}.")
        else:
            facts.append(_move(random, person, where))
            for thing in own:
                seen(thing, where[person])
    return facts, history


@dataclass(kw_only=True)
class Story(Kind):
    """A story among sentences of a haystack, a question about it, one word as the answer.

    Scored as BABILong does: the output names the right one of the words that could be an answer, and no other.

    Args:
        tell: makes facts, question and answer.
        labels: the words that could be an answer.
    """

    tell: Callable[[Random], Made]
    labels: tuple[str, ...]
    haystack: tuple[str, ...] = NOISE
    new_tokens: int = 16
    until: tuple[str, ...] = ("\n",)

    def make(self, random: Random, size: int) -> Question:
        shown = []
        for _ in range(2):
            facts, question, answer = self.tell(random)
            shown.append(f"{' '.join(facts)}\n{question}\nAnswer: {answer}\n")
        facts, question, answer = self.tell(random)
        text, place = spread(random, self.sentences(random, size), facts)
        head = "Facts about people, things and places are told among other sentences. Answer with one word.\n"
        return Question(f"{head}\n{''.join(shown)}\n{' '.join(text)}\n{question}\n", "Answer:", (answer,), place)

    def score(self, output: str, answers: Sequence[str]) -> float:
        words = set(re.findall(r"[a-z]+", output.splitlines()[0].lower() if output.strip() else ""))
        return float({label for label in self.labels if label.lower() in words} == {answers[0]})


def _story(tell: Callable[[Random], Made], labels: tuple[str, ...]) -> Callable[[], Any]:
    return lambda: Story(tell=tell, labels=labels)


register("story_1", _story(one_fact, PLACES))
register("story_2", _story(two_facts, PLACES))
register("story_3", _story(three_facts, PLACES))
register("story_4", _story(two_arguments, PLACES))
register("story_5", _story(three_arguments, (*PEOPLE, *THINGS)))
