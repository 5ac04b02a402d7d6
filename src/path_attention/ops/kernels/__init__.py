"""Triton kernels for the operator's stages on CUDA. docs/kernels.md lists what each reads and writes."""
