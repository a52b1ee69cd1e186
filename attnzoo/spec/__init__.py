"""The description of an attention as plain data, without device code and without kernels."""
