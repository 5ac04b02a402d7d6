"""The baselines: causal softmax attention with rotary position encoding, or with none."""

import torch
from torch import Tensor, nn

from path_attention.autocast import without_autocast
from path_attention.checks import check_number
from path_attention.layers.attention import Attention
from path_attention.layers.padding import token_positions


class SoftmaxAttention(Attention):
    """out = W_o softmax(q k^T / sqrt(D)) v, causal, by torch's scaled_dot_product_attention.

    Args:
        rope_theta: base of the rotary position encoding (arXiv 2104.09864), whose halves are laid out as Llama's, so
            that Llama's weights fit; None for no position encoding. Positions count from 0 in every sequence.

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
        self.rope_theta = rope_theta

    def attend(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self._rotated(hidden_states, cu_seqlens))
        if cu_seqlens is None:
            return self._causal(q, k, v).transpose(1, 2)
        # One call a sequence: a block-diagonal mask over the whole row would be quadratic in its length.
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        out = [self._causal(*part) if part[0].shape[2] else part[0] for part in parts]
        return torch.cat(out, dim=2).transpose(1, 2)

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
            positions = token_positions(cu_seqlens, hidden_states.shape[1], hidden_states.device)
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        return q, k, v

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.num_heads != self.num_kv_heads
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position encoding: pairs (x_i, x_{i + D/2}) turned by positions * theta^(-2 i / D).

    x (B, L, heads, D), positions (L,); angles in float32, the result in the dtype of x.
    """
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions[:, None].float() * frequency)[:, None, :]  # (L, 1, D / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.split(half, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
