"""Suites of evaluations, as every program of evaluation/ loads them."""

from __future__ import annotations

import functools
import random
from typing import Any

import yaml
from helpers.evaluations import MINIMAL

from evaluation.suite import SHIPPED, Suite, Task
from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command, load_suite

KEYS = [*Suite.model_fields, *Task.model_fields, "until", "temperature", "do_sample"]
FILES = ["s.yml", "s.yml", "s.yml", "s.x.yml", "a b.yml", "[b].yml", "x" * 200 + ".yml", "é.yml"]


@functools.cache
def _starts() -> list[Any]:
    shipped = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(SHIPPED.glob("*.yml"))]
    return [MINIMAL, *shipped]


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Write a suite, under a name that may be a strange one."""
    suite = rng.choice(_starts())
    for _ in range(rng.randint(1, 3)):
        suite = mutation.tree(rng, suite, KEYS, yaml=True)
    text = yaml.safe_dump(suite, allow_unicode=True).encode("utf-8", "surrogatepass")
    name = rng.choice(FILES)
    place.write(name, mutation.content(rng, text) if rng.random() < 0.2 else text)
    return [Command(load_suite, [name], (name,))]
