"""Find what mergekit would drop in silence, before hours of merging.

Works for every merge method: what a key or parameter may be is read off mergekit's own models and
method specs. Of models only file headers are read.

:data:`CHECKS` is the table of contents, in the order in which checks look. Codes say the subject,
which is also the file: ``DOC0`` the file as a whole (document.py), ``KEY1`` keys (keys.py),
``PAR2`` parameters (parameters.py), ``MOD3`` models (models.py), ``PLAN4`` mergekit's plan
(plan.py), ``TEN5`` tensors (tensors.py; what a model's files are, and how their tensors are named,
is in files.py), ``FOL6`` files beside the weights (folder.py). A code keeps its meaning; that of a
check that is gone is not used again.

To add a check, write one function in the file of its subject, for example::

    @define_check("MOD309", "warning", title="a hundred models", advice="merge fewer at a time")
    def many(document: Document) -> Iterator[Finding]:
        if len(document.models) >= 100:
            yield document.warning("models", f"are {len(document.models)}; each is read in full")

then name it below (``models.many``), and in the test file of the subject write a test that
produces it. ``mergekit-monosoup check --list`` shows it then; ``tests/check/test_list.py`` fails
until docs/check.md does, and a test produces the code. What several checks need, or takes time,
is a property of ``Document`` (context.py) or ``Planning`` (planning.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_monosoup.check import (
    document,
    files,
    folder,
    keys,
    models,
    parameters,
    plan,
    resolved,
    tensors,
)
from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.document import File
from mergekit_monosoup.check.finding import Check, Finding, ignorable, table
from mergekit_monosoup.checkpoints.headers import Headers
from mergekit_monosoup.report import PLANNING_ONLY

__all__ = ["CHECKS", "Check", "Examination", "Finding", "check", "examine", "table"]

_OF_FILE: tuple[Check[File], ...] = (
    document.unreadable,
    document.empty,
    document.stage_name,
    document.shared_report,
    document.not_a_mapping,
    document.shared_name,
    document.in_a_circle,
)
# In this order: an error of one keeps mergekit from getting to its plan, and so the later ones.
_OF_DOCUMENT: tuple[Check[Document], ...] = (
    keys.unknown_key,
    keys.refused,
    keys.unknown_method,
    keys.unknown_dtype,
    keys.narrow_output,
    parameters.unknown_parameter,
    parameters.shared_under_model,
    parameters.under_base,
    parameters.no_value,
    parameters.unknown_filter_key,
    parameters.unreached_filter,
    parameters.wrong_value,
    parameters.disagreement,
    parameters.weightless,
    parameters.merged_models,
    parameters.unused_beside_merged,
    parameters.unread_threshold,
    parameters.gradient_of_files,
    models.listed_twice,
    models.two_spellings,
    models.contract,
    models.missing,
    models.looks_like_hub,
    files.foreign,
    files.wrapped,
    models.swapped,
    plan.no_config,
    plan.other_architecture,
    plan.layer_range,
    plan.unknown_module,
    plan.cannot_plan,
    plan.other_depth,
    plan.planner_fails,
)
# These look at whatever can be read, also where the configuration has errors.
_OF_TENSORS: tuple[Check[Document], ...] = (
    tensors.unreadable,
    tensors.unreachable,
    tensors.adapter,
    tensors.quantised,
    tensors.working_dtype,
    tensors.unmatched_filter,
    tensors.unread,
    tensors.lacking,
    tensors.shapes,
    tensors.nothing_in_common,
    tensors.partial,
    tensors.misfitting_definition,
    tensors.uneven_stacks,
    files.renamed,
    files.differing_buffers,
    files.beside,
    folder.damaged,
    folder.unusable_config,
    folder.own_code,
    folder.leftover_quantisation,
    folder.other_config,
    folder.other_generation,
    folder.other_tokenizer,
    folder.left_behind,
    folder.tokens_without_rows,
    folder.dropped_rows,
    folder.unknown_template,
    folder.rows_left_as_they_are,
)
CHECKS: tuple[Check[Any], ...] = (*_OF_FILE, *_OF_DOCUMENT, *_OF_TENSORS)


def check(path: str | Path, ignore: Iterable[str] = ()) -> list[Finding]:
    """Return the findings for a file meant for mergekit-yaml, mergekit-multi or mergekit-pytorch.

    ``ignore``: codes whose warnings are left out.

    Raises:
        ValueError: a code to ignore is unknown, or that of an error.
    """
    return examine(path, ignore, sum_up=False).findings


@dataclass(frozen=True)
class Examination:
    """What was found in a file, and lines of what its merges come to if there is no error."""

    findings: list[Finding]
    summary: list[str]


def examine(path: str | Path, ignore: Iterable[str] = (), *, sum_up: bool = True) -> Examination:
    """Return what :func:`check` returns, and what the merges of the file come to.

    Raises as :func:`check`.
    """
    ignored = ignorable(ignore, CHECKS)
    token = PLANNING_ONLY.set(True)  # a merge that runs in another thread goes on with its report
    try:
        file, headers = File.read(path), Headers()  # a model of several stages is read once
        documents = [
            Document(data, label, file.stages, file.origins, headers)
            for label, data in file.mappings
        ]
        findings = [finding for of_file in _OF_FILE for finding in of_file(file)]
        findings += [finding for document in documents for finding in _of_document(document)]
        errors = [finding for finding in findings if finding.level == "error"]
        lines = []
        if sum_up and not errors:
            lines = [line for document in documents for line in resolved.summary(document)]
    finally:
        PLANNING_ONLY.reset(token)
    warnings = [f for f in findings if f.level != "error" and f.code not in ignored]
    return Examination([f for f in findings if f in errors or f in warnings], lines)


def _of_document(document: Document) -> Iterator[Finding]:
    for of_document in _OF_DOCUMENT:
        findings = list(of_document(document))
        yield from findings
        if document.sound and any(finding.level == "error" for finding in findings):
            document = replace(document, sound=False)
    for of_tensors in _OF_TENSORS:
        yield from of_tensors(document)
