"""The scores that `soup --scores` reads."""

from __future__ import annotations

import random

import yaml

from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command
from fuzz.subjects import models

START = {"tuned0": 0.5, "tuned1": 0.25}


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Write scores as YAML or JSON."""
    mutation.copied(models.good(), place.work)
    scores = START
    for _ in range(rng.randint(1, 2)):
        scores = mutation.tree(rng, scores, list(START), yaml=True)
    text = yaml.safe_dump(scores, allow_unicode=True).encode("utf-8", "surrogatepass")
    if rng.random() < 0.4:
        text = mutation.json_content(rng, mutation.as_json(START), list(START))
    place.write("scores.yml", text)
    return [models.soup(("scores.yml",), "--scores", "scores.yml")]
