"""generate() with a cache equals generate() without one, in every mode; what can be done with a cache, and what not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from path_attention.cache import CacheError
from path_attention.layers import mixer_names
from path_attention.models import PaTHForCausalLM, load_cache, save_cache
from tests.models.test_modeling import CLOSE, ids, model

# All mixers, PaTH with everything at once, and PaTH before RoPE.
KINDS = (*mixer_names(), "two reflections", "hybrid")


@pytest.fixture(params=KINDS)
def m(request: pytest.FixtureRequest) -> PaTHForCausalLM:
    if request.param == "two reflections":
        return model("path_fox", num_reflections=2, conv_size=4, w_rank=None, qk_norm=True)
    if request.param == "hybrid":
        return model("path_fox", layer_mixers=["path_fox", "rope"])
    return model(request.param)


@pytest.fixture
def path() -> PaTHForCausalLM:
    return model("path_fox")


def both(m: PaTHForCausalLM, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Tokens with a cache and without one."""
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(m.generate(x, use_cache=use_cache, **{"do_sample": False, **options}))
    return found[0], found[1]


# 140: beyond the 96 tokens at which the first leaf is folded, so that steps meet open and folded tokens.
@pytest.mark.parametrize("length", [5, 140])
def test_greedy(m: PaTHForCausalLM, length: int) -> None:
    cached, plain = both(m, ids(2, length), max_new_tokens=20)
    assert torch.equal(cached, plain)


def test_sampling(m: PaTHForCausalLM) -> None:
    cached, plain = both(m, ids(2, 90), max_new_tokens=20, do_sample=True, num_return_sequences=2)
    assert torch.equal(cached, plain)


def test_beam_search(m: PaTHForCausalLM) -> None:
    cached, plain = both(m, ids(2, 90), max_new_tokens=12, num_beams=3)
    assert torch.equal(cached, plain)


def test_assisted_generation(m: PaTHForCausalLM) -> None:
    x = ids(1, 90)
    expected = m.generate(x, max_new_tokens=25, do_sample=False, use_cache=False)
    torch.manual_seed(1)
    helper = PaTHForCausalLM(m.config).eval()  # guesses wrong nearly always
    assert torch.equal(m.generate(x, max_new_tokens=25, do_sample=False, assistant_model=helper), expected)
    assert torch.equal(m.generate(x, max_new_tokens=25, do_sample=False, assistant_model=m), expected)
    repeated = x.repeat(1, 2)  # has something to look up
    expected = m.generate(repeated, max_new_tokens=25, do_sample=False, use_cache=False)
    assert torch.equal(m.generate(repeated, max_new_tokens=25, do_sample=False, prompt_lookup_num_tokens=5), expected)


@pytest.mark.parametrize("static", [False, True])
def test_left_padding_is_as_if_absent(m: PaTHForCausalLM, static: bool) -> None:
    x = ids(3, 120)
    mask = torch.ones_like(x)
    mask[0, :100], mask[1, :7] = 0, 0
    options = {"cache_implementation": "static"} if static else {}
    out = m.generate(x, attention_mask=mask, max_new_tokens=20, do_sample=False, **options)
    for row, start in enumerate((100, 7, 0)):
        alone = m.generate(x[row : row + 1, start:], max_new_tokens=20, do_sample=False, use_cache=False)
        assert torch.equal(out[row, start:], alone[0])


def test_static_cache(m: PaTHForCausalLM) -> None:
    x = ids(2, 90)
    expected = m.generate(x, max_new_tokens=20, do_sample=False, use_cache=False)
    for _ in range(2):  # the second call takes the first one's memory again
        assert torch.equal(m.generate(x, max_new_tokens=20, do_sample=False, cache_implementation="static"), expected)
    cached, plain = (
        m.generate(x, max_new_tokens=10, do_sample=False, num_beams=2, **options)
        for options in ({"cache_implementation": "static"}, {"use_cache": False})
    )
    assert torch.equal(cached, plain)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["path_fox", "rope", "hybrid"])
def test_compiled_generation_in_one_graph(mixer: str) -> None:
    m = model("path", layer_mixers=["path", "rope"]) if mixer == "hybrid" else model(mixer)
    x = ids(2, 90)
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    expected = m.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=False)
    torch.compiler.reset()
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = m.generate(
            x,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            cache_implementation="static",
            compile_config=config,
        )
    assert torch.equal(out, expected)


def test_prefill_in_chunks(m: PaTHForCausalLM) -> None:
    x = ids(2, 150)
    expected = m.generate(x, max_new_tokens=10, do_sample=False, use_cache=False)
    assert torch.equal(m.generate(x, max_new_tokens=10, do_sample=False, prefill_chunk_size=40), expected)


def test_embeddings_as_prompt(m: PaTHForCausalLM) -> None:
    x = ids(2, 20)
    expected = m.generate(x, max_new_tokens=6, do_sample=False, use_cache=False)[:, 20:]
    assert torch.equal(m.generate(inputs_embeds=m.model.embed_tokens(x), max_new_tokens=6, do_sample=False), expected)


@torch.no_grad()
def test_logits_of_any_split(m: PaTHForCausalLM) -> None:
    x = ids(2, 170)
    expected = m(x).logits
    cache, outs = None, []
    for start, end in ((0, 33), (33, 34), (34, 110), (110, 111), (111, 170)):
        out = m(x[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outs.append(out.logits)
    torch.testing.assert_close(torch.cat(outs, 1), expected, **CLOSE)
    assert cache.get_seq_length() == 170


@torch.no_grad()
def test_crop_repeat_select_and_padding_inside(m: PaTHForCausalLM) -> None:
    x = ids(2, 150)
    mask = torch.ones_like(x)
    mask[1, :20], mask[0, 130:135] = 0, 0
    expected = m(x, attention_mask=mask).logits
    cache = m(x[:, :128], attention_mask=mask[:, :128], use_cache=True).past_key_values
    m(x[:, 5:25], attention_mask=torch.cat([mask[:, :128], mask[:, 5:25]], 1), past_key_values=cache)
    cache.crop(-20)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    x, mask, expected = (y[[1, 0]] for y in (x, mask, expected))
    out = m(x[:, 128:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(out[0], expected[0, 128:], **CLOSE)
    real = mask[1, 128:] == 1
    torch.testing.assert_close(out[1, real], expected[1, 128:][real], **CLOSE)


@torch.no_grad()
def test_a_saved_cache_goes_on(m: PaTHForCausalLM, tmp_path: Path) -> None:
    x = ids(2, 130)
    expected = m(x).logits[:, 110:]
    cache = m(x[:, :110], use_cache=True).past_key_values
    save_cache(cache, tmp_path / "cache.safetensors")
    loaded = load_cache(m.config, tmp_path / "cache.safetensors")
    torch.testing.assert_close(m(x[:, 110:], past_key_values=loaded).logits, expected, **CLOSE)
    assert loaded.get_seq_length() == 130
    out = m.generate(torch.cat([x, x[:, :1]], 1), past_key_values=loaded, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 134)
    one_layer = {"num_hidden_layers": 1, "layer_mixers": None}
    with pytest.raises(CacheError, match="file: got"):
        load_cache(type(m.config)(**{**m.config.to_dict(), **one_layer}), tmp_path / "cache.safetensors")


@torch.no_grad()
def test_what_does_not_go_with_a_cache_is_named(path: PaTHForCausalLM) -> None:
    x = ids(2, 70)
    cache = path(x, use_cache=True).past_key_values
    for call, message in (
        (lambda: path(x[:1], past_key_values=cache), "past_key_values: got a cache of 2 sequences; wanted 1"),
        (lambda: path(x, past_key_values=DynamicCache()), "past_key_values: got 0 layers; wanted 2"),
        (
            lambda: path(x, past_key_values=DynamicCache(config=model("rope").config)),
            "past_key_values: got layers of DynamicLayer",
        ),
        (lambda: path(x, past_key_values=cache, cu_seqlens=torch.tensor([0, 70])), "cu_seqlens: got"),
        (lambda: path(x[:1], past_key_values=cache, cu_seqlens=torch.tensor([0, 70])), "got a cache of 2 sequences"),
        (lambda: path(x, past_key_values=cache, output_attentions=True), "output_attentions: got True"),
        (lambda: path(x, attention_mask=torch.ones(2, 70), past_key_values=cache), "attention_mask: got shape"),
        (lambda: cache.crop(-71), "tokens_to_remove: got -71; wanted at most the 70"),
        (lambda: cache.crop(5), "tokens_to_remove: got 5; wanted a negative number"),
        (lambda: model("rope")(x, past_key_values=cache), "past_key_values: got a PaTH cache"),
        (lambda: path.double()(x, past_key_values=cache), "q: got dtype torch.float64; wanted torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    path.float()
    torch.testing.assert_close(
        path(x[:, :5], past_key_values=cache).logits, path(torch.cat([x, x[:, :5]], 1)).logits[:, 70:], **CLOSE
    )
    static = StaticCache(config=path.config, max_cache_len=72)
    path(x, past_key_values=static)
    with pytest.raises(ValueError, match="q: got 3 tokens behind 70; wanted 72 in all: the cache is full"):
        path(x[:, :3], past_key_values=static)
    torch.testing.assert_close(
        path(x[:, :2], past_key_values=static).logits, path(torch.cat([x, x[:, :2]], 1)).logits[:, 70:], **CLOSE
    )
