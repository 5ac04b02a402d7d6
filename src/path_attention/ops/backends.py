"""Which code computes a call: the backends by name, why one cannot serve, and the choice where the caller leaves it."""

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

# torch: the dyadic algorithm in torch operators, any device and every feature.
# triton: our kernels alone. sdpa: our kernels, with torch's fastest attention kernel between sibling spans.
Backend = Literal["torch", "triton", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("torch", "triton", "sdpa")
AUTO = "auto"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def reason_against(
    backend: Backend, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """As :func:`unsupported_reason`, of arguments as the registered operators take them: w is (B, L, R, H, D)."""
    if backend == "torch":
        return None
    if not q.is_cuda:
        return f"q is on {q.device}, not on CUDA"
    if not _has_triton():
        return "triton is not installed"
    from path_attention.ops.engines import cuda

    return cuda.unsupported_reason(backend, q, v, w, g, cu_seqlens)


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

    torch's attention kernels add up gradients in no fixed order: under torch.use_deterministic_algorithms the backward
    pass between siblings is always ours.
    """
    deterministic = is_backward and torch.are_deterministic_algorithms_enabled()
    if backend == "sdpa" and deterministic:
        return "triton"
    for name in BACKENDS:
        if backend == name:
            return name
    if reason_against("triton", q, v, w, g, cu_seqlens) is not None:
        return "torch"
    if deterministic or reason_against("sdpa", q, v, w, g, cu_seqlens) is not None:
        return "triton"
    return _faster(q)


def _faster(q: Tensor) -> Backend:
    """Of the two that can both serve a call on CUDA.

    Measured on an H200, both directions alike (docs/kernels.md): torch's kernel makes up for a launch a level and for
    its partial outputs on the way through memory from these lengths on.
    """
    return "sdpa" if q.shape[1] >= (16384 if q.shape[3] <= 64 else 8192) else "triton"
