"""mergekit's loaders of tensors, for several threads of one process."""

from __future__ import annotations

import os
import threading
from typing import Any
from zipfile import is_zipfile

import torch
from mergekit.io import LazyTensorLoader
from torch import Tensor

# mergekit's lazy unpickler exchanges functions of pickle and torch while it opens a file. Two
# threads at once would leave them exchanged, and torch could read no file any more.
_EXCHANGED = threading.Lock()


def own_loader(loader: LazyTensorLoader) -> LazyTensorLoader:
    """Return a loader of the same tensors for one thread, with an open file of its own.

    Files that torch can only read whole stay with the loader that is given, for all threads: one
    of them is in memory at a time.
    """
    if loader.index.is_safetensors:
        return LazyTensorLoader(loader.index)
    if loader.lazy_unpickle:
        return _LazyPickles(loader.index)
    folder, shards = loader.index.base_path, loader.index.shards
    if all(is_zipfile(os.path.join(folder, shard.filename)) for shard in shards):
        return _MappedPickles(loader.index)
    return loader


class _LazyPickles(LazyTensorLoader):
    """mergekit's reader of parts of .bin files (`--lazy-unpickle`), one thread at a time."""

    def get_tensor(self, *arguments: Any, **named: Any) -> Tensor | None:
        with _EXCHANGED:
            return super().get_tensor(*arguments, **named)


class _MappedPickles(LazyTensorLoader):
    """Tensors of .bin files that are mapped into memory, where mergekit reads each file whole.

    With whole files each thread would hold one of every model; or, if they shared a loader and
    were at different files, one would be read anew for every tensor.
    """

    _file = ""

    def get_tensor(self, key: str, *arguments: Any, **named: Any) -> Tensor | None:
        file = self.index.tensor_paths.get(key)
        if file is not None and file != self._file:
            with _EXCHANGED:
                shard: Any = _Mapped(os.path.join(self.index.base_path, file))
            self.current_shard, self._file = shard, file
        return super().get_tensor(key, *arguments, **named)


class _Mapped(dict[str, Tensor]):
    """The tensors of a .bin file, with what mergekit asks a file for them by."""

    def __init__(self, file: str):
        super().__init__(torch.load(file, "cpu", weights_only=True, mmap=True))

    def get_tensor(self, key: str) -> Tensor:
        return self[key]
