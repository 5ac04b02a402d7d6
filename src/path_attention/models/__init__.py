"""Hugging Face models. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from path_attention.models.configuration_path import PaTHConfig
from path_attention.models.modeling_path import PaTHForCausalLM, PaTHModel, PaTHPreTrainedModel

AutoConfig.register(PaTHConfig.model_type, PaTHConfig, exist_ok=True)
AutoModel.register(PaTHConfig, PaTHModel, exist_ok=True)
AutoModelForCausalLM.register(PaTHConfig, PaTHForCausalLM, exist_ok=True)

__all__ = ["PaTHConfig", "PaTHForCausalLM", "PaTHModel", "PaTHPreTrainedModel"]
