"""Context parallelism: one sequence split over several processes."""

from path_attention.distributed.attention import path_attention_context_parallel
from path_attention.distributed.context import ContextParallel

__all__ = ["ContextParallel", "path_attention_context_parallel"]
