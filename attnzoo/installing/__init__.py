"""Backend names as ``attn_implementation`` of transformers: ``install``, ``uninstall``, and variants of backends."""
