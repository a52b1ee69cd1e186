"""Backends that change the pattern of dense attention: ``blocked-local`` and ``lsh``."""
