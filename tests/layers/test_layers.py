"""The layer against the definition, and what holds for every mixer: causality, padding, packing, one path for all."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from path_attention import PaTHAttention, path_attention_reference
from path_attention.layers import ShortConvolution, SoftmaxAttention, build_mixer, mixer_names, register_mixer
from path_attention.layers.padding import token_positions
from path_attention.models import PaTHConfig

HIDDEN, HEADS, KV_HEADS = 24, 4, 2
# One leaf and more than one leaf of the operator, whose leaves hold 64 tokens.
LENGTHS = (1, 7, 70)


def mixer(name: str, **fields: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = PaTHConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=8,
        mixer=name,
        **fields,
    )
    return build_mixer(config).double()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=mixer_names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# Of float64; only the angles of rope are float32, and they are the same on both sides of every comparison.
CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("conv_size", [0, 3])
@pytest.mark.parametrize("reflections", [1, 2])
def test_layer_is_what_its_docstring_says(gate: bool, rank: int | None, conv_size: int, reflections: int) -> None:
    torch.manual_seed(0)
    layer = PaTHAttention(
        HIDDEN,
        HEADS,
        KV_HEADS,
        w_rank=rank,
        conv_size=conv_size,
        num_reflections=reflections,
        use_forget_gate=gate,
        qk_norm=True,
    ).double()
    with torch.no_grad():  # away from the initial values, which hide mistakes
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = tokens(2, 70)
    dim = HIDDEN // HEADS
    w = x @ layer.w_proj.weight.T if rank is None else x @ layer.w_down_proj.weight.T @ layer.w_up_proj.weight.T
    if conv_size:
        kernel = layer.w_conv.weight
        w = F.silu(F.conv1d(F.pad(w.mT, (2, 0)), kernel[:, None], groups=kernel.shape[0]).mT)
    w = w.unflatten(2, (reflections, KV_HEADS, dim))
    w = w / w.norm(dim=-1, keepdim=True)
    beta = 2 * torch.sigmoid(x @ layer.beta_proj.weight.T + layer.beta_proj.bias).unflatten(2, (reflections, KV_HEADS))
    g = torch.sigmoid(x @ layer.gate_proj.weight.T + layer.gate_proj.bias).log() if gate else None

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q = norm((x @ layer.q_proj.weight.T).unflatten(2, (HEADS, dim)), layer.q_norm.weight)
    k = norm((x @ layer.k_proj.weight.T).unflatten(2, (KV_HEADS, dim)), layer.k_norm.weight)
    v = (x @ layer.v_proj.weight.T).unflatten(2, (KV_HEADS, dim))
    expected = path_attention_reference(q, k, v, w, beta, g).flatten(2) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
def test_later_tokens_change_nothing_before_them(name: str, length: int) -> None:
    layer, x = mixer(name), tokens(1, length)
    changed = x.clone()
    changed[:, length // 2 :] += 1
    torch.testing.assert_close(layer(changed)[:, : length // 2], layer(x)[:, : length // 2], **CLOSE)
    assert not torch.allclose(layer(changed)[:, length // 2 :], layer(x)[:, length // 2 :])


def test_packed_equals_separate(name: str) -> None:
    layer, x = mixer(name), tokens(1, 150)
    ends = [0, 1, 1, 70, 150]  # one token, an empty sequence, one leaf and a bit twice
    packed = layer(x, cu_seqlens=torch.tensor(ends))
    separate = [layer(x[:, a:b]) for a, b in pairwise(ends) if b > a]
    torch.testing.assert_close(packed, torch.cat(separate, 1), **CLOSE)


def test_padding_is_as_if_absent(name: str) -> None:
    layer, x = mixer(name), tokens(4, 70)
    mask = torch.ones(4, 70, dtype=torch.int64)
    mask[0, :9] = 0  # left
    mask[1, 50:] = 0  # right
    mask[2, ::3] = 0  # between
    mask[3] = 0  # the whole row
    out = layer(x, attention_mask=mask)
    assert bool((out[mask == 0] == 0).all())
    for row in range(3):
        alone = layer(x[row : row + 1, mask[row] == 1])
        torch.testing.assert_close(out[row, mask[row] == 1], alone[0], **CLOSE)
    noise = torch.where(mask[..., None] == 1, x, tokens(4, 70, seed=2))
    torch.testing.assert_close(layer(noise, attention_mask=mask), out, rtol=0, atol=0)


def test_all_padding(name: str) -> None:
    layer = mixer(name)
    assert bool((layer(tokens(2, 5), attention_mask=torch.zeros(2, 5)) == 0).all())


def test_training_and_evaluation_are_one_path(name: str) -> None:
    layer, x = mixer(name, qk_norm=True), tokens(2, 70)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=0, atol=0)


def test_attention_weights_are_those_of_the_output(name: str) -> None:
    layer, x = mixer(name), tokens(2, 70)
    mask = torch.ones(2, 70)
    mask[1, :20] = 0
    for options in ({}, {"attention_mask": mask}):
        weights = layer.attention_weights(x, **options)
        v = layer.v_proj(x).unflatten(2, (KV_HEADS, -1)).repeat_interleave(HEADS // KV_HEADS, dim=2)
        expected = layer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        torch.testing.assert_close(layer(x, **options), expected, **CLOSE)


def test_gradients_reach_every_parameter(name: str) -> None:
    layer = mixer(name)
    layer(tokens(2, 70)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_exact_layer(name: str, dtype: torch.dtype) -> None:
    layer, x = mixer(name), tokens(2, 130)
    exact = layer(x)
    half = layer.to(dtype)(x.to(dtype)).double()
    error = (half - exact).norm() / exact.norm()
    # Inputs, weights, projections and attention each round a few times; 10 roundings of half a unit of the last place.
    assert error < 10 * torch.finfo(dtype).eps / 2


def test_path_keeps_its_transitions_in_float32() -> None:
    layer = PaTHAttention(HIDDEN, HEADS, use_forget_gate=True)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = layer.project(torch.randn(2, 5, HIDDEN))
    assert inputs.q.dtype == torch.bfloat16
    assert {inputs.w.dtype, inputs.beta.dtype, inputs.g.dtype} == {torch.float32}
    torch.testing.assert_close(inputs.w.norm(dim=-1), torch.ones(2, 5, 1, HEADS))


def test_projections_are_called_as_modules() -> None:
    """Adapters and quantized layers stand in for a projection and have no plain weight, or not the whole of it."""
    torch.manual_seed(0)
    layer, x = PaTHAttention(HIDDEN, HEADS, use_forget_gate=True), torch.randn(2, 5, HIDDEN)
    expected = layer(x)
    for name, module in list(layer.named_children()):
        if isinstance(module, torch.nn.Linear):
            setattr(layer, name, torch.nn.Sequential(module))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_norm_of_queries_and_keys_serves_every_mixer(name: str) -> None:
    """Scaling the projections changes nothing then, but for the epsilon in the norm."""
    layer, x = mixer(name, qk_norm=True), tokens(2, 70)
    expected = layer(x)
    with torch.no_grad():
        layer.q_proj.weight *= 100
        layer.k_proj.weight *= 100
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-4)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        layer = layer.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert layer(x.to(dtype)).dtype == torch.bfloat16
            assert {y.dtype for y in layer._project(x.to(dtype))} == {torch.bfloat16}


def test_zero_tokens_have_finite_gradients() -> None:
    layer = PaTHAttention(HIDDEN, HEADS)
    x = torch.zeros(1, 70, HIDDEN, requires_grad=True)
    layer(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_short_convolution_is_torchs_causal_depthwise_one(width: int) -> None:
    layer = ShortConvolution(6, width).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = F.silu(F.conv1d(F.pad(x.mT, (width - 1, 0)), layer.weight[:, None], groups=6).mT)
    torch.testing.assert_close(layer(x, torch.arange(9)), expected)
    ends = torch.tensor([0, 4, 4, 9])
    packed = layer(x[:1], token_positions(ends, 9, x.device))
    torch.testing.assert_close(
        packed, torch.cat([layer(x[:1, :4], torch.arange(4)), layer(x[:1, 4:], torch.arange(5))], 1)
    )


def test_registry_takes_new_mixers_once() -> None:
    with pytest.raises(ValueError, match="'path', which is registered already"):
        register_mixer("path", lambda config: SoftmaxAttention(8, 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3; wanted a divisor of num_heads, 4"),
        ({"hidden_size": 25}, "head_dim: got None"),
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"w_rank": 0}, "w_rank: got 0"),
        ({"conv_size": -1}, "conv_size: got -1"),
        ({"num_reflections": 0}, "num_reflections: got 0"),
        ({"hidden_size": "24"}, "hidden_size: got '24'; wanted an integer"),
        ({"num_heads": 4.0}, "num_heads: got 4.0; wanted an integer"),
        ({"num_kv_heads": True}, "num_kv_heads: got True; wanted a divisor"),
        ({"head_dim": 6.0}, "head_dim: got 6.0; wanted an integer"),
        ({"w_rank": "full"}, "w_rank: got 'full'; wanted an integer"),
        ({"conv_size": None}, "conv_size: got None; wanted an integer"),
        ({"num_reflections": 1.5}, "num_reflections: got 1.5; wanted an integer"),
        ({"use_forget_gate": 1}, "use_forget_gate: got 1; wanted True or False"),
        ({"qk_norm": "no"}, "qk_norm: got 'no'; wanted True or False"),
        ({"bias": None}, "bias: got None; wanted True or False"),
        ({"norm_eps": -1}, "norm_eps: got -1; wanted a finite number of at least 0"),
        ({"norm_eps": float("nan")}, "norm_eps: got nan"),
        ({"norm_eps": "1e-6"}, "norm_eps: got '1e-6'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaTHAttention(**{"hidden_size": HIDDEN, "num_heads": HEADS, **arguments})


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf"), "10000"])
def test_bad_bases_are_named(theta: object) -> None:
    with pytest.raises(ValueError, match=r"rope_theta: got .*; wanted a finite number above 0"):
        SoftmaxAttention(HIDDEN, HEADS, rope_theta=theta)


@pytest.mark.parametrize("channels, width, name", [(-1, 3, "channels"), (8, 0, "width"), (8, 2.0, "width")])
def test_bad_convolutions_are_named(channels: int, width: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got"):
        ShortConvolution(channels, width)


def test_shapes_on_meta(name: str) -> None:
    """No values are needed for the shape of a result, whatever is masked or packed."""
    with torch.device("meta"):
        layer, x = mixer(name).to("meta"), torch.zeros(1, 70, HIDDEN, dtype=torch.float64)
        mask, ends = torch.ones(1, 70, dtype=torch.int64), torch.tensor([0, 30, 70])
    for options in ({}, {"attention_mask": mask}, {"cu_seqlens": ends}, {"cu_seqlens": torch.tensor([0, 30, 70])}):
        out = layer(x, **options)
        assert out.is_meta
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert layer.attention_weights(x, **options).shape == (1, HEADS, 70, 70)


def test_maps_under_autocast_are_in_float32(name: str) -> None:
    """They add up to 1 as float32 does: autocast rounds what is projected, not the logits."""
    layer, x = mixer(name).float(), tokens(1, 70).float()
    with torch.autocast("cpu", torch.bfloat16):
        weights = layer.attention_weights(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, 70), rtol=0, atol=1e-6)


def test_bad_calls_are_named(name: str) -> None:
    layer, x = mixer(name), tokens(2, 5)
    with pytest.raises(ValueError, match="hidden_states: got shape"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        layer(x, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask: got one beside cu_seqlens"):
        layer(x[:1], attention_mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="cu_seqlens: got one beside a batch of 2"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    for ends in ([0, 3], [1, 5], [0, 4, 2, 5]):
        with pytest.raises(ValueError, match=r"cu_seqlens: got .*; wanted (first 0 and last 5|values that never)"):
            layer(x[:1], cu_seqlens=torch.tensor(ends))
    for wrong in (torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]]), torch.tensor([0]), [0, 5]):
        with pytest.raises(ValueError, match=r"cu_seqlens: got (shape|dtype|list)"):
            layer(x[:1], cu_seqlens=wrong)
    with pytest.raises(ValueError, match="cu_seqlens: got device meta"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 5], device="meta"))
    for wrong in ([[0.0] * HIDDEN], None):
        with pytest.raises(ValueError, match=r"hidden_states: got (list|NoneType); wanted a torch.Tensor"):
            layer(wrong)
    with pytest.raises(ValueError, match=r"hidden_states: got dtype torch.int64; wanted a floating dtype"):
        layer(x.long())
    for wrong, message in (
        ([[1] * 5] * 2, "list"),
        (torch.ones(2, 5, device="meta"), "device meta"),
        (torch.tensor([[0.0, 0.0, 0.0, 0.0, float("-inf")]] * 2), "values other than 0 and 1"),
        (torch.tensor([[1, 1, 2, 2, 2]] * 2), "values other than 0 and 1"),
        (torch.full((2, 5), float("nan")), "values other than 0 and 1"),
    ):
        with pytest.raises(ValueError, match=f"attention_mask: got {message}"):
            layer(x, attention_mask=wrong)
