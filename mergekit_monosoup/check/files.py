"""Checks of what the models' files are, and how their tensors are named."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from mergekit_monosoup.check.context import Document
from mergekit_monosoup.check.finding import Finding, define_check
from mergekit_monosoup.checkpoints.headers import ForeignError, LackingError, Stored, WrappedError
from mergekit_monosoup.checkpoints.pickles import other_entries
from mergekit_monosoup.checkpoints.reader import NAMES_IN_MESSAGE
from mergekit_monosoup.checkpoints.values import small_value


@define_check(
    "MOD306",
    "error",
    title="file or folder that is no model, but something else",
    advice="do what the message says: convert it, or download what is missing",
)
def foreign(document: Document) -> Iterator[Finding]:
    yield from _errors(document, ForeignError)


@define_check(
    "MOD307",
    "error",
    title="tensors in a dictionary inside of a file",
    advice="save the inner dictionary alone, with the line that the message has",
)
def wrapped(document: Document) -> Iterator[Finding]:
    yield from _errors(document, WrappedError)


def _errors(document: Document, kind: type[LackingError]) -> Iterator[Finding]:
    """Yield the errors of one kind that reading the models' headers raised."""
    for name, error in document.opened.items():
        if isinstance(error, kind):
            yield document.error(name, _after(name, str(error)))


def _after(name: str, message: str) -> str:
    """Return a message without the model's name at its beginning, which stands there already."""
    return message.removeprefix(f"{name} ")


@define_check(
    "TEN520",
    "error",
    title="names that only a wrapper tells apart",
    advice="save one of the files again, under the names that the other has",
)
def renamed(document: Document) -> Iterator[Finding]:
    if document.planning.tasks and not document.reads.lacking:
        return  # mergekit knows both names, as GPT-2's
    found = document.renamed
    others = [name for name in document.tensors if name in found]
    if not others:
        return
    first = next(iter(document.tensors))
    if all(found[name].more for name in others):  # so it is the first that stands out
        others = others[:1]
    for name in others:
        yield document.error(name, found[name].described(first))


@define_check(
    "TEN522",
    "error",
    title="tensors that are not floating point and differ",
    advice="make them equal, or merge with `monosoup`, which keeps them as fine-tuned",
)
def differing_buffers(document: Document) -> Iterator[Finding]:
    if document.own_method or len(document.tensors) < 2:
        return
    first, *others = document.tensors.items()
    for other, theirs in others:
        names = [
            name for name, ours in first[1].items() if name in theirs and _stops(ours, theirs[name])
        ]
        if names:
            yield document.error(
                other,
                f"{len(names)} tensor(s) that are not floating point differ from those of "
                f"{first[0]}, {', '.join(sorted(names)[:NAMES_IN_MESSAGE])}: mergekit stops at the "
                f"first; make them equal, or merge with `monosoup`, which keeps them",
            )


def _stops(ours: Stored, theirs: Stored) -> bool:
    """Whether mergekit stops at two tensors, as far as headers and small tensors tell."""
    if ours.floating and theirs.floating:
        return False
    if (ours.shape, ours.floating, ours.bits) != (theirs.shape, theirs.floating, theirs.bits):
        return True
    here, there = small_value(ours), small_value(theirs)
    if here is None or there is None:
        return False  # not read
    return here.dtype != there.dtype or not torch.equal(here, there)


@define_check(
    "TEN523",
    "error",
    title="entries that are no tensors, in a file for mergekit-pytorch",
    advice="save the tensors alone: mergekit-pytorch stops at anything else",
)
def beside(document: Document) -> Iterator[Finding]:
    for name in document.tensors if document.raw else ():
        if name.lower().endswith(".safetensors") or not os.path.isfile(name):
            continue
        if entries := other_entries(name):
            yield document.error(
                name,
                f"holds {len(entries)} entries that are no tensors, "
                f"{', '.join(sorted(entries)[:NAMES_IN_MESSAGE])}: mergekit-pytorch stops at the "
                "first; save the tensors alone",
            )
