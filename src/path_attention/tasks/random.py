"""Random numbers that are a function of (seed, stream, index) alone, the same on every device.

The generator is Philox 4x64 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a
bijection of counters under a key, so that any sequence can be had without those before it. NumPy's implementation
serves the CPU; the one in torch operators below makes the same numbers, bit by bit, where the model is.
"""

import numpy as np
import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def uniform(seed: int, stream: int, indices: Tensor, count: int) -> Tensor:
    """``count`` numbers in [0, 1) for each index: float64 (N, count) on the device of ``indices`` (N,) int64."""
    if indices.device.type != "cpu":
        return philox_uniform(seed, stream, indices, count)
    draws = np.empty((len(indices), count))
    key = np.array([seed, stream], dtype=np.uint64)  # given as plain numbers, large ones would go through floats
    for row, n in zip(draws, indices.tolist(), strict=True):
        # The highest word of the counter is never reached by drawing: it names the sequence.
        np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, n))).random(out=row)
    return torch.from_numpy(draws)


def philox_uniform(seed: int, stream: int, indices: Tensor, count: int) -> Tensor:
    """As :func:`uniform`, in torch operators: some 400 elementwise ones, whatever the number of sequences."""
    blocks = -(-count // 4)
    # NumPy counts up before it draws: the first block is number 1.
    block = torch.arange(1, blocks + 1, device=indices.device).expand(len(indices), -1)
    zero = torch.zeros_like(block)
    words = (block, zero, zero, indices[:, None].expand(-1, blocks))
    keys = [seed, stream]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = (high1 ^ words[1] ^ _signed(keys[0]), low1, high0 ^ words[3] ^ _signed(keys[1]), low0)
        keys = [key + weyl for key, weyl in zip(keys, _WEYL, strict=True)]
    bits = torch.stack(words, dim=-1).flatten(1)[:, :count]
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def integers(draws: Tensor, size: int) -> Tensor:
    """Uniform numbers in [0, 1) to whole numbers below ``size``, int64."""
    return (draws * size).long()


def _signed(word: int) -> int:
    """A word of 64 bits as the int64 with the same bits."""
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word


def _high_half(x: Tensor) -> Tensor:
    """The upper 32 bits as a number below 2^32: >> alone would copy the sign."""
    return (x >> 32) & _LOW


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 128-bit product of unsigned words; int64 holds their bits, and its products wrap."""
    x0, x1, f0, f1 = x & _LOW, _high_half(x), factor & _LOW, factor >> 32
    middle = x1 * f0 + _high_half(x0 * f0)
    high = x1 * f1 + _high_half(middle) + _high_half(x0 * f1 + (middle & _LOW))
    return high, x * _signed(factor)
