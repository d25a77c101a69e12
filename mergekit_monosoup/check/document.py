"""Checks of the file as a whole: whether it is YAML, and how its stages get along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mergekit_monosoup.check.context import (
    File,
    leaves,
    parameter_sections,
    real_path,
)
from mergekit_monosoup.check.finding import Finding, checks


@checks(
    "DOC001",
    "error",
    title="file that cannot be read as YAML",
    advice="correct the line that the message names; a key may appear only once",
)
def unreadable(file: File) -> Iterator[Finding]:
    if file.fault:
        yield Finding("error", file.path, f"cannot be read as YAML: {file.fault}")


@checks(
    "DOC002",
    "error",
    title="empty file",
    advice="write at least `merge_method` and `models`",
)
def empty(file: File) -> Iterator[Finding]:
    if not file.fault and not file.documents:
        yield Finding("error", file.path, "is empty; it needs at least `merge_method` and `models`")


@checks(
    "DOC003",
    "error",
    title="stage named like a method or a value",
    advice="rename the stage: mergekit-multi replaces every such string by the stage's path",
)
def stage_name(file: File) -> Iterator[Finding]:
    for stage in file.stages:
        if any(stage in _values(document) for _, document in file.mappings):
            yield Finding(
                "error",
                f"stage {stage}",
                f"mergekit-multi also replaces the option value or method {stage!r} by a path: "
                "rename the stage",
            )


def _values(document: dict[str, Any]) -> set[Any]:
    """Return the strings that are no model references: method, dtypes, parameter values."""
    references = ("name", "base_model", "tokenizer_source")
    top = {v for k, v in document.items() if k not in references and isinstance(v, str)}
    return top | {
        leaf
        for _, parameters, _ in parameter_sections(document)
        for value in parameters.values()
        for leaf in leaves(value)
        if isinstance(leaf, str)
    }


@checks(
    "DOC004",
    "warning",
    title="several stages write one report",
    advice="give each stage its own `report`: only the last would be kept",
)
def shared_report(file: File) -> Iterator[Finding]:
    written = Counter(path for _, document in file.mappings for path in _reports(document))
    for path, stages in written.items():
        if stages > 1:
            yield Finding(
                "warning",
                "report",
                f"several stages write {path}: only the last is kept, give each its own file",
            )


def _reports(document: dict[str, Any]) -> set[str]:
    """Return the paths of the reports that a document writes, each in one spelling."""
    return {
        real_path(leaf)
        for _, parameters, _ in parameter_sections(document)
        for leaf in leaves(parameters.get("report"))
        if isinstance(leaf, str)
    }


@checks(
    "DOC005",
    "error",
    title="document that is not a mapping",
    advice="write keys and values: `merge_method: …`, `models: …`",
)
def not_a_mapping(file: File) -> Iterator[Finding]:
    for number, document in enumerate(file.documents):
        if not isinstance(document, dict):
            label = file.label(number)
            yield Finding(
                "error",
                f"{label}: top level" if label else "top level",
                f"must be a mapping, not {type(document).__name__}",
            )
