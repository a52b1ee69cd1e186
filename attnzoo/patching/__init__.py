"""Patching models in place: sites, plans, forwards, and what adapters build on."""
