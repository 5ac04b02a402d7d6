"""What makes w out of its projection as one operator of PyTorch, with kernels of ours: for GPUs, without a cache.

Saved for the backward pass: the inputs alone. Differentiable once.
"""

from typing import Any

import torch
from torch import Tensor

# Widest heads and longest convolutions of the kernels: a token's row lies in registers, as often as the convolution is
# long, beside its gradients.
MOST_HEAD_DIM = 256
MOST_WIDTH = 4


@torch.library.custom_op("path_attention::convolve_normalise", mutates_args=())
def convolve_normalise(
    x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int, least: float, added: float
) -> Tensor:
    """w = y / max(sqrt(|y|^2 + added), least) of each head, y_t = SiLU(sum_j weight[:, width - 1 - j] * x_{t - j}).

    Args:
        x: (B, L, heads * head_dim), float32 or half precision, on a device that Triton's kernels run on.
        weight: (heads * head_dim, width), of the convolution.
        positions: (L,), each token's index in its own sequence: x before that is 0. None where every row is one.
        head_dim: at most MOST_HEAD_DIM.
        least: what a shorter y is divided by.
        added: to the square of the norm.

    Returns:
        (B, L, heads * head_dim) float32.
    """
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=torch.float32)
    from path_attention.ops.kernels import convolve_normalise as kernels  # triton is not needed elsewhere

    return kernels.forward(x, weight, positions, head_dim, least, added)


@convolve_normalise.register_fake
def _(x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int, least: float, added: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("path_attention::convolve_normalise_backward", mutates_args=())
def convolve_normalise_backward(
    d_w: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int, least: float, added: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, each in its dtype."""
    if x.numel() == 0:
        return x.new_empty(x.shape), weight.new_zeros(weight.shape)
    from path_attention.ops.kernels import convolve_normalise as kernels

    return kernels.backward(d_w, x, weight, positions, head_dim, least, added)


@convolve_normalise_backward.register_fake
def _(
    d_w: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int, least: float, added: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, positions, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight, positions)


def _autograd_backward(ctx: Any, d_w: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, positions = ctx.saved_tensors
    d_x, d_weight = convolve_normalise_backward(d_w, x, weight, positions, *ctx.numbers)
    return d_x, d_weight, None, None, None, None


torch.library.register_autograd("path_attention::convolve_normalise", _autograd_backward, setup_context=_setup_context)
