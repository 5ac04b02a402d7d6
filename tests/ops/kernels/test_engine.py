"""The whole CUDA engine in Triton's interpreter, float32, with torch's CPU attention kernel between the siblings."""

import os

import pytest
import torch
from torch import Tensor

from path_attention import path_attention_reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cuda.py runs the engine", allow_module_level=True)

from path_attention.ops.engines import cuda

# One leaf (no levels), two and three levels, grouped queries, a batch.
SHAPES = [(2, 64, 1, 1, 16), (2, 256, 2, 2, 16), (1, 512, 4, 2, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_engine_equals_the_definition(shape: tuple[int, ...]) -> None:
    batch, length, query_heads, heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, generator=generator)

    q, k, v = normal(query_heads, dim), normal(heads, dim), normal(heads, dim)
    w = torch.nn.functional.normalize(normal(1, heads, dim), dim=-1)
    beta = 2 * torch.rand(batch, length, 1, heads, generator=generator)
    exact = [x.double().requires_grad_() for x in (q, k, v, w, beta)]
    expected = path_attention_reference(*exact)
    d_out = normal(query_heads, dim)
    expected.backward(d_out.double())
    scale = dim**-0.5
    out, log_sum_exp = cuda.forward(q, k, v, w, beta, scale)
    gradients = cuda.backward(d_out, q, k, v, w, beta, out, log_sum_exp, scale)
    for x, y in zip((out, *gradients), [expected.detach(), *(e.grad for e in exact)], strict=True):
        assert x.shape == y.shape
        assert (x.double() - y).norm() <= 3e-6 * y.norm()  # float32: some hundred roundings of 6e-8 in a row
