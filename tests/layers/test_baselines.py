"""The baselines against their definitions, written out token by token in float64."""

import math

import pytest
import torch
from torch import Tensor

from path_attention.layers import ALiBiAttention, ForgettingAttention, StickBreakingAttention, stick_breaking
from path_attention.layers.attention import Attention

HIDDEN, HEADS, KV_HEADS = 24, 4, 2
DIM = HIDDEN // HEADS
# One token, an odd number within one leaf of the operator, and more than two leaves.
LENGTHS = (1, 37, 150)


def layer_and_tokens(kind: type[Attention], length: int, scale: float = 1.0) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    layer = kind(HIDDEN, HEADS, KV_HEADS).double()
    with torch.no_grad():  # away from the initial values, which hide mistakes
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).mul_(scale)
    return layer, torch.randn(2, length, HIDDEN, dtype=torch.float64)


def heads(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, HQ, L, D), keys and values repeated for their query heads."""
    q, k, v = (x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = (y.unflatten(2, (-1, DIM)).transpose(1, 2) for y in (q, k, v))
    return q, *(y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))


def output(layer: Attention, weights: Tensor, v: Tensor) -> Tensor:
    return (weights @ v).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


def biased_softmax(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    length = q.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (q @ k.mT / math.sqrt(DIM) + bias).masked_fill(future, float("-inf")).softmax(-1)


@pytest.mark.parametrize("length", LENGTHS)
def test_forgetting_attention_is_its_definition(length: int) -> None:
    layer, x = layer_and_tokens(ForgettingAttention, length)
    q, k, v = heads(layer, x)
    forget = torch.sigmoid(x @ layer.gate_proj.weight.T + layer.gate_proj.bias)  # (B, L, HQ)
    bias = torch.zeros(2, HEADS, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i):
            bias[:, :, i, j] = forget[:, j + 1 : i + 1].log().sum(1)
    torch.testing.assert_close(layer(x), output(layer, biased_softmax(q, k, bias), v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_alibi_is_its_definition(length: int) -> None:
    layer, x = layer_and_tokens(ALiBiAttention, length)
    q, k, v = heads(layer, x)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)  # of four heads
    bias = -slopes[:, None, None] * distance
    torch.testing.assert_close(layer(x), output(layer, biased_softmax(q, k, bias), v), rtol=0, atol=1e-12)


def stick_breaking_by_definition(z: Tensor) -> Tensor:
    """Logits (..., L, L) -> weights, key by key from the nearest on; the remainder on the diagonal."""
    weights = torch.zeros_like(z)
    for i in range(z.shape[-1]):
        left = torch.ones_like(z[..., 0, 0])
        for j in reversed(range(i)):
            share = torch.sigmoid(z[..., i, j])
            weights[..., i, j] = share * left
            left = left * (1 - share)
        weights[..., i, i] = left
    return weights


@pytest.mark.parametrize("length", LENGTHS)
def test_stick_breaking_is_its_definition(length: int) -> None:
    layer, x = layer_and_tokens(StickBreakingAttention, length)
    q, k, v = heads(layer, x)
    weights = stick_breaking_by_definition(q @ k.mT / math.sqrt(DIM))
    torch.testing.assert_close(layer(x), output(layer, weights, v), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.attention_weights(x), weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize("entries", [1, 2 * HEADS * 37**2])
def test_stick_breaking_without_gradients_takes_some_sequences_at_a_time(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is the same, and no more weights than allowed are made at once, but for a single sequence's."""
    layer, _ = layer_and_tokens(StickBreakingAttention, 37)
    x = torch.randn(5, 37, HIDDEN, dtype=torch.float64)
    whole, sizes = layer(x), []
    original = stick_breaking.stick_breaking_weights

    def noted(q: Tensor, *arguments: object) -> Tensor:
        sizes.append(len(q))
        return original(q, *arguments)

    monkeypatch.setattr(stick_breaking, "ENTRIES", entries)
    monkeypatch.setattr(stick_breaking, "stick_breaking_weights", noted)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole, rtol=0, atol=1e-12)
    assert sizes == ([1] * 5 if entries == 1 else [2, 2, 1])


def test_stick_breaking_weights_add_up_to_one_and_stay_finite_for_extreme_logits() -> None:
    """Logits of hundreds: shares that are 0 or 1 in floating point. Log-weights do not overflow, nor do gradients."""
    layer, x = layer_and_tokens(StickBreakingAttention, 70, scale=20.0)
    layer, x = layer.float(), x.float().requires_grad_()
    weights = layer.attention_weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-4)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("kind", [ForgettingAttention, ALiBiAttention, StickBreakingAttention])
def test_gradients_are_those_of_the_definition(kind: type[Attention]) -> None:
    """The attention matrix is computed by the definition: differentiate through it and through the layer."""
    layer, x = layer_and_tokens(kind, 70)
    x.requires_grad_()
    _, _, v = heads(layer, x)
    weights = layer.attention_weights(x)
    probe = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad((output(layer, weights, v) * probe).sum(), inputs)
    found = torch.autograd.grad((layer(x) * probe).sum(), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [ForgettingAttention, ALiBiAttention, StickBreakingAttention])
def test_autocast_keeps_gates_and_sums_in_float32(kind: type[Attention]) -> None:
    """In bfloat16 a running sum of gates over some hundred tokens would be off by whole units; in float32 it is not.

    What is left are the roundings of half precision in the projections, the logits and the output.
    """
    layer, x = layer_and_tokens(kind, 300)
    exact = layer(x)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x).double()
    assert (rounded - exact).norm() / exact.norm() < 10 * torch.finfo(torch.bfloat16).eps / 2
