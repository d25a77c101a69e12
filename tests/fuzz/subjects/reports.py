"""Reports of merges and inspections, for `report`, its pages, and `plot`."""

from __future__ import annotations

import json
import random
from typing import Any

from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command, in_some_encoding, monosoup
from mergekit_monosoup.cli import SORTS
from mergekit_monosoup.report import Record

NUMBERS = {
    **{"R": 0.8, "k": 1, "rank": 3, "effective_rank": 2.5, "gap": 0.1, "P_k": 0.9, "rho": 0.5},
    **{"cos_alpha": 0.3, "lambda_high": 0.7, "lambda_low": 0.3, "delta_norm": 1.0},
    **{"rel_update": 0.1, "edit_norm": 0.05, "realised": 0.99, "seconds": 0.1},
}
MERGED: list[Any] = [
    json.loads(Record(name, (4, 3), "float32", action="edited", mode=mode, **NUMBERS).to_json())
    for mode in ("variance", "freevariance")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
]
MERGED.append(json.loads(Record("norm", (4,), "float32", action="copied", reason="x").to_json()))
SVC = {"gamma_min": 0.5, "gamma_median": 1.0, "gamma_max": 1.5, "amplified": 0.5, "mode": None}
STARTS = [
    MERGED,
    [line | SVC for line in MERGED],
    [
        line
        | {
            "action": "inspected",
            "cosine": {"a ~ b": 0.5},
            "spectrum": [1.0, 0.5],
            "leading": [1.0],
        }
        for line in MERGED[:4]
    ],
]


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Write a report with a few absurd values."""
    lines = rng.choice(STARTS)
    for _ in range(rng.randint(1, 4)):
        lines = mutation.tree(rng, lines, list(MERGED[0]))
        lines = lines if isinstance(lines, list) and lines else [lines]
    text = b"\n".join(map(mutation.as_json, lines)) + b"\n"
    place.write("r.jsonl", mutation.content(rng, text) if rng.random() < 0.2 else text)
    names = ("r.jsonl",)
    forms = [[], ["--sort", rng.choice(SORTS)], ["--json"], ["--card"]]
    read = ["report", "r.jsonl", *rng.choice(forms)]
    made = [Command(in_some_encoding(rng), read, names)]
    if rng.random() < 0.2:
        made.append(Command(monosoup, ["plot", "r.jsonl", "--out", "p.svg"], (), ("p.svg",)))
    if rng.random() < 0.2:
        made.append(Command(monosoup, ["report", "r.jsonl", "--html", "p.html"], (), ("p.html",)))
    return made
