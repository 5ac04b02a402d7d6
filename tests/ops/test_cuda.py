"""The operator on a GPU: every route a call can take there, against the definition in float64.

The tolerance is derived from torch's own causal softmax attention in the same dtype on the same q, k and v: PaTH moves
its rows and rounds them once more, which costs up to 1.5 times that error in the output and, through one more product,
twice in the gradients.
"""

import pytest
import torch
from torch import Tensor

from path_attention import path_attention, path_attention_reference

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from path_attention.ops.engines import cuda  # noqa: E402 (needs triton, which only a CUDA build of torch brings)

# (batch, length, query heads, key heads, head_dim): lengths the Triton engine serves, head dims with and without masks.
SERVED = [
    (1, 64, 1, 1, 64),
    (2, 128, 2, 2, 64),
    (2, 1024, 4, 2, 128),
    (1, 1024, 4, 1, 96),
    (1, 512, 8, 1, 32),
    (1, 512, 2, 2, 16),
    (1, 4096, 2, 2, 64),
]
# What it does not serve runs in the torch engine.
REST = [
    {"shape": (1, 1000, 2, 2, 64)},
    {"shape": (1, 600, 4, 2, 64), "gate": True},
    {"shape": (1, 700, 4, 2, 64), "ends": [0, 5, 5, 300, 700]},
    {"shape": (1, 300, 2, 2, 40), "value_dim": 24, "reflections": 2},
    {"shape": (1, 512, 2, 2, 256)},
]
BETAS = {"uniform": (0.0, 2.0), "near 2": (1.9, 2.0), "2": (2.0, 2.0)}


def make(shape: tuple[int, ...], dtype: torch.dtype, beta: str = "uniform", **case: object) -> list[Tensor | None]:
    batch, length, query_heads, heads, dim = shape
    torch.manual_seed(0)
    reflections = int(case.get("reflections", 1))

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, device="cuda")

    low, high = BETAS[beta]
    w = torch.nn.functional.normalize(normal(reflections, heads, dim), dim=-1)
    strength = low + (high - low) * torch.rand(batch, length, reflections, heads, device="cuda")
    g = torch.nn.functional.logsigmoid(normal(query_heads) + 2) if case.get("gate") else None
    half = [normal(query_heads, dim), normal(heads, dim), normal(heads, int(case.get("value_dim", dim)))]
    tensors = [x.to(dtype) for x in half] + [w, strength, g]
    return [None if x is None else x.requires_grad_() for x in tensors]


def error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def softmax_errors(inputs: list[Tensor | None], d_out: Tensor) -> tuple[float, float]:
    """Of torch's causal attention on the same q, k, v: its output, and the worst of its gradients."""
    group = inputs[0].shape[2] // inputs[1].shape[2]
    half = [x.detach().repeat_interleave(1 if i == 0 else group, 2).transpose(1, 2) for i, x in enumerate(inputs[:3])]
    half = [x.requires_grad_() for x in half]
    exact = [x.detach().double().requires_grad_() for x in half]
    length = half[0].shape[2]
    out = torch.nn.functional.scaled_dot_product_attention(*half, is_causal=True)
    visible = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    logits = (exact[0] @ exact[1].mT * exact[0].shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    expected = logits.softmax(-1) @ exact[2]
    out.backward(d_out.transpose(1, 2))
    expected.backward(d_out.double().transpose(1, 2))
    gradients = max(error(x.grad, y.grad) for x, y in zip(half, exact, strict=True))
    return error(out.detach(), expected.detach()), gradients


def check(inputs: list[Tensor | None], cu_seqlens: Tensor | None = None) -> None:
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    out = path_attention(*inputs, cu_seqlens=cu_seqlens)
    expected = path_attention_reference(*exact, cu_seqlens=cu_seqlens)
    d_out = torch.randn_like(out)
    out.backward(d_out)
    expected.backward(d_out.double())
    of_output, of_gradients = softmax_errors(inputs, d_out)
    assert error(out.detach(), expected.detach()) <= 1.5 * of_output
    for x, y in zip(inputs, exact, strict=True):
        if x is not None and y.grad is not None and float(y.grad.norm()) > 0:
            assert x.grad.dtype == x.dtype
            assert error(x.grad, y.grad) <= 2 * of_gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SERVED, ids=str)
def test_triton_engine(shape: tuple[int, ...], beta: str, dtype: torch.dtype) -> None:
    inputs = make(shape, dtype, beta)
    q, _, v, w, _, g = inputs
    assert cuda.unsupported_reason(q, v, w, g, None) is None
    check(inputs)


@pytest.mark.parametrize("case", REST, ids=str)
def test_the_rest_runs_in_the_torch_engine(case: dict) -> None:
    case = dict(case)
    ends = case.pop("ends", None)
    inputs = make(case.pop("shape"), torch.bfloat16, **case)
    cu_seqlens = None if ends is None else torch.tensor(ends, device="cuda")
    q, _, v, w, _, g = inputs
    assert cuda.unsupported_reason(q, v, w, g, cu_seqlens) is not None
    check(inputs, cu_seqlens)


def test_nothing_unwritten_is_read() -> None:
    """Fresh memory filled with NaN leaves no trace."""
    inputs = make((1, 1024, 4, 2, 64), torch.bfloat16)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        path_attention(*inputs).sum().backward()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)
    assert all(bool(torch.isfinite(x.grad).all()) for x in inputs if x is not None)


def test_finite_at_131072_tokens_with_beta_2() -> None:
    inputs = make((1, 131072, 1, 1, 64), torch.bfloat16, "2")
    out = path_attention(*inputs)
    out.sum().backward()
    assert bool(torch.isfinite(out).all())
    assert all(bool(torch.isfinite(x.grad).all()) for x in inputs if x is not None)


def test_compiles_without_breaks() -> None:
    inputs = make((1, 256, 2, 2, 64), torch.bfloat16)
    compiled = torch.compile(lambda *x: path_attention(*x), fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), path_attention(*inputs), rtol=0, atol=0)
