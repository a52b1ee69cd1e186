"""A fake of the ``flash_attn`` package for machines without a GPU."""

from flash_attn.flash_attn_interface import flash_attn_varlen_func  # noqa: F401

__version__ = "2.8.3"
