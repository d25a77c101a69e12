"""The index of a model in shards: which file holds which tensor."""

from __future__ import annotations

import json
import os
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mergekit_monosoup.checkpoints import foreign
from mergekit_monosoup.checkpoints.foreign import AGAIN
from mergekit_monosoup.checkpoints.stored import ForeignError, LackingError

INDEX = ".index.json"  # after the name that the model would have in one file
_LARGEST = 100_000_000  # bytes; that of a model with a million tensors has 100 MB
_LISTED = 3


def read_index(file: str) -> dict[str, str]:
    """Return tensor → file, relative to the folder of the index.

    Raises:
        ForeignError: it is no index but something else.
        LackingError: it is damaged, names a file outside of its folder, or one that is not there.
        OSError: it cannot be opened.
    """
    weight_map = _weight_map(file)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name:
            raise LackingError(f"{file} is damaged: it gives {tensor[:100]!r} no file; {AGAIN}")
        if _outside(name):
            raise LackingError(
                f"{file} names {name[:100]!r}, which is outside of its folder: nothing there is "
                f"read; {AGAIN}"
            )
    _check_present(file, sorted(set(weight_map.values())))
    return weight_map


def _weight_map(file: str) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise ForeignError(f"{file} {foreign.of_file(file)}")
    if (size := os.path.getsize(file)) > _LARGEST:
        raise LackingError(f"{file} is no index of a model: it has {size} bytes")
    with open(file, "rb") as opened:
        content = opened.read()
    try:
        index = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        reason = "is no JSON" if content.lstrip()[:1] == b"{" else foreign.of_file(file)
        raise LackingError(f"{file} {reason or 'is no JSON'}: {AGAIN}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise LackingError(
            f"{file} is damaged: it has no `weight_map` from tensors to files; {AGAIN}"
        )
    return weight_map


def _outside(name: str) -> bool:
    """Whether a name leads out of the folder that it is relative to, on any system."""
    return "\0" in name or any(
        path.is_absolute() or path.anchor or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _check_present(file: str, names: list[str]) -> None:
    """Raise LackingError if shards are missing, or the index is left over from another model."""
    folder = os.path.dirname(file)
    missing = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    if not missing:
        return
    listed = ", ".join(f"{name!r:.100}" for name in missing[:_LISTED])
    more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    whole = os.path.basename(file).removesuffix(INDEX)
    if len(missing) == len(names) and os.path.exists(os.path.join(folder, whole)):
        advice = f"{whole} lies beside it: remove the index if that is the whole model"
    else:
        advice = "download what is missing"
    raise LackingError(
        f"{file} names {len(missing)} file(s) of {len(names)} that are not there ({listed}{more}): "
        f"{advice}"
    )
