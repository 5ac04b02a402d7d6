"""The Hugging Face model: loss, padding, packing, generation, saving; and Llama to check everything around PaTH."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
)

from path_attention import path_attention
from path_attention.layers import mixer_names, operator
from path_attention.models import PaTHConfig, PaTHForCausalLM, PaTHModel
from path_attention.training import parallel
from path_attention.training.recipe import Training

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large, so that greedy decoding does not hang on ties
}
CLOSE = {"rtol": 0, "atol": 2e-5}


def model(mixer: str = "path", **fields: object) -> PaTHForCausalLM:
    torch.manual_seed(0)
    return PaTHForCausalLM(PaTHConfig(mixer=mixer, **SHAPE, **fields)).eval()


def ids(batch: int = 2, length: int = 70) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(m: PaTHForCausalLM, x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = torch.cat([x, m(x).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return x


@pytest.fixture(params=mixer_names())
def mixer(request: pytest.FixtureRequest) -> str:
    return request.param


HYBRID = {"layer_mixers": ["path", "rope"]}


def test_loss_is_shifted_cross_entropy() -> None:
    m, x = model(), ids()
    labels = x.clone()
    labels[:, ::3] = -100
    out = m(x, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_padded_batch_equals_rows_alone(mixer: str) -> None:
    m, x = model(mixer), ids(3)
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    mask[1, 60:] = 0
    out = m(x, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(out.logits[0, 9:], m(x[:1, 9:]).logits[0], **CLOSE)
    torch.testing.assert_close(out.logits[1, :60], m(x[1:2, :60]).logits[0], **CLOSE)
    torch.testing.assert_close(out.logits[2], m(x[2:]).logits[0], **CLOSE)
    assert [state.shape for state in out.hidden_states] == [(3, 70, 32)] * 3


def test_packed_equals_separate(mixer: str) -> None:
    m, x = model(mixer), ids(1)
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        packed = m(x, **{name: torch.tensor([0, 30, 70])}).logits[0]
        torch.testing.assert_close(packed[30:], m(x[:, 30:]).logits[0], **CLOSE)


@pytest.mark.parametrize("flash_arguments", [False, True])
def test_padding_free_batches_of_transformers(mixer: str, flash_arguments: bool) -> None:
    m, x = model(mixer), ids(1)[0].tolist()
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_arguments)(
        [{"input_ids": part} for part in (x[:1], x[1:30], x[30:])]
    )
    packed = m(**batch).logits[0, 30:]
    torch.testing.assert_close(packed, m(torch.tensor([x[30:]])).logits[0], **CLOSE)


def test_plain_positions_change_nothing(mixer: str) -> None:
    m, x = model(mixer), ids(1)
    for positions in (torch.arange(70)[None], torch.arange(5, 75)[None]):
        assert torch.equal(m(x, position_ids=positions).logits, m(x).logits)


def test_generates_without_a_cache(mixer: str) -> None:
    m, x = model(mixer), ids(2, 5)
    expected = greedy(m, x, 6)
    m.generation_config.use_cache = False
    assert torch.equal(m.generate(x, max_new_tokens=6, do_sample=False), expected)
    embeds = m.model.embed_tokens(x)
    assert torch.equal(m.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False), expected[:, 5:])
    both = m.generate(x, inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(both[:, -6:], expected[:, 5:])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    mask = (torch.arange(8) >= 3).long().expand(2, -1)
    out = m.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, 8:], expected[:, 5:])
    assert m.generate(x, max_new_tokens=3, num_beams=3).shape == (2, 8)
    assert m.generate(x, max_new_tokens=3, do_sample=True).shape == (2, 8)


def test_generate_returns_maps_and_states(mixer: str) -> None:
    wanted = {
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
        "use_cache": False,
    }
    out = model(mixer).generate(ids(2, 5), max_new_tokens=2, do_sample=False, **wanted)
    assert [step[0].shape for step in out.attentions] == [(2, 4, 5, 5), (2, 4, 6, 6)]
    assert [step[0].shape for step in out.hidden_states] == [(2, 5, 32), (2, 6, 32)]


def test_beam_search_finds_at_least_the_greedy_sequence() -> None:
    m, x = model(), ids(1, 5)

    def score(y: Tensor) -> float:
        return float(m(y).logits.detach().log_softmax(-1)[:, 4:-1].gather(2, y[:, 5:, None]).sum())

    assert score(m.generate(x, max_new_tokens=4, num_beams=8, do_sample=False)) >= score(greedy(m, x, 4)) - 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_saves_and_loads(mixer: str, tied: bool, tmp_path: Path) -> None:
    m, x = model(mixer, tie_word_embeddings=tied, num_reflections=2), ids()
    m.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, PaTHForCausalLM)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(x).logits, m(x).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert isinstance(AutoModel.from_pretrained(tmp_path), PaTHModel)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.mixer == mixer
    assert config.num_reflections == 2


def test_checkpointing_gives_the_same_gradients(mixer: str) -> None:
    m, x = model(mixer).train(), ids()
    m(x, labels=x).loss.backward()
    plain = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    m.gradient_checkpointing_enable()
    m(x, labels=x).loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, m.parameters(), strict=True))


def test_attention_maps(mixer: str) -> None:
    m, x = model(mixer), ids()
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    maps = m(x, attention_mask=mask, output_attentions=True).attentions
    assert [a.shape for a in maps] == [(2, 4, 70, 70)] * 2
    sums = maps[0].sum(-1)
    torch.testing.assert_close(sums[0, :, 9:], torch.ones(4, 61), **CLOSE)
    assert bool((sums[0, :, :9] == 0).all())


def test_rope_is_llama(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theta = {"rope_type": "default", "rope_theta": 100.0}
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5, rope_parameters=theta)).eval()
    llama.save_pretrained(tmp_path)
    config = PaTHConfig(**{**llama.config.to_dict(), "mixer": "rope"})
    ours, info = PaTHForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(ours.eval()(ids()).logits, llama(ids()).logits, **CLOSE)


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,  # wavelengths on both sides of 32 / 1 and of 32 / 4
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rope_is_llama(scaling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameters = {"rope_theta": 100.0, **SCALINGS[scaling]}
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=parameters)).eval()
    llama.save_pretrained(tmp_path)
    config = PaTHConfig(**{**llama.config.to_dict(), "mixer": "rope"})
    ours = PaTHForCausalLM.from_pretrained(tmp_path, config=config).eval()
    torch.testing.assert_close(ours(ids()).logits, llama(ids()).logits, **CLOSE)
    ours.save_pretrained(tmp_path / "ours")
    again = PaTHForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(ids()).logits, ours(ids()).logits)


def test_recompute_is_told_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def watched(*inputs: Tensor, recompute: bool, **options: object) -> Tensor:
        told.append(recompute)
        return path_attention(*inputs, recompute=recompute, **options)

    monkeypatch.setattr(operator, "path_attention", watched)
    m = model()
    expected = m(ids(), use_cache=False).logits
    m.set_recompute(False)
    assert torch.equal(m(ids(), use_cache=False).logits, expected)
    m.set_recompute(True)
    parallel.prepare(m, Training(steps=1, batch_size=1, learning_rate=1.0, recompute_attention=False), None)
    m(ids(), use_cache=False)
    assert told == [True, True, False, False, False, False]
    with pytest.raises(ValueError, match="recompute: got 'no'; wanted True or False"):
        m.set_recompute("no")


def test_a_mixer_for_each_layer(tmp_path: Path) -> None:
    """A hybrid's layers are those of the plain models."""
    hybrid, path, rope = model(**HYBRID), model("path"), model("rope")
    assert hybrid.config.layer_types == ["path_attention", "full_attention"]
    states = {k: v for k, v in path.state_dict().items() if ".layers.0." in k}
    states |= {k: v for k, v in rope.state_dict().items() if ".layers.0." not in k}
    hybrid.load_state_dict(states)
    x = path.model.embed_tokens.weight[ids()] * 0 + rope.model.embed_tokens.weight[ids()]
    expected = rope.lm_head(rope.model.norm(rope.model.layers[1](path.model.layers[0](x))))
    torch.testing.assert_close(hybrid(ids()).logits, expected)
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids()).logits, hybrid(ids()).logits)


def test_output_bias_alone() -> None:
    attention = model(attention_bias=True, attention_output_bias=False).model.layers[0].self_attn
    assert attention.q_proj.bias is not None
    assert attention.o_proj.bias is None
    assert model(attention_bias=True).model.layers[0].self_attn.o_proj.bias is not None


def test_shapes_on_meta(mixer: str) -> None:
    with torch.device("meta"):
        m, x = model(mixer), torch.zeros(1, 70, dtype=torch.int64)
        out = m(x, attention_mask=torch.ones(1, 70), labels=x, output_hidden_states=True)
        packed = m(x, position_ids=torch.arange(70)[None])
    assert out.logits.is_meta
    assert out.logits.shape == packed.logits.shape == (1, 70, 50)
    assert out.loss.shape == ()


def test_half_precision_is_near_float32(mixer: str) -> None:
    m, x = model(mixer), ids()
    exact = m(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        autocast = m(x).logits
    for logits in (autocast, m.bfloat16()(x).logits):
        # Two layers of about ten roundings each, of half a unit of the last place.
        assert (logits - exact).norm() / exact.norm() < 20 * torch.finfo(torch.bfloat16).eps / 2


def test_no_engine_may_swap_the_attention() -> None:
    """With another attention on q, k and v the model would run, and be wrong without a word."""
    assert not PaTHForCausalLM._supports_attention_backend
    assert not PaTHForCausalLM._can_set_attn_implementation()
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        PaTHForCausalLM._from_config(PaTHConfig(**SHAPE), attn_implementation="sdpa")


def test_without_transformers_the_extra_is_named() -> None:
    for statement in ("from path_attention import PaTHConfig", "import path_attention.models"):
        code = f"import sys; sys.modules['transformers'] = None; import path_attention; {statement}"
        result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert "pip install 'path-attention[models]'" in result.stderr


def test_initial_values_after_loading_on_meta(tmp_path: Path) -> None:
    """What a checkpoint lacks must be initialised, not left as it came from the allocator."""
    model("rope").save_pretrained(tmp_path)
    config = PaTHConfig(mixer="path_fox", **SHAPE)
    loaded, info = PaTHForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert any("w_conv" in key for key in info["missing_keys"])
    attention = loaded.requires_grad_(False).model.layers[0].self_attn
    assert bool((attention.beta_proj.bias == 0).all())
    assert float(attention.w_conv.weight.abs().max()) <= attention.w_conv.bound
    assert float(attention.w_conv.weight.std()) > 0.1 * attention.w_conv.bound


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixer": "alibaba"}, "mixer: got 'alibaba'; wanted one of path, path_fox, rope, none"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim: got None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3; wanted a divisor of num_attention_heads, 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: got -1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
        ({"initializer_range": -1.0}, "initializer_range: got -1.0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: got 0"),
        ({"pad_token_id": 50}, "pad_token_id: got 50; wanted 0 to 49"),
        ({"pad_token_id": -1}, "pad_token_id: got -1"),
        ({"rope_theta": float("nan")}, "rope_theta: got nan"),
        ({"conv_size": -1}, "conv_size: got -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
        ({"mixer": "rope", "head_dim": 7}, "head_dim: got 7"),
        ({"mixer": "rope", "rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: got rope_type 'yarn'"),
        ({"mixer": "rope", "rope_scaling": {"type": "linear"}}, "rope_parameters.factor: got None"),
        ({"mixer": "rope", "rotary_scaling": {"rope_type": "su"}}, "rotary_scaling: got rope_type 'su'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: got partial_rotary_factor 0.5"),
        ({"layer_mixers": ["path"]}, "layer_mixers: got 1; wanted one for each of 2 layers"),
        ({"layer_mixers": ["rope", "rope"]}, "layer_mixers: got .*; wanted at least one 'path'"),
        ({"layer_mixers": ["path", "alibaba"]}, "mixer: got 'alibaba'"),
        ({"w_norm_eps": -1.0}, "w_norm_eps: got -1.0"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
    ],
)
def test_bad_configurations_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaTHConfig(**{**SHAPE, **fields})


def test_bad_calls_are_named() -> None:
    m, x = model(), ids()
    with pytest.raises(ValueError, match="input_ids: got both or neither"):
        m()
    with pytest.raises(ValueError, match="past_key_values: got object"):
        m(x, past_key_values=object())
    with pytest.raises(ValueError, match="cu_seq_lens_q: got one beside cu_seqlens"):
        m(x[:1], cu_seqlens=torch.tensor([0, 70]), cu_seq_lens_q=torch.tensor([0, 30, 70]))
    for positions in (torch.arange(69)[None], torch.arange(140).view(1, 140), torch.zeros(2, 70, 1)):
        with pytest.raises(ValueError, match=r"position_ids: got shape .*; wanted \(2, 70\)"):
            m(x, position_ids=positions)
    with pytest.raises(ValueError, match="position_ids: got list"):
        m(x, position_ids=list(range(70)))
    for shape in ((2, 71), (2, 1, 70, 70)):
        with pytest.raises(ValueError, match="attention_mask: got shape"):
            m(x, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="attention_mask: got padding beside cu_seqlens"):
        m(x[:1], attention_mask=torch.zeros(1, 70), cu_seqlens=torch.tensor([0, 70]))
