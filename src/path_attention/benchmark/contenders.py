"""What is timed: each attention by name, the formula it must equal, and when it cannot run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.benchmark.full_matrix import full_matrix_path_attention
from path_attention.ops import path_attention, path_attention_reference


@dataclass(frozen=True)
class Setting:
    """One problem. The same for every contender of a row of the table."""

    length: int
    batch: int = 1
    query_heads: int = 8
    heads: int = 8
    dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


class Operands(NamedTuple):
    """In the operator's layout: q (B, L, HQ, D), k, v and w (B, L, H, D), beta (B, L, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor


def make_operands(setting: Setting, seed: int = 0) -> Operands:
    """Normal q, k and v, unit w, beta uniform in [0, 2]; leaves of autograd. w and beta in float32 at least."""
    generator = torch.Generator().manual_seed(seed)
    rows = (setting.batch, setting.length)
    side_dtype = torch.promote_types(setting.dtype, torch.float32)

    def normal(heads: int) -> Tensor:
        return torch.randn(*rows, heads, setting.dim, generator=generator)

    q, k, v, w = normal(setting.query_heads), normal(setting.heads), normal(setting.heads), normal(setting.heads)
    w = torch.nn.functional.normalize(w, dim=-1)
    beta = 2 * torch.rand(*rows, setting.heads, generator=generator)
    dtypes = (setting.dtype, setting.dtype, setting.dtype, side_dtype, side_dtype)
    made = (x.to(setting.device, dtype).requires_grad_() for x, dtype in zip((q, k, v, w, beta), dtypes, strict=True))
    return Operands(*made)


def causal_softmax_attention(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """What a RoPE model pays: torch's own attention, no w and no beta."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def softmax_definition(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """PaTH without reflections."""
    return path_attention_reference(q, k, v, torch.zeros_like(w).detach(), torch.zeros_like(beta).detach())


@dataclass(frozen=True)
class Contender:
    name: str  # in JSON
    title: str  # in the table
    function: Callable[..., Tensor]  # of the fields of Operands
    definition: Callable[..., Tensor]  # what it must equal, in float64
    unsupported_reason: Callable[[Setting], str | None]  # why it does not run a setting, None where it does


def _always(setting: Setting) -> str | None:
    return None


# The L x L matrices of the full-matrix baseline, about 10 at once in float32: 5 GB at 4096 tokens and 8 heads.
FULL_MATRIX_LENGTH = 4096


def _full_matrix_reason(setting: Setting) -> str | None:
    if setting.length > FULL_MATRIX_LENGTH:
        return f"quadratic memory: left out above {FULL_MATRIX_LENGTH} tokens"
    if setting.query_heads != setting.heads:
        return "written for as many query as key heads"
    return None


# The first one is what the ratios are to.
CONTENDERS: tuple[Contender, ...] = (
    Contender("softmax", "softmax (SDPA)", causal_softmax_attention, softmax_definition, _always),
    Contender("path", "PaTH", path_attention, path_attention_reference, _always),
    Contender(
        "path_full_matrix",
        "PaTH, full matrix",
        full_matrix_path_attention,
        path_attention_reference,
        _full_matrix_reason,
    ),
)


def contender(name: str) -> Contender:
    return next(x for x in CONTENDERS if x.name == name)
