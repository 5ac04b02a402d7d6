"""Token mixers by name: one registry, so that a new one needs no new model.

A mixer is built from a configuration with the fields of :class:`path_attention.models.PaTHConfig` and is a module with
``forward(hidden_states, attention_mask=None, cu_seqlens=None)`` and ``attention_weights`` of the same arguments.
"""

from collections.abc import Callable
from typing import Any

from path_attention.layers.attention import Attention
from path_attention.layers.decay import ALiBiAttention, ForgettingAttention
from path_attention.layers.path import PaTHAttention
from path_attention.layers.softmax import SoftmaxAttention
from path_attention.layers.stick_breaking import StickBreakingAttention

Builder = Callable[[Any], Attention]
_BUILDERS: dict[str, Builder] = {}


def register_mixer(name: str, builder: Builder) -> None:
    """Make ``name`` a value of the configuration's ``mixer``.

    Raises:
        ValueError: the name is taken.
    """
    if name in _BUILDERS:
        raise ValueError(f"name: got {name!r}, which is registered already; wanted a new one")
    _BUILDERS[name] = builder


def mixer_names() -> tuple[str, ...]:
    """The registered names, in order of registration."""
    return tuple(_BUILDERS)


def build_mixer(config: Any, name: str | None = None) -> Attention:
    """The mixer ``name``, by default the one that ``config.mixer`` names.

    Raises:
        ValueError: no such mixer, or fields that do not fit it.
    """
    name = config.mixer if name is None else name
    if name not in _BUILDERS:
        raise ValueError(f"mixer: got {name!r}; wanted one of {', '.join(_BUILDERS)}")
    return _BUILDERS[name](config)


def _shared(config: Any) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "qk_norm": config.qk_norm,
        "norm_eps": config.rms_norm_eps,
        "bias": config.attention_bias,
        "output_bias": config.attention_output_bias,
    }


def _path(config: Any, use_forget_gate: bool) -> PaTHAttention:
    return PaTHAttention(
        **_shared(config),
        w_rank=config.w_rank,
        conv_size=config.conv_size,
        num_reflections=config.num_reflections,
        use_forget_gate=use_forget_gate,
        scale_gate=config.scale_gate,
        w_norm_eps=config.w_norm_eps,
    )


def _rope(config: Any) -> SoftmaxAttention:
    return SoftmaxAttention(**_shared(config), rope_theta=config.rope_theta, rotary_scaling=config.rotary_scaling)


register_mixer("path", lambda config: _path(config, use_forget_gate=False))
register_mixer("path_fox", lambda config: _path(config, use_forget_gate=True))
register_mixer("rope", _rope)
register_mixer("none", lambda config: SoftmaxAttention(**_shared(config), rope_theta=None))
register_mixer("fox", lambda config: ForgettingAttention(**_shared(config)))
register_mixer("stick_breaking", lambda config: StickBreakingAttention(**_shared(config)))
register_mixer("alibi", lambda config: ALiBiAttention(**_shared(config)))
