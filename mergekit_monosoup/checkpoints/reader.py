"""Models tensor by tensor, several side by side: what `inspect` and `soup` read.

Models are named and loaded as mergekit does it: folders, hub names (``name@revision``), safetensors
or .bin, sharded or not, ``base+adapter``. Tensors go by their names in the files, so any state dict
will do, also a single file.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor

from mergekit_monosoup.checkpoints import adapters, hub, quantisation
from mergekit_monosoup.checkpoints.adapters import AdapterError
from mergekit_monosoup.checkpoints.headers import Headers, LackingError
from mergekit_monosoup.checkpoints.names import natural
from mergekit_monosoup.checkpoints.paths import NotThereError, check_model_path
from mergekit_monosoup.checkpoints.pickles import named_tensors
from mergekit_monosoup.checkpoints.renaming import renaming
from mergekit_monosoup.checkpoints.storage import ANYWHERE, Storage
from mergekit_monosoup.checkpoints.stored import Stored
from mergekit_monosoup.errors import QUANTISED, NonFiniteError, SolverError

NAMES_IN_MESSAGE = 5  # tensors listed by name in a message; the rest are counted


class Checkpoints:
    """Several models of one architecture, of which each thread reads one tensor at a time.

    Attributes:
        models: their names, as given.
        names: tensors that all of them hold, in an order in which each file is opened once, as far
            as the models are sharded alike.
        remarks: a line for each set of models that hold tensors which others lack; those are left
            out.
    """

    def __init__(self, models: Sequence[str], storage: Storage = ANYWHERE):
        """Open the files of ``models``; nothing is read yet but their headers.

        Raises:
            ValueError: a model cannot be opened, is quantised, or has no tensor in common with the
                first.
        """
        self.models = tuple(models)
        self._headers = Headers(unwrap=True)
        self._loaders = [_open(model, storage, self._headers) for model in self.models]
        indices = [loader.index.tensor_paths for loader in self._loaders]
        self._check_numbers()
        self._check_overlap(indices)
        holders = {
            name: [m for m, index in zip(self.models, indices, strict=True) if name in index]
            for name in dict.fromkeys(name for index in indices for name in index)
        }
        self.remarks = self._partial_remarks(holders)
        shared = [name for name in holders if len(holders[name]) == len(self.models)]
        self.names = sorted(
            shared, key=lambda name: (*(index[name] for index in indices), natural(name))
        )

    def _check_numbers(self) -> None:
        for model, loader in zip(self.models, self._loaders, strict=True):
            names = loader.index.tensor_paths
            if fault := quantisation.fault_of(_place(loader.index), names):
                raise ValueError(f"{model} {fault}")

    def _check_overlap(self, indices: Sequence[Mapping[str, str]]) -> None:
        for model, index in zip(self.models[1:], indices[1:], strict=True):
            if found := renaming(indices[0], index):
                raise ValueError(f"{model}: {found.described(self.models[0])}")
            if not index.keys() & indices[0].keys():
                raise ValueError(
                    f"{model} has no tensor name in common with {self.models[0]} "
                    f"({listed(sorted(index))} against {listed(sorted(indices[0]))}): another "
                    "architecture?"
                )

    def _partial_remarks(self, holders: Mapping[str, Sequence[str]]) -> list[str]:
        """Return a line for each set of models that hold tensors which others lack."""
        partial: dict[str, list[str]] = defaultdict(list)
        for name in sorted(holders, key=natural):
            if len(holders[name]) < len(self.models):
                partial[", ".join(holders[name])].append(name)
        return [f"left out, only in {models}: {listed(names)}" for models, names in partial.items()]

    def stored(self, name: str) -> list[Stored]:
        """Return the tensor of each model as the header of its file describes it.

        Raises:
            ValueError: a file does not hold what its index lists.
        """
        found = []
        for loader in self._loaders:
            file = os.path.join(loader.index.base_path, loader.index.tensor_paths[name])
            tensors = self._headers.of_file(file)
            if name not in tensors:
                raise ValueError(f"{name} cannot be read from {file}: it is not in it")
            found.append(tensors[name])
        return found

    def load(self, name: str) -> list[Tensor]:
        """Return the tensor of each model, all of one shape, as they are stored.

        A method, not an iterator: the caller's variables would keep one tensor alive while the next
        is read.

        Raises:
            ValueError: it cannot be read, is quantised to 8 bits, or the shapes differ.
        """
        tensors = [self._read(name, model) for model in range(len(self.models))]
        for model, tensor in zip(self.models, tensors, strict=True):
            if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
                raise ValueError(f"{name} is {tensor.dtype} in {model}: {QUANTISED}")
        first = tensors[0].shape
        for model, tensor in zip(self.models[1:], tensors[1:], strict=True):
            if tensor.shape != first:
                vocabulary = "embed" in name or "lm_head" in name
                differ = vocabulary and tensor.shape[1:] == first[1:]
                raise ValueError(
                    f"{name} is {tuple(first)} in {self.models[0]} but {tuple(tensor.shape)} in "
                    f"{model}{'; the vocabularies differ' if differ else ''}"
                )
        return tensors

    def _read(self, name: str, model: int) -> Tensor:
        loader = self._loaders[model]
        try:
            tensor = loader.get_tensor(name)
            assert tensor is not None  # raise_on_missing is the default
            return tensor
        except Exception as error:
            # Errors of safetensors, zip and pickle name neither file nor tensor.
            file = os.path.join(loader.index.base_path, loader.index.tensor_paths[name])
            raise ValueError(
                f"{name} cannot be read from {file} ({type(error).__name__}: {error})"
            ) from error


def _open(model: str, storage: Storage, headers: Headers) -> LazyTensorLoader | _Pickled:
    try:
        index = _index(ModelReference.parse(model), storage, headers)
    except (NotThereError, hub.HubError, AdapterError, LackingError) as error:
        raise ValueError(f"{model}: {error}") from error
    except Exception as error:
        # Errors of pydantic, the hub, transformers and peft all come without the model's name.
        plain = type(error) is ValueError or isinstance(error, NotThereError | LackingError)
        kind = "" if plain else f"{type(error).__name__}: "
        raise ValueError(f"{model}: {kind}{error}") from error
    return LazyTensorLoader(index) if index.is_safetensors else _Pickled(index)


def _index(reference: ModelReference, storage: Storage, headers: Headers) -> ShardedTensorIndex:
    """Return which file holds which tensor, after downloading the model or merging its adapter."""
    check_model_path(reference.model.path)
    if reference.lora:
        check_model_path(reference.lora.path)
    merged = adapters.merged(reference, storage)
    path = merged.model.path
    if not os.path.isfile(path):
        path = _folder(merged, storage.transformers_cache)
    headers.of_model(path)  # a damaged shard is better found now than after the others are read
    return headers.index(path)


def _place(index: ShardedTensorIndex) -> str:
    """Return the folder of an index, or its file where that is all there is of the model."""
    files = {shard.filename for shard in index.shards}
    alone = len(files) == 1 and not files & set(hub.WEIGHTS)
    return os.path.join(index.base_path, *files) if alone else index.base_path


def _folder(reference: ModelReference, cache: str | None) -> str:
    """Return the folder of a model, downloaded as mergekit does it, or from the cache offline."""
    name, revision = reference.model.path, reference.model.revision
    if os.path.exists(name):
        return name
    try:
        with hub.explained():
            hub.check_holds_model(hub.ask(name, revision))
            return reference.local_path(cache)
    except hub.UnreachableError:
        if folder := hub.cached(name, revision, cache):
            return folder
        raise


class _Pickled:
    """Tensors of .bin files, one file open at a time.

    They are mapped instead of read where torch can (its zip format, since 1.6), so that one tensor
    at a time is in memory. mergekit's lazy unpickler, made for the same, cannot read files that
    were renamed, or scalars, and reads the wrong entries of views with gaps. Thread-safe, as
    mergekit's loader of safetensors is.
    """

    # A tensor must come from the file that holds it, and torch's warnings are switched off for the
    # whole process while a file is opened.
    _lock = threading.Lock()

    def __init__(self, index: ShardedTensorIndex):
        self.index = index
        self._file = ""
        self._tensors: dict[str, Tensor] = {}

    def get_tensor(self, name: str) -> Tensor:
        file = os.path.join(self.index.base_path, self.index.tensor_paths[name])
        with self._lock:
            if self._file != file:
                self._tensors = named_tensors(file, "cpu", unwrap=True)
                self._file = file
            return self._tensors[name]


def stored_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the smallest dtype that holds all of ``tensors`` exactly.

    A base in bfloat16 with a fine-tune in float32 is common.
    """
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    rest = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def named_errors(name: str, models: Sequence[str]) -> Iterator[None]:
    """Turn errors of kernels into a ValueError that names the tensor, and the model at fault.

    The kernels know neither.

    Args:
        name: of the tensor that the block works on.
        models: in the order of the counts of :class:`NonFiniteError`.
    """
    try:
        yield
    except NonFiniteError as error:
        counts = [
            f"{count} entries in {model}"
            for count, model in zip(error.counts, models, strict=False)
            if count
        ]
        raise ValueError(
            f"{name} is not finite: {'; '.join(counts)}. Check that checkpoint: a diverged run or "
            "a damaged download is the usual cause."
        ) from error
    except SolverError as error:
        raise ValueError(f"{name}: its spectrum could not be computed ({error})") from error


def local_reference(model: str) -> str:
    """Return ``model`` as it is best written in a configuration: relative folders begin with ./

    mergekit's model card takes folder/model for a hub repository and fails without a network, at
    the end of the merge.
    """

    def marked(part: str) -> str:
        return f"./{part}" if os.path.exists(part) and not part.startswith((".", "/")) else part

    return "+".join(marked(part) for part in model.split("+"))
