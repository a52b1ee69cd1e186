"""The backends that come with attnzoo; found by entry point, loaded when first asked for."""
