"""An own cache and registry for each test, and a fake clock."""

from tests.support.fake_clock import add, clock, own_cache

__all__ = ["add", "clock", "own_cache"]
