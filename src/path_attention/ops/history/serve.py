"""Whether Triton kernels serve a cache, and why not."""

from typing import Literal

import torch
from torch import Tensor

from path_attention.ops.backends import AUTO, choose, has_triton
from path_attention.ops.history.state import MAX_DIM, MAX_FOLD_DIM, State, Tokens

# Devices that kernels run on. Triton's interpreter would be another: it is for tests to say so.
DEVICES = frozenset({"cuda"})


def kernels_serve(state: State) -> bool:
    """Whether short calls and attention to the folded tokens run in Triton kernels."""
    return _kernels_serve(state.k, state.v)


def _kernels_serve(k: Tensor, v: Tensor) -> bool:
    return k.device.type in DEVICES and _reason(k, v) is None


def fold_kernel_serves(k: Tensor, v: Tensor, reflections: int) -> bool:
    """Whether many tokens are folded by kernels: half precision, one reflection a token, matrices that fit an SM. k and
    v (..., D) are those of a cache, or tokens that one is made for.
    """
    narrow = max(k.shape[-1], v.shape[-1]) <= MAX_FOLD_DIM
    return _kernels_serve(k, v) and k.dtype in (torch.bfloat16, torch.float16) and reflections == 1 and narrow


def engine_of(tokens: Tokens) -> Literal["triton", "hopper", "sdpa"] | None:
    """How the CUDA engine attends to these tokens alone; None where torch's does."""
    chosen = choose(AUTO, tokens.q, tokens.v, tokens.w, tokens.g, None, is_backward=False)
    return None if chosen == "torch" else chosen


def unsupported_reason(state: State) -> str | None:
    """Why Triton kernels do not serve a cache on a GPU, or None."""
    return _reason(state.k, state.v)


def _reason(k: Tensor, v: Tensor) -> str | None:
    if not has_triton():
        return "triton is not installed"
    if k.dtype == torch.float64:
        return "the cache is float64"
    if max(k.shape[-1], v.shape[-1]) > MAX_DIM:
        return f"head_dim {k.shape[-1]} and value_dim {v.shape[-1]} are not both at most {MAX_DIM}"
    return None
