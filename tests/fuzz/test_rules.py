"""The rules catch what they are there for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz.place import Place
from fuzz.programs import Command, Outcome
from fuzz.rules import Broken, assert_rules

GOOD = Outcome(1, "", "Error: m.yml: something is wrong\n")


def caught() -> Outcome:
    return Outcome(1, "", "", ValueError("x"))


def after(change: Callable[[], object]) -> Callable[[], Outcome]:
    def program() -> Outcome:
        change()
        return GOOD

    return program


@pytest.fixture
def place(tmp_path) -> Place:
    place = Place(tmp_path / "top")
    place.create()
    place.write("m.yml", "/OUTSIDE/x")
    return place


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        (caught, "ends in a traceback"),
        (lambda: Outcome(0, "", "Traceback (most recent call last):\n"), "prints a traceback"),
        (lambda: Outcome(3, "", "x"), "exit code is 3"),
        (lambda: Outcome(0, "a\x1b[31m", ""), "prints"),
        (lambda: Outcome(1, "", "m.yml\n" * 50), "many lines"),
        (lambda: Outcome(1, "", ""), "without words"),
        (lambda: Outcome(1, "", "Error: wrong"), "names no file"),
        (after(lambda: time.sleep(5)), "hangs"),
        (after(lambda: Path("../../../outside/x").unlink()), "other files"),
        (after(lambda: Path("../y").mkdir()), "other files"),
        (after(lambda: Path("m.yml").write_text("")), "other files"),
        (after(lambda: Path("r.json").symlink_to("/")), "other files"),
    ],
)
def test_what_breaks_a_rule(program, rule, place):
    with pytest.raises(Broken, match=rule):
        assert_rules(Command(lambda _: program(), [], ("m.yml",), ("out",)), place, longest=0.2)


def test_what_breaks_none(place):
    command = Command(lambda _: after(lambda: Path("out").mkdir())(), [], ("m.yml",), ("out",))
    assert assert_rules(command, place) == GOOD
    assert (place.work / "m.yml").read_text() == f"{place.top}/outside/x"
