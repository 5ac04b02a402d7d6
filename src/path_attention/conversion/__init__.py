"""Conversion: from a pretrained RoPE model to PaTH, and between PaTH's formats."""
