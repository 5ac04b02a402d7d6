"""Baselines whose logits decay with what lies between query and key: the forgetting attention and ALiBi.

Both are softmax attention with a bias that is a sum over the tokens in between,

    logit(i, j) = q_i k_j^T / sqrt(D) + sum_{s=j+1..i} g_s ,     j <= i ,

which is PaTH attention whose transitions are the identity (beta = 0). So they run in the same operator, on the same
kernels, and differ from ``path_fox`` in nothing but what they are about.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from path_attention.layers.operator import OperatorAttention, PaTHInputs, at_least_float32
from path_attention.layers.short_convolution import ConvolutionState


class DecayingAttention(OperatorAttention):
    """Attention with a log gate for every token and query head, which a subclass gives; arguments of Attention."""

    w_conv = None

    def log_gates(self, hidden_states: Tensor) -> Tensor:
        """(B, L, C) -> g (B, L, HQ), at most 0, float32 at least."""
        raise NotImplementedError

    def project(
        self, hidden_states: Tensor, cu_seqlens: Tensor | None = None, convolution: ConvolutionState | None = None
    ) -> PaTHInputs:
        q, k, v = self._project(hidden_states)
        w, beta = identity_transitions(k)
        return PaTHInputs(q, k, v, w, beta, self.log_gates(hidden_states))


def identity_transitions(k: Tensor) -> tuple[Tensor, Tensor]:
    """w (B, L, 1, H, D) and beta (B, L, 1, H) of transitions that change nothing, for keys k (B, L, H, D): both 0, in
    float32 at least.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    w = torch.zeros_like(k, dtype=dtype).unsqueeze(2)
    return w, w[..., 0]


class ForgettingAttention(DecayingAttention):
    """The forgetting transformer's attention (FoX, arXiv 2503.02130): g_t = log sigmoid(W_gate x_t + b_gate).

    One gate a query head, b_gate 0 at the start, no position encoding, and the gate is not divided by sqrt(D).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate_proj = nn.Linear(self.hidden_size, self.num_heads)
        nn.init.zeros_(self.gate_proj.bias)

    def log_gates(self, hidden_states: Tensor) -> Tensor:
        return F.logsigmoid(at_least_float32(self.gate_proj(hidden_states)))


class ALiBiAttention(DecayingAttention):
    """Attention with linear biases (ALiBi, arXiv 2108.12409): logit(i, j) = q_i k_j^T / sqrt(D) - slope_h (i - j).

    slope_h = 2^(-8 h / HQ) for the heads h = 1 ... HQ: the paper's geometric sequence, taken for any number of heads.
    """

    def log_gates(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        heads = torch.arange(1, self.num_heads + 1, dtype=dtype, device=hidden_states.device)
        slopes = torch.exp2(-8 * heads / self.num_heads)
        # Positions count from 0 in every packed sequence by themselves: a sum of gates never crosses a boundary.
        return (-slopes).expand(*hidden_states.shape[:2], -1)
