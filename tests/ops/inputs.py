"""Inputs, gradients and errors for the tests of the operator.

Legend: B batch, L length, HQ query heads, H key/value heads, D key dim, DV value dim, R reflections a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from path_attention import path_attention_reference

# Strength of the reflections. 2 exactly keeps the norm of what it moves, so nothing is forgotten and nothing may grow;
# 0 is the identity.
BETAS: dict[str, tuple[float, float]] = {"uniform": (0.0, 2.0), "near 2": (1.9, 2.0), "2": (2.0, 2.0), "0": (0.0, 0.0)}


@dataclass(frozen=True)
class Shape:
    length: int
    batch: int = 1
    query_heads: int = 2
    heads: int = 2
    dim: int = 16
    value_dim: int = 16
    reflections: int | None = None  # None: w comes without that dimension


Inputs = dict[str, Tensor]  # q, k, v, w, beta and, where there is a gate, g


def make_inputs(
    shape: Shape,
    *,
    gated: bool = False,
    beta: str = "uniform",
    dtype: torch.dtype = torch.float64,
    side_dtype: torch.dtype | None = None,  # of w, beta and g; None: dtype
    seed: int = 0,
) -> Inputs:
    """Random leaves of autograd: unit w, beta in the named range, gates of sigmoid(normal + 2)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rows = (shape.batch, shape.length)
    steps = rows if shape.reflections is None else (*rows, shape.reflections)
    low, high = BETAS[beta]
    inputs = {
        "q": normal(*rows, shape.query_heads, shape.dim),
        "k": normal(*rows, shape.heads, shape.dim),
        "v": normal(*rows, shape.heads, shape.value_dim),
        "w": torch.nn.functional.normalize(normal(*steps, shape.heads, shape.dim), dim=-1),
        "beta": low + (high - low) * torch.rand(*steps, shape.heads, generator=generator, dtype=torch.float64),
    }
    if gated:
        inputs["g"] = torch.nn.functional.logsigmoid(normal(*rows, shape.query_heads) + 2)
    side_dtype = dtype if side_dtype is None else side_dtype
    return {name: x.to(dtype if name in "qkv" else side_dtype).requires_grad_(True) for name, x in inputs.items()}


def copy_inputs(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The same values as new leaves of autograd."""
    return {name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_(True) for name, x in inputs.items()}


def output_gradient(out: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)


def out_and_gradients(function: Callable[..., Tensor], inputs: Inputs, **options: object) -> dict[str, Tensor]:
    """{"out": ..., "q": the gradient of q, ...}: of <out, output_gradient(out)>."""
    inputs = copy_inputs(inputs)
    out = function(**inputs, **options)
    # The definition of a single token uses no w, beta or g at all: their gradients are zeros.
    gradients = torch.autograd.grad(out, list(inputs.values()), output_gradient(out), materialize_grads=True)
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def oracle(inputs: Inputs, **options: object) -> dict[str, Tensor]:
    """Output and gradients by the definition in float64."""
    return out_and_gradients(path_attention_reference, copy_inputs(inputs, torch.float64), **options)


# In float64 the fast algorithm and the definition differ by the rounding of some hundred operations on numbers of
# order 1, a few 1e-14; a wrong term shows at 1e-3 and more.
FLOAT64_TOLERANCE = 1e-11


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = FLOAT64_TOLERANCE) -> None:
    """Equal names and values; the tolerance is for numbers of order 1 and relative for larger ones."""
    assert got.keys() == wanted.keys()
    for name, x in got.items():
        assert x.shape == wanted[name].shape, name
        torch.testing.assert_close(
            x, wanted[name], rtol=tolerance, atol=tolerance, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact value."""
    return float(torch.linalg.vector_norm(x.double() - exact) / torch.linalg.vector_norm(exact))
