"""A person's own questions, as a suite reads them."""

from __future__ import annotations

import json
import random
from typing import Any

from evaluation.questions import FIELDS
from evaluation.suite import SHIPPED
from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command, load_suite

SUITE = "ID:\n  - {questions: q.jsonl}\nOOD:\n  - {questions: good.jsonl}\n"
GOOD = json.dumps({"prompt": "a", "answer": "b"})


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Write a suite of two files of questions, the first of which is damaged."""
    lines: list[Any] = [
        json.loads(line)
        for path in rng.sample(sorted(SHIPPED.glob("*.jsonl")), rng.randint(1, 2))
        for line in path.read_text("utf-8").splitlines()
    ]
    for _ in range(rng.randint(1, 3)):
        number = rng.randrange(len(lines))
        lines[number] = mutation.tree(rng, lines[number], list(FIELDS))
    text = "\n".join(json.dumps(line) for line in lines).encode("utf-8", "surrogatepass")
    place.write("s.yml", SUITE.encode())
    place.write("good.jsonl", GOOD.encode())
    place.write("q.jsonl", mutation.content(rng, text) if rng.random() < 0.3 else text)
    return [Command(load_suite, ["s.yml"], ("s.yml", "q.jsonl"))]
