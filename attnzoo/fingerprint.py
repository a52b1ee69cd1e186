"""Fingerprints of the functions an adapter was verified against.

A fingerprint is a hash of a function's tokens: comments, docstrings and layout do not count, code does.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

# What structures a program without having a text of its own, and what has a text without structuring it.
_STRUCTURE = {tokenize.NEWLINE: ";", tokenize.INDENT: "<", tokenize.DEDENT: ">"}
_DOCSTRING = -1
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}


def locate(path: str) -> Any:
    """The object behind ``"package.module:Class.attribute"``."""
    module, _, attribute = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def fingerprint(function: Callable[..., Any]) -> str:
    """Sixteen hex digits that change when the code of a Python function does.

    Raises:
        OSError: the source of the function is not available.
    """
    plain = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(plain))
    tokens, previous, depth = [], tokenize.NEWLINE, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        statement_starts = depth == 0 and previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        docstring = token.type == tokenize.STRING and statement_starts
        ends_docstring = token.type == tokenize.NEWLINE and previous == _DOCSTRING
        if token.type not in _LAYOUT and not docstring and not ends_docstring:
            tokens.append(_STRUCTURE.get(token.type, token.string))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = _DOCSTRING if docstring else token.type
    # Python 3.12 splits f-strings into tokens and undoubles their braces; undouble everywhere.
    text = "".join(tokens).replace("{{", "{").replace("}}", "}")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _fingerprint_at(path: str, function: FunctionType) -> str:
    return fingerprint(function)


def drift(verified: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What differs from the verified functions.

    Args:
        verified: ``{"module:Class.method": known fingerprints}``.

    Returns:
        One line per function that is gone or has another fingerprint.
    """
    found = []
    for path, known in verified.items():
        try:
            got = _fingerprint_at(path, locate(path))
        except (ImportError, AttributeError, OSError, TypeError) as error:
            found.append(f"{path}: {type(error).__name__}: {error}")
            continue
        if got not in known:
            found.append(f"{path}: got fingerprint {got}; allowed: {', '.join(known)}")
    return tuple(found)
