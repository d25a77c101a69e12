"""Checks of mergekit's plan: what it would refuse before it reads the first tensor.

Each of these looks only where nothing before it found an error, for mergekit stops at the first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.finding import Finding, checks


@checks(
    "PLAN401",
    "error",
    title="model folder without config.json",
    advice="add the model's config.json, or merge single files with mergekit-pytorch",
)
def no_config(document: Document) -> Iterator[Finding]:
    for reference in document.local_models:
        if not os.path.exists(os.path.join(reference.model.path, "config.json")):
            yield document.error(str(reference), "has no config.json, which mergekit needs")


@checks(
    "PLAN402",
    "error",
    title="models of different architectures",
    advice="merge fine-tunes of one model; mergekit merges others with --allow-crimes only",
)
def other_architecture(document: Document) -> Iterator[Finding]:
    for other, architecture in document.architectures.items():
        first = next(iter(document.architectures))
        if architecture != document.architectures[first]:
            yield document.error(
                str(other),
                f"is a {_class_name(other)} and {first} a {_class_name(first)}; "
                "mergekit merges them with --allow-crimes only",
            )


def _class_name(model: ModelReference) -> str:
    return next(iter(model.config().architectures or []), "?")


@checks(
    "PLAN403",
    "error",
    title="layers that the model does not have",
    advice="correct `layer_range`: from the first layer, 0, to one after the last",
)
def layer_range(document: Document) -> Iterator[Finding]:
    if not document.architectures or not isinstance(document.config, MergeConfiguration):
        return
    for number, piece in enumerate(document.config.slices or []):
        for source in piece.sources:
            layers = getattr(source.model.config(), "num_hidden_layers", math.inf)
            begin, end = source.layer_range
            if not 0 <= begin <= end <= layers:
                yield document.error(
                    f"slices[{number}]",
                    f"layer_range [{begin}, {end}]: {source.model} has {layers}",
                )


@checks(
    "PLAN404",
    "error",
    title="module that the architecture does not have",
    advice="use one of the modules that the message lists",
)
def unknown_module(document: Document) -> Iterator[Finding]:
    if not document.architectures or not isinstance(document.config, MergeConfiguration):
        return
    (first, architecture), *_ = document.architectures.items()
    for name in sorted(set(document.config.modules or {}) - set(architecture.modules)):
        known = ", ".join(architecture.modules)
        yield document.error(f"modules.{name}", f"{first} has no such module, it has: {known}")


@checks(
    "PLAN405",
    "error",
    title="merge that mergekit cannot plan",
    advice="read mergekit's own words in the message, often a parameter that the method needs",
)
def cannot_plan(document: Document) -> Iterator[Finding]:
    if document.plan_error is not None:
        yield document.error("top level", f"mergekit cannot plan this merge: {document.plan_error}")
