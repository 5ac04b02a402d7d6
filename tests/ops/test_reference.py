"""The definition, token by token, equals its formula written out with transition matrices and loops."""

import itertools

import pytest
import torch

from path_attention import path_attention_reference, path_attention_weights
from tests.ops.inputs import Inputs, Shape, make_inputs


def logits_by_matrices(inputs: Inputs, head: int, key_head: int, row: int, scale: float) -> torch.Tensor:
    """scale q_i H_i ... H_{j+1} k_j + g_{j+1} + ... + g_i for one batch row and head; -inf where j > i."""
    q, k, w, beta = (inputs[name][row] for name in ("q", "k", "w", "beta"))
    length, dim = q.shape[0], q.shape[-1]
    logits = torch.full((length, length), float("-inf"), dtype=q.dtype)
    for i, j in itertools.product(range(length), range(length)):
        if j > i:
            continue
        product = torch.eye(dim, dtype=q.dtype)
        for t in range(i, j, -1):
            for r in reversed(range(w.shape[1])):
                w_t = w[t, r, key_head]
                product = product @ (torch.eye(dim, dtype=q.dtype) - beta[t, r, key_head] * torch.outer(w_t, w_t))
        logits[i, j] = scale * q[i, head] @ product @ k[j, key_head]
        if "g" in inputs:
            logits[i, j] += inputs["g"][row, j + 1 : i + 1, head].sum()
    return logits


@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("reflections", [1, 2, 3])
def test_definition_equals_products_of_matrices(reflections: int, gated: bool) -> None:
    """Query head h uses key/value head h // (HQ // H)."""
    shape = Shape(7, batch=2, query_heads=4, heads=2, dim=3, value_dim=2, reflections=reflections)
    inputs = {name: x.detach() for name, x in make_inputs(shape, gated=gated).items()}
    out = path_attention_reference(**inputs, scale=0.8)
    for row, head in itertools.product(range(2), range(4)):
        weights = logits_by_matrices(inputs, head, head // 2, row, 0.8).softmax(-1)
        torch.testing.assert_close(out[row, :, head], weights @ inputs["v"][row, :, head // 2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_definition_stays_causal_at_any_scale(scale: float) -> None:
    inputs = {name: x.detach() for name, x in make_inputs(Shape(9)).items() if name != "v"}
    weights = path_attention_weights(**inputs, scale=scale)
    assert not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_definition_in_half_precision_computes_in_float32() -> None:
    inputs = make_inputs(Shape(9), dtype=torch.bfloat16)
    assert path_attention_reference(**inputs).dtype == torch.float32
