"""Backends on kernels for packed sequences of varying lengths (varlen): FlashAttention and xformers."""
