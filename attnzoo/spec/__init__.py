"""The description of an attention as plain data. This folder contains neither device code nor kernels."""
