"""PaTH attention: position encoding by accumulated Householder transformations (arXiv 2505.16381)."""

from typing import TYPE_CHECKING, Any

from path_attention.cache import PathCache
from path_attention.layers import PaTHAttention
from path_attention.ops import (
    path_attention,
    path_attention_reference,
    path_attention_weights,
    unsupported_reason,
)

if TYPE_CHECKING:
    from path_attention.models import PaTHConfig, PaTHForCausalLM, PaTHModel

__version__ = "0.1.0"

__all__ = [
    "PaTHAttention",
    "PaTHConfig",
    "PaTHForCausalLM",
    "PaTHModel",
    "PathCache",
    "path_attention",
    "path_attention_reference",
    "path_attention_weights",
    "unsupported_reason",
]

_MODELS = ("PaTHConfig", "PaTHForCausalLM", "PaTHModel")


def __getattr__(name: str) -> Any:
    """The Hugging Face classes, imported on first use: the operator and the layer need torch alone."""
    if name not in _MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from path_attention import models

    return getattr(models, name)
