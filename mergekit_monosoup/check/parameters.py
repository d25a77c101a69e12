"""Checks of parameters: which a method has, where they are read, and what they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.merge_methods.base import MergeMethod, ParameterScope
from pydantic import ValidationError

from mergekit_monosoup import parameters as rules
from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.finding import Finding, define_check, nearest
from mergekit_monosoup.check.keys import FILTER_KEYS, unknown_filter_keys
from mergekit_monosoup.checkpoints.sections import filters, gradients, leaves, mapping


def _declared(document: Document) -> dict[str, Any]:
    """Return the method's parameters as mergekit declares them, by name; {} without a method."""
    method: MergeMethod | None = document.method
    return {p.name: p for p in method.spec.parameters} if method else {}


def _known(document: Document) -> Iterator[tuple[str, Any, Any, str | None]]:
    """Yield (place, declaration, value, model) of the parameters that the method has."""
    declared = _declared(document)
    for place, parameters, model in document.sections:
        for name, value in parameters.items():
            if name in declared:
                yield f"{place}.{name}", declared[name], value, model


@define_check(
    "PAR201",
    "error",
    title="parameter that the method does not have",
    advice="correct or remove it: mergekit ignores it without a word",
)
def unknown_parameter(document: Document) -> Iterator[Finding]:
    declared = _declared(document)
    if document.method is None:
        return
    for place, parameters, _ in document.sections:
        for name in parameters:
            if name not in declared:
                yield document.error(
                    f"{place}.{name}",
                    f"{document.method.spec.name} has no such parameter, mergekit ignores it"
                    f"{nearest(str(name), declared)}",
                )


@define_check(
    "PAR202",
    "error",
    title="merge-wide parameter under a model",
    advice="move it to the top-level `parameters`",
)
def shared_under_model(document: Document) -> Iterator[Finding]:
    for place, declared, _, model in _known(document):
        if model is not None and declared.scope == ParameterScope.SHARED:
            yield document.error(
                place, "is ignored under a model: write it under the top-level `parameters`"
            )


@define_check(
    "PAR203",
    "error",
    title="parameter of fine-tuned models under the base model",
    advice="move it to a fine-tuned model or to the top-level `parameters`",
)
def under_base(document: Document) -> Iterator[Finding]:
    base = str(document.data.get("base_model"))
    for place, declared, _, model in _known(document):
        if model is not None and model == base and declared.scope == ParameterScope.NON_BASE:
            yield document.error(
                place, "is ignored under base_model: write it under a fine-tuned model or top-level"
            )


@define_check(
    "PAR204",
    "error",
    title="parameter without a value",
    advice="leave the line out to get the default",
)
def no_value(document: Document) -> Iterator[Finding]:
    for place, _, value, _ in _known(document):
        if value is None:
            yield document.error(place, "has no value; leave the line out to get the default")


@define_check(
    "PAR205",
    "error",
    title="unknown key in a filter",
    advice="an entry has `filter` and `value` only",
)
def unknown_filter_key(document: Document) -> Iterator[Finding]:
    for place, _, value, _ in _known(document):
        for key in unknown_filter_keys(value):
            near = nearest(key, FILTER_KEYS)
            yield document.error(place, f"unknown key `{key}` in a filter{near}")


@define_check(
    "PAR206",
    "error",
    title="entry without `filter` before others",
    advice="put it last: the first entry that fits a tensor is taken",
)
def unreached_filter(document: Document) -> Iterator[Finding]:
    for place, _, value, _ in _known(document):
        for entry in filters(value)[:-1]:
            misspelt = any(unknown_filter_keys(entry))
            if entry.get("filter") in (None, "*") and not misspelt:
                yield document.error(
                    place,
                    "an entry without `filter` comes before others, which are never reached: "
                    "put it last",
                )


@define_check(
    "PAR207",
    "error",
    title="wrong value of a parameter",
    advice="write what the message asks for; `mergekit-monosoup parameters` lists ranges",
)
def wrong_value(document: Document) -> Iterator[Finding]:
    for place, declared, value, _ in _known(document):
        for leaf in leaves(value):
            try:
                declared.validate(leaf)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                yield document.error(place, message)


# -- rules about several values, for the methods of this package -----------------------------------


def _of_models(document: Document, name: str, default: Any) -> dict[str, Any]:
    """Return what the fine-tuned models say about a parameter, by model."""
    return {str(m.get("model")): _written(m).get(name, default) for m in document.tuned}


def _written(entry: Mapping[str, Any]) -> dict[Any, Any]:
    return mapping(entry.get("parameters"))


def _violations(document: Document, violations: Iterator[rules.Violation]) -> Iterator[Finding]:
    for violation in violations:
        yield document.error(violation.parameter, violation.message)


@define_check(
    "PAR208",
    "error",
    title="models that disagree about a merge-wide parameter",
    advice="write it once, under the top-level `parameters`",
)
def disagreement(document: Document) -> Iterator[Finding]:
    method = document.own_method
    if method is None or not document.tuned:
        return
    for parameter in method.parameters:
        if not parameter.per_model:
            # What mergekit takes for a model that has no value of its own.
            shared = _written(document.data).get(parameter.name, parameter.default)
            values = _of_models(document, parameter.name, shared)
            yield from _violations(
                document, rules.agreement_violations(method, parameter.name, values)
            )


@define_check(
    "PAR209",
    "error",
    title="weight 0 for every model",
    advice="give at least one model a weight above 0",
)
def weightless(document: Document) -> Iterator[Finding]:
    if (method := document.own_method) is not None:
        shared = _written(document.data).get("weight", method["weight"].default)
        weights = [_written(m).get("weight", shared) for m in document.tuned]
        yield from _violations(document, rules.weight_violations(method, weights))


def _merged(document: Document) -> tuple[list[str], list[str]]:
    """Return the models of `svc` that are the merge of the others, and those others."""
    flags = [(str(m.get("model")), _written(m).get("merged") is True) for m in document.tuned]
    return [name for name, flag in flags if flag], [name for name, flag in flags if not flag]


@define_check(
    "PAR210",
    "error",
    title="`merged` for several models, or for one beside fewer than two others",
    advice="set it for the one merge, and list at least two of the models that it was made of",
)
def merged_models(document: Document) -> Iterator[Finding]:
    if document.own_method is rules.SVC:
        yield from _violations(document, rules.merged_violations(*_merged(document)))


@define_check(
    "PAR211",
    "error",
    title="parameter that has no effect on a model that is `merged`",
    advice="write it where that merge is made",
)
def unused_beside_merged(document: Document) -> Iterator[Finding]:
    merged, _ = _merged(document)
    if document.own_method is not rules.SVC or len(merged) != 1:
        return
    values = {}
    for name in ("weight", "scaling", "normalize"):
        shared = _written(document.data).get(name)
        by_model = _of_models(document, name, shared).values()
        values[name] = [value for value in by_model if isinstance(value, int | float)]
    yield from _violations(document, rules.unused_violations(merged[0], values))


@define_check(
    "PAR212",
    "warning",
    title="`R` without the mode that reads it",
    advice="add `mode: variance`, or remove `R`",
)
def unread_threshold(document: Document) -> Iterator[Finding]:
    if document.own_method is not rules.MONOSOUP:
        return
    values = {
        name: [leaf for _, p, _ in document.sections for leaf in leaves(p.get(name))]
        for name in ("R", "mode")
    }
    if not all(map(rules.MONOSOUP["mode"].values.accepts, values["mode"])):
        return  # it is misspelt, and may be the mode that reads R
    for violation in rules.unread_violations(values):
        yield document.warning(violation.parameter, violation.message)


@define_check(
    "PAR213",
    "error",
    title="gradient over the layers, in a file for mergekit-pytorch",
    advice="write one value, or entries with `filter` and `value`",
)
def gradient_of_files(document: Document) -> Iterator[Finding]:
    if not document.raw:
        return
    for place, _, value, _ in _known(document):
        for values in gradients(value):
            if len(set(map(str, values))) > 1:
                yield document.error(
                    place,
                    f"mergekit-pytorch knows no layers, and takes {values[0]} of "
                    f"{values} for every tensor",
                )
