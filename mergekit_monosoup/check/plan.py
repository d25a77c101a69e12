"""Checks of mergekit's plan: what it would refuse before it reads the first tensor.

Each of these looks only where nothing before it found an error, for mergekit stops at the first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress

from mergekit.common import ModelReference

from mergekit_monosoup.check import crimes
from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.finding import Finding, define_check
from mergekit_monosoup.checkpoints import misfit


@define_check(
    "PLAN401",
    "error",
    title="model folder without config.json",
    advice="add the model's config.json, or merge single files with mergekit-pytorch",
)
def no_config(document: Document) -> Iterator[Finding]:
    for reference in document.planning.models:
        if not os.path.exists(os.path.join(reference.model.path, "config.json")):
            yield document.error(str(reference), "has no config.json, which mergekit needs")


@define_check(
    "PLAN402",
    "error",
    title="models of different architectures",
    advice="merge fine-tunes of one model; the message says whether --allow-crimes would help",
)
def other_architecture(document: Document) -> Iterator[Finding]:
    architectures = document.planning.architectures
    for other, architecture in architectures.items():
        first = next(iter(architectures))
        if architecture != architectures[first]:
            yield document.error(
                str(other),
                f"is a {misfit.class_of(other)} and {first} a {misfit.class_of(first)}; "
                + crimes.advice(document),
            )


@define_check(
    "PLAN403",
    "error",
    title="layers that the model does not have",
    advice="correct `layer_range`: from the first layer, 0, to one after the last",
)
def layer_range(document: Document) -> Iterator[Finding]:
    planning = document.planning
    if not planning.architectures or planning.config is None:
        return
    for number, piece in enumerate(planning.config.slices or []):
        for source in piece.sources:
            layers = getattr(source.model.config(), "num_hidden_layers", math.inf)
            begin, end = source.layer_range
            if not 0 <= begin <= end <= layers:
                yield document.error(
                    f"slices[{number}]",
                    f"layer_range [{begin}, {end}]: {source.model} has {layers}",
                )


@define_check(
    "PLAN404",
    "error",
    title="module that the architecture does not have",
    advice="use one of the modules that the message lists",
)
def unknown_module(document: Document) -> Iterator[Finding]:
    planning = document.planning
    if not planning.architectures or planning.config is None:
        return
    (first, architecture), *_ = planning.architectures.items()
    for name in sorted(set(planning.config.modules or {}) - set(architecture.modules)):
        known = ", ".join(architecture.modules)
        yield document.error(f"modules.{name}", f"{first} has no such module, it has: {known}")


@define_check(
    "PLAN405",
    "error",
    title="merge that mergekit cannot plan",
    advice="read mergekit's own words in the message, often a parameter that the method needs",
)
def cannot_plan(document: Document) -> Iterator[Finding]:
    error = document.planning.error
    # A different depth is what PLAN406 reports.
    if error is not None and misfit.is_refusal(error) and not _layers(document):
        yield document.error("top level", f"mergekit cannot plan this merge: {error}")


@define_check(
    "PLAN406",
    "error",
    title="models of different depth",
    advice="merge fine-tunes of one model; with `slices`, say which layers belong together",
)
def other_depth(document: Document) -> Iterator[Finding]:
    if layers := _layers(document):
        yield document.error("models", misfit.uneven_depths(layers))


def _layers(document: Document) -> dict[ModelReference, int]:
    """Return the layers of each model, where they differ."""
    planning = document.planning
    if planning.config is None or not planning.architectures:
        return {}
    architecture = next(iter(planning.architectures.values()))
    with suppress(Exception):  # which mergekit's planner meets again, and is reported there
        return misfit.depths(planning.config, architecture)
    return {}


@define_check(
    "PLAN407",
    "error",
    title="architecture that mergekit's planner fails at",
    advice="merge the files with mergekit-pytorch, by the configuration that the message gives",
)
def planner_fails(document: Document) -> Iterator[Finding]:
    planning = document.planning
    if planning.error is None or misfit.is_refusal(planning.error):
        return
    model = next(iter(planning.known))
    said = misfit.cannot_plan(planning.error, model, misfit.class_of(model))
    yield document.error("top level", f"{said}. {planning.way_out}")
