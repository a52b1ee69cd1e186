"""A fresh cache and registry for each test, a fake clock, and a rule that selects backends."""

import pytest

from attnzoo.auto import rule
from attnzoo.auto.calls import DECODING
from tests.support.fake_clock import add, clock, own_cache

__all__ = ["add", "clock", "own_cache"]


@pytest.fixture
def ours_everywhere(monkeypatch):
    """A rule that selects a backend for every forward and every training step."""
    monkeypatch.setattr(rule, "LIMITS", _Everything())


class _Everything(dict):
    def get(self, key, default=None):
        return None if key[2] == DECODING else rule.Limit(0, 0)
