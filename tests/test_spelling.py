"""Backends with options as users type them."""

import pytest

import attnzoo
from attnzoo.spelling import configured, parse, spell


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("sdpa", ("sdpa", {})),
        ("flash", ("flash_attention_2", {})),
        ("blocked-local:window=8, sinks=2", ("blocked-local", {"window": 8, "sinks": 2})),
        ("lsh:inner=eager,seed=-1", ("lsh", {"inner": "eager", "seed": -1})),
    ],
)
def test_parse_returns_name_and_options_and_spell_reverses_it(text, parsed):
    assert parse(text) == parsed
    assert parse(spell(*parsed)) == parsed


def test_configured_returns_the_backend():
    assert configured("blocked-local:window=8,sinks=2").window == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spda", "did you mean 'sdpa'"),
        ("blocked-local:window", "name:option=value"),
        ("blocked-local:window=", "name:option=value"),
        ("blocked-local:windw=3", "did you mean 'window'"),
        ("blocked-local:window=8,window=9", "option 'window' of a backend: got two values in .*; allowed: one value"),
        ("blocked-local:window=wide", "window of backend 'blocked-local': got 'wide'"),
    ],
)
def test_configured_names_what_is_wrong(text, words):
    with pytest.raises(attnzoo.InvalidArgumentError, match=words):
        configured(text)
