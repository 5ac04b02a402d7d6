"""The whole CUDA engine in Triton's interpreter: both ways of computing the attention between siblings in float32, and
the products of half-precision inputs in float16 (the interpreter gets bfloat16 wrong).
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from path_attention import path_attention_reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cuda.py runs the engine", allow_module_level=True)

from path_attention.ops.engines import cuda

# One leaf (no levels), one to three levels, grouped queries, a batch: (batch, length, query heads, key heads, dim).
WHOLE_TREES = [(2, 64, 1, 1, 16), (2, 128, 1, 1, 16), (2, 256, 2, 2, 16), (1, 512, 4, 2, 16)]
# What only the fused kernel takes.
REST = {
    "odd lengths": {"shape": (2, 333, 2, 1, 16)},
    "one token": {"shape": (2, 1, 2, 2, 16), "gate": True},
    "gates": {"shape": (2, 300, 4, 2, 16), "gate": True},
    "padded columns": {"shape": (1, 200, 1, 1, 18), "value_dim": 23, "gate": True},
    "packed": {"shape": (1, 470, 2, 2, 16), "ends": [0, 0, 65, 66, 300, 300, 470, 470], "gate": True},
    "packed, one sequence": {"shape": (1, 130, 1, 1, 16), "ends": [0, 130]},
}


def errors(
    siblings_by: cuda.Siblings,
    shape: tuple[int, ...],
    value_dim: int | None = None,
    gate: bool = False,
    ends: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    least_beta: float = 0.0,
    loss_scale: float | Tensor = 1.0,
    reflections: int = 1,
    closed: float = 0.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Output and every gradient, and what they should be. w, beta and g are float32 always.

    closed: the log gate of tokens 7, 20, 64 and 150: two in a leaf, one at its start, one inside a later one.
    """
    batch, length, query_heads, heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, generator=generator)

    q, k, v = (x.to(dtype) for x in (normal(query_heads, dim), normal(heads, dim), normal(heads, value_dim or dim)))
    w = torch.nn.functional.normalize(normal(reflections, heads, dim), dim=-1)
    beta = least_beta + (2 - least_beta) * torch.rand(batch, length, reflections, heads, generator=generator)
    g = torch.nn.functional.logsigmoid(normal(query_heads)) if gate else None
    if g is not None and closed:
        g[:, [7, 20, 64, 150]] = closed
    cu_seqlens = None if ends is None else torch.tensor(ends)
    inputs = (q, k, v, w, beta, g)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    expected = path_attention_reference(*exact, cu_seqlens=cu_seqlens)
    d_out = (loss_scale * normal(query_heads, value_dim or dim)).to(dtype)
    expected.backward(d_out.double())
    scale = dim**-0.5
    out, log_sum_exp = cuda.forward(siblings_by, *inputs, cu_seqlens, scale)
    gradients = cuda.backward(siblings_by, d_out, *inputs, out, log_sum_exp, cu_seqlens, scale)
    yield out, expected.detach()
    for x, y in zip(gradients, exact, strict=True):
        if x is not None and y is not None:
            yield x, torch.zeros_like(y) if y.grad is None else y.grad  # None: w of a single token


def check(siblings_by: cuda.Siblings, shape: tuple[int, ...], **case: object) -> None:
    results = list(errors(siblings_by, shape, **case))
    assert len(results) == (7 if case.get("gate") else 6)
    for x, y in results:
        assert x.shape == y.shape
        # float32: some hundred roundings of 6e-8 in a row; one token has gradients that cancel to nothing.
        assert (x.double() - y).norm() <= 3e-6 * y.norm() + 1e-6


@pytest.fixture
def leaves_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of half precision's leaves in float32, which shows their errors better."""
    monkeypatch.setattr(cuda, "_leaves_by", lambda *_: "triton")


@pytest.mark.usefixtures("leaves_by_triton")
@pytest.mark.parametrize("siblings_by", ["triton", "sdpa"])
@pytest.mark.parametrize("shape", WHOLE_TREES, ids=str)
def test_engine_equals_the_definition(siblings_by: cuda.Siblings, shape: tuple[int, ...]) -> None:
    check(siblings_by, shape)


@pytest.mark.usefixtures("leaves_by_triton")
@pytest.mark.parametrize("case", REST.values(), ids=REST.keys())
def test_fused_kernel_takes_the_rest(case: dict) -> None:
    check("triton", **case)


@pytest.mark.usefixtures("leaves_by_triton")
@pytest.mark.parametrize("closed", [-2000.0, -1e9, torch.finfo(torch.float32).min, float("-inf")])
def test_closed_gates_take_nothing_with_them(closed: float) -> None:
    check("triton", (1, 210, 4, 2, 16), gate=True, closed=closed)


@pytest.mark.parametrize(
    "case",
    [
        {"shape": (1, 470, 2, 1, 16), "ends": [0, 0, 65, 66, 300, 300, 470, 470], "gate": True},
        {"shape": (2, 1, 2, 2, 16), "gate": True},
        {"shape": (1, 330, 2, 1, 80), "value_dim": 24},  # rows wider than a tile
        {"shape": (1, 330, 1, 1, 136), "value_dim": 150, "gate": True},
        {"shape": (2, 300, 2, 1, 18), "reflections": 2, "gate": True},
        {"shape": (1, 200, 4, 2, 16), "reflections": 3, "ends": [0, 70, 70, 200]},
        {"shape": (1, 140, 1, 1, 16), "reflections": 2, "least_beta": 2.0},
    ],
    ids=str,
)
def test_float32_and_several_reflections_equal_the_definition(case: dict) -> None:
    check("triton", **case)


@pytest.mark.parametrize(
    "case",
    [
        {"shape": (1, 333, 2, 1, 64), "gate": True},
        {"shape": (1, 400, 2, 2, 32), "value_dim": 16, "ends": [0, 65, 300, 400]},
        {"shape": (1, 300, 4, 1, 64), "least_beta": 2.0},
        {"shape": (1, 300, 1, 1, 16), "loss_scale": 2.0**-10},  # the gradients of a scaled loss may have any size
        {"shape": (1, 300, 4, 2, 16), "reflections": 2, "gate": True, "loss_scale": 2.0**10},
        {"shape": (1, 300, 2, 1, 144), "value_dim": 16, "gate": True, "loss_scale": 2.0**-10},
    ],
    ids=str,
)
def test_products_of_half_precision_inputs_keep_more_bits_than_bfloat16(case: dict) -> None:
    """Less than rounding the results to bfloat16 would cost, 1.7e-3 (root mean square)."""
    for x, y in errors("triton", dtype=torch.float16, **case):
        assert (x.double() - y).norm() <= 1.7e-3 * y.norm()


@pytest.mark.parametrize("shape", [(1, 512, 2, 2, 16), (1, 512, 1, 1, 64)], ids=str)
def test_rows_of_reflected_float16_inputs_lose_little(shape: tuple[int, ...]) -> None:
    """beta = 2, where T^-1 is largest: twice the error of softmax attention in float16, 2.4e-4, in the output."""
    out, expected = next(errors("triton", shape, dtype=torch.float16, least_beta=2.0))
    assert (out.double() - expected).norm() <= 2 * 2.4e-4 * expected.norm()


def test_leaf_table_from_the_host_is_exact() -> None:
    """Sizes by the longest sequence and the leaves that are there, the rest as from boundaries on the device."""
    from path_attention.ops.kernels.leaf_table import packed_leaf_table

    table = packed_leaf_table(torch.tensor([0, 10, 10, 200, 300]), 300, torch.device("cpu"))
    assert table.num_leaves == 1 + 3 + 2
    assert table.num_levels == 2
    start, tokens, *_ = table.written_out().T.tolist()
    assert tokens == [10, 64, 64, 62, 64, 36]
    assert start == [0, 10, 74, 138, 200, 264]
