"""Configuration of the PaTH language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from path_attention.checks import bad, check_integer, check_number
from path_attention.layers.mixers import build_mixer


@strict
class PaTHConfig(PreTrainedConfig):
    """A Llama-like decoder whose attention is chosen by ``mixer``.

    Fields that Llama has carry Llama's names and meaning. The defaults are the 760M model that the paper's 760M figures
    most likely come from (1536 wide, 24 layers, 24 heads of 64).

    Args:
        mixer: token mixer of every layer, a name of :func:`path_attention.layers.mixer_names`: ``path``, ``path_fox``
            (with forget gate), ``rope``, ``none`` (no position encoding), ``fox`` (forgetting attention),
            ``stick_breaking``, ``alibi``, or one registered by the user.
        w_rank: rank of the projection that makes w; None for full rank.
        conv_size: tokens of the causal convolution over w; 0 for none.
        num_reflections: transitions a token.
        qk_norm: RMS norm of every query and key head.
        rope_theta: base of the rotary encoding of ``rope``; ``rope_parameters``, where Llama has it, is read too.

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
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    use_cache: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    mixer: str = "path"
    w_rank: int | None = 32
    conv_size: int = 3
    num_reflections: int = 1
    qk_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._take_from_llama(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_own_fields()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"head_dim: got None; wanted a number, because hidden_size {self.hidden_size} is no multiple of "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_mixer()
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
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise bad("pad_token_id", self.pad_token_id, f"0 to {self.vocab_size - 1}, below vocab_size, or None")

    def _take_from_llama(self, kwargs: dict[str, Any]) -> None:
        """What a Llama configuration says in other words, and what it may say that these models cannot do."""
        rope = dict(kwargs.pop("rope_parameters", None) or {}) | dict(kwargs.pop("rope_scaling", None) or {})
        self.rope_theta = float(rope.get("rope_theta", self.rope_theta))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if self.mixer == "rope" and rope_type != "default":
            raise ValueError(f"rope_parameters: got rope_type {rope_type!r}; wanted 'default'")
        for name, value in (("hidden_act", "silu"), ("mlp_bias", False)):
            if kwargs.get(name, value) != value:
                raise ValueError(f"{name}: got {kwargs[name]!r}; wanted {value!r}, all that these models have")

    def _check_mixer(self) -> None:
        """Build the mixer once, without memory: it knows which fields do not fit it."""
        import torch

        with torch.device("meta"):
            build_mixer(self)

    @property
    def layer_types(self) -> list[str]:
        """What kind of cache each layer wants. A property: transformers allows only its own names in config.json."""
        return ["path_attention"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """The base class knows only its own layer types."""
