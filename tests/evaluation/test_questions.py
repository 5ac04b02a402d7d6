"""Questions about long texts: a reader who follows the text answers all of them, and they fill the length asked for."""

import re
from collections import Counter
from random import Random

import pytest

from path_attention.evaluation.questions import Question, fitting, kind, kind_names
from path_attention.evaluation.questions.base import NOISE, spread
from path_attention.evaluation.questions.stories import PEOPLE, PLACES, THINGS


def words(text: str) -> int:
    return len(text.split())


def made(name: str, count: int, size: int = 60) -> list[Question]:
    of = kind(name)
    return [of.make(Random(n), max(size, of.smallest)) for n in range(count)]


def read_needles(question: Question) -> list[str]:
    codes: dict[str, list[str]] = {}
    for key, value in re.findall(r"The secret code of (\S+) is (\S+?)\.", question.prompt):
        codes.setdefault(key, []).append(value)
    asked = question.prompt.rpartition(" of ")[2].removesuffix("?").split(" and ")
    return [value for key in asked for value in codes[key]]


def read_variables(question: Question) -> list[str]:
    text, _, ask = question.prompt.rpartition("\n\n")
    wanted = re.findall(r"\d{5}", ask)[0]
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (\d+|VAR \w+)\.", text.rpartition("Keep track of them.")[2]):
        values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR") else value
    return [name for name, value in values.items() if value == wanted]


def read_common(question: Question) -> list[str]:
    text = question.prompt.split("\n\n")[-2]
    return [word for word, _ in Counter(re.findall(r"\d+\. (\S+)", text)).most_common(10)]


def read_frequent(question: Question) -> list[str]:
    counts = Counter(question.prompt.split("\n\n")[1].split()).most_common(4)
    assert counts[2][1] > counts[3][1]  # the third is no toss-up
    return [word for word, _ in counts[:3]]


def read_phone_book(question: Question) -> list[str]:
    book, _, asked = question.prompt.split("\n\n")
    entries = [line.split(": ") for line in book.splitlines()]
    assert len(dict(entries)) == len(entries)  # no name twice
    return [dict(entries)[asked]]


READERS = {
    "needle": read_needles,
    "variable": read_variables,
    "common": read_common,
    "frequent": read_frequent,
    "phone": read_phone_book,
}


@pytest.mark.parametrize("name", [n for n in kind_names() if not n.startswith("story")])
def test_reader_finds_every_answer(name: str) -> None:
    of = kind(name)
    read = READERS[name.partition("_")[0]]
    for question in made(name, 30):
        found = read(question)
        assert sorted(found) == sorted(question.answers)
        assert of.score(" " + ", ".join(found), question.answers) == 1.0
        assert of.score("no idea", question.answers) == 0.0


def read_story(facts: list[str], question: str) -> str:
    """By following every sentence; the stories' makers keep a world instead."""
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    visits: dict[str, list[str]] = {thing: [] for thing in THINGS}
    directions: dict[tuple[str, str], str] = {}
    gifts: list[tuple[str, str, str]] = []
    for fact in facts:
        if go := re.fullmatch(r"(\w+) (?:went|moved|travelled) to the (\w+)\.", fact):
            at[go[1]] = go[2]
        elif take := re.fullmatch(r"(\w+) (?:took|picked up) the (\w+)(?: there)?\.", fact):
            holder[take[2]] = take[1]
        elif drop := re.fullmatch(r"(\w+) (?:dropped|put down) the (\w+)\.", fact):
            assert holder.pop(drop[2]) == drop[1]
        elif lies := re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact):
            directions[lies[2], lies[3]] = lies[1]
        elif give := re.fullmatch(r"(\w+) gave the (\w+) to (\w+)\.", fact):
            assert holder[give[2]] == give[1]  # nobody gives what he has not
            holder[give[2]] = give[3]
            gifts.append((give[1], give[2], give[3]))
        else:
            raise AssertionError(fact)
        for thing, person in holder.items():
            if person in at and (not visits[thing] or visits[thing][-1] != at[person]):
                visits[thing].append(at[person])
    for pattern, answer in (
        (r"Where is (Mary|John|Sandra|Daniel)\?", lambda m: at[m[1]]),
        (r"Where is the (\w+)\?", lambda m: visits[m[1]][-1]),
        (
            r"Where was the (\w+) before the (\w+)\?",
            lambda m: visits[m[1]][max(n for n, p in enumerate(visits[m[1]]) if p == m[2]) - 1],
        ),
        (r"What is (\w+) of the (\w+)\?", lambda m: directions[m[1], m[2]]),
        (
            r"What is the (\w+) (\w+) of\?",
            lambda m: next(b for (d, b), a in directions.items() if (a, d) == (m[1], m[2])),
        ),
        (
            r"Who gave the (\w+) to (\w+)\?.*",
            lambda m: next(g for g, t, r in reversed(gifts) if (t, r) == (m[1], m[2])),
        ),
        (
            r"What did (\w+) give to (\w+)\?.*",
            lambda m: next(t for g, t, r in reversed(gifts) if (g, r) == (m[1], m[2])),
        ),
        (r"Who received the (\w+)\?.*", lambda m: next(r for _, t, r in reversed(gifts) if t == m[1])),
    ):
        if match := re.fullmatch(pattern, question):
            return str(answer(match))
    raise AssertionError(question)


@pytest.mark.parametrize("name", [n for n in kind_names() if n.startswith("story")])
def test_stories_are_told_so_that_their_answers_follow(name: str) -> None:
    of = kind(name)
    answers = set()
    for made_question in made(name, 200, size=5):
        *_, text, question, empty = made_question.prompt.split("\n")
        assert empty == ""
        facts = [s for s in re.findall(r"[^.]+\.", text) if s.strip() not in NOISE]
        assert read_story([fact.strip() for fact in facts], question) == made_question.answers[0]
        # The solved examples, too.
        example, asked, shown = made_question.prompt.split("\n")[2:5]
        told = [fact.strip() for fact in re.findall(r"[^.]+\.", example)]
        assert read_story(told, asked) == shown.removeprefix("Answer: ")
        answers.add(made_question.answers[0])
        assert of.score(f" the {made_question.answers[0]}.", made_question.answers) == 1.0
    labels = {"story_5": {*PEOPLE, *THINGS}}.get(name, set(PLACES))
    assert answers == labels  # no answer is never right
    wrong = next(iter(labels - {made_question.answers[0]}))
    assert of.score(f"{made_question.answers[0]} or {wrong}", made_question.answers) == 0.0


@pytest.mark.parametrize("name", kind_names())
def test_questions_fill_their_length_and_depend_on_seed_and_number_alone(name: str) -> None:
    of = kind(name)
    questions = fitting(name, of, words, 1500, seed=0, samples=6)
    sizes = [words(q.prompt + q.prefix) + of.new_tokens for q in questions]
    assert max(sizes) <= 1500
    assert min(sizes) > 1500 * 0.85
    assert fitting(name, of, words, 1500, seed=0, samples=3) == questions[:3]
    assert fitting(name, of, words, 1500, seed=1, samples=3) != questions[:3]
    with pytest.raises(ValueError, match="lengths: wanted more than 20 tokens"):
        fitting(name, of, words, 20, seed=0, samples=1)


def test_hidden_sentences_keep_their_order_and_come_everywhere() -> None:
    places = []
    for n in range(300):
        text, place = spread(Random(n), [f"s{k}" for k in range(10)], ["a", "b", "c"])
        assert [s for s in text if s in "abc"] == ["a", "b", "c"]
        assert [s for s in text if s not in "abc"] == [f"s{k}" for k in range(10)]
        places.append(place)
    assert min(places) == 0
    assert max(places) > 0.5


def test_phone_book_wants_the_number_and_nothing_else() -> None:
    of = kind("phone_book")
    assert of.score(" 7012345678\nAda Boyd: 8", ("7012345678",)) == 1.0
    for output in (" 7012345678 or so", "70123456789", "", "\n\n"):
        assert of.score(output, ("7012345678",)) == 0.0
    # More names than first and last ones make.
    large = of.make(Random(0), 5000)
    assert len(set(large.prompt.split("\n\n")[0].splitlines())) == 5000


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"tasks: no questions 'ruler'; there are needle_single, "):
        kind("ruler")
