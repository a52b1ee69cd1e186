"""An example plug-in with a backend and an adapter. Copy it to write another one."""
