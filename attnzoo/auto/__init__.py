"""Backend selection by ``auto``: by measurements from the same environment if there are any, else by priority."""
