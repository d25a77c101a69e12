"""The file as a whole: reading it, its documents and stages, and the checks of these."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from mergekit_monosoup.check.finding import Finding, define_check
from mergekit_monosoup.checkpoints.sections import leaves, mapping, parameter_sections
from mergekit_monosoup.checkpoints.texts import UnreadableError
from mergekit_monosoup.checkpoints.yaml import read_documents


def model_entries(data: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping with a `model` key, at any depth."""
    if isinstance(data, list):
        for item in data:
            yield from model_entries(item)
    elif isinstance(data, dict):
        if isinstance(data.get("model"), str):
            yield data
        for value in data.values():
            yield from model_entries(value)


def donor(data: Mapping[str, Any]) -> str:
    """Return the model whose configuration mergekit writes, or the first of those it may be.

    It is the base model; without one mergekit takes any, in another order each time it runs.
    """
    first = next(model_entries(data), {})
    return str(data["base_model"] if data.get("base_model") is not None else first.get("model", ""))


def tokenizer_source(data: Mapping[str, Any]) -> Any:
    """Return from what mergekit builds the tokenizer; None where it copies one."""
    if data.get("tokenizer") is None:
        return data.get("tokenizer_source")
    return mapping(data["tokenizer"]).get("source", "union")


def real_path(path: str) -> str:
    """Return one spelling of a local path."""
    try:
        return os.path.realpath(os.path.expanduser(path))
    except ValueError:  # a null byte
        return path


@dataclass(frozen=True)
class File:
    """A file meant for mergekit-yaml, mergekit-multi (several documents) or mergekit-pytorch.

    Attributes:
        path: as given.
        documents: what it holds, as YAML has it.
        fault: why it could not be read, or empty.
    """

    path: str
    documents: tuple[Any, ...] = ()
    fault: str = ""

    @classmethod
    def read(cls, path: str | Path) -> File:
        """Read a file, whatever is in it."""
        try:
            documents = read_documents(path)
        except UnreadableError as error:
            return cls(str(path), fault=str(error))
        return cls(str(path), tuple(d for d in documents if d is not None))

    @cached_property
    def mappings(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """(label, document) of those that may be merges."""
        return tuple(
            (self.label(number), document)
            for number, document in enumerate(self.documents)
            if isinstance(document, dict)
        )

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages of a mergekit-multi file."""
        return tuple(str(d["name"]) for d in self.documents if isinstance(d, dict) and "name" in d)

    @cached_property
    def needs(self) -> dict[str, set[str]]:
        """Stage → the stages whose names stand for models in it."""
        names = set(self.stages)
        return {
            str(document["name"]): {
                model
                for key, value in document.items()
                if key != "name"
                for model in map(_model, _strings(value))
                if model in names
            }
            for _, document in self.mappings
            if "name" in document
        }

    @cached_property
    def origins(self) -> dict[str, str]:
        """Stage → the model whose configuration and tokenizer it will have."""
        donors = {str(d["name"]): donor(d) for _, d in self.mappings if "name" in d}
        origins = dict(donors)
        for _ in donors:  # a stage's may be a stage; one round less than a circle has
            origins = {stage: donors.get(name, name) for stage, name in origins.items()}
        return {stage: name for stage, name in origins.items() if name not in donors}

    def label(self, number: int) -> str:
        """Return what findings call a document; nothing if there is but one."""
        document = self.documents[number]
        if isinstance(document, dict) and "name" in document:
            return f"stage {document['name']}"
        return "" if len(self.documents) == 1 else f"document {number + 1}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _model(reference: str) -> str:
    """Return the model of MODEL@REVISION+ADAPTER."""
    return reference.split("+")[0].split("@")[0]


def circle(needs: Mapping[str, Collection[str]]) -> str:
    """Return stages that need each other, as `a needs b needs a`; empty if there is an order."""
    try:
        TopologicalSorter({name: sorted(others) for name, others in needs.items()}).prepare()
    except CycleError as error:
        return " needs ".join(map(str, reversed(error.args[1])))
    return ""


# -- checks ----------------------------------------------------------------------------------------


@define_check(
    "DOC001",
    "error",
    title="file that cannot be read, or not as YAML",
    advice="correct the path, or the line that the message names; a key may appear only once",
)
def unreadable(file: File) -> Iterator[Finding]:
    if file.fault:
        yield Finding("error", file.path, file.fault)


@define_check(
    "DOC002",
    "error",
    title="empty file",
    advice="write at least `merge_method` and `models`",
)
def empty(file: File) -> Iterator[Finding]:
    if not file.fault and not file.documents:
        yield Finding("error", file.path, "is empty; it needs at least `merge_method` and `models`")


@define_check(
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


@define_check(
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


@define_check(
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


@define_check(
    "DOC006",
    "error",
    title="two stages of one name, or two without one",
    advice="give each stage a name of its own, and only the last one none",
)
def shared_name(file: File) -> Iterator[Finding]:
    for name, count in Counter(file.stages).items():
        if count > 1:
            message = f"is the name of {count} merges: mergekit-multi stops"
            yield Finding("error", f"stage {name}", message)
    nameless = len(file.mappings) - len(file.stages)
    if nameless > 1:
        yield Finding(
            "error",
            file.path,
            f"{nameless} of {len(file.mappings)} merges have no `name`: mergekit-multi stops, "
            "give all but the last one a name",
        )


@define_check(
    "DOC007",
    "error",
    title="stages that need each other in a circle",
    advice="make one of them from other models",
)
def in_a_circle(file: File) -> Iterator[Finding]:
    if found := circle(file.needs):
        message = f"no stage can be the first of a circle: {found}"
        yield Finding("error", file.path, message)
