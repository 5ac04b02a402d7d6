"""Flip-flop: the vectorised generator against the plain scan; statistics, labels, independence of batches."""

import math

import numpy as np
import pytest

from path_attention.tasks import IGNORED, FlipFlop, Score, score, task_class, task_names
from path_attention.tasks.flip_flop import IGNORE, IGNORE_PROBABILITY, ONE, READ, WRITE, ZERO

SPLITS = ("train", "in_distribution", "sparse", "dense")


# 4 is the shortest there is; 6 leaves one free pair; 512 is the paper's.
@pytest.mark.parametrize("length", [4, 6, 64, 512])
@pytest.mark.parametrize("split", SPLITS)
def test_generator_agrees_with_the_oracle(length: int, split: str) -> None:
    task = FlipFlop(length=length)
    examples = task.examples(3, range(200), split)
    assert examples.input_ids.shape == examples.labels.shape == (200, length)
    np.testing.assert_array_equal(examples.labels, task.oracle(examples.input_ids))
    np.testing.assert_array_equal(examples.answers, examples.labels)


def test_form_of_a_sequence() -> None:
    ids = FlipFlop(length=64).examples(0, range(100)).input_ids
    assert (ids[:, 0] == WRITE).all()
    assert (ids[:, -2] == READ).all()
    assert np.isin(ids[:, ::2], (WRITE, READ, IGNORE)).all()
    assert np.isin(ids[:, 1::2], (ZERO, ONE)).all()


@pytest.mark.parametrize("split", SPLITS)
def test_frequencies_are_those_of_the_definition(split: str) -> None:
    """Counts of independent events stay within 5 standard deviations: a false alarm in about 10^6 of these tests."""
    task, p_ignore = FlipFlop(), IGNORE_PROBABILITY.get(split, 0.8)
    ids = task.examples(1, range(400), split).input_ids
    free = ids[:, 2:-2:2]  # the instructions that are drawn
    bits = ids[:, 1::2][ids[:, ::2] != READ]
    for found, expected in (
        ((free == IGNORE), p_ignore),
        ((free == WRITE), (1 - p_ignore) / 2),
        ((free == READ), (1 - p_ignore) / 2),
        ((bits == ONE), 0.5),
    ):
        bound = 5 * math.sqrt(expected * (1 - expected) * found.size)
        assert abs(int(found.sum()) - expected * found.size) <= bound
    reads = int((ids == READ).sum()) / len(ids)
    spread = math.sqrt((task.length / 2 - 2) * (1 - p_ignore) / 2 / len(ids))
    assert abs(reads - task.expected_count(split)) <= 5 * spread


def test_clean_labels_stand_on_the_bits_after_r_only_and_noisy_ones_everywhere() -> None:
    clean = FlipFlop(length=64).examples(0, range(20))
    after_read = np.zeros_like(clean.input_ids, dtype=bool)
    after_read[:, 1:] = clean.input_ids[:, :-1] == READ
    np.testing.assert_array_equal(clean.labels, np.where(after_read, clean.input_ids, IGNORED))
    noisy = FlipFlop(length=64, clean=False).examples(0, range(20))
    np.testing.assert_array_equal(noisy.input_ids, clean.input_ids)
    np.testing.assert_array_equal(noisy.answers, clean.answers)
    assert (noisy.labels[:, 0] == IGNORED).all()
    np.testing.assert_array_equal(noisy.labels[:, 1:], noisy.input_ids[:, 1:])


def test_a_sequence_depends_on_its_number_alone() -> None:
    task = FlipFlop(length=32)
    whole = task.examples(5, range(40)).input_ids
    np.testing.assert_array_equal(whole[17:23], task.examples(5, range(17, 23)).input_ids)
    np.testing.assert_array_equal(whole[[30, 2]], task.examples(5, [30, 2]).input_ids)
    assert task.examples(5, []).input_ids.shape == (0, 32)
    assert len(np.unique(whole, axis=0)) > 1


def test_seeds_and_splits_are_different_streams() -> None:
    task = FlipFlop(length=64)
    ids = [task.examples(seed, range(8), split).input_ids for seed in (0, 1) for split in ("train", "in_distribution")]
    assert len(np.unique(np.concatenate(ids), axis=0)) == 32


def test_score_counts_reads_and_wrong_answers() -> None:
    ids = np.array([[WRITE, ONE, READ, ONE, IGNORE, ZERO, READ, ONE]])
    answers = FlipFlop(length=8).oracle(ids)
    right = np.roll(ids, -1, axis=1)
    assert score(answers, right) == Score(2, 0)
    wrong = right.copy()
    wrong[0, 6] = ZERO  # the answer to the last read
    wrong[0, 0] = ZERO  # no answer: after a write
    assert score(answers, wrong) == Score(2, 1)
    assert (Score(2, 1) + Score(6, 1)).rate == 0.25
    assert math.isnan(Score().rate)


def test_oracle_refuses_what_is_no_flip_flop_sequence() -> None:
    task = FlipFlop(length=4)
    with pytest.raises(ValueError, match="before anything is written"):
        task.oracle(np.array([[READ, ONE, READ, ONE]]))
    with pytest.raises(ValueError, match="position 2"):
        task.oracle(np.array([[WRITE, ONE, ONE, ONE]]))


def test_arguments_are_checked() -> None:
    for length in (5, 2, 0):
        with pytest.raises(ValueError, match="length must be even"):
            FlipFlop(length=length)
    with pytest.raises(ValueError, match="ignore_probability"):
        FlipFlop(ignore_probability=1.5)
    with pytest.raises(ValueError, match="split: wanted one of"):
        FlipFlop().examples(0, [0], "spare")


def test_registry_names_its_tasks() -> None:
    assert "flip_flop" in task_names()
    assert task_class("flip_flop") is FlipFlop
    with pytest.raises(ValueError, match=r"no task 'flop'.*flip_flop"):
        task_class("flop")
