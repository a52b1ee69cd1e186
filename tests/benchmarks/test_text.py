"""The text of the benchmarks: whole in the repository, and its start in a wheel."""

from __future__ import annotations

import pytest

from attnzoo.benchmarks import text
from attnzoo.benchmarks.options import make_plan
from attnzoo.errors import InvalidArgumentError


@pytest.fixture
def as_in_a_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "BOOK", tmp_path / "moby_dick.txt")
    text.book.cache_clear()
    yield
    text.book.cache_clear()


def test_the_wheel_has_the_start_of_the_text(as_in_a_wheel):
    start = text.book()
    assert len(start) == 32768
    tokens = text.read_tokens(2, 16384, 4)
    assert bytes((tokens.flatten() - 4).tolist()) == start


def test_the_start_is_the_start():
    assert text.book().startswith(text.START.read_bytes()) and len(text.book()) > 200_000


@pytest.mark.parametrize(
    "read", [lambda: text.read_tokens(2, 16385, 0), lambda: make_plan(seq_lens=[1024, 16385], batch=2)]
)
def test_more_text_than_there_is_is_refused_and_the_message_says_where_the_rest_is(as_in_a_wheel, tmp_path, read):
    with pytest.raises(InvalidArgumentError) as caught:
        read()
    message = str(caught.value)
    assert message.startswith("seq-len: got 32770 tokens of text; allowed: at most 32768 tokens in all passages")
    assert "pip download" in message and str(tmp_path) in message


def test_the_whole_text_is_repeated(monkeypatch):
    assert text.read_tokens(1, len(text.book()) + 2, 0)[0, -2:].tolist() == list(text.book()[:2])
