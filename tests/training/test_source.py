"""Sources: measures against models whose results are known, and data that does not depend on how it is fetched."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from path_attention.data import ByteData
from path_attention.tasks import FlipFlop
from path_attention.training.recipe import ByteEvaluation, TaskEvaluation
from path_attention.training.source import ByteSource, TaskSource, TrainingSet, open_source
from tests.training.tiny import tiny


class Constant(nn.Module):
    """The same logits at every position."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class Memory(nn.Module):
    """Solves flip-flop by remembering the last bit behind a w (token 0); bits are tokens 3 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        written = torch.full_like(input_ids, -1)
        written[:, 1:] = torch.where(input_ids[:, :-1] == 0, torch.arange(1, input_ids.shape[1]), -1)
        memory = input_ids.gather(1, written.cummax(dim=1).values.clamp(min=0))
        return SimpleNamespace(logits=nn.functional.one_hot(memory, 5).float())


def test_solution_has_no_errors_and_a_guess_half() -> None:
    source = TaskSource(FlipFlop(length=64), TaskEvaluation(answers=2000, quick_answers=50))
    for split, measured in source.evaluate(Memory()).items():
        assert (measured.errors, measured.value) == (0, 0.0), split
        assert measured.count >= 2000
    for measured in source.evaluate(Constant(torch.eye(5)[3])).values():
        # Five standard deviations of a fair coin; bits read from the same write are one toss, at most 31 of them.
        assert abs(measured.value - 0.5) <= 5 * 0.5 * math.sqrt(31 / measured.count)
    assert all(50 <= m.count < 2000 for m in source.evaluate(Memory(), quick=True).values())


def test_model_mode_and_random_state_are_left_alone() -> None:
    source = TaskSource(FlipFlop(length=16), TaskEvaluation(answers=10))
    model = Memory().train()
    state = torch.get_rng_state()
    source.evaluate(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def text(tmp_path: Path) -> ByteData:
    for n in range(4):
        (tmp_path / f"{n}.txt").write_bytes(bytes(range(97, 107)) * 40)
    return ByteData(path=str(tmp_path), length=32, validation_fraction=0.5, cache=str(tmp_path / "cache"))


def test_bits_per_byte_of_an_even_guess(text: ByteData) -> None:
    """Every token costs log2 257; separators are paid for but are no bytes."""
    corpus = text.open()
    source = ByteSource(corpus, ByteEvaluation(windows=1000, batch_size=5))
    measured = source.evaluate(Constant(torch.zeros(257)))["validation"]
    windows = [corpus.read("validation", s)[1:] for s in corpus.validation_starts(1000)]
    predicted, bytes_ = sum(len(w) for w in windows), sum(int((w < 256).sum()) for w in windows)
    assert bytes_ < predicted
    assert measured.count == bytes_
    assert measured.sequences == len(windows)
    assert measured.value == pytest.approx(math.log2(257) * predicted / bytes_, rel=1e-6)


def test_byte_examples_are_their_own_labels(text: ByteData) -> None:
    example = ByteSource(text.open(), ByteEvaluation()).example(0, 5)
    assert torch.equal(example["input_ids"], example["labels"])
    assert example["input_ids"].shape == (32,)


# Starting processes is slow; one batch size is enough for them.
@pytest.mark.parametrize("workers, batch_size", [(0, 1), (0, 3), (0, 8), (2, 3)])
def test_sequence_n_is_the_same_for_every_batch_size_and_worker(workers: int, batch_size: int) -> None:
    data = TrainingSet(open_source(tiny()), seed=7, size=16)
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, num_workers=workers)
    ids = torch.cat([batch["input_ids"] for batch in loader])
    expected = FlipFlop(length=16).examples(7, range(16)).input_ids
    assert torch.equal(ids, torch.from_numpy(expected))
