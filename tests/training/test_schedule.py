"""The learning rate by step, and the paper's recipe, whose rates it was made for."""

import itertools
import math

import pytest
import torch
from transformers import get_scheduler

from path_attention.data import TokenData
from path_attention.models import PaTHConfig, PaTHForCausalLM
from path_attention.training import load_recipe
from path_attention.training.recipe import Training
from path_attention.training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    "schedule, name", [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_from_nothing_to_nothing_it_is_the_schedule_of_transformers(schedule: str, name: str) -> None:
    settings = Training(steps=50, batch_size=1, learning_rate=1.0, warmup_steps=7, schedule=schedule)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    wanted = get_scheduler(name, optimizer, num_warmup_steps=7, num_training_steps=50).lr_lambdas[0]  # type: ignore[attr-defined]
    for step in range(51):
        assert learning_rate_factor(settings, step) == pytest.approx(wanted(step), abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_rises_from_the_initial_rate_and_falls_to_the_final_one(schedule: str) -> None:
    rates = {"learning_rate": 2.0, "initial_learning_rate": 0.5, "final_learning_rate": 0.25}
    settings = Training(steps=40, batch_size=1, warmup_steps=10, schedule=schedule, **rates)  # type: ignore[arg-type]
    found = [2.0 * learning_rate_factor(settings, step) for step in range(41)]
    assert (found[0], found[10]) == (0.5, 2.0)
    assert found[40] == pytest.approx(0.25)
    assert found[5] == pytest.approx((0.5 + 2.0) / 2)
    assert found[25] == pytest.approx((2.0 + 0.25) / 2)  # both are half way in the middle
    assert all(a < b for a, b in itertools.pairwise(found[:11]))
    assert all(a > b for a, b in itertools.pairwise(found[10:]))


def test_recipe_of_the_paper() -> None:
    """arXiv 2505.16381, appendix B: 760M parameters, 50B tokens in batches of 2M, 1B tokens of warm-up, 3e-5 at both
    ends, 1e-3 at the peak."""
    recipe = load_recipe("fineweb_edu_760m")
    settings, data = recipe.training, recipe.data
    assert isinstance(data, TokenData)
    tokens = settings.batch_size * data.length
    assert (tokens, data.length, data.max_tokens) == (2**21, 4096, 50_000_000_000)
    assert settings.steps == math.ceil(50e9 / tokens)
    assert settings.warmup_steps == round(1e9 / tokens)
    rates = [1e-3 * learning_rate_factor(settings, step) for step in (0, settings.warmup_steps, settings.steps)]
    assert rates == pytest.approx([3e-5, 1e-3, 3e-5])
    with torch.device("meta"):
        model = PaTHForCausalLM(PaTHConfig(vocab_size=32000, mixer="path", **recipe.model))
    assert 750e6 < sum(p.numel() for p in model.parameters()) < 790e6
