"""Kernels for Hopper GPUs in Gluon: warp-specialised, fed by the copy engine."""
