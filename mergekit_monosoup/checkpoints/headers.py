"""The one reader of file headers: name, shape, dtype and size of each tensor, never its data.

Files are safetensors or pickles (.bin, .pt, .pth); of a repository on the hub only the headers of
its safetensors files are fetched. :class:`Headers` reads each file once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from mergekit.io import ShardedTensorIndex
from mergekit.io.lazy_tensor_loader import ShardInfo

from mergekit_monosoup.checkpoints import foreign
from mergekit_monosoup.checkpoints.index import INDEX, read_index
from mergekit_monosoup.checkpoints.pickles import read_pickle
from mergekit_monosoup.checkpoints.safetensors import read_safetensors
from mergekit_monosoup.checkpoints.stored import ForeignError, LackingError, Stored, WrappedError

__all__ = ["ForeignError", "Headers", "LackingError", "Stored", "WrappedError", "read_header"]

# The names that mergekit looks for in a folder, in its order; shards have an index beside them.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def read_header(file: str, *, unwrap: bool = False) -> dict[str, Stored]:
    """Return the tensors of a file by name, in the file's order.

    ``unwrap``: of a pickle also those in a dictionary inside, where mergekit does not look.

    Raises:
        ForeignError: it is no file of tensors, but something else that the error names.
        WrappedError: its tensors lie in a dictionary inside of it.
        LackingError: it is cut off, damaged, would run code, or cannot be opened.
    """
    try:
        if file.lower().endswith(".safetensors"):
            return {tensor.name: tensor for tensor in read_safetensors(file)}
        return {tensor.name: tensor for tensor in read_pickle(file, unwrap=unwrap)}
    except OSError as error:
        raise LackingError(f"{file} cannot be read: {error.strerror or error}") from error


def _of_hub(repository: str, revision: str | None) -> dict[str, Stored]:
    """Fetch the headers of a hub repository's safetensors files.

    Raises:
        ForeignError: it holds another format only, as GGUF; and what the hub's client raises.
    """
    from huggingface_hub import get_safetensors_metadata, list_repo_files
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(repository, revision=revision).files_metadata
    except NotASafetensorsRepoError:
        names = list_repo_files(repository, revision=revision)
        if not any(name.endswith(".bin") for name in names) and (found := foreign.of_names(names)):
            raise ForeignError(f"{repository} {found}") from None
        raise
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
    """Headers of files and hub repositories, each read once and kept.

    ``unwrap``: see :func:`read_header`.
    """

    unwrap: bool = False
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

        Raises what :func:`read_header` does, ForeignError also of a folder without a model; and
        what the hub's client raises.
        """
        if not os.path.exists(path):
            return self._once(f"{path}@{revision}", lambda: _of_hub(path, revision))
        index = self.index(path)
        files = [os.path.join(index.base_path, shard.filename) for shard in index.shards]
        return {name: stored for file in files for name, stored in self.of_file(file).items()}

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
        for name in SINGLE_FILES:
            for file in (name + INDEX, name):
                if os.path.exists(os.path.join(folder, file)):
                    return file
        raise ForeignError(f"{folder} {foreign.of_folder(folder)}")
    except OSError as error:
        raise LackingError(f"{folder} cannot be read: {error.strerror or error}") from error
