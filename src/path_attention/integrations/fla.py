"""flash-linear-attention's PaTH function, by this library's operator: its name, arguments and results.

    from path_attention.integrations.fla import parallel_path_attn    # in the place of fla.ops.path_attn.parallel

or, for its own layers and models as they are, ``patch()`` once before they run. Weights of its models for ours:
:mod:`path_attention.conversion`.
"""

import importlib
import sys
from itertools import pairwise

import torch
from torch import Tensor

from path_attention.ops.history.fold import right_edge
from path_attention.ops.path_attention import path_attention

# Where flash-linear-attention 0.6 uses the function, where else it has it, and by which names.
LAYER = "fla.layers.path_attn"
MODULES = ("fla.ops.path_attn.parallel", "fla.ops.path_attn", "fla.ops")
NAMES = ("parallel_path_attn", "parallel_path_attention")


def parallel_path_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    use_cache: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """PaTH attention as flash-linear-attention has it, whose scale multiplies the gates too,

        logit(i, j) = scale * (q_i H_i ... H_{j+1} k_j^T + sum_{s=j+1..i} g_s) ,     j <= i ,

    where :func:`path_attention.path_attention` leaves them as they are. Beyond what is served there: any head_dim,
    dtype and device, w and beta in half precision.

    Args:
        q, k, v, w, beta, g, cu_seqlens: as of :func:`path_attention.path_attention`, one reflection a token.
        scale: None means D ** -0.5.
        use_cache: also return the keys for decoding, without gradients.

    Returns:
        The output (B, L, HQ, DV), and with ``use_cache`` the keys H_last ... H_{j+1} k_j (B, L, H, D), each at the end
        of its sequence, in the dtype of k; else None.

    Raises:
        ValueError: as :func:`path_attention.path_attention`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gates = None if g is None else g * scale
    out = path_attention(q, k, v, w, beta, gates, scale=scale, cu_seqlens=cu_seqlens)
    return out, _keys_at_the_end(k, w, beta, cu_seqlens) if use_cache else None


parallel_path_attention = parallel_path_attn


@torch.no_grad()
def _keys_at_the_end(k: Tensor, w: Tensor, beta: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    ends = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    wide = torch.promote_types(k.dtype, torch.float32)
    moved = torch.empty_like(k)
    for first, last in pairwise(ends):
        if first < last:
            k_heads, w_heads = (x[:, first:last].to(wide).transpose(1, 2)[:, :, None] for x in (k, w))
            beta_heads = beta[:, first:last].to(wide).transpose(1, 2)[:, :, None]
            moved[:, first:last] = right_edge(k_heads, w_heads, beta_heads)[0][:, :, 0].transpose(1, 2)
    return moved


def patch() -> None:
    """From now on flash-linear-attention's layers compute PaTH by :func:`parallel_path_attn`. Again: no effect.

    Raises:
        ModuleNotFoundError: it is not installed.
        RuntimeError: it is a version whose layer calls another function.
    """
    layer = importlib.import_module(LAYER)
    if not hasattr(layer, NAMES[0]):
        raise RuntimeError(f"{LAYER}: wanted a version of flash-linear-attention whose layer calls {NAMES[0]}")
    for module in (sys.modules[name] for name in (LAYER, *MODULES) if name in sys.modules):
        for name in NAMES:
            if callable(getattr(module, name, None)):
                setattr(module, name, parallel_path_attn)
