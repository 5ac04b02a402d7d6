"""Context parallelism, one sequence split over several processes; tensor parallelism, layers shared by several."""

from path_attention.distributed.attention import path_attention_context_parallel
from path_attention.distributed.context import ContextParallel
from path_attention.distributed.tensor import tensor_parallel

__all__ = ["ContextParallel", "path_attention_context_parallel", "tensor_parallel"]
