"""Dense (unmasked) softmax attention by torch's own kernels, on any device.

Each call returns the log-sum-exp of its rows and its backward takes the log-sum-exp and the output of the WHOLE
attention back, so that partial attentions over different keys add up exactly: with P = exp(S - log_sum_exp) and
delta = rowsum(d_out * out), dS = P * (d_out V^T - delta) is the gradient whichever part of the keys S covers.

The scale is already in the queries. Shapes: q (n, H, rows, E), k and v (n, H, keys, E), log_sum_exp (n, H, rows).
"""

import torch
from torch import Tensor

# Scores held at once by the plain route below, in elements: bounds its memory whatever the length (64 MB in float32).
MAX_SCORES = 2**24


def dense_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v and log_sum_exp, the latter in float32 at least."""
    if q.device.type == "cpu":
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=1.0)
        return out, log_sum_exp
    return _plain_forward(q, k, v)


def dense_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtype of q, with out and log_sum_exp those of the whole attention."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, log_sum_exp, 0.0, False, scale=1.0
        )
    return _plain_backward(d_out, q, k, v, out, log_sum_exp)


def _row_chunks(q: Tensor, k: Tensor) -> list[slice]:
    size = max(1, MAX_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(start, start + size) for start in range(0, q.shape[2], size)]


def _plain_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix products in float32 at least, a bounded number of rows at a time: for devices without their own kernel."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    out, log_sum_exp = [], []
    for rows in _row_chunks(q, k):
        scores = q[:, :, rows] @ keys.mT
        log_sum_exp.append(scores.logsumexp(-1))
        out.append((scores - log_sum_exp[-1][..., None]).exp_() @ values)
    return torch.cat(out, 2).to(v.dtype), torch.cat(log_sum_exp, 2)


def _plain_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_, d_out_ = (x.to(dtype) for x in (q, k, v, d_out))
    delta = (d_out_ * out.to(dtype)).sum(-1, keepdim=True)
    d_q, d_k, d_v = [], torch.zeros_like(k_), torch.zeros_like(v_)
    for rows in _row_chunks(q, k):
        weights = (q_[:, :, rows] @ k_.mT - log_sum_exp[:, :, rows, None]).exp_()
        d_v += weights.mT @ d_out_[:, :, rows]
        d_scores = (d_out_[:, :, rows] @ v_.mT - delta[:, :, rows]).mul_(weights)
        d_q.append(d_scores @ k_)
        d_k += d_scores.mT @ q_[:, :, rows]
    return torch.cat(d_q, 2).to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
