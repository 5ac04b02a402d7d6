"""PaTH attention: position encoding by accumulated Householder transformations (arXiv 2505.16381)."""

from path_attention.ops import path_attention, path_attention_reference, path_attention_weights

__version__ = "0.1.0"

__all__ = ["path_attention", "path_attention_reference", "path_attention_weights"]
