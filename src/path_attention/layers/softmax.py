"""The baselines: causal softmax attention with rotary position encoding, or with none."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from path_attention.autocast import without_autocast
from path_attention.checks import bad, check_number
from path_attention.layers.attention import Attention
from path_attention.layers.padding import token_positions


class SoftmaxAttention(Attention):
    """out = W_o softmax(q k^T / sqrt(D)) v, causal, by torch's scaled_dot_product_attention.

    Args:
        rope_theta: base of the rotary position encoding (arXiv 2104.09864), whose halves are laid out as Llama's, so
            that Llama's weights fit; None for no position encoding. Positions count from 0 in every sequence.
        rotary_scaling: how the frequencies differ from theta's own, see :func:`rotary_frequencies`; None: not at all.

    The others are those of :class:`Attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope_theta: float | None = None,
        rotary_scaling: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        output_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm=qk_norm,
            bias=bias,
            output_bias=output_bias,
            norm_eps=norm_eps,
        )
        if rope_theta is not None:
            check_number("rope_theta", rope_theta, zero=False)
            if self.head_dim % 2:
                raise ValueError(f"head_dim: got {self.head_dim}; wanted an even number for rotary position encoding")
        if rotary_scaling is not None:
            check_rotary_scaling(rotary_scaling)
        self.rope_theta, self.rotary_scaling = rope_theta, rotary_scaling

    def attend(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self._rotated(hidden_states, cu_seqlens))
        if cu_seqlens is None:
            return self._causal(q, k, v).transpose(1, 2)
        # One call a sequence: a block-diagonal mask over the whole row would be quadratic in its length.
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        out = [self._causal(*part) if part[0].shape[2] else part[0] for part in parts]
        return torch.cat(out, dim=2).transpose(1, 2)

    def attend_cached(
        self, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, cache: Any
    ) -> Tensor:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: got boundaries beside a cache; wanted None: keys and values have a row each")
        length, past = hidden_states.shape[1], cache.length
        q, k, v = self._project(hidden_states)
        tokens = past + torch.arange(length, device=q.device)  # past may be a tensor: no wait for the device
        if self.rope_theta is not None:
            positions = tokens[None]
            if attention_mask is not None:  # positions count real tokens
                positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, tokens]
            q, k = self._rotate(q, k, positions)
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2))
        keys = torch.arange(k.shape[2], device=q.device)
        visible = (keys <= tokens[:, None])[None, None]
        if attention_mask is not None:
            real = nn.functional.pad(attention_mask != 0, (0, len(keys) - attention_mask.shape[1]), value=True)
            # Padding sees itself: a row of nothing but -inf has no softmax.
            visible = visible & real[:, None, None] | (keys == tokens[:, None])
        out = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=visible, enable_gqa=self.num_heads != self.num_kv_heads
        )
        return out.transpose(1, 2)

    def weigh(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, _ = (x.transpose(1, 2) for x in self._rotated(hidden_states, cu_seqlens))
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        length = q.shape[2]
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if cu_seqlens is not None:
            first = torch.arange(length, device=q.device) - token_positions(cu_seqlens, length, q.device)
            visible &= first[:, None] == first[None, :]
        dtype = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q.device):
            logits = q.to(dtype) @ k.to(dtype).mT * self.head_dim**-0.5
        return logits.masked_fill(~visible, float("-inf")).softmax(-1)

    def _rotated(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(hidden_states)
        if self.rope_theta is not None:
            q, k = self._rotate(q, k, token_positions(cu_seqlens, hidden_states.shape[1], hidden_states.device))
        return q, k, v

    def _rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        assert self.rope_theta is not None
        frequencies = rotary_frequencies(self.head_dim, self.rope_theta, self.rotary_scaling, q.device)
        cos, sin = rotary_table(positions, frequencies, q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.num_heads != self.num_kv_heads
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


# What scaled frequencies are made of, by their type in transformers' rope_parameters.
_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_rotary_scaling(scaling: Mapping[str, Any], name: str = "rotary_scaling") -> None:
    """Raise a ValueError unless :func:`rotary_frequencies` knows this type, and all its numbers are there."""
    kind = scaling.get("rope_type")
    if kind not in _SCALINGS:
        raise bad(name, f"rope_type {kind!r}", f"'default', {', '.join(map(repr, _SCALINGS))}")
    for key in _SCALINGS[kind]:
        check_number(f"{name}.{key}", scaling.get(key), zero=False)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Radians a token, float32 (D / 2,): f_i = theta^(-2 i / D), for a longer context divided by a factor, by type of
    ``scaling["rope_type"]``, with the keys that transformers' ``rope_parameters`` have:

        linear   all of them
        llama3   those whose wavelength is above original_max_position_embeddings / low_freq_factor; none whose is below
                 original_max_position_embeddings / high_freq_factor; a blend in between
    """
    half = head_dim // 2
    frequency = theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)  # of the frequency as it was
    return frequency * (share + (1 - share) / scaling["factor"])


# An operator of its own, so that a compiler computes the table once and reads it: torch's would rather compute sines
# and powers again for every number of every head.
@torch.library.custom_op("path_attention::rotary_table", mutates_args=())
def rotary_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions * frequencies_i, angles in float32, the results (..., L, D / 2) in ``dtype``.

    positions (L,) or (B, L), frequencies (D / 2,).
    """
    angle = positions[..., None].float() * frequencies
    return angle.cos().to(dtype), angle.sin().to(dtype)


@rotary_table.register_fake
def _(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, *frequencies.shape)
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding of x (B, L, heads, D): pairs (x_i, x_{i + D/2}) turned by the angles of a table."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
