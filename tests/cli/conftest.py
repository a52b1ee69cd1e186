"""The fixtures of the tuning tests: ``attnzoo tune`` needs a cache of its own and a fake clock too."""

from tests.support.fake_clock import add, clock, own_cache

__all__ = ["add", "clock", "own_cache"]
