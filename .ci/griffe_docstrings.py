"""Griffe extension for mkdocs.yml: adapt docstrings to Markdown.

Griffe reads only sections titled ``Examples:`` as Python code. Docstrings of attnzoo contain one example under the
title ``Example:``. Docstrings also contain roles of Sphinx, such as ``:class:`Backend```, which Markdown does not have.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`<]+?)(?: <[^`>]+>)?`")


class MarkdownDocstrings(griffe.Extension):
    """Extension that replaces the title ``Example:`` and the roles in every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object after the object was read."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)
