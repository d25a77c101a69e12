"""Makes docstrings and signatures fit to be read on a page; loaded by mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

from mergekit_monosoup.parameters import METHODS

# As :func:`edit` is one: Markdown does not know them.
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
# Defaults are written down once, in parameters.py; signatures name the place, readers want the
# value. The second way is that of kernel/monosoup.py, the settings of which are MonoSoup's.
DEFAULT = re.compile(r"(?:(?P<method>[A-Z]+)\['|DEFAULTS\.)(?P<name>\w+)(?:'\]\.default)?")


class Readable(griffe.Extension):
    """Rewrites each object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Show the roles of its docstring as code."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Show the values of its defaults."""
        for parameter in func.parameters:
            if match := DEFAULT.fullmatch(str(parameter.default)):
                method = METHODS[(match["method"] or "monosoup").lower()]
                parameter.default = repr(method[match["name"]].default)
