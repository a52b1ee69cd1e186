"""A fresh cache and registry for each test, and a fake clock."""

from tests.support.fake_clock import add, clock, many_runs, own_cache

__all__ = ["add", "clock", "many_runs", "own_cache"]
