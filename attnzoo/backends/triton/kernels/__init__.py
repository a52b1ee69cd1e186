"""The Triton kernels: one file per kernel, and the functions on tiles that the kernels share."""
