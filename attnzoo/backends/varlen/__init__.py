"""Backends that call kernels for packed sequences of varying lengths (varlen): FlashAttention and xformers."""
