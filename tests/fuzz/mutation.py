"""Changes at random: of trees of JSON or YAML, of texts, of bytes and of whole files."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fuzz.values import DEEP, TEXTS, value

FOREIGN = [
    *(b"", b"\0" * 4096, b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * DEEP, b"\xff\xfe{\0"),
    *(b"GGUF\x03\0\0\0" + bytes(99), b"\x89HDF\r\n\x1a\n" + bytes(99), b"PK\x03\x04" + bytes(99)),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
    *(b"<!DOCTYPE html><html>404", b'{"error": "Repository not found"}', b"9" * 300_000),
]
"""What else lies where a file should: nothing, other formats, pages of a browser, depth."""


def _places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(tree, dict):
        children: Any = tree.items()
    else:
        children = enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from _places(child, (*place, key))


def tree(rng: random.Random, original: Any, keys: Sequence[str] = (), *, yaml: bool = False) -> Any:
    """Return a copy in which one place is changed, removed, added or moved to another key."""
    new = value(rng, yaml=yaml)
    *above, last = rng.choice(list(_places(original))) or (None,)
    if last is None or not isinstance(original, dict | list):
        return new if rng.random() < 0.2 else _with(rng, original, keys, new)
    changed = copy.deepcopy(original)
    parent = changed
    for key in above:
        parent = parent[key]
    kind = rng.random()
    if kind < 0.6:
        parent[last] = new
    elif kind < 0.75:
        del parent[last]
    elif isinstance(parent, list):
        parent.insert(rng.randint(0, len(parent)), new)
    elif kind < 0.9:
        parent[rng.choice([*keys, *TEXTS])] = new
    else:
        parent[rng.choice([*keys, *TEXTS])] = parent.pop(last)
    return changed


def _with(rng: random.Random, original: Any, keys: Sequence[str], new: Any) -> Any:
    """Return a copy with a value more at the top."""
    if isinstance(original, dict):
        return {**copy.deepcopy(original), rng.choice([*keys, *TEXTS]): new}
    return [*copy.deepcopy(original), new] if isinstance(original, list) else new


def content(rng: random.Random, original: bytes) -> bytes:
    """Return bytes with a few changed, cut off, put in or doubled, or something foreign."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(FOREIGN)
    at = rng.randrange(len(original) + 1)
    if kind < 0.3:
        return original[:at]
    if kind < 0.45:
        return original[:at] + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + original[at:]
    if kind < 0.55:
        return original[:at] + original[rng.randrange(len(original) + 1) :]
    changed = bytearray(original or b"x")
    for _ in range(rng.randint(1, 4)):
        # Mostly in front, where headers are.
        most = len(changed) if rng.random() < 0.5 else min(len(changed), 600)
        changed[rng.randrange(most)] = rng.randrange(256)
    return bytes(changed)


def json_content(rng: random.Random, original: bytes, keys: Sequence[str] = ()) -> bytes:
    """Return the bytes of a JSON file that is changed as a tree, or now and then as bytes."""
    if rng.random() < 0.2:
        return content(rng, original)
    changed = json.loads(original)
    for _ in range(rng.randint(1, 3)):
        changed = tree(rng, changed, keys)
    return as_json(changed)


def as_json(changed: Any) -> bytes:
    """Return JSON as Python writes it: also NaN, and numbers of any length."""
    return json.dumps(changed).encode()


def place_taken(rng: random.Random, path: Path) -> None:
    """Put something that is no file where a file was."""
    path.unlink(missing_ok=True)
    kinds: list[Callable[[], object]] = [
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("missing"),
    ]
    rng.choice(kinds)()


def copied(start: Path, work: Path) -> None:
    """Copy the good files of a subject into the folder of a case."""
    shutil.copytree(start, work, dirs_exist_ok=True)
