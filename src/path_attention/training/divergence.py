"""What is known when a loss or a gradient is no finite number: which step, which sequences, which layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def statistics(x: Tensor) -> dict[str, float]:
    """Root mean square and largest magnitude of the finite numbers, and how many are not finite."""
    x = (x.to_local() if isinstance(x, DTensor) else x).detach().float()
    finite = torch.isfinite(x)
    kept = torch.where(finite, x, 0)
    count = int(finite.sum())
    return {
        "rms": math.sqrt(float(kept.double().square().sum()) / count) if count else math.nan,
        "largest": float(kept.abs().max()) if x.numel() else 0.0,
        "not_finite": x.numel() - count,
    }


def named(value: Any) -> Any:
    """Nested plain data with numbers that are not finite by their names, "nan" and "inf": JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [named(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def recorded(layers: Sequence[nn.Module], found: list[dict[str, float]]) -> Iterator[None]:
    """Puts the statistics of every layer's output into ``found`` while it is open."""

    def record(_: nn.Module, __: Any, output: Any) -> None:
        found.append(statistics(output[0] if isinstance(output, tuple) else output))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def examine(model: Any, batches: Sequence[dict[str, Any]], loss: Callable[[dict[str, Any]], Tensor]) -> dict[str, Any]:
    """Statistics of a step that gave no finite number, its gradients still in place and its weights as they were.

    Args:
        model: the model; its layers are those of ``model.base_model``.
        batches: the step's micro-batches on this process.
        loss: of one of them.

    Returns:
        ``losses`` of the micro-batches; ``outputs`` of each layer, of the first micro-batch whose loss is not finite;
        ``weights`` and ``gradients``; ``first`` in words: the first thing found that is not finite.
    """
    layers = list(model.base_model.layers)
    losses: list[float] = []
    outputs: list[list[dict[str, float]]] = []
    for batch in batches:
        outputs.append([])
        with recorded(layers, outputs[-1]):
            losses.append(float(loss(batch)))
    bad = next((n for n, x in enumerate(losses) if not math.isfinite(x)), 0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: statistics(p) for name, p in parameters.items()}
    gradients = {name: statistics(p.grad) for name, p in parameters.items() if p.grad is not None}
    return {
        "losses": losses,
        "first": _first(weights, outputs[bad] if outputs else [], losses, gradients),
        "outputs": outputs[bad] if outputs else [],
        "weights": weights,
        "gradients": gradients,
    }


def _first(
    weights: dict[str, dict[str, float]],
    outputs: list[dict[str, float]],
    losses: list[float],
    gradients: dict[str, dict[str, float]],
) -> str:
    """In the order in which they are computed: weights, outputs, losses; gradients from the last layer on."""
    for name, found in weights.items():
        if found["not_finite"]:
            return f"the weights of {name}"
    for layer, found in enumerate(outputs):
        if found["not_finite"]:
            return f"the output of layer {layer}"
    if any(not math.isfinite(x) for x in losses):
        return "the loss, from finite outputs of all layers"
    for name, found in reversed(gradients.items()):
        if found["not_finite"]:
            return f"the gradient of {name}, from a finite loss"
    return "nothing when the step was computed again"
