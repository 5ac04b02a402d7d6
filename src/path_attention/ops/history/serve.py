"""Whether Triton kernels serve a cache, and why not."""

from typing import Literal

import torch

from path_attention.ops.backends import AUTO, choose, has_triton
from path_attention.ops.history.state import MAX_DIM, MAX_FOLD_DIM, State, Tokens

# Devices that kernels run on. Triton's interpreter would be another: it is for tests to say so.
DEVICES = frozenset({"cuda"})


def kernels_serve(state: State) -> bool:
    """Whether short calls and attention to the folded tokens run in Triton kernels."""
    return state.k.device.type in DEVICES and unsupported_reason(state) is None


def fold_kernel_serves(state: State) -> bool:
    """Whether many tokens are folded by kernels: half precision, one reflection a token, matrices that fit an SM."""
    narrow = max(state.k.shape[3], state.v.shape[3]) <= MAX_FOLD_DIM
    return kernels_serve(state) and state.coded and state.reflections == 1 and narrow


def engine_of(tokens: Tokens) -> Literal["triton", "hopper", "sdpa"] | None:
    """How the CUDA engine attends to these tokens alone; None where torch's does."""
    chosen = choose(AUTO, tokens.q, tokens.v, tokens.w, tokens.g, None, is_backward=False)
    return None if chosen == "torch" else chosen


def unsupported_reason(state: State) -> str | None:
    """Why Triton kernels do not serve a cache on a GPU, or None."""
    if not has_triton():
        return "triton is not installed"
    if state.w.dtype == torch.float64:
        return "the cache is float64"
    if max(state.k.shape[3], state.v.shape[3]) > MAX_DIM:
        return f"head_dim {state.k.shape[3]} and value_dim {state.v.shape[3]} are not both at most {MAX_DIM}"
    return None
