"""``attnzoo.explain`` shows by which rule and by which measurements ``auto`` decides."""

import attnzoo
from attnzoo.auto.calls import DECODING
from tests.auto.test_native import measured, real_backends
from tests.support.models import gpt_neox

__all__ = ["real_backends"]  # a fixture that every test of this file uses


def test_explain_shows_the_rule_and_the_measurements():
    model = gpt_neox()
    lines = attnzoo.explain(model).auto["gpt_neox.layers.0.attention"]
    assert lines[0] == "the model's own code by rule, dense in sdpa on cpu: decoding, forward, forward+backward"
    measured(model, (1, 21, 21), 2.0, 1.0)
    measured(model, (1, 1, 21), 1.0, 2.0, mode=DECODING)
    lines = attnzoo.explain(model).auto["gpt_neox.layers.0.attention"]
    assert lines[0].startswith("a backend for forward at batch <= 1, queries <= 32, keys <= 32: measured in the module")
    assert lines[1].startswith("native for decoding at batch <= 1, queries <= 1, keys <= 32: measured in the module")
    assert lines[2].startswith("the model's own code by rule elsewhere, dense in sdpa")


def test_explain_by_priority_shows_no_native(monkeypatch):
    monkeypatch.setenv("ATTNZOO_AUTO", "priority")
    (line,) = attnzoo.explain(gpt_neox()).auto["gpt_neox.layers.0.attention"]
    assert line == "sdpa by priority: ATTNZOO_AUTO=priority"
