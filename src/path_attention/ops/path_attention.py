"""The public operator: formula, shapes, errors."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from path_attention.checks import bad, check_flag
from path_attention.ops.arguments import check_values, validate_arguments
from path_attention.ops.autograd import path_attention_forward
from path_attention.ops.backends import AUTO, BACKENDS, Backend, named, reason_against, refuse_unserved


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
    recompute: bool = True,
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
        g: log forget gates (B, L, HQ), at most 0, natural logarithm; dtype of q or float32. A very low one closes: it
            is a boundary as of a packed sequence (docs/numerics.md).
        scale: factor of the q.k part; None means D ** -0.5.
        cu_seqlens: (N + 1,) int32 or int64, boundaries of N sequences packed into one row (B = 1), first 0, last L, on
            the device of q or on the host. Equal to running each sequence alone; empty sequences are allowed. Every
            sequence is padded to whole leaves of 64 tokens: very many very short ones cost accordingly.
        check_inputs: also look at the values: NaN or infinity, beta outside [0, 2], w neither of unit length nor zero,
            g above 0, cu_seqlens out of order. Makes the host wait for the device.
        backend: what computes it. "torch" runs anywhere; "triton" is our CUDA kernels; "sdpa" is those with torch's
            attention kernel (cuDNN or FlashAttention) between spans. None takes the fastest that can serve the call;
            :func:`unsupported_reason` says why one cannot. Under torch.use_deterministic_algorithms gradients are equal
            bit by bit from run to run: None then takes "triton" for the backward pass, and that of "hopper" and "sdpa"
            raises RuntimeError, or warns where torch only warns.
        recompute: False keeps what the backward pass else computes again: less time and more memory from forward to
            backward pass (docs/kernels.md has both). Kernels do so in half precision with R = 1 and dims up to 128;
            whatever else serves a call computes it again all the same.

    Returns:
        (B, L, HQ, DV) in the dtype of q. Differentiable once in q, k, v, w, beta and g, each gradient in the dtype of
        its input; there is no forward mode (torch.func.jvp) and torch.func.vmap runs a loop. Under autocast q, k and v
        are cast to the autocast dtype, w, beta and g are left as they are.

    Raises:
        ValueError: naming the argument, what was given and what is wanted, before anything is computed. Of a backend
            that cannot serve a compiled call torch.compile makes an error of its own, with the same text.
        NotImplementedError: an input has a forward-mode tangent.
    """
    arguments = validate_arguments(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens)
    q, k, v, _, _, g, scale = arguments
    if check_inputs and not q.is_meta:  # which has no values
        check_values(*arguments[:6], cu_seqlens)
    w, beta = arguments.reflections()
    check_backend(backend, q, v, w, g, cu_seqlens)
    refuse_forward_mode(q, k, v, w, beta, g)
    check_flag("recompute", recompute)
    keep = not recompute and needs_gradient(q, k, v, w, beta, g)
    out, _, _ = path_attention_forward(q, k, v, w, beta, g, cu_seqlens, scale, backend or AUTO, keep)
    return out


def needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


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
    backend = _backend(backend, "one of {}")
    arguments = validate_arguments(q, k, v, w, beta, g, scale=None, cu_seqlens=cu_seqlens)
    return reason_against(backend, arguments.q, arguments.v, arguments.reflections()[0], arguments.g, cu_seqlens)


def check_backend(
    backend: object, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raises ValueError where the caller asks for a backend that cannot serve the call; w is (B, L, R, H, D)."""
    if backend is None:
        return
    name = _backend(backend, "one of {}, or None")
    if not torch.compiler.is_compiling():  # else the operator looks: what tells of devices and packages is not traced
        refuse_unserved(name, q, v, w, g, cu_seqlens)


def _backend(backend: object, wanted: str) -> Backend:
    if (name := named(backend)) is not None:
        return name
    raise bad("backend", repr(backend), wanted.format(", ".join(BACKENDS)))


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Without this torch would take the tangents of a registered operator for zero, without a word."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("path_attention: it has no forward-mode derivative; take gradients in reverse mode")
