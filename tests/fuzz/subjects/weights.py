"""Files of weights and their indices, for everything that reads models."""

from __future__ import annotations

import io
import json
import random
import struct
from pathlib import Path

import torch

from fuzz import mutation, values
from fuzz.place import Place
from fuzz.programs import Command
from fuzz.subjects import models

KEYS = [
    "dtype",
    "shape",
    "data_offsets",
    "weight_map",
    "metadata",
    "__metadata__",
    "lm_head.weight",
]


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Damage one file of one model."""
    mutation.copied(models.good(), place.work)
    files = sorted(p for p in place.work.glob("*/*") if _holds_tensors(p))
    path = rng.choice(files)
    damage(rng, path, place)
    names = (path.name, path.parent.name)
    if path.parent.name == "adapter":
        place.write("m.yml", models.WITH_ADAPTER)
        return [models.check(()), models.run(names)]
    place.write("m.yml", models.SOUP)
    tuned = path.parent.name if path.parent.name != "base" else "tuned0"
    return [
        models.check(()),
        rng.choice([models.inspect(names, tuned=tuned), models.soup(names), models.run(names)]),
    ]


def _holds_tensors(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")


def damage(rng: random.Random, path: Path, place: Place) -> None:
    """Change a file of weights, or put something else in its place."""
    if rng.random() < 0.07:
        mutation.place_taken(rng, path)
        return
    original, name = path.read_bytes(), str(path.relative_to(place.work))
    if path.suffix == ".json":
        place.write(name, mutation.json_content(rng, original, KEYS))
    elif rng.random() < 0.3:
        place.write(name, mutation.content(rng, original))
    elif path.suffix == ".bin":
        place.write(name, _pickled(rng, path))
    else:
        place.write(name, header_changed(rng, original))


def header_changed(rng: random.Random, original: bytes) -> bytes:
    """Return a safetensors file with a few changes in its header, whose length is right."""
    (length,) = struct.unpack("<Q", original[:8])
    header = mutation.json_content(rng, original[8 : 8 + length], KEYS)
    return struct.pack("<Q", len(header)) + header + original[8 + length :]


def _pickled(rng: random.Random, path: Path) -> bytes:
    """Return a .bin file that holds other things, too."""
    tensors = torch.load(path)
    name = rng.choice(list(tensors))
    strange = [
        *(values.value(rng), torch.zeros(0, 4), torch.zeros(3, 0), torch.tensor(1.0)),
        *(torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4, dtype=torch.complex64)),
        *(torch.full((32, 32), float("nan")), torch.zeros(9, 9)[::2], torch.zeros(4, 4).half()),
        *(torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8), torch.nn.Linear(2, 2)),
        *(torch.zeros(1).expand(2**20, 2**9), torch.zeros(4, 4, device="meta"), {"w": tensors}),
    ]
    changed = {**tensors, rng.choice([name, *values.TEXTS]): rng.choice(strange)}
    if rng.random() < 0.15:
        changed = rng.choice([{"state_dict": changed}, [changed], changed[name], values.value(rng)])
    written = io.BytesIO()
    try:
        torch.save(changed, written, _use_new_zipfile_serialization=rng.random() < 0.8)
    except Exception:  # not everything can be saved in every format
        return json.dumps(list(tensors)).encode()
    return written.getvalue()
