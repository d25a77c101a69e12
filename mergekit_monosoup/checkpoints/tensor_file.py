"""A safetensors file that is written tensor by tensor, so that one at a time is in memory.

The library's `save_file` takes all of them at once: of a rank-64 adapter of an 8B model 0.7 GB.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_monosoup.checkpoints.stored import LackingError, Stored
from mergekit_monosoup.errors import QUANTISED

# As the format names them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def dtype_of(stored: Stored) -> torch.dtype:
    """Return the dtype of a stored tensor.

    Raises:
        LackingError: torch, or the format, has no such dtype.
    """
    names = {name: dtype for dtype, name in _DTYPES.items()}
    names |= {str(dtype): dtype for dtype in _DTYPES}
    if stored.dtype not in names:
        raise LackingError(f"{stored.file}: {stored.name[:100]} is {stored.dtype}: {QUANTISED}")
    return names[stored.dtype]


class Entry(NamedTuple):
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class TensorFile:
    """A file of tensors whose shapes are known before, written in any order."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        """Begin the file. A context manager: it must be left for the file to be whole.

        Args:
            path: of the file.
            entries: of all tensors, by name.

        Raises:
            ValueError: the format has no such dtype.
            OSError: the file cannot be written.
        """
        self._entries, self._missing = entries, set(entries)
        # Wide numbers first, as the library lays them out, so that each lies at a multiple of its
        # size.
        order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        place, places = 0, {}
        for name in order:
            entry = entries[name]
            if entry.dtype not in _DTYPES:
                raise ValueError(f"{name} is {entry.dtype}, which safetensors files cannot hold")
            places[name] = place
            header[name] = {
                "dtype": _DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [place, place := place + entry.size],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._places = {name: 8 + len(text) + offset for name, offset in places.items()}
        self._file = open(path, "wb")  # noqa: SIM115 # closed on exit
        self._file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> TensorFile:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, of the dtype and shape that were announced."""
        assert Entry(tensor.dtype, tuple(tensor.shape)) == self._entries[name], name
        self._missing.remove(name)
        self._file.seek(self._places[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                assert not self._missing, self._missing
                self._file.flush()
                os.fsync(self._file.fileno())
