"""Which models can be converted: one table a family, of its tensors' names and ours, read in both directions.

``{n}`` stands for the number of a layer. What a configuration says is checked here too: these models are the families'
own functions with nothing left out, or they are refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from path_attention.checks import bad
from path_attention.models.configuration_path import PaTHConfig

_LAYER = "model.layers.{n}."


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: ``model_type`` of its config.json.
        architecture: its class for causal language models.
        names: name of a tensor there -> its name here.
        read: the fields of PaTHConfig that a configuration of the family means, as plain data.
        write: the family's configuration of one of ours; raises a ValueError for what it cannot say.
        dropped: tensors of old checkpoints that say nothing: the frequencies of RoPE, which follow from theta.
        depthwise: endings of our names whose tensors have a middle dimension of 1 there, as torch's Conv1d.
    """

    name: str
    architecture: str
    names: Mapping[str, str]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[PaTHConfig], dict[str, Any]]
    dropped: tuple[str, ...] = (_LAYER + "self_attn.rotary_emb.inv_freq",)
    depthwise: tuple[str, ...] = ()
    _back: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._back.update({ours: theirs for theirs, ours in self.names.items()})
        assert len(self._back) == len(self.names), "a table that is read in both directions names nothing twice"

    def ours(self, name: str) -> str | None:
        """Our name of a tensor of the family, None if it has no such tensor."""
        return _translate(self.names, name)

    def theirs(self, name: str) -> str | None:
        """The family's name of one of our tensors, None if it has no such tensor."""
        return _translate(self._back, name)

    def is_dropped(self, name: str) -> bool:
        return _numbered(name)[0] in self.dropped


def _numbered(name: str) -> tuple[str, str]:
    """model.layers.7.x -> model.layers.{n}.x and 7."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match is None:
        return name, ""
    return _LAYER + name[match.end() :], match.group(1)


def _translate(table: Mapping[str, str], name: str) -> str | None:
    pattern, number = _numbered(name)
    found = table.get(pattern)
    return None if found is None else found.replace("{n}", number)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _projections(kind: str, *letters: str) -> dict[str, str]:
    return _same(*(f"{_LAYER}self_attn.{letter}_proj.{kind}" for letter in letters))


# Everything but attention, which has one name in all families that descend from Llama.
_DECODER = _same(
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    _LAYER + "input_layernorm.weight",
    _LAYER + "post_attention_layernorm.weight",
    _LAYER + "mlp.gate_proj.weight",
    _LAYER + "mlp.up_proj.weight",
    _LAYER + "mlp.down_proj.weight",
)
_ATTENTION = _DECODER | _projections("weight", "q", "k", "v", "o")
_QK_NORM = _same(_LAYER + "self_attn.q_norm.weight", _LAYER + "self_attn.k_norm.weight")
# What our mixers have that no RoPE model has.
_MIXERS = _same(
    *(
        f"{_LAYER}self_attn.{name}"
        for name in (
            "w_proj.weight",
            "w_down_proj.weight",
            "w_up_proj.weight",
            "w_conv.weight",
            "beta_proj.weight",
            "beta_proj.bias",
            "gate_proj.weight",
            "gate_proj.bias",
        )
    )
)

# Fields with one name and one meaning in all configurations that descend from Llama's.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _read_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """What all of them have; a family adds its biases and norms."""
    window = config.get("sliding_window")
    windowed = config.get("layer_types") is None or "sliding_attention" in config["layer_types"]
    if window is not None and windowed and window < config["max_position_embeddings"]:
        raise bad(
            "sliding_window",
            window,
            "none: attention here sees everything before it. For sequences no longer than the window both are the "
            f"same: set max_position_embeddings to {window} in config.json to convert such a model for those",
        )
    for name, wanted in (("hidden_act", "silu"), ("mlp_bias", False)):
        if config.get(name, wanted) != wanted:
            raise bad(name, repr(config[name]), f"{wanted!r}, all that these models have")
    fields = {name: config[name] for name in _SHARED if config.get(name) is not None}
    if config.get("head_dim") is not None:
        fields["head_dim"] = config["head_dim"]
    rope = dict(config.get("rope_parameters") or {})
    fields["rope_theta"] = float(rope.pop("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") in (None, 1.0):
        rope.pop("partial_rotary_factor", None)
    if rope.get("rope_type", "default") != "default":
        fields["rotary_scaling"] = rope
    elif rope.keys() - {"rope_type"}:
        raise bad("rope_parameters", sorted(rope), "rope_theta alone beside rope_type 'default'")
    return fields


def _write_llama(config: PaTHConfig) -> dict[str, Any]:
    if set(config.mixers) != {"rope"}:
        raise bad("mixer", ", ".join(sorted(set(config.mixers))), "'rope' in all layers, which is what the family has")
    scaling = config.rotary_scaling or {"rope_type": "default"}
    return {
        **{name: getattr(config, name) for name in _SHARED},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        # Whoever reads the file with a transformers before version 5 looks for these.
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rotary_scaling,
    }


def _only(config: PaTHConfig, **wanted: Any) -> None:
    """Raise for the first field that has another value than the family's models have."""
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise bad(name, repr(getattr(config, name)), f"{value!r}, which is what the family has")


def _read_with_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    return _read_llama(config) | {"attention_bias": bool(config.get("attention_bias", False))}


def _write_with_biases(config: PaTHConfig) -> dict[str, Any]:
    _only(config, qk_norm=False, attention_output_bias=config.attention_bias)
    return _write_llama(config) | {"attention_bias": config.attention_bias, "mlp_bias": False}


def _write_mistral(config: PaTHConfig) -> dict[str, Any]:
    _only(config, qk_norm=False, attention_bias=False, attention_output_bias=False)
    return _write_llama(config) | {"sliding_window": None}


def _read_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return _read_llama(config) | {"attention_bias": True, "attention_output_bias": False}


def _write_qwen2(config: PaTHConfig) -> dict[str, Any]:
    _only(config, qk_norm=False, attention_bias=True, attention_output_bias=False)
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        raise bad("head_dim", config.head_dim, "hidden_size / num_attention_heads, which is what the family has")
    return _write_llama(config) | {"use_sliding_window": False, "sliding_window": None}


def _read_qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    return _read_with_biases(config) | {"qk_norm": True}


def _write_qwen3(config: PaTHConfig) -> dict[str, Any]:
    _only(config, qk_norm=True, attention_output_bias=config.attention_bias)
    written = _write_llama(config) | {"attention_bias": config.attention_bias}
    return written | {"use_sliding_window": False, "sliding_window": None}


def _read_own(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = PaTHConfig.from_dict(dict(config)).to_diff_dict()
    return {name: value for name, value in fields.items() if name not in ("architectures", "dtype")}


# flash-linear-attention's constants, which its configuration does not have: the rank of w and the taps of its
# convolution (layers/path_attn.py), and what is added to |w|^2 (modules, l2_norm).
FLA_RANK, FLA_CONV, FLA_NORM_EPS = 32, 3, 1e-6


def _read_fla(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, wanted in (("hidden_act", "swish"), ("attnres_block_size", None), ("elementwise_affine", True)):
        if config.get(name, wanted) != wanted:
            raise bad(name, repr(config[name]), f"{wanted!r}, all that these models have")
    hidden, gated = config["hidden_size"], bool(config.get("use_forget_gate", False))
    inner = config.get("intermediate_size")
    if inner is None:  # 2 / 3 of hidden_ratio times the width, up to the next multiple of 256
        inner = 256 * -(-int(hidden * (config.get("hidden_ratio") or 4) * 2 / 3) // 256)
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings")
    optional = ("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
    return {
        **{name: config[name] for name in (*shared, *optional) if config.get(name) is not None},
        "intermediate_size": inner,
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config.get("num_kv_heads") or config["num_heads"],
        "rms_norm_eps": config.get("norm_eps", 1e-6),
        "mixer": "path_fox" if gated else "path",
        "w_rank": FLA_RANK if config.get("use_low_rank_w", True) else None,
        "conv_size": FLA_CONV if config.get("use_w_shortconv", True) else 0,
        "w_norm_eps": FLA_NORM_EPS,
        "scale_gate": gated,
    }


def _write_fla(config: PaTHConfig) -> dict[str, Any]:
    gated = config.mixer == "path_fox"
    if set(config.mixers) not in ({"path"}, {"path_fox"}):
        raise bad("mixer", ", ".join(sorted(set(config.mixers))), "'path' or 'path_fox', one for all layers")
    _only(config, qk_norm=False, attention_bias=False, attention_output_bias=False, num_reflections=1)
    _only(config, w_norm_eps=FLA_NORM_EPS)
    if gated:
        _only(config, scale_gate=True)
    if config.w_rank not in (FLA_RANK, None):
        raise bad("w_rank", config.w_rank, f"{FLA_RANK} or None, which is what the family has")
    if config.conv_size not in (FLA_CONV, 0):
        raise bad("conv_size", config.conv_size, f"{FLA_CONV} or 0, which is what the family has")
    if config.hidden_size != config.num_attention_heads * (config.head_dim or 0):
        raise bad("head_dim", config.head_dim, "hidden_size / num_attention_heads, which is what the family has")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "initializer_range")
    optional = ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
    return {
        **{name: getattr(config, name) for name in (*shared, *optional)},
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "hidden_act": "swish",
        "norm_eps": config.rms_norm_eps,
        "use_forget_gate": gated,
        "use_low_rank_w": config.w_rank is not None,
        "use_w_shortconv": config.conv_size > 0,
    }


_FLA_NAMES = {
    "model.embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    **{
        _LAYER + theirs: _LAYER + ours
        for theirs, ours in {
            "attn_norm.weight": "input_layernorm.weight",
            "attn.q_proj.weight": "self_attn.q_proj.weight",
            "attn.k_proj.weight": "self_attn.k_proj.weight",
            "attn.v_proj.weight": "self_attn.v_proj.weight",
            "attn.o_proj.weight": "self_attn.o_proj.weight",
            "attn.w_proj.0.weight": "self_attn.w_down_proj.weight",
            "attn.w_proj.1.weight": "self_attn.w_up_proj.weight",
            "attn.w_proj.weight": "self_attn.w_proj.weight",
            "attn.w_conv1d.weight": "self_attn.w_conv.weight",
            "attn.bt_proj.weight": "self_attn.beta_proj.weight",
            "attn.bt_proj.bias": "self_attn.beta_proj.bias",
            "attn.g_proj.weight": "self_attn.gate_proj.weight",
            "attn.g_proj.bias": "self_attn.gate_proj.bias",
            "mlp_norm.weight": "post_attention_layernorm.weight",
            "mlp.gate_proj.weight": "mlp.gate_proj.weight",
            "mlp.up_proj.weight": "mlp.up_proj.weight",
            "mlp.down_proj.weight": "mlp.down_proj.weight",
        }.items()
    },
}

_BIASES = _projections("bias", "q", "k", "v", "o")

# RoPE models, which are teachers, by model_type. Llama 2 and 3, SmolLM2 and many others are "llama".
ROPE_FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", _ATTENTION | _BIASES, _read_with_biases, _write_with_biases),
        Family("mistral", "MistralForCausalLM", _ATTENTION, _read_llama, _write_mistral),
        Family(
            "qwen2", "Qwen2ForCausalLM", _ATTENTION | _projections("bias", "q", "k", "v"), _read_qwen2, _write_qwen2
        ),
        Family("qwen3", "Qwen3ForCausalLM", _ATTENTION | _BIASES | _QK_NORM, _read_qwen3, _write_qwen3),
    )
}
# Our own format; its "rope" models are teachers too.
OWN = Family(
    PaTHConfig.model_type, "PaTHForCausalLM", _ATTENTION | _BIASES | _QK_NORM | _MIXERS, _read_own, PaTHConfig.to_dict
)
FLA = Family(
    "path_attn",
    "PaTHAttentionForCausalLM",
    _FLA_NAMES,
    _read_fla,
    _write_fla,
    dropped=(),
    depthwise=("self_attn.w_conv.weight",),
)
FAMILIES = {**ROPE_FAMILIES, OWN.name: OWN, FLA.name: FLA}


def family(model_type: object) -> Family:
    """The family of a model_type.

    Raises:
        ValueError: naming those there are.
    """
    if model_type not in FAMILIES:
        raise bad("model_type", repr(model_type), f"one of {', '.join(FAMILIES)} (path_attn: flash-linear-attention)")
    return FAMILIES[str(model_type)]
