"""Layers: the PaTH attention, the baselines, and the registry that a model picks its token mixer from."""

from path_attention.layers.mixers import build_mixer, mixer_names, register_mixer
from path_attention.layers.path import PaTHAttention, PaTHInputs
from path_attention.layers.short_convolution import ShortConvolution
from path_attention.layers.softmax import SoftmaxAttention

__all__ = [
    "PaTHAttention",
    "PaTHInputs",
    "ShortConvolution",
    "SoftmaxAttention",
    "build_mixer",
    "mixer_names",
    "register_mixer",
]
