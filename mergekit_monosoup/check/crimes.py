"""Whether `--allow-crimes` gets mergekit through a merge of different classes of models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from textwrap import shorten

from mergekit.common import ModelReference

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.planning import Planning
from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.reader import listed

LONGEST = 100  # characters of an error of mergekit's that are repeated


def advice(document: Document) -> str:
    """Return what to do about models of different classes, as far as their headers tell."""
    planning = document.planning
    if len(planning.loaders) < len(planning.models):
        return "mergekit merges them with --allow-crimes only"
    trials = [(leader, _trial(planning, leader)) for leader in planning.architectures]
    if stops := next((reason for _, trial in trials if (reason := _stops(trial))), ""):
        certain = "stops" if all(_stops(trial) for _, trial in trials) else "may stop"
        return f"with --allow-crimes mergekit {certain}: {stops}{_by_files(document)}"
    lost = sorted(
        {n for _, trial in trials for names in trial.reads.unread.values() for n in names}
    )
    loses = f", without {listed(lost)}" if lost else ""
    return f"mergekit merges them with --allow-crimes only{loses}"


def _trial(planning: Planning, leader: ModelReference) -> Planning:
    """Plan by the architecture of one model.

    With --allow-crimes that is any of the models', in another order each time mergekit runs.
    """
    trial = Planning(planning.config, planning.headers)
    first = {leader: planning.architectures[leader]}
    vars(trial)["architectures"] = {**first, **planning.architectures}  # instead of computing it
    return trial


def _stops(trial: Planning) -> str:
    """Return why mergekit would stop; empty if it would not."""
    if trial.error is not None:
        # Its error may quote a whole config.json.
        return f"it cannot plan the merge ({shorten(str(trial.error), LONGEST, placeholder='…')})"
    for model, names in trial.reads.lacking.items():
        return f"{model} lacks {listed(sorted(names))}"
    return ""


def _by_files(document: Document) -> str:
    """Return how mergekit-pytorch would merge what the models have in common, if it would."""
    tensors = list(document.comparable.values())
    shared = set.intersection(*(set(of_model) for of_model in tensors)) if tensors else set()
    alike = all(len({of_model[name].shape for of_model in tensors}) == 1 for name in shared)
    files = list(_single_files(document))
    if not shared or not alike or len(files) < len(document.models):
        return ""
    return (
        f". `mergekit-pytorch CONFIG OUT --tensor-union` merges {os.path.basename(files[0])} of "
        "each, named in place of the folders: the methods of this package keep what only the "
        "fine-tune has; then copy its config.json and tokenizer into OUT"
    )


def _single_files(document: Document) -> Iterator[str]:
    for beside in document.beside.values():
        name = next((name for name in hub.WEIGHTS if beside.has(name)), None)
        if name is not None:
            yield os.path.join(beside.folder, name)
