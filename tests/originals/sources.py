"""Functions whose source is hard to parse (``hard_sources.txt``), and edits that may change a fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FILE = Path(__file__).with_name("hard_sources.txt")
_OLDEST = (3, 10)


def _read() -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    for section in _FILE.read_text(encoding="utf-8").split("=== ")[1:]:
        title, _, text = section.partition("\n")
        name, _, since = title.partition(", since ")
        yield name, (tuple(map(int, since.split("."))) if since else _OLDEST, text)


# By name: the first Python that accepts the text, and the text. Tests define the decorators `same` and `marked`.
HARD = dict(_read())

ORIGINAL = '''
@same
def f(x, scale=1.0):
    """What it does."""
    # why
    if x > 0:
        y = x * scale
        y = y + 1
    if x < 0: y = 1; x = 2
    return (y, f"{x + 1:.2f} of {{y}}", "two  words")
'''.lstrip("\n")

# Name of the change, text in ORIGINAL, replacement. EQUAL changes keep the fingerprint, DIFFERENT changes do not.
EQUAL = [
    ("a comment", "    # why\n", ""),
    ("another comment", "# why", "# because \"it's\" '''"),
    ("a comment at the margin", "    # why", "# why"),
    ("a comment at the end of a line", "y = y + 1", "y = y + 1  # one more"),
    ("a comment after a decorator", "@same", "@same  # as before\n# and here"),
    ("a comment after the end", '"two  words")\n', '"two  words")\n    # inside\n# outside\n'),
    ("a statement after the end", '"two  words")\n', '"two  words")\nz = """1"""\ndef g(): pass\n'),
    ("no docstring", '    """What it does."""\n', ""),
    ("another docstring", "What it does.", "What it\n\n    does, and why."),
    ("a docstring in other quotes", '"""What it does."""', "'What it does.'"),
    ("a docstring of several strings", '"""What it does."""', "'What' r\"it\" \\\n        '''does.'''"),
    ("blank lines", "    if x > 0", "\n\n    \n    if x > 0"),
    ("spaces", "x * scale", "x  *  scale"),
    ("fewer spaces", "x * scale", "x*scale"),
    ("spaces at the end of a line", "y = y + 1\n", "y = y + 1  \t\n"),
    ("deeper indentation", "        y = x * scale\n        y = y + 1", "          y = x * scale\n          y = y + 1"),
    ("tabs", "        y = x * scale\n        y = y + 1", "\ty = x * scale\n\ty = y + 1"),
    ("lines joined by brackets", "(y, f", "(\n  y,  # one\n\n        f"),
    ("lines joined in the header", "(x, scale=1.0)", "(\n    x,\n  scale=1.0)"),
    ("lines joined by a backslash", "y = y + 1", "y = y \\\n   + 1"),
    ("line ends", "\n", "\r\n"),
]
DIFFERENT = [
    ("a constant", "y + 1\n", "y + 2\n"),
    ("an operator", "x * scale", "x / scale"),
    ("a default", "scale=1.0", "scale=2.0"),
    ("a name", "(y, f", "(x, f"),
    ("another argument", "x, scale", "x, other, scale"),
    ("another decorator", "@same", "@other"),
    ("no decorator", "@same\n", ""),
    ("async", "def f", "async def f"),
    ("a statement less", "        y = y + 1\n", ""),
    ("a statement in another block", "        y = y + 1\n", "    y = y + 1\n"),
    ("a statement out of a one-line block", "y = 1; x = 2", "y = 1\n    x = 2"),
    ("a word split", "y = 1; x", "y = 1; x x"),
    ("a constant in an f-string", "{x + 1:", "{x + 2:"),
    ("spaces in an f-string", "} of {{", "}  of {{"),
    ("a format", ".2f}", ".3f}"),
    ("a conversion", "{x + 1:", "{x + 1!r:"),
    ("a field that becomes text", "{x + 1:.2f}", "{{x + 1:.2f}}"),
    ("text that becomes a field", "{{y}}", "{y}"),
    ("spaces in a string", "two  words", "two words"),
    ("a comment sign in a string", "two  words", "two # words"),
    ("the prefix of a string", '"two  words"', 'b"two  words"'),
    ("a string that is no docstring", "return (y, ", 'return ("y", '),
    ("an f-string in place of the docstring", '"""What it does."""', 'f"""{x}"""'),
    ("a call of the docstring", '"""What it does."""', '"""What it does.""".strip()'),
    ("a docstring that becomes a value", '"""What it does."""', 'y = """What it does."""'),
    ("a space in a number", "1.0", "1 .e0"),
]


def changed(old: str, new: str) -> str:
    """Return ORIGINAL with a text replaced."""
    assert old in ORIGINAL
    return ORIGINAL.replace(old, new)


def every_source() -> dict[str, str]:
    """Return all sources of this module by name."""
    sources = {name: text for name, (_, text) in HARD.items()}
    sources.update({f"equal: {what}": changed(old, new) for what, old, new in EQUAL})
    sources.update({f"different: {what}": changed(old, new) for what, old, new in DIFFERENT})
    return sources
