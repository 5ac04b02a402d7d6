"""Dense (unmasked) softmax attention by torch's own kernels, on any device.

Each call returns the log-sum-exp of its rows and its backward takes the log-sum-exp and the output of the WHOLE
attention back, so that partial attentions over different keys add up exactly: with P = exp(S - log_sum_exp) and
delta = rowsum(d_out * out), dS = P * (d_out V^T - delta) is the gradient whichever part of the keys S covers.

The scale is already in the queries. Shapes: q (n, H, rows, E), k and v (n, H, keys, E), log_sum_exp (n, H, rows).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Scores held at once by the plain route below, in elements: bounds its memory whatever the length (64 MB in float32).
MAX_SCORES = 2**24
# The CUDA kernels want rows of 16 bytes in half precision, of which 8 elements are a multiple in every dtype.
CUDA_COLUMNS = 8
# Widest rows that torch's fused kernels take on CUDA.
CUDNN_COLUMNS = 128
FLASH_COLUMNS = 256

aten = torch.ops.aten


class Kernel(NamedTuple):
    """forward(q, k, v) -> out, log_sum_exp; backward(d_out, q, k, v, out, log_sum_exp) -> dq, dk, dv."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def select(q: Tensor) -> Kernel:
    """The kernel of torch for operands like q (n, H, rows, E)."""
    if q.device.type == "cpu":
        return _CPU
    if q.device.type != "cuda" or q.dtype == torch.float64 or q.shape[-1] > FLASH_COLUMNS:
        return _PLAIN
    if torch.are_deterministic_algorithms_enabled():
        # FlashAttention-2 adds up in a fixed order where torch is told to; the others have no such mode.
        return _FLASH if q.dtype in (torch.bfloat16, torch.float16) else _PLAIN
    if q.dtype == torch.float32:
        return _EFFICIENT
    # cuDNN is the fastest of torch's kernels on Hopper; on older GPUs FlashAttention-2 is the one made for them.
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0) and torch.backends.cudnn.is_available()
    return CUDNN if hopper and q.shape[-1] <= CUDNN_COLUMNS else _FLASH


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=1.0)


def _cpu_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, log_sum_exp, 0.0, False, scale=1.0
    )


def _no_random_state(q: Tensor) -> Tensor:
    """The CUDA backwards ask for the random state of the dropout, of which there is none."""
    return torch.zeros((), dtype=torch.int64, device=q.device)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum_exp, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=1.0)
    return out, log_sum_exp.view(q.shape[:3])


def _cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    state = _no_random_state(q)
    log_sum_exp = log_sum_exp.contiguous().unsqueeze(-1)
    lengths = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, log_sum_exp, state, state, None, None, None, *lengths, 0.0, False, scale=1.0
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum_exp, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=1.0)
    return out, log_sum_exp


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    state = _no_random_state(q)
    lengths = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, log_sum_exp.contiguous(), None, None, *lengths, 0.0, False, state, state, scale=1.0
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum_exp, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=1.0)
    return out, log_sum_exp[..., : q.shape[2]]


def _efficient_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    state = _no_random_state(q)
    # The kernel reads the log-sum-exp of whole tiles of 32 rows, as its forward writes it.
    log_sum_exp = torch.nn.functional.pad(log_sum_exp, (0, -q.shape[2] % 32)).contiguous()
    d_q, d_k, d_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        d_out, q, k, v, None, out, log_sum_exp, state, state, 0.0, [True, True, True, False], scale=1.0
    )
    return d_q, d_k, d_v


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


_CPU = Kernel(_cpu_forward, _cpu_backward)
CUDNN = Kernel(_cudnn_forward, _cudnn_backward)
_FLASH = Kernel(_flash_forward, _flash_backward)
_EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
_PLAIN = Kernel(_plain_forward, _plain_backward)
