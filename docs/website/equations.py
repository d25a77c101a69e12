"""Turns the TeX of ```` ```math ```` blocks, as GitHub shows them, into MathML.

Browsers draw MathML by themselves: no script is loaded, and pages read the same without a network.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, *_: Any, **__: Any) -> str:
    """Return the HTML of one block; a formatter of pymdownx.superfences.

    Raises:
        ValueError: a command is not known to latex2mathml, which would print its name.
    """
    mathml = convert(source, display="block")
    if "\\" in mathml:
        raise ValueError(f"latex2mathml does not know all of this: {source}")
    return f'<div class="equation">{mathml}</div>'
