"""The ``flex_attention`` backend: block masks and the compiled kernel."""
