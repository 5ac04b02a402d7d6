"""Configuration of the PaTH language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from path_attention.checks import bad, check_integer, check_number
from path_attention.layers.attention import Attention
from path_attention.layers.mixers import build_mixer
from path_attention.layers.softmax import check_rotary_scaling


@strict
class PaTHConfig(PreTrainedConfig):
    """A Llama-like decoder whose attention is chosen by ``mixer``.

    Fields that Llama has carry Llama's names and meaning. The defaults are the 760M model that the paper's 760M figures
    most likely come from (1536 wide, 24 layers, 24 heads of 64).

    Args:
        mixer: token mixer of every layer, a name of :func:`path_attention.layers.mixer_names`: ``path``, ``path_fox``
            (with forget gate), ``rope``, ``none`` (no position encoding), ``fox`` (forgetting attention),
            ``stick_breaking``, ``alibi``, or one registered by the user.
        layer_mixers: a mixer for each layer, for hybrids; ``mixer`` must be one of them. None: ``mixer`` in all.
        w_rank: rank of the projection that makes w; None for full rank.
        conv_size: tokens of the causal convolution over w; 0 for none.
        num_reflections: transitions a token.
        qk_norm: RMS norm of every query and key head.
        w_norm_eps, scale_gate: conventions of flash-linear-attention's models, see
            :class:`path_attention.layers.PaTHAttention`.
        rope_theta: base of the rotary encoding of ``rope``; ``rope_parameters``, where Llama has it, is read too.
        rotary_scaling: scaled frequencies of ``rope``, see :func:`path_attention.layers.rotary_frequencies`.
        attention_bias: biases of the q, k and v projections.
        attention_output_bias: bias of the output projection; None: as attention_bias, which Llama means by it.

    Raises:
        ValueError: naming the field, what was given and what is wanted.
    """

    model_type = "path_attention"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads a plain class attribute)

    vocab_size: int = 32000
    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    rope_theta: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    mixer: str = "path"
    layer_mixers: list[str] | None = None
    w_rank: int | None = 32
    conv_size: int = 3
    num_reflections: int = 1
    qk_norm: bool = False
    w_norm_eps: float = 0.0
    scale_gate: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._take_from_llama(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        self._check_own_fields()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"head_dim: got None; wanted a number, because hidden_size {self.hidden_size} is no multiple of "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_mixers()
        super().__post_init__(**kwargs)

    def _check_own_fields(self) -> None:
        """Those that the mixer does not check, or knows by other names."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings"):
            check_integer(name, getattr(self, name), 1)
        heads = self.num_key_value_heads
        assert heads is not None
        if heads < 1 or self.num_attention_heads % heads:
            wanted = f"a divisor of num_attention_heads, {self.num_attention_heads}"
            raise bad("num_key_value_heads", heads, wanted)
        for name in ("rms_norm_eps", "initializer_range"):
            check_number(name, getattr(self, name), zero=True)
        check_number("rope_theta", self.rope_theta, zero=False)
        if self.layer_mixers is not None:
            if len(self.layer_mixers) != self.num_hidden_layers:
                raise bad(
                    "layer_mixers", f"{len(self.layer_mixers)}", f"one for each of {self.num_hidden_layers} layers"
                )
            if self.mixer not in self.layer_mixers:
                raise bad("layer_mixers", self.layer_mixers, f"at least one {self.mixer!r}, which is the mixer")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise bad("pad_token_id", self.pad_token_id, f"0 to {self.vocab_size - 1}, below vocab_size, or None")

    def _take_from_llama(self, kwargs: dict[str, Any]) -> None:
        """What a Llama configuration says in other words, and what it may say that these models cannot do."""
        rope = dict(kwargs.pop("rope_parameters", None) or {}) | dict(kwargs.pop("rope_scaling", None) or {})
        self.rope_theta = float(rope.get("rope_theta", self.rope_theta))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default" and "rope" in self.mixers:
            self.rotary_scaling = {key: x for key, x in rope.items() if key not in ("type", "rope_theta")}
            self.rotary_scaling["rope_type"] = rope_type
            check_rotary_scaling(self.rotary_scaling, "rope_parameters")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise bad("rope_parameters", f"partial_rotary_factor {rope['partial_rotary_factor']}", "1")
        for name, value in (("hidden_act", "silu"), ("mlp_bias", False)):
            if kwargs.get(name, value) != value:
                raise ValueError(f"{name}: got {kwargs[name]!r}; wanted {value!r}, all that these models have")

    def _check_mixers(self) -> dict[str, Attention]:
        """Build each mixer once, without memory: it knows which fields do not fit it."""
        import torch

        with torch.device("meta"):
            return {name: build_mixer(self, name) for name in dict.fromkeys(self.mixers)}

    @property
    def mixers(self) -> list[str]:
        """The mixer of every layer."""
        return [self.mixer] * self.num_hidden_layers if self.layer_mixers is None else self.layer_mixers

    @property
    def layer_types(self) -> list[str]:
        """What kind of cache each layer wants. A property: transformers allows only its own names in config.json."""
        built = self._check_mixers()
        return [built[name].cache_type for name in self.mixers]

    def validate_layer_type(self) -> None:
        """The base class knows only its own layer types."""
