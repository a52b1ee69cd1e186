"""Fingerprints of the functions that an adapter was verified against.

A fingerprint is a hash of a function's tokens without comments, docstrings, blank lines and layout. All Python versions
give a function the same fingerprint. This module has its own lexer, because ``tokenize`` splits f-strings only since
Python 3.12, and ``ast`` and ``inspect.getsource`` also differ between versions. The module needs only the standard
library.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import linecache
import re
from collections.abc import Callable, Iterator
from pathlib import PurePath
from types import FunctionType
from typing import Any

# Characters beyond ASCII belong to names, as in CPython's tokenizer. The result does not depend on Unicode tables.
# Each character of an operator is a token, because no valid program changes if such an operator is split.
# A word directly before a quote is a string prefix if all its letters can be in a prefix. No keyword is such a word.
_TOKEN = re.compile(
    r"""
    (?P<space> [ \t\f]+ | \\\n | \#[^\n]* )
  | (?P<newline> \n )
  | (?P<string> (?P<prefix> [bdfrtuBDFRTU]{0,3} ) (?P<quote> '{3} | "{3} | ' | " ) )
  | (?P<number> 0[xX][0-9a-fA-F_]+ | 0[oO][0-7_]+ | 0[bB][01_]+
              | (?: [0-9][0-9_]*\.?[0-9_]* | \.[0-9][0-9_]* ) (?: [eE][+-]?[0-9][0-9_]* )? [jJ]? )
  | (?P<name> [A-Za-z_\x80-\U0010ffff][0-9A-Za-z_\x80-\U0010ffff]* )
  | (?P<operator> . )
    """,
    re.VERBOSE,
)
_NEWLINE, _INDENT, _DEDENT = "\n", "\n>", "\n<"


def path_of(cls: type) -> str:
    """Return the path of a class as ``"package.module:Class"``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def object_at(path: str) -> Any:
    """Return the object with the path ``"package.module:Class.attribute"``."""
    module, _, attribute = path.partition(":")
    value: Any = importlib.import_module(module)
    for name in attribute.split("."):
        value = getattr(value, name)
    return value


def fingerprint(function: Callable[..., Any]) -> str:
    """Return sixteen hex digits that change if the code of a Python function changes.

    The lines of decorators above ``def`` are part of the code. The code of a wrapper (:func:`functools.wraps`) is not:
    a wrapper has the fingerprint of the wrapped function.

    Raises:
        OSError: the source of the function is not available.
        TypeError: ``function`` is not a Python function defined with ``def``.
    """
    return fingerprint_of_source(source_from(function))


def source_from(function: Callable[..., Any]) -> str:
    """Return the text of a function's file, from the function's first decorator or ``def`` to the end of the file."""
    plain = inspect.unwrap(function)
    plain = getattr(plain, "__func__", plain)
    if not isinstance(plain, FunctionType) or plain.__name__ == "<lambda>":
        raise TypeError(f"got {function!r}; allowed: a Python function defined with def")
    code = plain.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, plain.__globals__)[code.co_firstlineno - 1 :]
    if not lines:
        raise OSError(f"the source of the function is not available ({PurePath(code.co_filename).name})")
    return "".join(lines)


def fingerprint_of_source(source: str) -> str:
    """Return the fingerprint of the function at the start of the source.

    The source starts with the first decorator or ``def``, may be indented, and may continue after the function.

    Raises:
        OSError: the source does not begin with a function, or ends inside a string.
    """
    tokens: list[str] = []
    columns: list[int] = []
    defined = False
    for column, line, is_docstring in _logical_lines(source.replace("\r\n", "\n").replace("\r", "\n")):
        columns = columns or [column]
        if defined and column <= columns[0]:
            break
        if not defined and line[0] not in ("@", "async", "def"):
            raise OSError(f"the source begins with {' '.join(line[:5])!r}, not with a function: did the file change?")
        defined = defined or line[0] != "@"
        if is_docstring:
            continue
        if column > columns[-1]:
            columns.append(column)
            tokens.append(_INDENT)
        while column < columns[-1]:
            columns.pop()
            tokens.append(_DEDENT)
        tokens.extend((*line, _NEWLINE))
    if not defined:
        raise OSError("the source ends before a function begins")
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()[:16]


def _logical_lines(text: str) -> Iterator[tuple[int, list[str], bool]]:
    """Yield ``(column, tokens, is_docstring)`` per logical line. A line of only plain strings counts as a docstring."""
    at, depth, column, line, is_docstring = 0, 0, 0, list[str](), True
    while match := _TOKEN.match(text, at):
        kind, end = match.lastgroup, _end_of(text, match)
        token = text[at:end]
        if kind == "newline" and depth == 0 and line:
            yield column, line, is_docstring
            line, is_docstring = [], True
        elif kind not in ("newline", "space"):
            if not line:
                margin = text[text.rfind("\n", 0, at) + 1 : at]
                column = len(margin.rpartition("\f")[2].expandtabs())
            line.append(token)
            is_docstring = is_docstring and kind == "string" and not set(match["prefix"].lower()) & set("bft")
            depth += _nesting(kind, token)
        at = end
    if line:
        yield column, line, is_docstring


def _nesting(kind: str | None, token: str) -> int:
    """Return 1 for an opening bracket, -1 for a closing bracket, otherwise 0."""
    return 0 if kind != "operator" else (token in "([{") - (token in ")]}")


def _end_of(text: str, match: re.Match[str]) -> int:
    """Return the index after a token. For a string, ``match`` ends at the opening quote."""
    if match.lastgroup != "string":
        return match.end()
    has_fields, quote, at = bool(set(match["prefix"].lower()) & set("ft")), match["quote"], match.end()
    while not text.startswith(quote, at):
        if at >= len(text):
            raise OSError(f"the source ends inside a string: {text[match.start() :][:20]!r}")
        if text[at] == "\\":
            at += 1 if has_fields and text.startswith(("{", "}"), at + 1) else 2
        elif has_fields and text[at] == "{":
            at = at + 2 if text.startswith("{{", at) else _end_of_field(text, at + 1)
        else:
            at += 1
    return at + len(quote)


def _end_of_field(text: str, at: int) -> int:
    """Return the index after a replacement field of an f-string. The expression of the field starts at ``at``."""
    depth = 0
    while match := _TOKEN.match(text, at):
        at, token = _end_of(text, match), match[0]
        if depth == 0 and token == "}":
            return at
        if depth == 0 and token == ":":
            return _end_of_format(text, at)
        depth += _nesting(match.lastgroup, token)
    raise OSError("the source ends inside an f-string")


def _end_of_format(text: str, at: int) -> int:
    """Return the index after a replacement field. The format specification of the field starts at ``at``."""
    while not text.startswith("}", at):
        if at >= len(text):
            raise OSError("the source ends inside an f-string")
        at = _end_of_field(text, at + 1) if text[at] == "{" else at + 1
    return at + 1
