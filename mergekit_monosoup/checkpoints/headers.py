"""The one reader of file headers: name, shape, dtype and size of each tensor, never its data.

Files are safetensors or pickles (.bin, .pt, .pth); of a repository on the hub only the headers of
its safetensors files are fetched. :class:`Headers` reads each file once.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from zipfile import is_zipfile

import torch
from mergekit.io import ShardedTensorIndex
from mergekit.io.lazy_tensor_loader import ShardInfo

# The names that mergekit looks for in a folder, in its order; shards have an index beside them.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class LackingError(ValueError):
    """A model does not have a tensor that the merge needs, or a file is not whole."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the path, or on the hub REPOSITORY/FILE.
        name: its name in the file.
        shape: its dimensions.
        size: bytes.
        dtype: as the file has it: BF16, F8_E4M3 (safetensors), torch.bfloat16 (pickles).
    """

    file: str
    name: str
    shape: tuple[int, ...]
    size: int
    dtype: str = ""

    @property
    def itemsize(self) -> int:
        return self.size // (math.prod(self.shape) or 1)

    @property
    def bits(self) -> int:
        """Bits of one entry, as its dtype's name says; 8 for names without a number (BOOL)."""
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 8


def read_header(file: str) -> dict[str, Stored]:
    """Return the tensors of a file by name, in the file's order.

    Raises:
        LackingError: a safetensors file is cut off or damaged.
        ValueError: a pickle holds something else than named tensors.
        OSError, pickle.UnpicklingError, RuntimeError: a pickle cannot be read.
    """
    tensors = _safetensors(file) if file.lower().endswith(".safetensors") else _pickled(file)
    return {tensor.name: tensor for tensor in tensors}


def _safetensors(file: str) -> list[Stored]:
    """Read a header of the safetensors format: its length in 8 bytes, then JSON.

    Not with the library: its errors name neither the file nor how much of it is missing.
    """
    present = os.path.getsize(file)
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0] if present >= 8 else present
        try:
            entries = json.loads(opened.read(length) if length <= present - 8 else b"")
            entries.pop("__metadata__", None)
            tensors = [_entry(file, name, entry) for name, entry in entries.items()]
            ends = [entry["data_offsets"] for entry in entries.values()]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise LackingError(
                f"{file} is no safetensors file, or cut off in its header: download it again"
            ) from None
    whole = 8 + length + max((end for _, end in ends), default=0)
    if present < whole:
        raise LackingError(
            f"{file} is cut off: {present} of {whole} bytes are there; download it again"
        )
    if present > whole or not _gapless(tensors, ends):
        raise LackingError(f"{file} is damaged: its header does not fit it; download it again")
    return tensors


def _entry(file: str, name: str, entry: dict[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    return Stored(file, name, shape, int(end) - int(begin), str(entry["dtype"]))


def _gapless(tensors: list[Stored], offsets: list[list[int]]) -> bool:
    """Whether tensors lie one after another, each as large as its shape says.

    The safetensors library refuses other files, so the merge would.
    """
    place = 0
    for begin, end in sorted(offsets):
        if begin != place:
            return False
        place = end
    return all(8 * tensor.size == math.prod(tensor.shape) * tensor.bits for tensor in tensors)


def _pickled(file: str) -> Iterator[Stored]:
    """Load a pickle onto the meta device, where tensors have no data."""
    state = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}, not a dictionary of tensors")
    if "state_dict" in state:
        raise ValueError(
            f"{file} is wrapped in {{'state_dict': …}}, which mergekit does not unwrap; "
            "save the inner dictionary"
        )
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield Stored(file, name, tuple(value.shape), value.nbytes, str(value.dtype))


def _of_hub(repository: str, revision: str | None) -> dict[str, Stored]:
    """Fetch the headers of a hub repository's safetensors files."""
    from huggingface_hub import get_safetensors_metadata

    files = get_safetensors_metadata(repository, revision=revision).files_metadata
    return {
        name: Stored(
            f"{repository}/{file}",
            name,
            tuple(tensor.shape),
            tensor.data_offsets[1] - tensor.data_offsets[0],
            tensor.dtype,
        )
        for file, metadata in files.items()
        for name, tensor in metadata.tensors.items()
    }


@dataclass(frozen=True)
class Headers:
    """Headers of files and hub repositories, each read once and kept."""

    _read: dict[str, dict[str, Stored] | Exception] = field(default_factory=dict)

    def of_file(self, file: str) -> dict[str, Stored]:
        """Return the tensors of one file by name; raises what :func:`read_header` does."""
        return self._once(file, lambda: read_header(file))

    def _once(self, place: str, read: Callable[[], dict[str, Stored]]) -> dict[str, Stored]:
        """Read a place, or return or raise what came of it before."""
        if place not in self._read:
            try:
                self._read[place] = read()
            except Exception as error:
                self._read[place] = error
        outcome = self._read[place]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def of_model(self, path: str, revision: str | None = None) -> dict[str, Stored]:
        """Return the tensors of a model by name: of a file, a folder or a hub repository.

        Raises what :func:`read_header` does; RuntimeError: a folder without a model; and what
        the hub's client raises.
        """
        if not os.path.exists(path):
            return self._once(f"{path}@{revision}", lambda: _of_hub(path, revision))
        index = self.index(path)
        files = [os.path.join(index.base_path, shard.filename) for shard in index.shards]
        return {name: stored for file in files for name, stored in self.of_file(file).items()}

    def index(self, path: str) -> ShardedTensorIndex:
        """Return mergekit's index of a model in a folder or file; mergekit would open it again."""
        file = path if os.path.isfile(path) else _single_file(path)
        if file is None:
            return ShardedTensorIndex.from_disk(path)  # which opens the index beside the shards
        folder, name = os.path.split(file)
        names = list(self.of_file(file))
        return ShardedTensorIndex(
            base_path=folder,
            is_safetensors=file.lower().endswith(".safetensors"),
            tensor_paths=dict.fromkeys(names, name),
            shards=[ShardInfo(name, names)],
        )


def _single_file(folder: str) -> str | None:
    """Return the file that holds the whole model, if it is not sharded."""
    for name in SINGLE_FILES:
        file = os.path.join(folder, name)
        if os.path.exists(f"{file}.index.json"):
            return None
        if os.path.exists(file):
            return file
    return None
