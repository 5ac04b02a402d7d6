"""What holds for every task, and what is particular to words, recall and the phone book."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from path_attention.tasks import (
    IGNORED,
    AssociativeRecall,
    FlipFlop,
    GroupWords,
    PhoneBook,
    RecencyRecall,
    Task,
    VariableTracking,
    score,
    task_names,
)
from path_attention.tasks import random as task_random
from path_attention.tasks.groups import cycles, from_cycles, generate_group, inverse, named_generators

TASKS = {
    "flip_flop": FlipFlop(length=40),
    "a5": GroupWords(word_length=11),
    "s5": GroupWords(group="S5", word_length=7),
    "all": GroupWords(letters="all", word_length=5),
    "one_letter": GroupWords(word_length=1),
    "klein": GroupWords(group="Klein", generators=("(1 2)(3 4)", "(1 3)(2 4)"), word_length=6),
    "identity": GroupWords(answer="identity", word_length=9),
    "mqar": AssociativeRecall(length=64, num_pairs=6, num_queries=6, vocabulary=40),
    "mqrar": RecencyRecall(length=64, num_pairs=6, num_queries=14, vocabulary=40),
    "mqrar_2": RecencyRecall(length=64, num_pairs=6, num_queries=20, vocabulary=40, back=2),
    "mqrar_4": RecencyRecall(length=64, num_pairs=4, num_queries=28, vocabulary=40, back=4),
    "phone_book": PhoneBook(num_entries=9),
    "variables": VariableTracking(length=64),
    "one_variable": VariableTracking(length=8, num_variables=1),
    "one_entry": PhoneBook(num_entries=1, num_examples=0),
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def test_every_registered_task_is_tested() -> None:
    assert set(task_names()) == {"flip_flop", "group_words", "mqar", "mqrar", "phone_book", "variable_tracking"}


def test_generator_agrees_with_the_oracle(task: Task) -> None:
    for split in ("train", *task.splits):
        made = task.examples(3, range(100), split)
        assert made.input_ids.shape == made.labels.shape == made.answers.shape == (100, task.length)
        np.testing.assert_array_equal(made.answers, task.oracle(made.input_ids))
        assert (made.answers[:, 0] == IGNORED).all()
        assert (made.answers != IGNORED).any()
        # What is scored is trained on, as the same token.
        np.testing.assert_array_equal(made.labels[made.answers != IGNORED], made.answers[made.answers != IGNORED])
        assert ((made.labels != IGNORED).sum(1) <= task.max_labels).all()
        for ids in (made.input_ids, made.labels[made.labels != IGNORED]):
            assert ids.min() >= 0
            assert ids.max() < task.vocab_size
    assert len(task.tokens) == len(set(task.tokens)) == task.vocab_size


def test_a_sequence_is_a_function_of_seed_split_and_number(task: Task) -> None:
    whole = task.examples(5, range(30))
    part = task.examples(5, [17, 2])
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[[17, 2]], b)
    for other in (task.examples(6, range(30)), task.examples(5, range(30), task.splits[0])):
        assert (other.input_ids != whole.input_ids).any()
    with pytest.raises(ValueError, match="split: wanted one of train"):
        task.examples(0, [0], "trian")


def test_other_devices_make_the_same_sequences(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, random numbers come from torch operators; everything else is the same code."""
    expected = task.generate(2, torch.arange(20), task.splits[0])
    for name in ("flip_flop", "group_words", "recall", "phone_book", "variable_tracking"):
        monkeypatch.setattr(f"path_attention.tasks.{name}.uniform", task_random.philox_uniform)
    for a, b in zip(task.generate(2, torch.arange(20), task.splits[0]), expected, strict=True):
        assert torch.equal(a, b)


def test_score_of_the_right_answers(task: Task) -> None:
    answers = task.examples(0, range(20), task.splits[0]).answers
    right = np.roll(answers, -1, axis=1)
    assert score(answers, right).errors == 0
    found = score(answers, right + 1)
    assert found.errors == found.count == (answers != IGNORED).sum()


# --- groups and words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, order, letters", [("S3", 6, 3), ("S5", 120, 10), ("A4", 12, 4), ("A5", 60, 6), ("Z7", 7, 2)]
)
def test_named_groups(name: str, order: int, letters: int) -> None:
    group = generate_group(named_generators(name))
    assert len(group.elements) == order
    assert len(group.generators) == letters
    assert group.names[0] == "e"
    assert group.elements == tuple(sorted(group.elements))
    table = group.table
    assert torch.equal(table[0], torch.arange(order))
    # Associative, and every row and column a permutation.
    assert torch.equal(table[table[:, :, None], torch.arange(order)], table[torch.arange(order)[:, None, None], table])
    assert torch.equal(table.sort(0).values, torch.arange(order)[:, None].expand(-1, order))
    assert all(from_cycles(cycles(p), len(p)) == p for p in group.elements[1:])
    assert all(table[a, group.elements.index(inverse(p))] == 0 for a, p in enumerate(group.elements))


def test_generators_of_a5_are_the_papers() -> None:
    group = generate_group(named_generators("A5"))
    letters = [group.names[g] for g in group.generators.tolist()]
    assert letters == ["(1 2 3)", "(1 3 2)", "(1 2 4)", "(1 4 2)", "(1 2 5)", "(1 5 2)"]


@pytest.mark.parametrize("answer", ["product", "identity"])
def test_training_and_held_out_words_are_disjoint_and_all_there_are(answer: str) -> None:
    """Every word of the right kind turns up in one of the two, none in both: S3, 3 swaps, 81 words of length 4."""
    task = GroupWords(group="S3", word_length=4, answer=answer)
    words = [
        Counter(tuple(row[1:-1]) for row in task.examples(0, range(4000), split).input_ids.tolist())
        for split in ("train", "held_out")
    ]
    assert not words[0].keys() & words[1].keys()
    assert len(words[0]) + len(words[1]) == 3**4
    assert len(words[1]) == 3**3


def test_words_of_a_kind_are_equally_likely() -> None:
    """Chi-squared over all training words that are the identity, and over all that are not, 5 standard deviations."""
    task = GroupWords(group="S3", word_length=4, answer="identity")
    made = task.examples(1, range(6000))
    yes = made.answers[:, -1] == task.tokens.index("yes")
    assert abs(yes.sum() - 3000) < 5 * math.sqrt(6000) / 2
    for kind in (yes, ~yes):
        counts = np.array(list(Counter(tuple(row) for row in made.input_ids[kind].tolist()).values()))
        expected = counts.sum() / len(counts)
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        freedom = len(counts) - 1
        assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_letters_are_uniform_at_every_place() -> None:
    task = GroupWords(word_length=6)
    ids = task.examples(0, range(6000)).input_ids[:, 1:-1]
    for place in ids.T:
        counts = np.array(list(Counter(place.tolist()).values()))
        assert len(counts) == 6
        assert ((counts - 1000) ** 2 / 1000).sum() < 5 + 5 * math.sqrt(2 * 5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group": "B5"}, "group: wanted S2"),
        ({"word_length": 0}, "word_length must be at least 1"),
        ({"generators": ("(1 2",)}, "generators: wanted disjoint cycles"),
        ({"generators": ("(1 1)",)}, "generators: wanted disjoint cycles"),
        ({"generators": ("(1 2)",)}, "at least 2 letters"),
        ({"group": "S7"}, "at most 2000"),
        ({"group": "S5", "answer": "identity", "word_length": 3}, "no train words that are the identity"),
    ],
)
def test_words_arguments_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupWords(**options)


# --- recall ----------------------------------------------------------------------------------------------------------


def test_mqrar_has_as_many_answers_as_its_docstring_says() -> None:
    """Means over 400 sequences of the paper's size, 5 standard errors; the deviation is estimated from the sample."""
    for back, expected in ((1, 32.1), (2, 11.7), (3, 3.2), (4, 0.68)):
        counts = (RecencyRecall(back=back).examples(0, range(400)).answers != IGNORED).sum(1)
        assert abs(counts.mean() - expected) < 5 * counts.std() / 20 + 0.05


def test_recall_queries_come_early_and_are_keys() -> None:
    task = RecencyRecall(length=256, num_pairs=8, num_queries=16, vocabulary=128)
    ids = task.examples(0, range(300)).input_ids
    is_key = ids <= task.num_keys
    assert (is_key.sum(1) == 24).all()
    assert not is_key[:, 1::2].any()
    assert is_key[:, :16:2].all()
    places = is_key[:, 16::2].mean(0)  # of 120 possible ones
    assert places[0] > 0.9
    assert places[:20].sum() > 3 * places[-20:].sum()


def test_mqar_keys_are_different_and_asked_once() -> None:
    task = TASKS["mqar"]
    made = task.examples(0, range(200))
    assert ((made.answers != IGNORED).sum(1) == 6).all()
    for row in made.input_ids:
        keys = row[row <= task.num_keys]
        assert sorted(keys[:6]) == sorted(keys[6:])
        assert len(set(keys[:6].tolist())) == 6


@pytest.mark.parametrize("kind", [RecencyRecall, AssociativeRecall])
def test_recall_arguments_are_checked(kind: type) -> None:
    for options, message in (
        ({"length": 7}, "length must be even"),
        ({"num_pairs": 0}, "num_pairs and num_queries"),
        ({"num_queries": 353}, "num_pairs and num_queries"),
        ({"vocabulary": 7}, "vocabulary must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**options)
    with pytest.raises(ValueError, match="back must be at least 1"):
        RecencyRecall(back=0)
    with pytest.raises(ValueError, match="num_queries must be num_pairs"):
        AssociativeRecall(num_queries=4)


# --- phone book ------------------------------------------------------------------------------------------------------


def test_phone_book_form() -> None:
    task = PhoneBook(num_entries=20)
    made = task.examples(0, range(50), "held_out")
    assert ((made.answers != IGNORED).sum(1) == 10).all()
    assert ((made.labels != IGNORED).sum(1) == 30).all()
    for ids in made.input_ids:
        text = " ".join(task.tokens[t] for t in ids)
        book, examples, question = text.split(" // ") if " // " in text else text.split("//")
        lines = [line.strip() for line in book.split(" /") if line.strip()]
        names = [line.split(" : ")[0] for line in lines]
        assert len(set(names)) == 20
        solved = [line.strip() for line in examples.split(" /") if line.strip()]
        assert len(set(solved)) == 2
        assert set(solved) <= set(lines)
        assert question in lines
        assert question not in solved
        assert all(line.split(" : ")[1][0] in "6789" for line in lines)


def test_phone_book_arguments_are_checked() -> None:
    for entries, examples in product((0, 5000), (0,)):
        with pytest.raises(ValueError, match="num_entries must be"):
            PhoneBook(num_entries=entries, num_examples=examples)
    with pytest.raises(ValueError, match="num_examples must be"):
        PhoneBook(num_entries=3, num_examples=3)


def test_variables_are_what_their_programs_make_of_them() -> None:
    """Python itself runs the statements; chains are of copies nearly all."""
    task = VariableTracking(length=80, num_variables=4)
    for split in ("train", *task.splits):
        made = task.examples(0, range(50), split)
        copies = 0
        for sequence, answers in zip(made.input_ids, made.answers, strict=True):
            memory: dict[str, int] = {}
            for t in range(0, 80, 4):
                text = "".join(task.tokens[token] for token in sequence[t : t + 3])
                if "?" in text:
                    assert memory[text[0]] == answers[t + 2] == int(text[2])
                else:
                    exec(text, {}, memory)
                    copies += text[2].isalpha()
            assert "?" in text
        share = copies / (50 * (20 - 4 - 1))
        expected = 0.65 if split == "chains" else 0.3
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 750)  # five standard deviations


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"length": 18}, "length must be a multiple of 4, at least 24, got 18"),
        ({"length": 20}, "length must be a multiple of 4, at least 24, got 20"),
        ({"num_variables": 0}, "num_variables must be in 1 ... 26, got 0"),
        ({"num_variables": 27}, "num_variables must be in 1 ... 26, got 27"),
    ],
)
def test_variable_tracking_refuses(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariableTracking(**fields)
