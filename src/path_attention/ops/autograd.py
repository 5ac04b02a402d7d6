"""The operator as PyTorch knows it: two torch.library operators, forward and backward, with fake and autograd rules.

Saved for the backward pass: the inputs, the output and the log-sum-exp of every row; leaves and levels are computed
again, or on CUDA kept where that is asked for. Gradients come back in the dtype of their input straight from the dtype
of the computation.
"""

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from path_attention.autocast import without_autocast, without_tf32
from path_attention.ops import dyadic
from path_attention.ops.arguments import sequence_bounds
from path_attention.ops.backends import AUTO, UNORDERED, Backend, choose, reason_against, refuse_unserved
from path_attention.ops.spans import plan_spans

Given = ParamSpec("Given")
Result = TypeVar("Result")


def out_of_autocast(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Autocast reaches into operators and would round the float32 products of leaves and transitions to half, and
    tensor-float-32, where it is allowed, to 11 bits.
    """

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with without_autocast(first.device), without_tf32(first.device):
            return function(*args, **kwargs)

    return run


def _problem(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> dyadic.Problem:
    batch, length = q.shape[:2]
    if cu_seqlens is None:
        lengths = (length,) * batch
    else:
        lengths = tuple(end - start for start, end in sequence_bounds(cu_seqlens, length))
    plan = plan_spans(lengths, dyadic.LEAF)
    return dyadic.Problem.pack(plan, q, k, v, w, beta, g, scale)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _serve(
    backend: str,
    q: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    is_backward: bool,
) -> Backend:
    """The backend for one direction of a call. Says once where a GPU is left to the torch engine unasked."""
    chosen = choose(backend, q, v, w, g, cu_seqlens, is_backward=is_backward)
    if chosen == "torch" and backend == AUTO and q.is_cuda:
        _warn_of_slow_engine(str(reason_against("triton", q, v, w, g, cu_seqlens)))
    return chosen


@cache  # once for each reason
def _warn_of_slow_engine(reason: str) -> None:
    warnings.warn(
        f"path_attention: {reason}. The torch backend serves this call: exact, but many times slower on a GPU than the "
        "Triton kernels.",
        stacklevel=2,
    )


def _room_to_keep(
    keep: bool,
    chosen: Backend,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Bytes for what a forward pass by the ``chosen`` backend keeps, of the size that it takes; none where it keeps
    nothing.
    """
    size = 0
    if keep and q.numel() > 0:
        # Where gradients are to be equal bit by bit, and the choice is ours, another backend makes them, which has no
        # use for this one's rows.
        is_other = backend == AUTO and chosen in UNORDERED and torch.are_deterministic_algorithms_enabled()
        if chosen != "torch" and not is_other:
            from path_attention.ops.engines import cuda  # triton is not needed on other devices

            size = cuda.kept_bytes(chosen, q, k, v, w, g, cu_seqlens)
    return q.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("path_attention::forward", mutates_args=())
@out_of_autocast
def path_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    backend: str,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, L, HQ, DV) in the dtype of q, log_sum_exp (B, L, HQ) in float32 at least, and bytes for the backward
    pass: with ``keep`` what it would else compute again, of kernels that can keep it; none otherwise.

    w (B, L, R, H, D) and beta (B, L, R, H); scale None for D ** -0.5; backend one of BACKENDS or AUTO; the rest as in
    :func:`path_attention.path_attention`.
    """
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        # Here, where values are known also under torch.compile. Of those on a GPU the kernels that read them there take
        # care: the host does not wait.
        sequence_bounds(cu_seqlens, q.shape[1])
    if q.numel() == 0:
        return *_new_results(q, v), q.new_empty(0, dtype=torch.uint8)
    scale = _scale(scale, q)
    chosen = _serve(backend, q, v, w, g, cu_seqlens, is_backward=False)
    kept = _room_to_keep(keep, chosen, backend, q, k, v, w, g, cu_seqlens)
    if chosen != "torch":
        from path_attention.ops.engines import cuda

        to_keep = kept if kept.numel() else None
        return *cuda.forward(chosen, q, k, v, w, beta, g, cu_seqlens, scale, kept=to_keep), kept
    problem = _problem(q, k, v, w, beta, g, cu_seqlens, scale)
    out, log_sum_exp = dyadic.forward(problem)
    batch = q.shape[0]
    out = problem.plan.unpack(out.to(q.dtype), batch).contiguous()
    return out, problem.plan.unpack(log_sum_exp, batch).squeeze(-1).contiguous(), kept


def _new_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)


@path_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    backend: str,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_unserved(backend, q, v, w, g, cu_seqlens)  # what torch.compile does not look into when it is called
    chosen = choose(backend, q, v, w, g, cu_seqlens, is_backward=False) if keep else "torch"
    return *_new_results(q, v), _room_to_keep(keep, chosen, backend, q, k, v, w, g, cu_seqlens)


@torch.library.custom_op("path_attention::backward", mutates_args=())
@out_of_autocast
def path_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    backend: str,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, w, beta and g; the last one empty where there is no g. kept: the forward operator's."""
    empty = q.new_empty(0)
    if q.numel() == 0:
        # Nothing to sum over: every gradient is as empty as its input.
        return _empty(q), _empty(k), _empty(v), _empty(w), _empty(beta), empty if g is None else _empty(g)
    scale = _scale(scale, q)
    chosen = _serve(backend, q, v, w, g, cu_seqlens, is_backward=True)
    if chosen != "torch":
        from path_attention.ops.engines import cuda

        # Of another backend, if deterministic algorithms have been asked for since the forward pass.
        if kept is not None and not (
            kept.numel() and chosen == choose(backend, q, v, w, g, cu_seqlens, is_backward=False)
        ):
            kept = None
        of_cuda = cuda.backward(chosen, d_out, q, k, v, w, beta, g, out, log_sum_exp, cu_seqlens, scale, kept)
        return *of_cuda[:5], empty if of_cuda[5] is None else of_cuda[5]
    problem = _problem(q, k, v, w, beta, g, cu_seqlens, scale)
    plan, batch = problem.plan, q.shape[0]
    gradients = dyadic.backward(
        problem,
        plan.pack(out, out.dtype),
        plan.pack(log_sum_exp[..., None], log_sum_exp.dtype),
        plan.pack(d_out, out.dtype),
    )

    inputs = (q, k, v, w, beta, g)
    found = gradients.tokens(plan, batch, w.shape[2], scale)
    d_q, d_k, d_v, d_w, d_beta, d_g = (
        empty if d is None or x is None else d.to(x.dtype).contiguous() for d, x in zip(found, inputs, strict=True)
    )
    return d_q, d_k, d_v, d_w, d_beta, d_g


@path_attention_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    backend: str,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v), _empty(w), _empty(beta), q.new_empty(0) if g is None else _empty(g)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, w, beta, g, cu_seqlens, ctx.scale, ctx.backend, _ = inputs
    out, log_sum_exp, kept = output
    ctx.save_for_backward(q, k, v, w, beta, g, out, log_sum_exp, cu_seqlens, kept)
    ctx.mark_non_differentiable(log_sum_exp, kept)  # they are for the backward pass only
    ctx.set_materialize_grads(False)  # or it would be handed zeros, as many bytes as are kept


def _autograd_backward(
    ctx: Any, d_out: Tensor | None, _d_log_sum_exp: Tensor | None, _d_kept: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, cu_seqlens, kept = ctx.saved_tensors
    g = inputs[5]
    if d_out is None:  # whatever the output went into has no gradient of it
        return (None,) * 10
    *gradients, d_g = path_attention_backward(d_out, *inputs, cu_seqlens, ctx.scale, ctx.backend, kept)
    return *gradients, None if g is None else d_g, None, None, None, None


torch.library.register_autograd("path_attention::forward", _autograd_backward, setup_context=_setup_context)
