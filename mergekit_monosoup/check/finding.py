"""What a check is, and what it finds."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

Level = Literal["error", "warning"]
Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Finding:
    """Something that a check found in a configuration.

    Attributes:
        level: ``error``: the merge would fail, or not do what the file says. ``warning``: worth a
            look, or something that could not be checked.
        where: the place in the file, or the model or tensor.
        message: what is wrong there, to be read after ``where``.
        code: of the check that found it.
    """

    level: Level
    where: str
    message: str
    code: str = ""


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One check: what it is called, what to do about it, and the function that looks.

    Attributes:
        code: three letters for the subject and a number; it never changes its meaning.
        levels: of its findings, the first one where a finding does not say.
        title: what is wrong, in a few words.
        advice: what to do about it.
        look: yields findings without a code, of a whole file or of one document in it.
    """

    code: str
    levels: tuple[Level, ...]
    title: str
    advice: str
    look: Callable[[Subject], Iterable[Finding]]

    def __call__(self, subject: Subject) -> Iterator[Finding]:
        """Yield the findings, with the code."""
        for finding in self.look(subject):
            yield replace(finding, code=self.code)


def define_check(
    code: str, *levels: Level, title: str, advice: str
) -> Callable[[Callable[[Subject], Iterable[Finding]]], Check[Subject]]:
    """Make a :class:`Check` of the function below."""

    def decorate(look: Callable[[Subject], Iterable[Finding]]) -> Check[Subject]:
        return Check(code, levels, title, advice, look)

    return decorate


def near_word(word: str, known: Collection[str]) -> str:
    """Return the known word that an unknown one was meant to be; empty if none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def nearest(word: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown word: the one that was meant, or all."""
    near = near_word(word, known)
    return f"; did you mean `{near}`?" if near else f"; known: {', '.join(sorted(known))}"


def table(checks: Sequence[Check[Any]]) -> str:
    """Return the checks as a Markdown table; docs/check.md shows exactly this."""
    rows = [
        f"| {check.code} | {' or '.join(check.levels)} | {check.title} | {check.advice} |"
        for check in checks
    ]
    return "\n".join(["| code | level | finds | what to do |", "|---|---|---|---|", *rows])


def ignorable(codes: Iterable[str], checks: Sequence[Check[Any]]) -> set[str]:
    """Return the codes whose warnings are to be silenced, in capitals.

    Raises:
        ValueError: a code is unknown, or its check finds errors only.
    """
    known = {check.code: check for check in checks}
    ignored = {code.strip().upper() for code in codes}
    for code in sorted(ignored):
        if code not in known:
            near = difflib.get_close_matches(code, list(known), n=3, cutoff=0.5)
            listed = f"near: {', '.join(near)}" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{code!r} is not the code of a check; {listed}")
        if "warning" not in known[code].levels:
            raise ValueError(
                f"{code} ({known[code].title}) is an error and cannot be ignored: "
                "the merge would fail, or not do what the file says"
            )
    return ignored
