"""The public operator: formula, shapes, errors."""

import torch
from torch import Tensor

from path_attention.ops.arguments import check_values, validate_arguments
from path_attention.ops.autograd import path_attention_forward
from path_attention.ops.backends import AUTO, BACKENDS, Backend, reason_against


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
    backend: Backend | None = None,
) -> Tensor:
    """PaTH attention (arXiv 2505.16381, section 2.2): causal softmax attention whose logits see the tokens in between.

    With the transition H_t = I - beta_t w_t^T w_t of token t and rows as vectors,

        logit(i, j) = scale * q_i H_i H_{i-1} ... H_{j+1} k_j^T  +  sum_{s=j+1..i} g_s ,     j <= i
        out_i       = sum_j softmax_j(logit(i, j)) v_j

    The empty product (j = i) is the identity. ``g``, where given, are log forget gates (PaTH-FoX); ``scale`` never
    multiplies them. With R reflections a token, H_t = H_{t,R} ... H_{t,1}; two make a rotation. The cost is that of one
    causal softmax attention plus terms linear in the length, in memory too, for the forward and the backward pass.

    Args:
        q: queries (B, L, HQ, D), float64, float32, bfloat16 or float16.
        k: keys (B, L, H, D), dtype of q. HQ is a multiple of H; query head h uses key/value head h // (HQ // H).
        v: values (B, L, H, DV), dtype of q.
        w: reflection directions (B, L, H, D), or (B, L, R, H, D); dtype of q or float32. Used as given: unit vectors
            (or zero, the identity) are the caller's to provide.
        beta: reflection strengths (B, L, H), or (B, L, R, H), in [0, 2]: 0 the identity, 1 a projection, 2 a
            reflection; dtype of q or float32. Values outside let the products grow without bound.
        g: log forget gates (B, L, HQ), at most 0, natural logarithm; dtype of q or float32.
        scale: factor of the q.k part; None means D ** -0.5.
        cu_seqlens: (N + 1,) int32 or int64, boundaries of N sequences packed into one row (B = 1), first 0, last L.
            Equal to running each sequence alone; empty sequences are allowed.
        check_inputs: also look at the values: NaN or infinity, beta outside [0, 2], w neither of unit length nor zero,
            g above 0, cu_seqlens out of order. Makes the host wait for the device.
        backend: what computes it. "torch" runs anywhere; "triton" is our CUDA kernels; "sdpa" is those with torch's
            attention kernel (cuDNN or FlashAttention) between spans. None takes the fastest that can serve the call;
            :func:`unsupported_reason` says why one cannot. Under torch.use_deterministic_algorithms gradients are equal
            bit by bit from run to run: "sdpa" and None then leave the backward pass to "triton".

    Returns:
        (B, L, HQ, DV) in the dtype of q. Differentiable once in q, k, v, w, beta and g, each gradient in the dtype of
        its input. Under autocast q, k and v are cast to the autocast dtype, w, beta and g are left as they are.

    Raises:
        ValueError: naming the argument, what was given and what is wanted, before anything is computed.
    """
    q, k, v, w, beta, g = as_autocast_wants(q, k, v, w, beta, g)
    arguments = validate_arguments(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens)
    if check_inputs:
        check_values(q, k, v, w, beta, g, cu_seqlens)
    w, beta = arguments.reflections(w, beta)
    check_backend(backend, q, v, w, g, cu_seqlens)
    out, _ = path_attention_forward(q, k, v, w, beta, g, cu_seqlens, arguments.scale, backend or AUTO)
    return out


def unsupported_reason(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> str | None:
    """Why ``backend`` cannot serve :func:`path_attention` of these arguments; None if it can.

    Raises:
        ValueError: naming the argument, as path_attention does.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; wanted one of {', '.join(BACKENDS)}")
    arguments = validate_arguments(q, k, v, w, beta, g, scale=None, cu_seqlens=cu_seqlens)
    w, _ = arguments.reflections(w, beta)
    return reason_against(backend, q, v, w, g, cu_seqlens)


def check_backend(
    backend: Backend | None, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raises ValueError where the caller asks for a backend that cannot serve the call; w is (B, L, R, H, D)."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; wanted one of {', '.join(BACKENDS)}, or None")
    if (reason := reason_against(backend, q, v, w, g, cu_seqlens)) is not None:
        raise ValueError(f"backend: got {backend!r}, which cannot serve this call: {reason}")


def as_autocast_wants(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments, where autocast is on in the dtypes it asks for."""
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v, w, beta, g
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (_autocast(x, dtype) for x in (q, k, v))
    # The rest may stay float32; only the other half precision would not go with q.
    w, beta = (_autocast(x, torch.float32) if x.dtype != dtype else x for x in (w, beta))
    return q, k, v, w, beta, _autocast(g, torch.float32) if g is not None and g.dtype != dtype else g


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does it: floating tensors but float64."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
