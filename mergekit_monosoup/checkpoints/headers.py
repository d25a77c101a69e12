"""Names, shapes and sizes of the tensors in a file, from its header: the data is never read."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from zipfile import is_zipfile

import torch


class LackingError(ValueError):
    """A model does not have a tensor that the merge needs."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str
    name: str
    shape: tuple[int, ...]
    size: int  # bytes

    @property
    def itemsize(self) -> int:
        return self.size // (math.prod(self.shape) or 1)


def read_header(file: str) -> dict[str, Stored]:
    """Raises LackingError: a safetensors file is cut off."""
    if not file.lower().endswith(".safetensors"):
        state = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
        tensors = {
            name: t
            for name, t in state.get("state_dict", state).items()
            if isinstance(t, torch.Tensor)
        }
        return {name: Stored(file, name, tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    there = os.path.getsize(file)
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0] if there >= 8 else there
        try:
            entries = json.loads(opened.read(length)) if length <= there - 8 else None
        except ValueError:
            entries = None
    if not isinstance(entries, dict):
        raise LackingError(
            f"{file} is no safetensors file, or cut off in its header: download it again"
        )
    whole = (
        8
        + length
        + max((e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0)
    )
    if there < whole:
        raise LackingError(
            f"{file} is cut off: {there} of {whole} bytes are there; download it again"
        )
    return {
        name: Stored(
            file, name, tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }
