"""Attention between two pieces by the kernels for Hopper against plain attention in float64: on a GPU as they are, on a
CPU in gluon_emulator.py.
"""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from path_attention.ops.engines import cuda
from tests.ops.kernels.gluon_emulator import emulated_gluon

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if CUDA else []
# Less than rounding the results to bfloat16 would cost. Operands are float16: weights and dS are rounded to 11 bits.
TOLERANCE = 1.7e-3


@pytest.fixture
def pairs() -> Iterator[ModuleType]:
    """kernels/hopper/pairs.py. Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True)
    if CUDA:
        x = torch.empty(0, 0, 0, 64, device="cuda", dtype=torch.float16)
        if reason := cuda._reason_against_hopper(x, x):
            pytest.skip(reason)
        from path_attention.ops.kernels.hopper import pairs

        yield pairs
    else:
        with emulated_gluon("path_attention.ops.kernels.hopper") as modules:
            yield modules["pairs"]
    torch.use_deterministic_algorithms(False)


# Whole tiles; rows that end within a tile, and within its first leaf; keys from the middle of a piece on; grouped
# queries; sequences beside each other; the other width. Rows of the output and keys that belong to other pairs lie
# around them.
CASES = {
    "whole tiles": {"shape": (1, 256, 384, 1, 1, 64)},
    "rows of a batch": {"shape": (2, 200, 256, 2, 2, 64)},
    "grouped": {"shape": (1, 130, 256, 4, 2, 64)},
    "few rows": {"shape": (1, 3, 128, 2, 1, 64)},
    "later keys": {"shape": (2, 128, 332, 1, 1, 64), "first_key": 76},
    "128": {"shape": (1, 200, 256, 2, 1, 128)},
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_pairs_equal_the_definition(pairs: ModuleType, case: dict, gated: bool) -> None:
    (batch, rows, keys, query_heads, heads, dim), first_key = case["shape"], case.get("first_key", 0)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    before, length = 5, rows + 9  # rows of other pieces
    x = pairs.Operands(
        queries=(normal(batch, rows, query_heads, dim) * dim**-0.5).half(),
        keys=normal(batch, keys, heads, dim).half(),
        values=normal(batch, keys, heads, dim).half(),
        gate_query=-normal(batch, rows, query_heads).abs() if gated else None,
        gate_key=-normal(query_heads, batch, keys).abs() if gated else None,
        first_key=first_key,
    )
    if gated:
        x.gate_key[..., first_key + 3], x.gate_query[:, 1] = -1e30, -20  # a key without weight, a row with little
        x.gate_query[:, 2] = -1e30  # and one with none
    own, some = slice(before, before + rows), slice(first_key, None)
    # What other keys gave the rows: as one more key, of this logit and this value.
    earlier, of_others = normal(batch, length, query_heads), normal(batch, length, query_heads, dim)
    d_out = normal(batch, length, query_heads, dim).half()

    leaves = [y.double().requires_grad_() for y in (x.queries, x.keys, x.values)]
    q, k, v = leaves[0], *(y[:, some].repeat_interleave(query_heads // heads, 2) for y in leaves[1:])
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    if gated:
        scores = scores + x.gate_query.permute(0, 2, 1)[..., None] + x.gate_key[..., some].transpose(0, 1)[:, :, None]
    scores = torch.cat([scores, earlier[:, own].permute(0, 2, 1)[..., None]], -1)
    weights = scores.softmax(-1)
    exact = torch.einsum("bhij,bjhd->bihd", weights[..., :-1], v)
    exact = exact + weights[..., -1:].transpose(1, 2) * of_others[:, own]
    gradients = torch.autograd.grad(exact, [scores, *leaves], d_out[:, own].double())
    d_scores = gradients[0][..., :-1]

    def close(a: Tensor, b: Tensor, scale: Tensor) -> None:
        error = (a.double() - b).norm() / scale.norm()
        assert error <= TOLERANCE, float(error)

    out, log_sum_exp = of_others.clone(), earlier.clone()
    pairs.forward(x, out, log_sum_exp, before)
    close(out[:, own], exact, exact)
    close(log_sum_exp[:, own].transpose(1, 2), scores.logsumexp(-1), scores.logsumexp(-1))
    for a, b in ((out, of_others), (log_sum_exp, earlier)):
        assert torch.equal(a[:, :before], b[:, :before])
        assert torch.equal(a[:, own.stop :], b[:, own.stop :])

    delta = (out * d_out.float()).sum(-1)
    factor = torch.tensor([4.0], device=DEVICE)
    d_keys, d_values = torch.zeros(x.keys.shape, device=DEVICE), torch.ones(x.values.shape, device=DEVICE)
    d_gate_key = torch.zeros_like(x.gate_key) if gated else None
    d_queries, d_rows = pairs.backward(x, d_out, log_sum_exp, delta, factor, before, d_keys, d_values, d_gate_key)
    close(d_queries / factor, gradients[1], gradients[1])
    close(d_keys, gradients[2], gradients[2])
    close(d_values - 1, gradients[3], gradients[3])
    assert (d_rows is not None) == gated
    if gated:
        close(d_gate_key[..., some].transpose(0, 1), d_scores.sum(-2), d_scores.sum(-2))
        assert (d_gate_key[..., :first_key] == 0).all()
        close((d_rows / factor).transpose(1, 2), d_scores.sum(-1), d_scores.sum(-1))


def test_what_is_not_served_is_said(pairs: ModuleType) -> None:
    assert pairs.unsupported_reason(256, 128) is None
    assert "100 keys" in str(pairs.unsupported_reason(228, 128))
    assert "0 keys" in str(pairs.unsupported_reason(128, 128))
    # An illegal instruction on an H200, with gates: their tiles would not begin at 16 bytes.
    assert "330 keys" in str(pairs.unsupported_reason(330, 74))
