"""YAML as configurations and suites need it: no key twice, and nothing that never ends.

A file of a few lines can stand for a value that holds itself, or for one of billions of entries
(aliases of aliases); and PyYAML lets some wrong values through to functions that raise anything.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text

MOST_BYTES = 2**18  # a merge of a hundred layers from ten models, layer by layer, has 75 kB
MOST_LEVELS = 40  # nested in each other; the deepest configuration that mergekit reads has ten
MOST_VALUES = 50_000  # with aliases written out
MOST_DOCUMENTS = 500

# libyaml reads events ten times as fast, but is not in every build of PyYAML.
_EventLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LARGEST = 2**64  # of whole numbers
_KEYS = (str, int, float, type(None))  # also bool


class PlainLoader(yaml.SafeLoader):
    """A safe YAML loader whose only errors are YAMLError, with the line."""

    unique = False

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Return the value of a node.

        Raises:
            yaml.constructor.ConstructorError: it cannot be one of the kind that it is tagged with,
                or nothing in a configuration can be meant by it.
        """
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]  # a number of 5000 digits, the 32nd of a month
            raise _error(f"cannot be read as a value of the kind `{kind}`", node) from error
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise _error("half of a surrogate pair, which is no character", node)
        if isinstance(value, int) and abs(value) > LARGEST:
            raise _error("a whole number of more than 64 bits", node)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node.

        Raises:
            yaml.constructor.ConstructorError: a key is neither text nor a number, or appears twice
                where keys are :attr:`unique`.
        """
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`; what it brings in may be overwritten
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, _KEYS):
                raise _error(f"a key must be text, not {type(key).__name__}", key_node)
            if self.unique and key in seen:
                raise _error(f"key {key!r} appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


class UniqueKeyLoader(PlainLoader):
    """A safe YAML loader that refuses equal keys, of which YAML lets the last win in silence."""

    unique = True


def read_documents(path: str | Path, loader: type[PlainLoader] = UniqueKeyLoader) -> list[Any]:
    """Return the documents of a YAML file.

    Raises:
        UnreadableError: it cannot be read, or not as YAML.
    """
    return parse_documents(read_text(path, MOST_BYTES), loader)


def parse_documents(text: str, loader: type[PlainLoader] = UniqueKeyLoader) -> list[Any]:
    """Return the documents of a text in YAML.

    Raises:
        UnreadableError: it is not YAML, or stands for something endless.
    """
    try:
        _check_extent(yaml.parse(text, Loader=_EventLoader))
        return list(yaml.load_all(text, Loader=loader))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise UnreadableError(f"cannot be read as YAML: {reason}") from error
    except RecursionError as error:
        raise UnreadableError("cannot be read as YAML: nested too deep") from error


def read_document(path: str | Path, loader: type[PlainLoader] = UniqueKeyLoader) -> Any:
    """Return the only document of a YAML file; None of an empty one.

    Raises:
        UnreadableError: it cannot be read, or not as YAML, or holds several.
    """
    documents = read_documents(path, loader)
    if len(documents) > 1:
        raise UnreadableError(f"holds {len(documents)} documents, separated by ---; one is wanted")
    return documents[0] if documents else None


def _error(problem: str, node: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


# -- how large it is, before anything is built -----------------------------------------------------


def _check_extent(events: Iterator[Any]) -> None:
    """Follow the events of a parser and raise an error where the file stands for too much."""
    documents = 0
    begun: list[list[Any]] = [["", 0]]  # the anchor and the values so far of each open collection
    extents: dict[str | None, int] = {}  # of each finished anchor
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents, extents = documents + 1, {}
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in begun):
                raise _endless(f"*{event.anchor} stands inside of &{event.anchor} itself", event)
            begun[-1][1] += extents.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, extent = begun.pop()
            extents[anchor] = extent
            begun[-1][1] += extent
        elif isinstance(event, yaml.ScalarEvent):
            begun[-1][1] += 1
            extents[event.anchor] = 1
        if len(begun) > MOST_LEVELS:
            raise _endless(f"more than {MOST_LEVELS} levels are nested in each other", event)
        if sum(extent for _, extent in begun) > MOST_VALUES:
            raise _endless(f"it stands for more than {MOST_VALUES} values", event)
        if documents > MOST_DOCUMENTS:
            raise _endless(f"it holds more than {MOST_DOCUMENTS} documents", event)


def _endless(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
