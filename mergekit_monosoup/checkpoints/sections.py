"""Where parameters stand in a merge configuration, and what their filters match."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

Section = tuple[str, dict[str, Any], str | None]


def mapping(value: Any) -> dict[Any, Any]:
    """Return what stands where a mapping belongs; {} of anything else, which pydantic names."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[Any]:
    """Return what stands where a list belongs; [] of anything else, which pydantic names."""
    return value if isinstance(value, list) else []


def leaves(value: Any) -> Iterator[Any]:
    """Yield the single values of a parameter: of gradients and filters each."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(value.get("value"))
    elif value is not None:
        yield value


def gradients(value: Any) -> Iterator[list[Any]]:
    """Yield the lists of a parameter that give the layers of a model different values."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            yield from gradients(entry.get("value"))
    if isinstance(value, list) and value and not any(isinstance(v, (dict, list)) for v in value):
        yield value


def filters(value: Any) -> list[dict[Any, Any]]:
    """Return the entries with `filter` and `value` of a parameter."""
    return [entry for entry in (value if isinstance(value, list) else [value]) if mapping(entry)]


def parameter_sections(data: Any, place: str = "") -> Iterator[Section]:
    """Yield (place, parameters, model they stand under or None) of every `parameters` mapping."""
    if isinstance(data, list):
        for number, item in enumerate(data):
            yield from parameter_sections(item, f"{place}[{number}]")
    elif isinstance(data, dict):
        for key, value in data.items():
            here = f"{place}.{key}" if place else str(key)
            if key != "parameters":
                yield from parameter_sections(value, here)
            elif isinstance(value, dict):
                model = data.get("model")
                yield here, value, str(model) if model is not None else None


def filtered(data: Any) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every filter in a configuration but `*`."""
    for place, parameters, _ in parameter_sections(data):
        for name, value in parameters.items():
            for entry in filters(value):
                text = entry.get("filter")
                if isinstance(text, str) and text != "*":
                    yield f"{place}.{name}", text


def unmatched(data: Any, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of the filters that are part of none of the tensors' names."""
    for place, text in filtered(data):
        if not any(text in name for name in names):
            yield place, text
