"""Names of tensors, models, suites and tasks, through every table and figure."""

from __future__ import annotations

import random
import re

import torch
from helpers import evaluations
from safetensors.torch import save_file

from evaluation.store import MODEL_NAME
from fuzz.place import Place
from fuzz.programs import Command, figures, in_some_encoding, tables
from fuzz.values import TEXTS

PARTS = [
    *("model", "layers", "0", "1", "11", "blocks", "_blocks", "mlp", "up_proj", "weight", "bias"),
    *("bert", "embeddings", "experts", "stages", "conv", "norm", "lm_head", "q_proj", "[3]", "W"),
]
# In the file system's way, or read by mergekit as a name with a revision or an adapter.
UNFIT = {"", ".", "..", "~"}
FOLDERS = [
    text
    for text in TEXTS
    if text not in UNFIT and len(text) < 100 and not set(text) & set("/\0@+\\~")
]

MODELS = ["made", *(f"s{text}" for text in FOLDERS if re.fullmatch(MODEL_NAME, f"s{text}"))]


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Write models of such names, or results."""
    return _results(rng, place) if rng.random() < 0.4 else _models(rng, place)


def name(rng: random.Random) -> str:
    """Return a name of a tensor, strange in a part or as a whole."""
    if rng.random() < 0.15:
        return rng.choice(TEXTS)
    parts = [rng.choice(PARTS if rng.random() < 0.85 else TEXTS) for _ in range(rng.randint(1, 6))]
    return rng.choice([".", ".", ".", "_", "/"]).join(parts)


def _models(rng: random.Random, place: Place) -> list[Command]:
    torch.manual_seed(rng.getrandbits(32))
    names = [name(rng) for _ in range(rng.choice([1, 3, 12, 60]))]
    shapes = [rng.choice([(4, 3), (3, 4), (3,), (2, 2, 3, 3), (0, 3), (1, 1)]) for _ in names]
    base = {n: torch.randn(shape) for n, shape in zip(names, shapes, strict=True)}
    base = {n: tensor for n, tensor in base.items() if n != "__metadata__"} or {
        "w": torch.ones(2, 2)
    }
    models = ["base", f"one{rng.choice(FOLDERS)}", f"two{rng.choice(FOLDERS)}"]
    for model in models:
        (place.work / model).mkdir(exist_ok=True)
        tensors = {n: tensor + 0.1 * torch.randn(tensor.shape) for n, tensor in base.items()}
        save_file(tensors, place.work / model / "model.safetensors")
    _, one, two = models
    out = ("i.jsonl", "p.svg", "s.yml")
    made = [
        ["inspect", "base", one, "--cosine", two, "--spectra", "--layers", "--out", "i.jsonl"],
        ["report", "i.jsonl"],
        ["soup", one, two, "--base", "base", "--threshold", "0", "--out", "s.yml"],
    ]
    if rng.random() < 0.15:
        made.append(["plot", "i.jsonl", "--out", "p.svg"])
    return [Command(in_some_encoding(rng), arguments, (), out) for arguments in made]


def _results(rng: random.Random, place: Place) -> list[Command]:
    tasks = [rng.choice(TEXTS) or "t" for _ in range(3)]
    labels = [rng.choice(["", *TEXTS]) for _ in range(3)]
    tasks = [f"{task}{number}" for number, task in enumerate(tasks)]
    ask = [
        {"task": task, "label": label, "metric": "exact_match"}
        for task, label in zip(tasks, labels, strict=True)
    ]
    suite = evaluations.suite(title=rng.choice(TEXTS), ID=ask[:1], OOD=ask[1:])
    folder = place.work / "results"
    for model, outcomes in (
        ("finetuned", evaluations.TUNED),
        ("soup", evaluations.SOUP),
        (rng.choice(MODELS), evaluations.SOUP),
    ):
        answered = dict(zip(tasks, outcomes.values(), strict=True))
        evaluations.write(folder, model, answered, made=suite)
    form = rng.choice([[], ["--latex"], ["--csv"]])
    made = [Command(tables, ["results", *form])]
    if rng.random() < 0.15:
        drawn = ["results", "--out", "drawn", "--format", "svg"]
        made.append(Command(figures, drawn, (), ("drawn",)))
    return made
