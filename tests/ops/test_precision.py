"""Rounding: tolerances come from what softmax attention and the definition itself lose in the same dtype.

Half precision: the error of causal softmax attention (torch's own, same q, k, v, same dtype) against float64 is the
yardstick; the operator may have 1.5 times that in its output and in each gradient (the largest of those of q, k and v
where softmax attention has no such gradient). What is rounded is about the same number of times in both: inputs,
probabilities, rows and results.

Float32: there the products of transitions matter, which softmax attention does not have, so the yardstick is the
larger of its error and that of the definition itself, token by token, in float32; the operator may have 4 times that.
It inverts a triangular matrix of 64 reflections at once where the definition applies one after another: 2.7 times is
the largest ratio found on this grid (beta = 2, no gate; with a gate, or beta uniform, about 1).
"""

import math

import pytest
import torch

from path_attention import path_attention, path_attention_reference
from tests.ops.inputs import Inputs, Shape, copy_inputs, make_inputs, oracle, out_and_gradients, relative_error
from tests.ops.test_path_attention import softmax_attention

HALF_FACTOR = 1.5
FLOAT32_FACTOR = 4.0

# 200: four leaves, the last one not full. 513: nine, with a right sibling of one token.
LENGTHS = (200, 513)
BETAS = ("uniform", "near 2", "2")
gates = pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])


def errors(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: relative_error(x, exact[name]) for name, x in got.items()}


def softmax_errors(inputs: Inputs) -> dict[str, float]:
    """Of out and the gradients of q, k, v, and the largest of these for every other gradient."""
    plain = {name: inputs[name] for name in "qkv"}
    exact = out_and_gradients(softmax_attention, copy_inputs(plain, torch.float64))
    found = errors(out_and_gradients(softmax_attention, plain), exact)
    largest = max(found[name] for name in "qkv")
    return {**found, **{name: largest for name in inputs if name not in plain}}


def assert_within(got: dict[str, float], yardstick: dict[str, float], factor: float) -> None:
    over = {name: (error, yardstick[name]) for name, error in got.items() if not error <= factor * yardstick[name]}
    assert not over, f"error and yardstick, more than {factor} times it: {over}"


@gates
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("side", ["float32", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_half_precision(length: int, dtype: torch.dtype, side: str, beta: str, gated: bool) -> None:
    shape = Shape(length, query_heads=2, heads=1, dim=32, value_dim=32)
    side_dtype = torch.float32 if side == "float32" else dtype
    inputs = make_inputs(shape, gated=gated, beta=beta, dtype=dtype, side_dtype=side_dtype)
    got = out_and_gradients(path_attention, inputs)
    assert got["out"].dtype == dtype
    assert {name: got[name].dtype for name in inputs} == {name: x.dtype for name, x in inputs.items()}
    assert_within(errors(got, oracle(inputs)), softmax_errors(inputs), HALF_FACTOR)


@gates
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("length", LENGTHS)
def test_float32(length: int, beta: str, gated: bool) -> None:
    inputs = make_inputs(Shape(length, dim=32, value_dim=32), gated=gated, beta=beta, dtype=torch.float32)
    exact = oracle(inputs)
    definition = errors(out_and_gradients(path_attention_reference, inputs), exact)
    plain = softmax_errors(inputs)
    yardstick = {name: max(definition[name], plain[name]) for name in definition}
    assert_within(errors(out_and_gradients(path_attention, inputs), exact), yardstick, FLOAT32_FACTOR)


@pytest.mark.parametrize("length", [129, 1500])
def test_near_parallel_reflections(length: int) -> None:
    """Two reflections a token make the same small turn everywhere: T^{-1} is large and P is not. U, of the size of one
    over the angle, is rounded once, and so the error is eps / angle whatever the length; in float32 throughout it grew.
    """
    angle = 0.01
    inputs = make_inputs(Shape(length, query_heads=1, heads=1, reflections=2), beta="2", dtype=torch.float32)
    with torch.no_grad():
        inputs["w"].zero_()
        inputs["w"][..., 0] = 1
        inputs["w"][:, :, 1, :, 0], inputs["w"][:, :, 1, :, 1] = math.cos(angle), math.sin(angle)
    # The operator in float64 is the definition to 1e-11, in a hundredth of its time.
    exact = out_and_gradients(path_attention, copy_inputs(inputs, torch.float64))
    got = errors(out_and_gradients(path_attention, inputs), exact)
    assert all(got[name] <= torch.finfo(torch.float32).eps / angle for name in ("out", "q", "k", "v")), got


@pytest.mark.parametrize("gate", [-300.0, -1e4, -1e9, torch.finfo(torch.float32).min, float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_closed_gate_is_a_boundary(dtype: torch.dtype, gate: float) -> None:
    """Nothing before it is seen, and what comes after is as exact as without it: equal to packed sequences."""
    # 20: twice in the first leaf; 64: at an edge of leaves; 150: inside a later one.
    ends = [0, 7, 20, 64, 150, 200]
    inputs = make_inputs(Shape(200, query_heads=4, dim=8, value_dim=8), gated=True, dtype=dtype)
    closed = copy_inputs(inputs)
    with torch.no_grad():
        closed["g"][:, ends[1:-1]] = gate
    packed = oracle(inputs, cu_seqlens=torch.tensor(ends))
    for function in (path_attention, path_attention_reference):
        got = out_and_gradients(function, closed)
        rounding = errors(out_and_gradients(function, inputs, cu_seqlens=torch.tensor(ends)), packed)
        assert_within(errors(got, packed), {name: max(x, torch.finfo(dtype).eps) for name, x in rounding.items()}, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_grows_over_long_products_of_reflections(dtype: torch.dtype) -> None:
    """8192 exact reflections, w often repeated: a product whose norm drifted above 1 would blow the logits up."""
    inputs = make_inputs(Shape(8192, query_heads=1, heads=1), beta="2", dtype=dtype)
    w = inputs["w"].detach().clone()
    w[:, 1::3] = w[:, 0:-1:3][:, : w[:, 1::3].shape[1]]
    inputs["w"] = w.requires_grad_(True)
    got = out_and_gradients(path_attention, inputs)
    assert all(torch.isfinite(x).all() for x in got.values())
    # Outputs are averages of values, and the moved rows keep their norm: logits stay below scale |q| |k|.
    assert got["out"].abs().max() <= inputs["v"].abs().max()
    without_position = out_and_gradients(path_attention, {**inputs, "beta": torch.zeros_like(inputs["beta"])})
    for name in ("q", "k", "v"):
        assert got[name].float().norm() <= 2 * without_position[name].float().norm(), name
