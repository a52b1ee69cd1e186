"""The ``sdpa`` backend: ``scaled_dot_product_attention`` and the CPU kernel that it calls."""
