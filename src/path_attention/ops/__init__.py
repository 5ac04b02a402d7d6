"""The PaTH operator: public function, oracle, and the algorithm behind them."""

from path_attention.ops.path_attention import path_attention, unsupported_reason
from path_attention.ops.reference import path_attention_reference, path_attention_weights

__all__ = ["path_attention", "path_attention_reference", "path_attention_weights", "unsupported_reason"]
