"""An example plug-in with a backend and an adapter. To write a plug-in, copy this package."""
