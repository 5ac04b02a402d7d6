"""Temporary body while the dyadic engine is being written: the definition itself."""

from torch import Tensor

from path_attention.ops.reference import path_attention_reference


def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check_inputs: bool = False,
) -> Tensor:
    return path_attention_reference(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens).to(q.dtype)
