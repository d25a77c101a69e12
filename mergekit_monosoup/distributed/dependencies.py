"""What a merge depends on, so that half of one is never continued with half of another."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.yaml import PlainLoader, parse_documents

# Versions that can change a bit of the result, here and on every node.
PACKAGES = (
    "mergekit",
    "mergekit-monosoup",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
)

# The options of mergekit that can change the weights or how they are cut into files. The rest says
# where things lie, how loud the program is, or what the driver writes at the end.
OPTIONS = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "lora_merge_dtype",
    "device",
    "out_shard_size",
    "safe_serialization",
)

THREADS = "threads per worker (-j)"  # their number, among the options

# Files beside the weights that decide shapes and vocabularies.
_SIDE_FILES = re.compile(r"\.json$|\.model$|\.jinja$|^merges\.txt$")

CHUNK = 2**22  # bytes read at a time for a checksum
READERS = 8  # files looked at a time

# Section → thing → its state. Stored in merge.json under "fingerprint".
Dependencies = dict[str, dict[str, Any]]


def versions() -> dict[str, str]:
    """Return the installed version of each of :data:`PACKAGES`."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # on the path without an installation
            installed[package] = "not installed"
    return installed


def as_json(source: str) -> Any:
    """Return a configuration as JSON has it.

    mergekit's own dump of one fails where a model's path holds a space.
    """
    return json.loads(json.dumps(parse_documents(source, PlainLoader)[0], default=str))


def asked(
    source: str, options: MergeOptions, *, threads: int, seed: int | None, hash_inputs: bool = False
) -> Dependencies:
    """Return what the user asks for: the part of the dependencies that is no file.

    Args:
        source: text of the configuration, as it was read.
        options: mergekit's.
        threads: per worker; sums are rounded differently with another number.
        seed: of the streams per tensor; None where every tensor is to come out the same without.
        hash_inputs: inputs are known by their content.
    """
    settings = {name: getattr(options, name) for name in OPTIONS}
    settings |= {THREADS: threads, "seed of each tensor": seed}
    return {
        "configuration": as_json(source),
        "options": {**settings, "--hash-inputs": hash_inputs},
    }


# -- the files that are merged ---------------------------------------------------------------------

ABSENT = "absent"
HASHED = "sha256"


def states(paths: Iterable[str], *, hashed: bool) -> dict[str, str]:
    """Return path → what is known of each file: size and time of change, or size and checksum."""
    paths = list(paths)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(paths, pool.map(partial(_state, hashed=hashed), paths), strict=True))


def _state(path: str, hashed: bool) -> str:
    try:
        state = os.stat(path)
        if hashed:
            return f"{state.st_size} bytes of {HASHED} {sha256(path)}"
    except OSError:
        return ABSENT
    changed = datetime.fromtimestamp(state.st_mtime, timezone.utc).isoformat(" ")
    return f"{state.st_size} bytes of {changed}"


def input_files(loaders: Iterable[LazyTensorLoader]) -> list[str]:
    """Return the absolute paths of the files that a merge reads, of models that are loaded."""
    paths: dict[str, None] = {}
    for loader in loaders:
        folder = os.path.abspath(loader.index.base_path)
        paths |= dict.fromkeys(_beside(folder, (shard.filename for shard in loader.index.shards)))
    return list(paths)


def local_input_files(config: MergeConfiguration) -> list[str]:
    """Return the same of models that nobody has loaded yet, as far as they are folders here."""
    paths: dict[str, None] = {}
    for reference in config.referenced_models():
        for part in (reference.model, reference.lora):
            if part is not None and os.path.isdir(part.path):
                folder = os.path.abspath(part.path)
                paths |= dict.fromkeys(_beside(folder, weight_files(Path(folder))))
    return list(paths)


def _beside(folder: str, weights: Iterable[str]) -> list[str]:
    side_files = [name for name in os.listdir(folder) if _SIDE_FILES.search(name)]
    return [os.path.join(folder, name) for name in sorted({*side_files, *weights})]


def weight_files(folder: Path) -> set[str]:
    """Return the names of the files of weights that mergekit will open in a model's folder."""
    names = set(hub.ADAPTER)
    for name in hub.WEIGHTS:  # mergekit takes the first that it finds
        index = folder / f"{name}.index.json"
        if index.exists():
            with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
                names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            break
        if (folder / name).exists():
            names.add(name)
            break
    return {name for name in map(str, names) if (folder / name).is_file()}


def sha256(path: str | Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# -- changes ---------------------------------------------------------------------------------------


def changed_inputs(before: Mapping[str, str], *, hashed: bool) -> list[str]:
    """Return a line for each file that is not what it was."""
    return differences({"inputs": dict(before)}, {"inputs": states(before, hashed=hashed)})


def differences(old: Dependencies, new: Dependencies) -> list[str]:
    """Return a line for each thing that is not as it was."""
    lines = []
    for section in {**old, **new}:
        before, now = old.get(section, {}), new.get(section, {})
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                lines.append(f"{section}: {key} was {_value(before, key)}, is {_value(now, key)}")
    return lines


def _value(section: Mapping[str, Any], key: str) -> str:
    return str(section[key]) if key in section else "absent"
