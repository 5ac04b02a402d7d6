"""Layers: the PaTH attention, the baselines, and the registry that a model picks its token mixer from."""

from path_attention.layers.decay import ALiBiAttention, ForgettingAttention
from path_attention.layers.mixers import build_mixer, mixer_names, register_mixer
from path_attention.layers.path import PaTHAttention, PaTHInputs
from path_attention.layers.short_convolution import ShortConvolution
from path_attention.layers.softmax import SoftmaxAttention, rotary_frequencies
from path_attention.layers.stick_breaking import StickBreakingAttention

__all__ = [
    "ALiBiAttention",
    "ForgettingAttention",
    "PaTHAttention",
    "PaTHInputs",
    "ShortConvolution",
    "SoftmaxAttention",
    "StickBreakingAttention",
    "build_mixer",
    "mixer_names",
    "register_mixer",
    "rotary_frequencies",
]
