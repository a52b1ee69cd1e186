"""A backend and an adapter that attnzoo does not know of: how to write yours."""
