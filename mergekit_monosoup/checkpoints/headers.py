"""The one reader of file headers: name, shape, dtype and size of each tensor, never its data.

Files are safetensors or pickles (.bin, .pt, .pth); of a repository on the hub only the headers of
its safetensors files are fetched. :class:`Headers` reads each file once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from huggingface_hub import constants
from mergekit.io import ShardedTensorIndex
from mergekit.io.lazy_tensor_loader import ShardInfo

from mergekit_monosoup.checkpoints import foreign, hub
from mergekit_monosoup.checkpoints.index import INDEX, read_index
from mergekit_monosoup.checkpoints.one_file import read_header
from mergekit_monosoup.checkpoints.stored import ForeignError, LackingError, Stored, WrappedError

__all__ = ["ForeignError", "Headers", "LackingError", "Stored", "WrappedError", "read_header"]


def _of_hub(repository: str, files: hub.Files) -> dict[str, Stored]:
    """Return the tensors of a hub repository from its files' headers."""
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


def _adapter_file(folder: str) -> str:
    """Return the file with an adapter's weights."""
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        for name in hub.ADAPTER:
            if os.path.exists(file := os.path.join(folder, name)):
                return file
    raise LackingError(
        f"{folder} is no adapter: peft looks for adapter_config.json and {' or '.join(hub.ADAPTER)}"
    )


@dataclass(frozen=True)
class Headers:
    """Headers of files and hub repositories, each read once and kept.

    Attributes:
        unwrap: see :func:`read_header`.
        notes: of repositories that were read: what is to be changed about how they are named.
    """

    unwrap: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    _read: dict[str, dict[str, Stored] | Exception] = field(default_factory=dict)

    def of_file(self, file: str) -> dict[str, Stored]:
        """Return the tensors of one file by name; raises what :func:`read_header` does."""
        return self._once(file, lambda: read_header(file, unwrap=self.unwrap))

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

        Raises what :func:`read_header` does; RuntimeError: a folder without a model;
            HubError: a repository that cannot be had from the hub.
        """
        if not os.path.exists(path):
            try:
                return self._from_hub(hub.headers, path, revision)
            except hub.UnreachableError:
                if (folder := hub.cached(path, revision)) is None:
                    raise
            self.notes[path] = hub.only_cached(folder)
            return self.of_model(folder)
        index = self.index(path)
        files = [os.path.join(index.base_path, shard.filename) for shard in index.shards]
        return {name: stored for file in files for name, stored in self.of_file(file).items()}

    def of_adapter(self, path: str, revision: str | None = None) -> dict[str, Stored]:
        """Return the tensors of an adapter by name, of a folder or a hub repository.

        Raises what :func:`read_header` does; LackingError: a folder without an adapter;
            HubError: a repository that cannot be had from the hub.
        """
        if not os.path.exists(path):
            return self._from_hub(hub.adapter_headers, path, revision)
        return self.of_file(_adapter_file(path))

    def _from_hub(
        self,
        fetch: Callable[[str, str | None], tuple[hub.Repository, hub.Files]],
        name: str,
        revision: str | None,
    ) -> dict[str, Stored]:
        """Read from the hub, which is not asked again once it was silent: each wait is long."""
        silence = self._read.get(constants.ENDPOINT)
        if isinstance(silence, hub.UnreachableError):
            raise silence

        def read() -> dict[str, Stored]:
            repository, files = fetch(name, revision)
            if repository.name.lower() != name.lower():
                self.notes[name] = f"is called {repository.name} on the hub now: write that name"
            return _of_hub(name, files)

        try:
            return self._once(f"{fetch.__name__} of {name}@{revision}", read)
        except hub.UnreachableError as error:
            self._read[constants.ENDPOINT] = error
            raise

    def index(self, path: str) -> ShardedTensorIndex:
        """Return mergekit's index of a model in a folder or file; mergekit would open it again.

        Raises what :meth:`of_model` does.
        """
        if os.path.isdir(path):
            name = _model_in(path)
            if name.endswith(INDEX):
                shards = read_index(os.path.join(path, name))
                return _index(path, shards, name.removesuffix(INDEX))
            path = os.path.join(path, name)
        folder, name = os.path.split(path)
        return _index(folder, dict.fromkeys(self.of_file(path), name), name)


def _index(folder: str, files: dict[str, str], kind: str) -> ShardedTensorIndex:
    """Return mergekit's index for ``files``: tensor → file in the folder."""
    shards: dict[str, list[str]] = {name: [] for name in sorted(set(files.values()))}
    for tensor, name in files.items():
        shards[name].append(tensor)
    return ShardedTensorIndex(
        base_path=folder,
        is_safetensors=kind.lower().endswith(".safetensors"),
        tensor_paths=files,
        shards=[ShardInfo(name, tensors) for name, tensors in shards.items()],
    )


def _model_in(folder: str) -> str:
    """Return the file that says what a folder's model consists of: an index, or the weights.

    Raises:
        ForeignError: there is none.
    """
    try:
        for name in hub.WEIGHTS:
            for file in (name + INDEX, name):
                if os.path.exists(os.path.join(folder, file)):
                    return file
        raise ForeignError(f"{folder} {foreign.of_folder(folder)}")
    except OSError as error:
        raise LackingError(f"{folder} cannot be read: {error.strerror or error}") from error
