"""The three rules: no traceback, no hang, no file outside the places named."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuzz.place import Place, changes, snapshot
from fuzz.programs import Command, Outcome

LONGEST = 20  # seconds
MOST_LINES = 8  # of an error: "a few"
UNSAFE = set("\x1b\0\x07\x08\u202e\u2028")  # would move the cursor, or hide
FINDING = re.compile(r"(error|warning)  [A-Z]+\d+  .|m\.yml: |.*: (fine|\d+ error)")
_STDERR = os.dup(2)  # pytest puts files of its own in its place


class Broken(AssertionError):
    """A rule was broken; `signature` is the same for the same fault."""

    def __init__(self, rule: str, command: Command, details: str, signature: str = ""):
        super().__init__(f"{rule}\n  {command}\n{details[-6000:]}")
        self.signature = f"{rule} {signature}"


class _HangError(BaseException):
    """Rises in the middle of a command that takes too long; no `except Exception` stops it."""


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Raise in the block when its time is over; end the process where that does not help."""

    def ring(*_: Any) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=_STDERR)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def assert_rules(command: Command, place: Place, longest: float = LONGEST) -> Outcome:
    """Run a command in the place's work folder.

    Raises:
        Broken: a rule was.
    """
    before = snapshot(place.top)
    started = time.monotonic()
    try:
        with watchdog(longest), _working_in(place.work):
            outcome = command.program(command.arguments)
    except _HangError:
        text = traceback.format_exc()
        raise Broken("it hangs", command, text, _where(text)) from None
    _no_traceback(command, outcome)
    _clean_words(command, outcome)
    if time.monotonic() - started > longest:
        raise Broken("it hangs", command, "in code that no signal interrupts")
    work = f"{place.work.relative_to(place.top)}/"
    allowed = tuple(work + name for name in command.writes)
    if changed := changes(before, snapshot(place.top), allowed or ("\0",)):
        raise Broken("it changes other files", command, "\n".join(changed), changed[0])
    return outcome


def _no_traceback(command: Command, outcome: Outcome) -> None:
    if outcome.raised is not None:
        text = "".join(traceback.format_exception(outcome.raised))
        raise Broken("it ends in a traceback", command, text, _where(text))
    everything = outcome.output + outcome.errors
    if "Traceback (most recent call last)" in everything:
        raise Broken("it prints a traceback", command, everything, _where(everything))
    if outcome.code not in (0, 1, 2):
        raise Broken(f"its exit code is {outcome.code}", command, everything)


def _clean_words(command: Command, outcome: Outcome) -> None:
    """Assert that errors are one line or a few that name the file, and no character does harm."""
    everything = outcome.output + outcome.errors
    if unsafe := UNSAFE & set(everything):
        raise Broken(f"it prints {sorted(unsafe)!a}", command, everything)
    if outcome.code == 0:
        return
    said = _without_bars(outcome.errors or outcome.output)
    is_check = command.arguments[:1] == ["check"]
    if is_check and "--json" not in command.arguments:
        strange = [line for line in outcome.output.splitlines() if not FINDING.match(line)]
        if strange:
            raise Broken("a line of check is no finding", command, "\n".join(strange))
    elif not is_check and len(said.splitlines()) > MOST_LINES:
        raise Broken("an error of many lines", command, said, _kind(said))
    if not said.strip():
        raise Broken("an error without words", command, repr(outcome))
    if command.names and not any(name in said for name in command.names):
        raise Broken("an error that names no file", command, said, _kind(said))


def _kind(said: str) -> str:
    """Return what errors of one kind have in common."""
    return re.sub(r"\d+", "0", said)[:40]


def _without_bars(text: str) -> str:
    """Return a text without progress bars, which terminals overwrite."""
    lines = (line.rpartition("\r")[2] for line in text.split("\n"))
    return "\n".join(line for line in lines if not re.search(r"\d+%\|", line))


def _where(text: str) -> str:
    """Return where an exception was raised, and its kind: the signature of a fault."""
    frames = re.findall(r'File ".*?([^/"]+/[^/"]+)", line (\d+)', text)
    kind = re.findall(r"^([\w.]+(?:Error|Exception|Warning|Hang)\w*)", text, flags=re.M)
    return f"{frames[-1] if frames else ''} {kind[-1] if kind else ''}"
