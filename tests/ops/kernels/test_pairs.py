"""Attention with gates between two pieces against plain attention in float64: outputs, every gradient, sums of dS.

On a CPU the kernels run in Triton's interpreter in float32; on a GPU in bfloat16.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from path_attention.ops.kernels import pairs

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# float32 throughout, sums of 256 products; bfloat16 rounds operands, P and dS once each.
TOLERANCE = 2e-2 if CUDA else 2e-6


@pytest.mark.parametrize(
    "batch, heads, group, rows, keys, dim, value_dim",
    # Fewer rows than keys and more, several of each tile; grouped queries; widths that need masks.
    [(1, 1, 1, 64, 256, 64, 64), (2, 2, 2, 128, 128, 16, 48), (1, 2, 1, 192, 128, 128, 128)],
)
def test_pairs(batch: int, heads: int, group: int, rows: int, keys: int, dim: int, value_dim: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    query_heads = heads * group
    x = pairs.Operands(
        queries=(normal(batch, query_heads, rows, dim) * dim**-0.5).to(DTYPE),
        keys=normal(batch, heads, keys, dim).to(DTYPE),
        values=normal(batch, heads, keys, value_dim).to(DTYPE),
        gate_query=-normal(batch, query_heads, rows).abs(),
        gate_key=-normal(batch, query_heads, keys).abs(),
    )
    x.gate_key[..., 3], x.gate_query[..., 5] = -1e30, -20  # a key without weight, a row with little
    leaves = [y.double().requires_grad_() for y in x]
    q, k, v, gate_q, gate_k = leaves
    k, v = (y.repeat_interleave(group, 1) for y in (k, v))
    scores = q @ k.mT + gate_q[..., None] + gate_k[..., None, :]
    exact = scores.softmax(-1) @ v
    d_out = normal(*exact.shape).to(DTYPE)
    gradients = torch.autograd.grad(exact, leaves[:3], d_out.double())
    # Softmax does not see what all logits of a row share: rows of dS add up to 0, but for rounding.
    d_scores = scores.softmax(-1) * (d_out.double() @ v.mT - (exact * d_out).sum(-1, keepdim=True))

    out, log_sum_exp = pairs.forward(x)
    delta = (out.float() * d_out.float()).sum(-1)
    # As where the whole attention has further keys: the same weights, all of them halved.
    found = pairs.backward(x, d_out, log_sum_exp + torch.log(torch.tensor(2.0)), delta)

    def close(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> bool:
        return bool((a.double() - b).norm() <= TOLERANCE * scale.norm())

    assert close(out, exact, exact)
    assert close(log_sum_exp, scores.logsumexp(-1), scores.logsumexp(-1))
    for a, b in zip(found[:3], gradients, strict=True):
        assert close(2 * a, b, b), float((2 * a - b).norm() / b.norm())
    columns = d_scores.sum(-2)
    assert close(2 * found.gate_column, columns, columns)
    assert close(2 * found.gate_row, d_scores.sum(-1), d_scores.abs().sum(-1))


def test_what_is_not_served_is_said() -> None:
    def reason(dtype: torch.dtype = torch.bfloat16, rows: int = 64, keys: int = 128, dim: int = 64) -> str | None:
        return pairs.unsupported_reason(dtype, rows, keys, dim, 64, rows)

    assert reason() is None
    assert "not bfloat16" in str(reason(dtype=torch.float16))
    assert "not multiples of 64 and 128" in str(reason(rows=63))
    assert "not multiples of 64 and 128" in str(reason(keys=64))
    assert "up to 128" in str(reason(dim=256))
    assert "cannot count" in str(pairs.unsupported_reason(torch.bfloat16, 64, 128, 64, 64, 2**31))
