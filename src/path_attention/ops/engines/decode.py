"""Dense attention with a bias for each key, by torch's own kernels: what reading a cache takes.

Forward only. The log-sum-exp of each row is returned, so that attentions over different keys add up exactly.
"""

import torch
from torch import Tensor

from path_attention.ops.engines import dense

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (n, H, rows, DV) and log_sum_exp (n, H, rows, 1), float32 at least.

    Args:
        q: (n, H, rows, D), the scale already in it; dtype of k.
        k: (n, H, keys, D).
        v: (n, H, keys, DV).
        bias: (n, H, rows, keys) or broadcast to it, float32 at least; added to the logits.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    if bias is None and k.shape[-1] == v.shape[-1]:
        if q.device.type == "cpu" or q.shape[-1] % dense.CUDA_COLUMNS == 0:
            out, log_sum_exp = dense.select(q).forward(q, k, v)
            return out.to(dtype), log_sum_exp[..., None].to(dtype)
    elif k.shape[-1] == v.shape[-1] and q.device.type == "cpu" and bias is not None:
        out, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=1.0)
        return out.to(dtype), log_sum_exp[..., None].to(dtype)
    return _plain(q.to(dtype), k.to(dtype), v.to(dtype), bias)


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """For values of another width than the keys, and biases on other devices than CPUs."""
    logits = q @ k.mT if bias is None else q @ k.mT + bias
    log_sum_exp = logits.logsumexp(-1, keepdim=True)
    return (logits - log_sum_exp).exp() @ v, log_sum_exp
