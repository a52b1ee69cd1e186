"""The backend ``auto``. It selects by measurements from the same environment or, without measurements, by priority."""
