"""Checkpoints of every family: read with the same function, written back as they came, and never read half."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from path_attention.conversion import Checkpoint, ConversionRecipe, convert, find, is_rope, translate, write
from path_attention.conversion.families import FAMILIES, ROPE_FAMILIES
from path_attention.evaluation.generate import load
from path_attention.models import PaTHConfig, PaTHForCausalLM
from tests.conversion.teachers import SHAPE, TEACHERS, ids, save, teacher

# Two programs of the same float32 arithmetic; rounding of one may be another's in a few of the last bits.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(params=TEACHERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_every_family_has_its_own_function_here(name: str, tmp_path: Path) -> None:
    model = teacher(name)
    checkpoint = Checkpoint(save(model, tmp_path))
    torch.testing.assert_close(checkpoint.load().eval()(ids()).logits, model(ids()).logits, **CLOSE)


@torch.no_grad()
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Tensors, bit by bit, and what the configuration means."""
    model = teacher(name)
    source = save(model, tmp_path / "source")
    translate(source, tmp_path / "ours")
    back = translate(tmp_path / "ours", tmp_path / "back", to=model.config.model_type)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    again, info = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert type(again) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(ids()).logits, model(ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["path", "path_fox", "fox"])
def test_converted_saved_loaded_and_generating(name: str, mixer: str, tmp_path: Path) -> None:
    """Transitions that change almost nothing are almost those of attention without any: H = I - beta w w^T."""
    source = save(teacher(name), tmp_path / "source", max_shard_size="10KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    wanted = {"beta": 1e-6, "gate": (1e9, 1e9)}
    recipe = ConversionRecipe(mixer=mixer, initialisation=options(**wanted))
    convert(source, tmp_path / "target", recipe)
    converted, info = AutoModelForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert converted.config.mixer == mixer
    assert converted.config.tie_word_embeddings == ("tied" in name or name == "smollm2")
    without = PaTHForCausalLM(PaTHConfig(**{**Checkpoint(source).fields, "mixer": "none"})).eval()
    without.load_state_dict(converted.state_dict(), strict=False)
    torch.testing.assert_close(converted.eval()(ids()).logits, without(ids()).logits, rtol=0, atol=2e-3)
    out = converted.generate(ids(2, 10), max_new_tokens=5, do_sample=False)
    assert torch.equal(out, converted.generate(ids(2, 10), max_new_tokens=5, do_sample=False, use_cache=False))


def options(**fields: object):  # type: ignore[no-untyped-def]
    from path_attention.conversion.recipe import Initialisation

    return Initialisation(**fields)  # type: ignore[arg-type]


def test_tables_are_read_in_both_directions() -> None:
    for family in FAMILIES.values():
        for theirs, ours in family.names.items():
            assert family.ours(theirs.replace("{n}", "17")) == ours.replace("{n}", "17")
            assert family.theirs(ours.replace("{n}", "17")) == theirs.replace("{n}", "17")
        assert family.ours("model.layers.0.self_attn.rotary.weight") is None
    assert set(ROPE_FAMILIES) == {"llama", "mistral", "qwen2", "qwen3"}


def test_tokenizer_and_generation_config_go_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    source = save(teacher("llama"), tmp_path / "source")
    words = {"<s>": 1, "</s>": 2, "a": 3, "b": 4, "<unk>": 0}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(source)
    settings = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.5, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# A teacher\n")
    convert(source, tmp_path / "target", ConversionRecipe())
    _, encode, decode = load(tmp_path / "target")
    assert encode("a") == tokenizer.encode("a")
    assert decode([3]) == "a"
    assert (tmp_path / "target" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").generation_config.temperature == 0.5
    assert json.loads((tmp_path / "target" / "generation_config.json").read_text()) == settings
    card = (tmp_path / "target" / "README.md").read_text()
    assert "license: mit" in card
    assert "Nothing was trained" in card


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    source = save(teacher("qwen2").bfloat16(), tmp_path / "source")
    convert(source, tmp_path / "target", ConversionRecipe())
    assert {x.dtype for x in load_file(tmp_path / "target/model.safetensors").values()} == {torch.bfloat16}
    convert(source, tmp_path / "float", ConversionRecipe(dtype="float32"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "float").dtype == torch.float32


def test_frequencies_in_old_checkpoints_are_no_weights(tmp_path: Path) -> None:
    source = save(teacher("llama"), tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    Checkpoint(source).load()


Change = Callable[[dict[str, Tensor]], object]
_KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop(_KEY), rf"tensor {_KEY} is missing"),
        (lambda x: x.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda x: x.update({_KEY: x[_KEY][:-1]}), rf"tensor {_KEY}: got shape \(15, 32\); wanted \(16, 32\)"),
        (lambda x: x.update({_KEY: x[_KEY].int()}), rf"tensor {_KEY}: got dtype torch.int32"),
        (lambda x: x[_KEY][3].fill_(float("nan")), rf"tensor {_KEY}: got values that are not finite"),
        (lambda x: x.update({"model.extra.weight": torch.ones(3)}), "got tensor model.extra.weight, which a llama"),
        (
            lambda x: x.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}),
            "got tensor model.layers.2.mlp.up_proj.weight, which a llama of this config lacks",
        ),
        (
            lambda x: x.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "got tensor model.layers.0.self_attn.q_proj.bias, which a llama of this config lacks",
        ),
    ],
)
def test_altered_tensors_are_named(change: Change, message: str, tmp_path: Path) -> None:
    source = save(teacher("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target", ConversionRecipe())
    assert not (tmp_path / "target").exists()  # so that the mended source finds nothing of another there


def test_a_tied_head_that_is_not_the_embeddings_is_named(tmp_path: Path) -> None:
    source = save(teacher("smollm2"), tmp_path)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    Checkpoint(source).load()
    save_file({**tensors, "lm_head.weight": torch.ones(50, 32)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight is not the embeddings"):
        Checkpoint(source).load()


def test_broken_files_are_named(tmp_path: Path) -> None:
    source = save(teacher("llama"), tmp_path / "source", max_shard_size="10KB")
    shard = sorted(source.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    for broken in (whole[:-10], whole[:5], b""):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{shard.name}: cut off, or no safetensors file"):
            Checkpoint(source)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: missing; model.safetensors.index.json names it"):
        Checkpoint(source)
    shard.write_bytes(whole)
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for change, message in (
        ({"model.norm.bias": shard.name}, "tensor model.norm.bias is in no shard"),
        ({"model.norm.weight": None}, "tensor model.norm.weight is not in model.safetensors.index.json"),
    ):
        names = {key: file for key, file in (good["weight_map"] | change).items() if file is not None}
        index.write_text(json.dumps({**good, "weight_map": names}))
        with pytest.raises(ValueError, match=message):
            Checkpoint(source)
    for text, message in (("{", "not valid JSON"), ("[]", "got list; wanted an object"), ("{}", "wanted a weight_map")):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"index.json: {message}"):
            Checkpoint(source)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="no weights here"):
        Checkpoint(source)
    for text, message in (("{", "not valid JSON"), ("[]", "got list; wanted an object")):
        (source / "config.json").write_text(text)
        for read in (Checkpoint, is_rope):
            with pytest.raises(ValueError, match=rf"config.json: {message}"):
                read(source)


@pytest.mark.parametrize("text", ["{", "[]", '{"cache_implementation": "none of them"}'])
def test_a_broken_generation_config_is_named_before_any_training(text: str, tmp_path: Path) -> None:
    source = save(teacher("llama"), tmp_path / "source")
    (source / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        convert(source, tmp_path / "target", ConversionRecipe())
    assert not (tmp_path / "target").exists()


def test_unknown_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model_type: got 'gpt2'; wanted one of llama, mistral, qwen2, qwen3"):
        Checkpoint(tmp_path / "gpt2")
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        find(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor to be had"):
        find("nobody/has-such-a-model")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'dynamic'"),
    ],
)
def test_what_our_models_cannot_be_is_refused(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    save(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **fields})), tmp_path)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_windows_are_refused_unless_they_see_everything(tmp_path: Path) -> None:
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=128))
    with pytest.raises(ValueError, match="sliding_window: got 128; wanted none"):
        Checkpoint(save(model, tmp_path / "narrow"))
    model.config.max_position_embeddings = 128
    Checkpoint(save(model, tmp_path / "wide"))


def test_what_a_family_cannot_say_is_refused(tmp_path: Path) -> None:
    def ours(**fields: object) -> PaTHForCausalLM:
        return PaTHForCausalLM(PaTHConfig(**{**SHAPE, "mixer": "rope", **fields}))

    for model, to, message in (
        (ours(mixer="path"), "llama", "mixer: got path; wanted 'rope' in all layers"),
        (ours(qk_norm=True), "llama", "qk_norm: got True"),
        (ours(), "qwen3", "qk_norm: got False"),
        (ours(attention_bias=True), "mistral", "attention_bias: got True"),
        (ours(attention_bias=True), "qwen2", "attention_output_bias: got True"),
        (ours(), "path_attn", "mixer: got rope"),
        (ours(mixer="path"), "path_attn", "w_norm_eps: got 0.0; wanted 1e-06"),
        (ours(mixer="path", w_norm_eps=1e-6, w_rank=8), "path_attn", "w_rank: got 8"),
        (ours(mixer="path", w_norm_eps=1e-6, conv_size=4), "path_attn", "conv_size: got 4"),
        (ours(mixer="path_fox", w_norm_eps=1e-6), "path_attn", "scale_gate: got False"),
        (ours(mixer="path", num_reflections=2, w_norm_eps=1e-6), "path_attn", "num_reflections: got 2"),
        (ours(), "gpt2", "model_type: got 'gpt2'"),
    ):
        with pytest.raises(ValueError, match=message):
            write(model, tmp_path / "target", to=to)
        assert not (tmp_path / "target").exists()


def test_a_model_is_never_overwritten(tmp_path: Path) -> None:
    source = save(teacher("llama"), tmp_path / "source")
    with pytest.raises(FileExistsError, match="holds a model already"):
        translate(source, source, to="path_attention")
    with pytest.raises(ValueError, match="wanted another format"):
        translate(source, tmp_path / "target", to="llama")
    translate(source, tmp_path / "ours")
    PaTHForCausalLM(PaTHConfig(**SHAPE)).save_pretrained(tmp_path / "path")
    with pytest.raises(ValueError, match="wanted a RoPE model, got one with path"):
        convert(tmp_path / "path", tmp_path / "target", ConversionRecipe())
    convert(tmp_path / "ours", tmp_path / "target", ConversionRecipe())  # our own rope models are teachers too


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_files_of_others_are_not_overwritten(name: str, tmp_path: Path) -> None:
    """A folder with notes in it will do, but for those in a place where the model has something."""
    source, target = save(teacher("llama"), tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / name).write_text("mine")
    for convert_it in (lambda: convert(source, target, ConversionRecipe()), lambda: translate(source, target)):
        with pytest.raises(FileExistsError, match=f"{name}: exists, and would be overwritten"):
            convert_it()
    assert {file.name: file.read_text() for file in target.iterdir()} == {"notes.txt": "mine", name: "mine"}
    # Cut off between two files: what is there is our own, and so is the folder they came from.
    (target / "partial-0").mkdir()
    translate(source, target)
    assert (target / "notes.txt").read_text() == "mine"
    assert not list(target.glob("partial-*"))
    PaTHForCausalLM.from_pretrained(target)


def test_a_target_that_is_a_file_is_named(tmp_path: Path) -> None:
    source = save(teacher("llama"), tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "target"):
        with pytest.raises(FileExistsError, match="file: a file; wanted a folder"):
            convert(source, target, ConversionRecipe())
