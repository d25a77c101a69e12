"""Checks of the models: how they are named, and whether the method takes so many of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mergekit.common import ModelReference

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.document import real_path
from mergekit_monosoup.check.finding import Finding, define_check
from mergekit_monosoup.check.keys import meant
from mergekit_monosoup.checkpoints.lineage import looks_swapped
from mergekit_monosoup.checkpoints.sections import entries, mapping


@dataclass(frozen=True)
class Group:
    """Models that are merged as one.

    Attributes:
        models: their names, as often as they are listed.
        base: the base model's name.
        slice: what mergekit calls the slice, or None for whole models.
    """

    models: tuple[str, ...]
    base: str | None
    slice: str | None = None


def _groups(document: Document) -> Iterator[Group]:
    """Yield everything that is merged as one; nothing unless mergekit reads the configuration."""
    if document.config is None or document.method is None:
        return
    top = document.data.get("base_model")
    # mergekit-pytorch ignores `slices` and `modules`, whatever stands there.
    for section in map(mapping, (document.data, *mapping(document.data.get("modules")).values())):
        if models := entries(section.get("models")):
            yield _group(models, top)
        for number, piece in enumerate(map(mapping, entries(section.get("slices")))):
            base = piece.get("base_model") or top
            yield _group(entries(piece.get("sources")), base, f"model.slices[{number}]")


def _group(models: list[object], base: object, name: str | None = None) -> Group:
    names = tuple(str(mapping(model).get("model")) for model in models)
    return Group(names, None if base is None else str(base), name)


@define_check(
    "MOD301",
    "error",
    title="model listed twice",
    advice="list it once; for a larger share give it a larger `weight`",
)
def listed_twice(document: Document) -> Iterator[Finding]:
    for group in _groups(document):
        twice = sorted(name for name, count in Counter(group.models).items() if count > 1)
        if twice:
            yield document.error("models", f"listed twice: {', '.join(twice)}")


@define_check(
    "MOD302",
    "error",
    title="one model in two spellings",
    advice="use one spelling: mergekit takes two for two models",
)
def two_spellings(document: Document) -> Iterator[Finding]:
    for group in _groups(document):
        spelled: dict[str, str] = {}
        base = [] if group.base is None else [group.base]
        for name in dict.fromkeys([*base, *group.models]):
            if not os.path.exists(name):
                continue
            first = spelled.setdefault(real_path(name), name)
            if first != name:
                yield document.error(
                    name,
                    f"is the same model as {first}; mergekit takes two spellings for two models",
                )


@define_check(
    "MOD303",
    "error",
    title="models that the method cannot merge",
    advice="add the base model, or as many models as the method needs",
)
def contract(document: Document) -> Iterator[Finding]:
    if "base_model" in meant(document):
        return  # it is there, but misspelt
    for group in _groups(document):
        names = list(dict.fromkeys(group.models))
        if group.base is not None and group.slice is None and group.base not in names:
            names.append(group.base)
        try:
            assert document.method is not None
            document.method.validate_inputs(names, group.base, group_name=group.slice)
        except ValueError as error:
            yield document.error("models", str(error))


@define_check(
    "MOD304",
    "error",
    title="model that is not there",
    advice="correct the path, or name a hub repository as ORGANISATION/MODEL",
)
def missing(document: Document) -> Iterator[Finding]:
    for name, error in document.missing.items():
        yield document.error(name, str(error))


@define_check(
    "MOD305",
    "warning",
    title="local folder that looks like a hub name",
    advice="write ./ in front: mergekit's model card asks the hub about it",
)
def looks_like_hub(document: Document) -> Iterator[Finding]:
    if document.raw:
        return  # mergekit-pytorch writes no model card
    for name, reference in document.references.items():
        path = reference.model.path if isinstance(reference, ModelReference) else ""
        if os.path.exists(path) and not path.startswith((".", "/")) and path.count("/") <= 1:
            yield document.warning(
                name,
                f"looks like a hub name to mergekit's model card: write ./{path}, "
                "or an offline merge fails at its end",
            )


@define_check(
    "MOD308",
    "warning",
    title="base and fine-tune that look swapped, by the files beside them",
    advice="`base_model` is what the fine-tuning started from: exchange the two",
)
def swapped(document: Document) -> Iterator[Finding]:
    base = document.data.get("base_model")
    if document.own_method is None or base is None:
        return
    folders = {name: beside.folder for name, beside in document.beside.items()}
    for name in (str(entry.get("model")) for entry in document.tuned):
        reference = document.references.get(name)
        adapted = isinstance(reference, ModelReference) and reference.lora
        if name in folders and str(base) in folders and not adapted:
            models = (str(base), folders[str(base)]), (name, folders[name])
            for said in looks_swapped(*models):
                yield document.warning("base_model", said)
