"""Attention by the PaTH operator: what all mixers share whose logits it computes, cached and over processes too."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from path_attention.autocast import autocast_dtype
from path_attention.layers.attention import Attention
from path_attention.layers.short_convolution import ConvolutionState, ShortConvolution
from path_attention.ops import path_attention, path_attention_weights


class PaTHInputs(NamedTuple):
    """What the layer feeds :func:`path_attention.path_attention`."""

    q: Tensor  # (B, L, HQ, D)
    k: Tensor  # (B, L, H, D)
    v: Tensor  # (B, L, H, D)
    w: Tensor  # (B, L, R, H, D) float32 at least, unit vectors
    beta: Tensor  # (B, L, R, H) float32 at least, in (0, 2)
    g: Tensor | None  # (B, L, HQ) float32 at least, at most 0


class OperatorAttention(Attention):
    """:class:`Attention` of a subclass that says what it feeds the operator: see :meth:`project`."""

    cache_type = "path_attention"
    supports_context_parallel = True
    # False: what the operator's backward pass would compute again is kept, for less time and more memory. No effect
    # under context parallelism.
    recompute = True
    w_conv: ShortConvolution | None  # over w, for mixers that have one

    def project(
        self, hidden_states: Tensor, cu_seqlens: Tensor | None = None, convolution: ConvolutionState | None = None
    ) -> PaTHInputs:
        """(B, L, C) -> what the operator takes: for attention maps, and for caches.

        ``convolution``: what the convolution of w has seen before these tokens, which are offered to it; with
        cu_seqlens it has a row for each packed sequence.
        """
        raise NotImplementedError

    def attend(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        inputs = self.project(hidden_states, cu_seqlens)
        if self.context is None:
            return path_attention(*inputs, cu_seqlens=cu_seqlens, recompute=self.recompute)
        from path_attention.distributed.attention import path_attention_context_parallel

        return path_attention_context_parallel(*inputs, group=self.context, cu_seqlens=cu_seqlens)

    def weigh(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, _, w, beta, g = self.project(hidden_states, cu_seqlens)
        return path_attention_weights(q, k, w, beta, g, cu_seqlens=cu_seqlens)

    def attend_cached(
        self, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, cache: Any
    ) -> Tensor:
        batch, length = hidden_states.shape[:2]
        padding = cache.padding(attention_mask, hidden_states)
        if padding is not None:
            hidden_states, cu_seqlens = padding.unpad(hidden_states), padding.cu_seqlens
        convolution = None
        if self.w_conv is not None:
            sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
            # Its inputs come from a linear layer, in the dtype of these; under autocast in one that float32 holds.
            like = hidden_states if autocast_dtype(hidden_states.device) is None else at_least_float32(hidden_states)
            convolution = cache.convolution(sequences, self.w_conv, like)
        inputs = self.project(hidden_states, cu_seqlens, convolution)
        out = cache.attend(inputs, cu_seqlens, attention_mask, length)
        return out if padding is None else padding.pad(out)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
