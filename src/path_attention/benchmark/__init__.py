"""Time and memory of the operator beside other attentions, after a check that each computes what it says."""

from path_attention.benchmark.operator import run_operator_benchmark

__all__ = ["run_operator_benchmark"]
