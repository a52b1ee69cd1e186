"""The backend ``auto``, which selects by priority unless there are measurements from the same environment."""
