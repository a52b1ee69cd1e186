"""The backends ``blocked-local`` and ``lsh``, which change the pattern of dense attention."""
