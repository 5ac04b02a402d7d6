"""Rows at the edges of pieces and their products, and the gradients of all inputs, against the algorithm in torch.

In Triton's interpreter, in float32. Pieces of two, four and sixteen leaves: one level, two, and more than one launch of
the tree works through; several pieces and sequences; grouped queries.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from path_attention.ops import dyadic
from path_attention.ops.engines import edges
from path_attention.ops.spans import plan_spans

# Products of 21 bits (three products of tensor-float-32 parts), a few of them one after another at each of five levels.
TOLERANCE = 1e-5


@pytest.mark.parametrize("batch, pieces, leaves, group", [(1, 2, 2, 1), (2, 2, 4, 2), (1, 1, 16, 1)])
def test_edges(batch: int, pieces: int, leaves: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "FORWARD_PART", batch * pieces * leaves)
    monkeypatch.setattr(edges, "PART", batch * pieces * leaves)  # a key head at a time
    heads, dim, length = 2, 16, 64 * leaves
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, pieces * length, *shape, generator=generator)

    q, k = normal(heads * group, dim), normal(heads, dim)
    w = torch.nn.functional.normalize(normal(1, heads, dim), dim=-1)
    beta = 2 * torch.rand(batch, pieces * length, 1, heads, generator=generator)
    plan = plan_spans((length,) * (batch * pieces), dyadic.LEAF, to_edges=True)
    problem = dyadic.Problem.pack(plan, *(x.double() for x in (q, k, k[..., :1], w, beta)), None, 0.3)
    exact, found = dyadic.edges(problem), edges.edges(q, k, w, beta, length, 0.3)

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.shape == b.shape
        assert (a - b).norm() <= TOLERANCE * b.norm(), float((a - b).norm() / b.norm())

    for a, b in zip(found, exact, strict=True):
        close(a, b)
    d_edges = dyadic.Edges(*(torch.randn(x.shape, generator=generator) for x in found))
    wanted = dyadic.edges_backward(problem, dyadic.Edges(*(x.double() for x in d_edges)))
    wanted = wanted.tokens(plan, batch, 1, 0.3)
    gradients = [torch.zeros_like(x) for x in (q, k, w, beta)]
    edges.add_backward(q, k, w, beta, length, 0.3, d_edges, tuple(gradients))
    for a, b in zip(gradients, (wanted.q, wanted.k, wanted.w, wanted.beta), strict=True):
        close(a, b)
