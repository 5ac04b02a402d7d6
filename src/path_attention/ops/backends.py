"""Which code computes a call: the backends by name, why one cannot serve, and the choice where the caller leaves it."""

import warnings
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

# torch: the dyadic algorithm in torch operators, any device and every feature.
# triton: our portable kernels alone. hopper and sdpa: those, and between sibling spans kernels of ours for Hopper GPUs,
# or torch's fastest attention kernel.
Backend = Literal["torch", "triton", "hopper", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("torch", "triton", "hopper", "sdpa")
AUTO = "auto"
# Their gradients are sums in no fixed order: hopper adds up those of queries and values in memory, and so do some of
# torch's kernels.
UNORDERED: tuple[Backend, ...] = ("hopper", "sdpa")
_HAS_TRITON = find_spec("triton") is not None  # known before torch.compile asks, which cannot look for packages


def has_triton() -> bool:
    return _HAS_TRITON


def reason_against(
    backend: Backend, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """As :func:`unsupported_reason`, of arguments as the registered operators take them: w is (B, L, R, H, D)."""
    if backend == "torch":
        return None
    if not q.is_cuda:
        return f"q is on {q.device}, not on CUDA"
    if not has_triton():
        return "triton is not installed"
    from path_attention.ops.engines import cuda

    return cuda.unsupported_reason(backend, q, v, w, g, cu_seqlens)


def named(backend: object) -> Backend | None:
    """The backend of that name, if there is one."""
    for name in BACKENDS:
        if isinstance(backend, str) and backend == name:
            return name
    return None


def refuse_unserved(backend: str, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError if a backend is named that cannot serve the call; w is (B, L, R, H, D)."""
    name = named(backend)
    if name is not None and (reason := reason_against(name, q, v, w, g, cu_seqlens)) is not None:
        raise ValueError(f"backend: got {name!r}, which cannot serve this call: {reason}")


def choose(
    backend: str,
    q: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    is_backward: bool,
) -> Backend:
    """The backend that computes one direction of a call; ``backend`` is one of them, or AUTO.

    Under torch.use_deterministic_algorithms AUTO takes a backward pass that gives the same bits on every run.

    Raises:
        RuntimeError: where such are asked for, a backend named that has none, and not just a warning wanted.
    """
    deterministic = is_backward and torch.are_deterministic_algorithms_enabled()
    if (name := named(backend)) is not None:
        if deterministic and name in UNORDERED:
            _refuse_unordered(name)
        return name
    if reason_against("triton", q, v, w, g, cu_seqlens) is not None:
        return "torch"
    if deterministic:
        return "triton"
    if reason_against("hopper", q, v, w, g, cu_seqlens) is None:
        return "hopper"
    if reason_against("sdpa", q, v, w, g, cu_seqlens) is not None:
        return "triton"
    return _faster(q)


def _refuse_unordered(name: Backend) -> None:
    """Raises, or warns where torch is set to warn only: what torch does in operators of its own."""
    text = (
        f"path_attention: the backward pass of backend {name!r} adds up gradients in no fixed order, but "
        "torch.use_deterministic_algorithms is on; backend 'triton', or none, gives the same bits on every run"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)


def _faster(q: Tensor) -> Backend:
    """Of triton and sdpa, where both can serve a call.

    Measured on an H200, both directions alike (docs/kernels.md): torch's kernel makes up for a launch a level and for
    its partial outputs on the way through memory from these lengths on.
    """
    return "sdpa" if q.shape[1] >= (16384 if q.shape[3] <= 64 else 8192) else "triton"
