"""What ``path-attention benchmark operator --device cuda`` compares: each attention by name, and when it cannot run.

All take the same six arguments in this library's layout and leave those that they have no use for.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from path_attention.benchmark.contenders import causal_softmax_attention
from path_attention.benchmark.shapes import Shape, operands
from path_attention.ops import path_attention, unsupported_reason
from path_attention.ops.backends import BACKENDS, Backend

# softmax: causal attention. fox: with forget gates. path: with reflections. path_fox: with both.
Formula = Literal["softmax", "fox", "path", "path_fox"]
# Names of the arguments that each formula depends on: those it has gradients of.
DEPENDS: dict[Formula, tuple[str, ...]] = {
    "softmax": ("q", "k", "v"),
    "fox": ("q", "k", "v", "g"),
    "path": ("q", "k", "v", "w", "beta"),
    "path_fox": ("q", "k", "v", "w", "beta", "g"),
}
# The mask of FlexAttention's blocks is made from one of all pairs, a byte each: 1 GB at this length.
FLEX_LENGTH = 32768


class Arguments(NamedTuple):
    """q (B, L, HQ, D), k, v and w (B, L, H, D), beta (B, L, H), g (B, L, HQ); w, beta and g in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor

    def of(self, formula: Formula) -> list[Tensor]:
        """Those the formula depends on."""
        return [getattr(self, name) for name in DEPENDS[formula]]


def make_arguments(shape: Shape, dtype: torch.dtype, device: str) -> Arguments:
    """Normal q, k and v, unit w, beta uniform in [0, 2], g = log sigmoid(normal + 2); leaves of autograd."""
    made = operands(shape, shape.length, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    normal = torch.randn(shape.batch, shape.length, shape.query_heads, generator=generator, device=device)
    return Arguments(*(x.requires_grad_() for x in (*made, torch.nn.functional.logsigmoid(normal + 2))))


def exact_attention(formula: Formula, given: Arguments) -> Tensor:
    """The formula by the torch backend, of arguments in float64: without reflections and gates PaTH is softmax."""
    q, k, v, w, beta, g = given
    if "w" not in DEPENDS[formula]:
        w, beta = torch.zeros_like(w), torch.zeros_like(beta)
    return path_attention(q, k, v, w, beta, g if "g" in DEPENDS[formula] else None, backend="torch")


@dataclass(frozen=True)
class CudaContender:
    name: str  # in JSON, and for --without, where the part before "_" names a group
    title: str  # in the figure
    formula: Formula
    function: Callable[..., Tensor]  # of the fields of Arguments
    unsupported_reason: Callable[[Shape, Arguments], str | None]
    ours: bool = False


def _always(shape: Shape, given: Arguments) -> str | None:
    return None


# --- this library's --------------------------------------------------------------------------------------------------


def _ours(backend: Backend, formula: Formula, *, recompute: bool = True) -> CudaContender:
    gated = formula == "path_fox"

    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return path_attention(q, k, v, w, beta, g if gated else None, backend=backend, recompute=recompute)

    def reason(shape: Shape, given: Arguments) -> str | None:
        return unsupported_reason(backend, *given[:5], given.g if gated else None)

    name, title = f"{formula}_{backend}", f"{'PaTH-FoX' if gated else 'PaTH'}, {backend}"
    if not recompute:
        name, title = f"{name}_kept", f"{title}, linear stages kept"
    return CudaContender(name, title, formula, function, reason, ours=True)


# --- torch's ---------------------------------------------------------------------------------------------------------


def _sdpa(backend: str) -> Callable[..., Tensor]:
    def function(*given: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return causal_softmax_attention(*given)

    return function


@functools.lru_cache(maxsize=1)
def _flex(length: int, device: torch.device) -> tuple[Callable[..., Any], Any]:
    """FlexAttention compiled for one shape, and its causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # what was compiled for other shapes counts towards torch's limit of variants
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(device))
    return torch.compile(flex_attention, dynamic=False), mask


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    attention, mask = _flex(q.shape[1], q.device)
    rows = (x.transpose(1, 2) for x in (q, k, v))
    return attention(*rows, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def _flex_reason(shape: Shape, given: Arguments) -> str | None:
    return f"its mask is made at lengths up to {FLEX_LENGTH}" if shape.length > FLEX_LENGTH else None


# --- flash-linear-attention's ----------------------------------------------------------------------------------------


def _fla_softmax(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    from fla.ops.attn.parallel import parallel_attn

    return parallel_attn(q, k, v)


def _fla_fox(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    from fla.ops.forgetting_attn.parallel import parallel_forgetting_attn

    return parallel_forgetting_attn(q, k, v, g)


def _fla_path(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, *_: Tensor) -> Tensor:
    from fla.ops.path_attn.parallel import parallel_path_attn

    return parallel_path_attn(q, k, v, w, beta)[0]


def _fla_path_fox(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    from fla.ops.path_attn.parallel import parallel_path_attn

    # Its gates are multiplied by the softmax scale: divided by it they are ours. 1 / D of a pass over q.
    return parallel_path_attn(q, k, v, w, beta, g * q.shape[-1] ** 0.5)[0]


def _fla_reason(shape: Shape, given: Arguments) -> str | None:
    return None if find_spec("fla") is not None else "fla is not installed"


# The first one is what ratios are to. Rivals come last: one that breaks the device takes no other with it.
CUDA_CONTENDERS: tuple[CudaContender, ...] = (
    CudaContender("cudnn", "cuDNN", "softmax", _sdpa("CUDNN_ATTENTION"), _always),
    *(_ours(backend, formula) for formula in ("path", "path_fox") for backend in reversed(BACKENDS[1:])),
    *(_ours("hopper", formula, recompute=False) for formula in ("path", "path_fox")),
    CudaContender("flash", "FlashAttention-2", "softmax", _sdpa("FLASH_ATTENTION"), _always),
    CudaContender("flex", "FlexAttention", "softmax", _flex_attention, _flex_reason),
    CudaContender("fla_softmax", "fla softmax", "softmax", _fla_softmax, _fla_reason),
    CudaContender("fla_fox", "fla FoX", "fox", _fla_fox, _fla_reason),
    CudaContender("fla_path", "fla PaTH", "path", _fla_path, _fla_reason),
    CudaContender("fla_path_fox", "fla PaTH-FoX", "path_fox", _fla_path_fox, _fla_reason),
)


def without(names: Sequence[str]) -> list[CudaContender]:
    """All contenders but those named; "path" names path_triton and its like but not path_fox_triton.

    Raises:
        ValueError: a name that is none of a contender and none of a group.
    """
    groups = {x.name: {x.name, x.formula if x.ours else x.name.partition("_")[0]} for x in CUDA_CONTENDERS}
    known = sorted(set().union(*groups.values()) - {"cudnn"})
    for name in names:
        if name not in known:
            raise ValueError(f"--without: wanted some of {', '.join(known)}, got {name!r}")
    return [x for x in CUDA_CONTENDERS if not groups[x.name] & set(names)]
