"""Where this library meets others: serving many requests."""

from path_attention.integrations.batching import NewToken, generate_batch

__all__ = ["NewToken", "generate_batch"]
