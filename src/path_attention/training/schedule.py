"""The learning rate by step."""

import math

from path_attention.training.recipe import Training


def learning_rate_factor(settings: Training, step: int) -> float:
    """The rate of a step, counted from 0, as a multiple of the peak.

    It rises linearly from the initial rate over the steps of the warm-up, and goes from the peak to the final rate over
    the others: with x from 0 to 1, by (1 + cos(pi x)) / 2, by 1 - x, or not at all.
    """
    if step < settings.warmup_steps:
        first = settings.initial_learning_rate / settings.learning_rate
        return first + (1 - first) * step / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    x = min(1.0, (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * x)) if settings.schedule == "cosine" else 1 - x
    last = settings.final_learning_rate / settings.learning_rate
    return last + (1 - last) * left
