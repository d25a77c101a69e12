"""Checks of keys and their values, but for parameters, against mergekit's own schema of a file."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConditionalParameter
from pydantic import BaseModel, ValidationError

from _mergekit_monosoup_autoload import SWITCH
from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.finding import Finding, define_check, near_word, nearest
from mergekit_monosoup.checkpoints.sections import filters
from mergekit_monosoup.parameters import METHODS

Schemas = list[type[BaseModel]]
FILTER_KEYS = tuple(ConditionalParameter.model_fields)
MODEL_KEYS = {"models", "slices", "modules"}  # of which mergekit wants exactly one


@define_check(
    "KEY101",
    "error",
    title="unknown or misspelt key",
    advice="correct or remove it: mergekit ignores it without a word",
)
def unknown_key(document: Document) -> Iterator[Finding]:
    for place, key, known in _unknown([document.schema], document.data, ""):
        if place != "name":  # of a stage of a mergekit-multi file
            yield document.error(place, f"unknown key, mergekit ignores it{nearest(key, known)}")


def meant(document: Document) -> set[str]:
    """Return the places of the keys that misspelt ones were meant to be, as ``models[0].model``.

    That these are missing is no second mistake.
    """
    return {
        place.removesuffix(key) + near
        for place, key, known in _unknown([document.schema], document.data, "")
        if (near := near_word(key, known))
    }


def _unknown(
    schemas: Schemas, data: Mapping[str, Any], place: str
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (place, key, known keys) where none of ``schemas`` has the key.

    ``schemas`` are the members of a union that ``data`` may be.
    """
    known = {key: field for schema in schemas for key, field in schema.model_fields.items()}
    for key, value in data.items():
        here = f"{place}.{key}" if place else str(key)
        if key not in known:
            yield here, str(key), list(known)
            continue
        for inner, part, part_place in _nested(known[key].annotation, value, here):
            yield from _unknown(inner, part, part_place)


def _nested(
    annotation: Any, value: Any, place: str
) -> Iterator[tuple[Schemas, Mapping[str, Any], str]]:
    """Yield (schemas, mapping, place) of every mapping that pydantic would read as one of these."""
    members = list(_members(annotation))
    if isinstance(value, dict) and (schemas := _schemas(members)):
        yield schemas, value, place
    for member in members:
        arguments = typing.get_args(member)
        if isinstance(value, list) and typing.get_origin(member) is list:
            for number, item in enumerate(value):
                yield from _nested(arguments[0], item, f"{place}[{number}]")
        elif isinstance(value, dict) and typing.get_origin(member) is dict:
            for key, item in value.items():
                yield from _nested(arguments[1], item, f"{place}.{key}")


def _schemas(members: list[Any]) -> Schemas:
    """Return pydantic's models among the members of a union.

    Without references (plain strings in YAML) and parameter values, which other checks look at.
    """
    models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    return [m for m in models if m not in (ModelReference, ConditionalParameter)]


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, however deep; anything else is its own."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


@define_check(
    "KEY102",
    "error",
    title="value or structure that mergekit refuses",
    advice="write what the message asks for at the place that it names",
)
def refused(document: Document) -> Iterator[Finding]:
    error = document.config_error
    if error is None:
        return
    explained = meant(document) | _explained_parameters(document)
    if isinstance(error, ValidationError):
        for place, message in refusals(error).items():
            if place not in explained:
                yield document.error(place, message)
    elif not (str(error).startswith("Exactly one of") and explained & MODEL_KEYS):
        yield document.error("top level", str(error))


def unknown_filter_keys(value: Any) -> Iterator[str]:
    """Yield the keys of a parameter's filters that filters do not have."""
    for entry in filters(value):
        yield from (str(key) for key in entry if key not in FILTER_KEYS)


def _explained_parameters(document: Document) -> set[str]:
    """Return the places of parameters about which PAR204 or PAR205 says more."""
    return {
        f"{place}.{name}"
        for place, parameters, _ in document.sections
        for name, value in parameters.items()
        if document.method and (value is None or any(unknown_filter_keys(value)))
    }


def refusals(error: ValidationError) -> dict[str, str]:
    """Return place → message; one mistake in a parameter fails every member of pydantic's union."""
    messages: dict[str, str] = {}
    for item in error.errors():
        parts = list(item["loc"])
        if "parameters" in parts[:-1]:
            place = _place(parts[: parts.index("parameters") + 2])
            messages.setdefault(
                place,
                "must be a value, a list of values (a gradient), or a list of `filter` and `value`",
            )
        else:
            messages.setdefault(_place(parts) or "top level", item["msg"])
    return messages


def _place(parts: Sequence[str | int]) -> str:
    """Return pydantic's path to a value as findings name places: ``models[0].model``."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return place.removeprefix(".")


@define_check(
    "KEY103",
    "error",
    title="unknown merge method",
    advice="correct `merge_method`; the message names the nearest, or all that are installed",
)
def unknown_method(document: Document) -> Iterator[Finding]:
    name = document.data.get("merge_method")
    if isinstance(name, str) and document.method is None:
        if name in METHODS and os.environ.get(SWITCH):
            end = f": this package is switched off by {SWITCH}={os.environ[SWITCH]}"
        else:
            end = nearest(name, document.methods)
        yield document.error("merge_method", f"{name!r} is not a merge method{end}")


@define_check(
    "KEY104",
    "error",
    title="unknown dtype",
    advice="use a dtype of torch, as `bfloat16`, `float16` or `float32`",
)
def unknown_dtype(document: Document) -> Iterator[Finding]:
    for key in ("dtype", "out_dtype"):
        if isinstance(name := document.data.get(key), str):
            try:
                dtype_from_name(name)
            except (RuntimeError, AttributeError, KeyError) as error:
                yield document.error(key, f"{name!r} is not a dtype ({error})")


@define_check(
    "KEY105",
    "warning",
    title="`out_dtype` narrower than `dtype`",
    advice="make them equal, or know that the report's `realised` does not count that rounding",
)
def narrow_output(document: Document) -> Iterator[Finding]:
    dtype, out = named_dtype(document, "dtype"), named_dtype(document, "out_dtype")
    if document.own_method and dtype and out and out.itemsize < dtype.itemsize:
        yield document.warning(
            "out_dtype",
            "mergekit rounds to it after the method: `realised` in the report is that "
            "of `dtype`, what is stored may be less",
        )


def named_dtype(document: Document, key: str) -> torch.dtype | None:
    """Return the dtype under ``key``; None where there is none that torch knows."""
    if not isinstance(name := document.data.get(key), str):
        return None
    try:
        return dtype_from_name(name)
    except (RuntimeError, AttributeError, KeyError):
        return None
