"""Conversion: from a pretrained RoPE model to PaTH, and between the formats of PaTH models."""

from path_attention.conversion.checkpoint import Checkpoint, find, is_rope, write
from path_attention.conversion.initialise import student_of
from path_attention.conversion.recipe import ConversionRecipe, load_conversion
from path_attention.conversion.run import convert, translate

__all__ = [
    "Checkpoint",
    "ConversionRecipe",
    "convert",
    "find",
    "is_rope",
    "load_conversion",
    "student_of",
    "translate",
    "write",
]
