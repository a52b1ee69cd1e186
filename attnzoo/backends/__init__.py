"""The backends of attnzoo. The registry finds them by entry point and loads them at first use."""
