"""What a merge depends on, so that half of one is never continued with half of another."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.options import MergeOptions

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

# Files beside the weights that decide shapes and vocabularies.
_SIDE_FILES = re.compile(r"\.json$|\.model$|\.jinja$|^merges\.txt$")

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
    return json.loads(json.dumps(yaml.safe_load(source), default=str))


def dependencies(
    source: str,
    options: MergeOptions,
    loaders: Mapping[ModelReference, LazyTensorLoader],
    *,
    threads: int,
    seed: int | None,
) -> Dependencies:
    """Return everything that the weights depend on, in types that JSON knows.

    Args:
        source: text of the configuration, as it was read.
        options: mergekit's.
        loaders: of every model that is referred to.
        threads: per worker; sums are rounded differently with another number.
        seed: of the streams per tensor; None where every tensor is to come out the same without.
    """
    settings = {name: getattr(options, name) for name in OPTIONS}
    return {
        "configuration": as_json(source),
        "options": {**settings, "threads per worker (-j)": threads, "seed of each tensor": seed},
        "inputs": {file: state for loader in loaders.values() for file, state in _files(loader)},
        "versions": versions(),
    }


def _files(loader: LazyTensorLoader) -> Iterator[tuple[str, str]]:
    """Yield (absolute path, size and time of change) of each file of a model."""
    folder = os.path.abspath(loader.index.base_path)
    side_files = [name for name in os.listdir(folder) if _SIDE_FILES.search(name)]
    for name in sorted({*side_files, *(shard.filename for shard in loader.index.shards)}):
        path = os.path.join(folder, name)
        state = os.stat(path)
        changed = datetime.fromtimestamp(state.st_mtime, timezone.utc).isoformat(" ")
        yield path, f"{state.st_size} bytes of {changed}"


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
