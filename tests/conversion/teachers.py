"""Randomly initialised checkpoints of every family, small enough to be converted in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large, so that greedy decoding does not hang on ties
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

Make = Callable[[], PreTrainedModel]


def _make(config: type, model: type, **fields: Any) -> Make:
    return lambda: model(config(**{**SHAPE, **fields}))


# What each is there for: all attention biases; another head_dim than hidden / heads; grouped, single and equal key
# heads; tied and untied embeddings; scaled frequencies; an odd number of layers.
TEACHERS: dict[str, Make] = {
    "llama": _make(LlamaConfig, LlamaForCausalLM),
    "llama, biases, tied": _make(LlamaConfig, LlamaForCausalLM, attention_bias=True, tie_word_embeddings=True),
    "llama 3": _make(LlamaConfig, LlamaForCausalLM, rope_parameters=LLAMA3, num_key_value_heads=1, rms_norm_eps=1e-5),
    "smollm2": _make(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=True, num_key_value_heads=4),
    "mistral": _make(MistralConfig, MistralForCausalLM, sliding_window=None, head_dim=16, num_hidden_layers=3),
    "qwen2": _make(Qwen2Config, Qwen2ForCausalLM, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2, tied": _make(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True, num_key_value_heads=1),
    "qwen3": _make(Qwen3Config, Qwen3ForCausalLM, head_dim=16),
    "qwen3, biases, tied": _make(
        Qwen3Config, Qwen3ForCausalLM, head_dim=8, attention_bias=True, tie_word_embeddings=True
    ),
}


def teacher(name: str) -> PreTrainedModel:
    """One of :data:`TEACHERS`, with biases and norms that are not all 0 and 1, as they begin."""
    torch.manual_seed(0)
    model = TEACHERS[name]().eval()
    for key, parameter in model.named_parameters():
        if "norm" in key or "bias" in key:
            nn.init.normal_(parameter, float("norm" in key), 0.3)
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def ids(batch: int = 2, length: int = 70) -> torch.Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(1))
