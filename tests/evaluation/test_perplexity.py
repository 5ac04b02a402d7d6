"""Perplexity by position: against the model's own logits, one prefix at a time."""

import math

import numpy as np
import pytest
import torch

from path_attention.evaluation.perplexity import PositionLosses, measure_positions, token_losses
from path_attention.models import PaTHConfig, PaTHForCausalLM

VOCABULARY = 23


def model(mixer: str = "path_fox") -> PaTHForCausalLM:
    torch.manual_seed(0)
    config = PaTHConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,  # large, so that it predicts something
        mixer=mixer,
    )
    return PaTHForCausalLM(config).double().eval()


def stretches(count: int, length: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(VOCABULARY, size=length) for _ in range(count)]


# Logits at once: of one token, of some that do not divide the length, of all.
@pytest.mark.parametrize("logits", [1, 7 * 2 * VOCABULARY, 10**9])
def test_token_losses_are_those_of_every_prefix(logits: int) -> None:
    ids = torch.from_numpy(np.stack(stretches(2, 40)))
    found = token_losses(model(), ids, logits)
    assert found.shape == (2, 39)
    assert found.dtype == torch.float32
    for t in range(1, 40):
        last = model()(ids[:, :t]).logits[:, -1].log_softmax(-1)
        wanted = -last.gather(1, ids[:, t : t + 1])[:, 0]
        # Losses are near log 23; logits are taken in float32.
        torch.testing.assert_close(found[:, t - 1].double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [64, 2048])
def test_perplexities_are_those_of_a_direct_computation(length: int) -> None:
    """Over two stretches, by position and by length; 64 positions are two to a bucket, 2048 are 64."""
    rows = stretches(2, length)
    one = model("rope")
    losses = np.stack([token_losses(one, torch.from_numpy(row)[None])[0].double().numpy() for row in rows])
    mean = np.concatenate([[np.nan], losses.mean(0)])
    measured = measure_positions(one, rows)
    assert (measured.length, measured.stretches) == (length, 2)
    half = length // 2
    for start, end in ((0, half), (half, length), (0, length), (half, half + measured.width)):
        wanted = np.nanmean(mean[start:end])
        assert measured.between(start, end) == pytest.approx(wanted, abs=1e-6)  # rounded for the JSON
    assert measured.by_length([half, length]) == pytest.approx(
        [math.exp(np.nanmean(mean[:half])), math.exp(np.nanmean(mean))], rel=1e-5
    )
    ends, values = measured.by_position(half)
    assert ends == [half, length]
    assert values[1] == pytest.approx(math.exp(mean[half:].mean()), rel=1e-5)
    ranges = [np.nanmean(part) for part in np.concatenate([[np.nan], losses[1]]).reshape(32, -1)]
    assert measured.by_stretch[1] == pytest.approx(ranges, abs=1e-6)


def test_mode_is_left_and_progress_is_told() -> None:
    one, told = model().train(), []
    measure_positions(one, stretches(3, 64), progress=told.append)
    assert told == [1, 2, 3]
    assert one.training


def test_what_does_not_fit_is_named() -> None:
    for row in (stretches(1, 100), stretches(1, 32)):
        with pytest.raises(ValueError, match="length: wanted a multiple of 2048, or of 32"):
            measure_positions(model(), row)
    with pytest.raises(ValueError, match="stretches: wanted at least one"):
        measure_positions(model(), [])
    losses = PositionLosses(64, 2, [1.0] * 32, [[1.0] * 32])
    for start, end in ((1, 4), (0, 3), (4, 4), (0, 66)):
        with pytest.raises(ValueError, match="start, end: wanted multiples of 2 up to 64"):
            losses.between(start, end)
