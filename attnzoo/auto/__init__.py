"""The backend ``auto``, which selects by measurements from the same environment, or by priority if none exist."""
