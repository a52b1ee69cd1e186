"""The JavaScript that draws the charts of a page: Vega-Lite, from the package vl-convert-python."""

from __future__ import annotations

from attnzoo.errors import InvalidArgumentError, raise_interrupts


def javascript() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as a script of about 0.9 MB, which needs no network.

    Raise InvalidArgumentError if the package is missing or broken. The message names the extra to install.
    """
    try:
        import vl_convert

        script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    except BaseException as error:  # the package contains a JavaScript engine, whose errors may have any type
        raise_interrupts(error)
        got = f"a page with charts, but vl-convert-python does not work here ({type(error).__name__}: {error})"
        raise InvalidArgumentError("report", got, "pip install 'attnzoo[report]'") from error
    return script
