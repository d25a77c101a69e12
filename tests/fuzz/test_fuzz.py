"""Cases of each subject: a few fixed ones in every run, new ones for minutes by `make fuzz`."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from fuzz.place import Place
from fuzz.rules import Broken, assert_rules
from fuzz.subjects import SUBJECTS

FAILURES = Path(__file__).parents[2] / "fuzz-out"
MINUTES = float(os.environ.get("FUZZ_MINUTES") or 0)
FIRST = int(os.environ.get("FUZZ_SEED") or time.time())  # number of the first case
ONE = os.environ.get("FUZZ_CASE", "")  # SUBJECT-NUMBER
FIXED = range(1)  # numbers of the cases that every run of the tests tries
MOST_FAULTS = 20  # of a subject, before it is given up


@pytest.fixture(autouse=True)
def alone_in_the_world(monkeypatch, tmp_path_factory):
    """No hub, an empty home, and nothing that mergekit remembers of the models before."""
    from mergekit.io.tasks import LoaderCache

    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    yield
    LoaderCache().flush_all()


def numbers(subject: str) -> Iterator[int]:
    """Yield the cases to try: one, the fixed ones, or new ones until the time is over."""
    if ONE:
        if ONE.startswith(f"{subject}-"):
            yield int(ONE.rpartition("-")[2])
        return
    if not MINUTES:
        yield from FIXED
        return
    end = time.monotonic() + 60 * MINUTES / len(SUBJECTS)
    for number in count(FIRST):
        if time.monotonic() > end:
            return
        yield number


def attempt(subject: str, number: int, top: Path) -> None:
    """Make a case and run its commands.

    Raises:
        Broken: a rule was.
    """
    from mergekit.io.tasks import LoaderCache

    LoaderCache().flush_all()
    place = Place(top)
    place.create()
    for command in SUBJECTS[subject](random.Random(f"{subject}-{number}"), place):
        assert_rules(command, place)


@contextmanager
def named(case: str) -> Iterator[None]:
    """Name a case in fuzz-out/running for as long as it runs: the process may die of it."""
    running = FAILURES / "running"
    if MINUTES:
        FAILURES.mkdir(exist_ok=True)
        running.write_text(f"make fuzz CASE={case}\n")
    try:
        yield
    finally:
        running.unlink(missing_ok=True)


def keep(subject: str, number: int, fault: Broken) -> str:
    """Write the input of a case, and what came of it, below fuzz-out/; return what to tell."""
    case = f"{subject}-{number}"
    place = Place(FAILURES / case)
    shutil.rmtree(place.top, ignore_errors=True)
    place.create()
    SUBJECTS[subject](random.Random(case), place)
    (place.top / "fault.txt").write_text(str(fault), "utf-8", "backslashreplace")
    return f"{fault}\n  again: make fuzz CASE={case}\n  input: {place.work}"


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_traceback_no_hang_no_other_file(subject, tmp_path):
    faults: dict[str, str] = {}
    tried = 0
    for number in numbers(subject):
        try:
            with named(f"{subject}-{number}"):
                attempt(subject, number, tmp_path / str(number))
        except Broken as fault:
            if fault.signature not in faults:
                faults[fault.signature] = keep(subject, number, fault)
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)
        tried += 1
        if len(faults) >= MOST_FAULTS:
            break
    if MINUTES:
        print(f"{subject}: {tried} cases from number {FIRST}", file=sys.stderr)
    assert not faults, "\n\n".join(faults.values())
