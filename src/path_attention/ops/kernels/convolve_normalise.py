"""Launchers of the kernels that make w out of its projection, and of the way back."""

from typing import Any

import torch
import triton
from torch import Tensor

from path_attention.ops.kernels.convolve_normalise_kernels import (
    convolve_normalise_backward_kernel,
    convolve_normalise_kernel,
)
from path_attention.ops.kernels.launch import launch_kernel, next_power_of_2

# Numbers of a tile, a token's row of some heads, in four warps: four a thread, which are read at once and let a head of
# 64 or 128 lie in one warp, whose threads sum its squares without waiting for other warps.
TILE = 512
NUMBERS_PER_WARP = 128
# Tokens of a program. The width - 1 on either side are read and computed by two programs: 6% of them at width 3. With
# twice as many, 16,384 tokens of 24 heads of 64 are 768 programs: not many more than an H100 holds at once.
TOKENS = 32
# Tokens whose rows are read at once: 8 bytes a thread of x in half precision, and 16 of the gradient of w. By the
# registers that they take an H100 holds eight programs a multiprocessor forward and five backward: some 60 KB on their
# way, of which 18 keep the memory busy (3 TB/s times 0.8 us over 132 multiprocessors) while other programs compute.
FORWARD_GROUP = 8
BACKWARD_GROUP = 4


def _arguments(x: Tensor, weight: Tensor, head_dim: int) -> dict[str, Any]:
    """How the kernels divide x (B, L, heads * head_dim)."""
    heads = x.shape[2] // head_dim
    block_d = next_power_of_2(head_dim)
    block_heads = min(next_power_of_2(heads), max(1, TILE // block_d))
    return {
        "length": x.shape[1],
        "blocks": triton.cdiv(x.shape[1], TOKENS),
        "heads": heads,
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_HEADS": block_heads,
        "WIDTH": weight.shape[1],
        "TOKENS": TOKENS,
        "num_warps": max(1, block_heads * block_d // NUMBERS_PER_WARP),
    }


def _grid(x: Tensor, arguments: dict[str, Any]) -> tuple[int]:
    return (x.shape[0] * arguments["blocks"] * triton.cdiv(arguments["heads"], arguments["BLOCK_HEADS"]),)


def forward(x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int, least: float, added: float) -> Tensor:
    """w (B, L, channels) float32 of x (B, L, channels), weight (channels, width) and positions (L,)."""
    arguments = _arguments(x, weight, head_dim)
    w = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    launch_kernel(
        convolve_normalise_kernel,
        _grid(x, arguments),
        p_x=x.contiguous(),
        p_weight=weight.contiguous(),
        p_positions=None if positions is None else positions.contiguous(),
        p_w=w,
        added=added,
        least_square=least**2,
        GROUP=FORWARD_GROUP,
        **arguments,
    )
    return w


def backward(
    d_w: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int, least: float, added: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their dtypes. The same bits on every run."""
    arguments = _arguments(x, weight, head_dim)
    channels, width = weight.shape
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_taps = torch.empty(x.shape[0] * arguments["blocks"], width, channels, dtype=torch.float32, device=x.device)
    launch_kernel(
        convolve_normalise_backward_kernel,
        _grid(x, arguments),
        p_d_w=d_w.contiguous(),
        p_x=x.contiguous(),
        p_weight=weight.contiguous(),
        p_positions=None if positions is None else positions.contiguous(),
        p_d_x=d_x,
        p_d_taps=d_taps,
        added=added,
        least_square=least**2,
        GROUP=BACKWARD_GROUP,
        **arguments,
    )
    d_weight = torch.empty(channels, width, dtype=torch.float32, device=x.device)
    torch.sum(d_taps.mT, 0, out=d_weight)  # laid out as the weight is, without a copy
    return d_x, d_weight.to(weight.dtype)
