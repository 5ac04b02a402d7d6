"""The operator is what its formula says: against the definition in float64, and by properties of the formula."""

import pytest
import torch
from torch import Tensor

from path_attention import path_attention, path_attention_weights
from tests.ops.inputs import (
    FLOAT64_TOLERANCE,
    Inputs,
    Shape,
    assert_same,
    copy_inputs,
    make_inputs,
    oracle,
    out_and_gradients,
    output_gradient,
)

# Leaves have 64 tokens, so that lengths of 1, 2, 63, 64 and 65 lie inside, at and just over a leaf's edge; 127 and 129
# at the edge of the first pair; 192, 300 and 443 make 3, 5 and 7 leaves (right siblings cut short, at different levels,
# by a whole leaf and inside one); 513 makes 9 (a right sibling of one token eight leaves from its left one's start).
LENGTHS = (1, 2, 63, 64, 65, 127, 129, 192, 200, 300, 443, 513)

# What may differ between heads, dims and batch rows; lengths with 3 leaves, the last one not full, so that every kind
# of step of the algorithm is taken.
SHAPES = {
    "grouped queries": Shape(150, query_heads=4, heads=2),
    "one key head": Shape(150, query_heads=3, heads=1),
    "values wider than keys": Shape(150, dim=8, value_dim=24),
    "values narrower than keys": Shape(150, dim=24, value_dim=8),
    "head dim 5": Shape(150, dim=5, value_dim=5),
    "head dim 80": Shape(150, heads=1, query_heads=1, dim=80, value_dim=80),
    "head dim 96": Shape(150, heads=1, query_heads=2, dim=96, value_dim=16),
    "value dim 1": Shape(150, dim=8, value_dim=1),
    "head dim 1": Shape(150, dim=1, value_dim=3),
    "batch of 3, leaves not full": Shape(65, batch=3),
    "batch of 2, odd leaves": Shape(300, batch=2, query_heads=2, heads=1, dim=8, value_dim=8),
    "one reflection, written out": Shape(150, reflections=1),
    "two reflections": Shape(150, reflections=2, query_heads=4),
    "three reflections": Shape(200, batch=2, reflections=3, dim=8, value_dim=12),
}

gates = pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])


def assert_equals_definition(inputs: Inputs, **options: object) -> None:
    assert_same(out_and_gradients(path_attention, inputs, **options), oracle(inputs, **options))


@gates
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_definition_at_every_kind_of_length(length: int, gated: bool) -> None:
    heads = 1 if length > 256 else 2
    assert_equals_definition(make_inputs(Shape(length, heads=heads, dim=8, value_dim=8), gated=gated))


@gates
@pytest.mark.parametrize("name", SHAPES)
def test_equals_definition_in_every_shape(name: str, gated: bool) -> None:
    assert_equals_definition(make_inputs(SHAPES[name], gated=gated))


@gates
@pytest.mark.parametrize("beta", ["near 2", "2", "0"])
def test_equals_definition_for_every_beta(beta: str, gated: bool) -> None:
    assert_equals_definition(make_inputs(Shape(200, dim=8, value_dim=8), beta=beta, gated=gated))


@pytest.mark.parametrize("beta", ["uniform", "2"])
def test_equals_definition_with_repeated_w(beta: str) -> None:
    """w_t = w_{t-1} makes W W^T all ones: the worst conditioned T there is."""
    inputs = make_inputs(Shape(200), beta=beta)
    inputs["w"] = inputs["w"].detach()[:, :1].expand_as(inputs["w"]).clone().requires_grad_(True)
    assert_equals_definition(inputs)


def test_equals_definition_with_w_of_zero() -> None:
    """Zero vectors, as padding has them, are the identity whatever beta is, among others that are not."""
    inputs = make_inputs(Shape(200, reflections=2), beta="2")
    w = inputs["w"].detach().clone()
    w[:, 40:90] = 0
    w[:, 150:, 1] = 0
    inputs["w"] = w.requires_grad_(True)
    assert_equals_definition(inputs)


def test_equals_definition_with_w_not_normalised() -> None:
    """w is used as given; a short one with a beta of the caller's choice is still what the formula says."""
    inputs = make_inputs(Shape(130))
    inputs["w"] = (inputs["w"].detach() * 0.5).requires_grad_(True)
    assert_equals_definition(inputs)


@pytest.mark.slow
def test_equals_definition_at_length_3000() -> None:
    """47 leaves, six levels; forward against the definition, which is quadratic."""
    inputs = {name: x.detach() for name, x in make_inputs(Shape(3000, heads=1, query_heads=1), gated=True).items()}
    assert_same({"out": path_attention(**inputs)}, {"out": path_attention_reference_forward(inputs)})


def path_attention_reference_forward(inputs: Inputs) -> Tensor:
    weights = path_attention_weights(**{name: x for name, x in inputs.items() if name != "v"})
    return torch.einsum("bhij,bjhd->bihd", weights, inputs["v"])


# --- scale -----------------------------------------------------------------------------------------------------------


@gates
@pytest.mark.parametrize("scale", [0.07, 1, -0.5, 0.0])
def test_scale_of_the_caller(scale: float, gated: bool) -> None:
    assert_equals_definition(make_inputs(Shape(130), gated=gated), scale=scale)


def test_scale_is_one_over_the_root_of_the_key_dim() -> None:
    inputs = make_inputs(Shape(100, dim=9))
    assert_same(out_and_gradients(path_attention, inputs), out_and_gradients(path_attention, inputs, scale=1 / 3))


def test_scale_never_multiplies_the_gate() -> None:
    """With q = 0 the logits are the gates' sums alone, so the scale has nothing to act on."""
    inputs = make_inputs(Shape(150), gated=True)
    inputs["q"] = torch.zeros_like(inputs["q"]).requires_grad_(True)
    small, large = (path_attention(**inputs, scale=scale) for scale in (0.01, 10.0))
    torch.testing.assert_close(small, large, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


# --- packed sequences ------------------------------------------------------------------------------------------------

PACKED = {
    "one sequence": (200,),
    "equal sequences": (70, 70, 70),
    "unequal sequences": (65, 200, 1, 64, 130),
    "empty sequences first, between and last": (0, 100, 0, 0, 64, 1, 0),
    "only single tokens": (1, 1, 1),
}


def cumulative(lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


@gates
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_each_sequence_alone(name: str, dtype: torch.dtype, gated: bool) -> None:
    lengths = PACKED[name]
    inputs = make_inputs(Shape(sum(lengths), query_heads=4, heads=2, dim=8, value_dim=12), gated=gated)
    cu_seqlens = cumulative(lengths, dtype)
    packed = out_and_gradients(path_attention, inputs, cu_seqlens=cu_seqlens)
    alone: dict[str, list[Tensor]] = {name: [] for name in packed}
    whole_gradient = output_gradient(packed["out"])
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        if length == 0:
            continue
        part = copy_inputs({key: x[:, start : start + length] for key, x in inputs.items()})
        out = path_attention(**part)
        gradients = torch.autograd.grad(out, list(part.values()), whole_gradient[:, start : start + length])
        for key, x in zip(alone, (out.detach(), *gradients), strict=True):
            alone[key].append(x)
    assert_same(packed, {key: torch.cat(parts, dim=1) for key, parts in alone.items()})


def test_packed_equals_definition() -> None:
    inputs = make_inputs(Shape(195, reflections=2), gated=True)
    assert_equals_definition(inputs, cu_seqlens=cumulative((65, 0, 130), torch.int32))


def test_packed_without_any_token() -> None:
    inputs = make_inputs(Shape(0), gated=True)
    got = out_and_gradients(path_attention, inputs, cu_seqlens=torch.tensor([0, 0, 0]))
    assert got["out"].shape == (1, 0, 2, 16)
    assert {name: got[name].shape for name in inputs} == {name: x.shape for name, x in inputs.items()}


def test_batch_rows_do_not_see_each_other() -> None:
    inputs = make_inputs(Shape(130, batch=3), gated=True)
    row = {name: x[1:2] for name, x in inputs.items()}
    torch.testing.assert_close(path_attention(**inputs)[1:2], path_attention(**row), rtol=0, atol=1e-14)


def test_empty_batch() -> None:
    inputs = make_inputs(Shape(130, batch=0), gated=True)
    assert out_and_gradients(path_attention, inputs)["out"].shape == (0, 130, 2, 16)


# --- properties of the formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 63, 64, 100, 127, 128, 198])
def test_causality(position: int) -> None:
    """Nothing after a token changes its output, and its gradient touches nothing after it."""
    inputs = make_inputs(Shape(199), gated=True)
    other = make_inputs(Shape(199), gated=True, seed=5)
    end = position + 1
    changed = copy_inputs({name: torch.cat([x[:, :end], other[name][:, end:]], 1) for name, x in inputs.items()})
    out = path_attention(**changed)[:, :end]
    torch.testing.assert_close(out, path_attention(**inputs)[:, :end], rtol=0, atol=1e-14)
    gradients = torch.autograd.grad(out[:, position].sum(), list(changed.values()))
    assert all(not x[:, end:].any() for x in gradients)


def test_the_first_transition_and_gate_act_on_nothing() -> None:
    """logit(i, j) has H_{j+1} ... H_i and g_{j+1} ... g_i: token 0's own appear in no logit."""
    gradients = out_and_gradients(path_attention, make_inputs(Shape(150), gated=True))
    for name in ("w", "beta", "g"):
        torch.testing.assert_close(gradients[name][:, 0], torch.zeros_like(gradients[name][:, 0]), rtol=0, atol=1e-13)


def test_two_reflections_equal_a_sequence_of_twice_the_length() -> None:
    """H_t = H_{t,2} H_{t,1}: a token's first step is a token without a query, whose key no one attends to (its gate
    closes it off by a bias that only this hand-made sequence can have: a key of a huge negative logit)."""
    inputs = make_inputs(Shape(100, reflections=2, dim=8, value_dim=8))
    q, k, v, w, beta = (inputs[name].detach() for name in ("q", "k", "v", "w", "beta"))
    # An extra dimension that no reflection touches: queries have 1 there, the keys of first steps -1e4.
    first, second = torch.zeros_like(k[..., :1]) - 1e4, torch.zeros_like(k[..., :1])
    key_steps = torch.stack([torch.cat([k, first], -1), torch.cat([k, second], -1)], 2).flatten(1, 2)
    query = torch.cat([q, torch.ones_like(q[..., :1])], -1)
    query_steps = torch.stack([query, query], 2).flatten(1, 2)
    value_steps = v.repeat_interleave(2, dim=1)
    w_steps = torch.nn.functional.pad(w, (0, 1)).flatten(1, 2)
    doubled = path_attention(query_steps, key_steps, value_steps, w_steps, beta.flatten(1, 2), scale=8**-0.5)
    torch.testing.assert_close(doubled[:, 1::2], path_attention(q, k, v, w, beta), rtol=0, atol=1e-11)


def test_two_equal_full_reflections_undo_each_other() -> None:
    inputs = make_inputs(Shape(150, reflections=2), beta="2")
    inputs["w"] = inputs["w"].detach()[:, :, :1].expand_as(inputs["w"]).clone().requires_grad_(True)
    out = path_attention(**inputs)
    torch.testing.assert_close(out, softmax_attention(inputs["q"], inputs["k"], inputs["v"]), rtol=0, atol=1e-12)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(*rows, attn_mask=bias, is_causal=bias is None, enable_gqa=True).transpose(1, 2)


def test_beta_zero_is_softmax_attention() -> None:
    inputs = make_inputs(Shape(200, query_heads=4), beta="0")
    plain = {name: inputs[name] for name in "qkv"}
    got = out_and_gradients(path_attention, inputs)
    assert_same({name: got[name] for name in ("out", *plain)}, out_and_gradients(softmax_attention, plain))


def test_gate_alone_is_forgetting_attention() -> None:
    inputs = make_inputs(Shape(200, query_heads=4), beta="0", gated=True)

    def forgetting_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        total = g.transpose(1, 2).cumsum(-1)
        above = torch.ones(200, 200, dtype=torch.bool).triu(1)
        bias = (total[..., :, None] - total[..., None, :]).masked_fill(above, float("-inf"))
        return softmax_attention(q, k, v, bias)

    wanted = {name: inputs[name] for name in ("q", "k", "v", "g")}
    got = out_and_gradients(path_attention, inputs)
    assert_same({name: got[name] for name in ("out", *wanted)}, out_and_gradients(forgetting_attention, wanted))


def test_a_gate_that_closes_forgets_everything_before() -> None:
    """g = -1e4 at a token: what follows attends to it and to later tokens only, without NaN."""
    inputs = make_inputs(Shape(200), gated=True)
    with torch.no_grad():
        inputs["g"][:, 90] = -1e4
    got = path_attention(**inputs)
    assert torch.isfinite(torch.stack([x.sum() for x in torch.autograd.grad(got.sum(), list(inputs.values()))])).all()
    after = {name: x[:, 90:] for name, x in inputs.items()}
    torch.testing.assert_close(got[:, 90:], path_attention(**after), rtol=0, atol=1e-11)


def test_large_logits_stay_finite() -> None:
    """Logits of a few thousand: the parts are joined by their log-sum-exp and no exponential overflows.

    A logit of 1e4 has a rounding of 1e-12, and the scale multiplies it again in the gradients of q and k.
    """
    inputs = make_inputs(Shape(200))
    got = out_and_gradients(path_attention, inputs, scale=1e3)
    assert_same(got, oracle(inputs, scale=1e3), tolerance=1e3 * 1e-11)


def test_values_enter_linearly() -> None:
    inputs = make_inputs(Shape(130))
    doubled = {**inputs, "v": 2 * inputs["v"]}
    torch.testing.assert_close(path_attention(**doubled), 2 * path_attention(**inputs), rtol=0, atol=1e-13)


@gates
def test_weights_are_the_softmax_behind_the_output(gated: bool) -> None:
    inputs = make_inputs(Shape(150, query_heads=4, reflections=2), gated=gated)
    cu_seqlens = torch.tensor([0, 50, 50, 150])
    rest = {name: x for name, x in inputs.items() if name != "v"}
    weights = path_attention_weights(**rest, cu_seqlens=cu_seqlens)
    assert weights.shape == (1, 4, 150, 150)
    assert (weights >= 0).all()
    assert not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    values = inputs["v"].repeat_interleave(2, dim=2)
    torch.testing.assert_close(
        torch.einsum("bhij,bjhd->bihd", weights, values),
        path_attention(**inputs, cu_seqlens=cu_seqlens),
        rtol=0,
        atol=FLOAT64_TOLERANCE,
    )


def test_only_some_inputs_need_gradients() -> None:
    inputs = make_inputs(Shape(130), gated=True)
    some = {name: x.detach().requires_grad_(name in ("k", "beta")) for name, x in inputs.items()}
    out = path_attention(**some)
    d_k, d_beta = torch.autograd.grad(out, [some["k"], some["beta"]], output_gradient(out))
    wanted = out_and_gradients(path_attention, inputs)
    assert_same({"k": d_k, "beta": d_beta}, {"k": wanted["k"], "beta": wanted["beta"]})
    assert not path_attention(**{name: x.detach() for name, x in inputs.items()}).requires_grad
