"""Results of evaluations, for `evaluation.tables` and `evaluation.figures`."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import random
import tempfile
from pathlib import Path

from helpers import evaluations

from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command, figures, tables

FORMS = [[], ["--latex", "--paper"], ["--csv"]]

_TEMPORARY = tempfile.TemporaryDirectory(prefix="fuzz-results-")  # gone with the process


@functools.cache
def _good() -> Path:
    folder = Path(_TEMPORARY.name)
    evaluations.write(folder, "pretrained", evaluations.PRETRAINED)
    evaluations.write(folder, "finetuned", evaluations.TUNED)
    evaluations.write(folder, "soup", evaluations.SOUP, merge=evaluations.merge_of("monosoup"))
    return folder


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Change a result or its answers; mostly with a digest that fits all the same."""
    mutation.copied(_good(), place.work / "results")
    model = rng.choice(["soup", "finetuned"])
    result, answers = f"results/{model}.made.json", f"results/{model}.made.samples.jsonl.gz"
    kind = rng.random()
    if kind < 0.06:
        mutation.place_taken(rng, place.work / rng.choice([result, answers]))
    elif kind < 0.5:
        place.write(result, mutation.json_content(rng, (place.work / result).read_bytes()))
    else:
        path = place.write(answers, _answers(rng, (place.work / answers).read_bytes()))
        if rng.random() < 0.9:
            data = json.loads((place.work / result).read_bytes())
            data["samples"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            place.write(result, json.dumps(data))
    made = [Command(tables, ["results", *rng.choice(FORMS)])]
    if rng.random() < 0.1:
        drawn = ["results", "--out", "drawn", "--format", "svg"]
        made.append(Command(figures, drawn, (), ("drawn",)))
    return made


def _answers(rng: random.Random, original: bytes) -> bytes:
    """Return a file of answers in which lines are changed, doubled, cut off or gone."""
    if rng.random() < 0.2:
        return mutation.content(rng, original)
    lines = gzip.decompress(original).splitlines()
    at = rng.randrange(len(lines))
    kind = rng.random()
    if kind < 0.6:
        lines[at] = mutation.json_content(rng, lines[at])
    elif kind < 0.8:
        lines[at:] = []
    else:
        lines.insert(at, lines[rng.randrange(len(lines))])
    return gzip.compress(b"\n".join(lines) + b"\n")
