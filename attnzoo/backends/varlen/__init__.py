"""Backends on kernels for packed sequences (varlen): FlashAttention and xformers."""
