"""Hugging Face models. Importing this package registers them with the Auto classes."""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"path_attention.models needs {error.name}, which is not installed: pip install 'path-attention[models]'",
        name=error.name,
    ) from error

from path_attention.models.cache_path import (
    LayerCache,
    PathCacheLayer,
    StaticPathCacheLayer,
    load_cache,
    save_cache,
)
from path_attention.models.configuration_path import PaTHConfig
from path_attention.models.modeling_path import PaTHForCausalLM, PaTHModel, PaTHPreTrainedModel

AutoConfig.register(PaTHConfig.model_type, PaTHConfig, exist_ok=True)
AutoModel.register(PaTHConfig, PaTHModel, exist_ok=True)
AutoModelForCausalLM.register(PaTHConfig, PaTHForCausalLM, exist_ok=True)

__all__ = [
    "LayerCache",
    "PaTHConfig",
    "PaTHForCausalLM",
    "PaTHModel",
    "PaTHPreTrainedModel",
    "PathCacheLayer",
    "StaticPathCacheLayer",
    "load_cache",
    "save_cache",
]
