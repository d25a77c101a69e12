"""What mergekit reads for each tensor of a merge, and where it lies, from file headers alone."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoadTensor

from mergekit_monosoup.checkpoints.headers import Headers, LackingError, Stored
from mergekit_monosoup.checkpoints.names import layer

Layer = tuple[int, ...]


def loads(task: Task[Any]) -> Iterator[LoadTensor]:
    """Yield what a task reads, directly or through others.

    A tensor that several of these need comes several times.
    """
    if isinstance(task, LoadTensor):
        yield task
    for argument in task.arguments().values():
        yield from loads(argument)


@dataclass
class Inputs:
    """Where the tensors of each model lie, and how large they are.

    Attributes:
        loaders: mergekit's, of which only the index is used: nothing is loaded.
        trust_remote_code: run a model's own code to learn its type.
        headers: read so far; shared with whoever reads the same files.
    """

    loaders: Mapping[ModelReference, LazyTensorLoader]
    trust_remote_code: bool = False
    headers: Headers = field(default_factory=Headers)
    _layers: dict[ModelReference, dict[Layer, list[str]]] = field(default_factory=dict)
    _types: dict[ModelReference, str] = field(default_factory=dict)

    def sources(self, load: LoadTensor) -> tuple[list[Stored], tuple[int, ...]]:
        """Return what is read for a tensor, and its shape.

        Both are empty for an optional tensor that the model lacks.

        Raises:
            LackingError: the model lacks it, or a part of it.
        """
        loader = self.loaders[load.model]
        for name in (load.tensor, *(load.aliases or ()), *(load.tied_names or ())):
            if name in loader.index.tensor_paths:
                stored = self._stored(loader, name)
                return [stored], stored.shape
        stack = self._stack(load)
        if stack is None and not load.optional:
            raise LackingError(
                f"{load.model} lacks {load.tensor}, which the merge needs: "
                "is the checkpoint complete?"
            )
        return stack or ([], ())

    def stored(self, model: ModelReference, name: str) -> Stored:
        """Return a tensor of a model by its name in the files.

        Raises:
            LackingError: the index lists it, and the file lacks it.
        """
        return self._stored(self.loaders[model], name)

    def _stack(self, load: LoadTensor) -> tuple[list[Stored], tuple[int, ...]] | None:
        """Return the parts and shape of a tensor that mergekit puts together, if it does.

        Experts are stored one by one and loaded as a stack. The names of its layer first: with
        the 36 thousand of a large model each stack would take half a second here.
        """
        everything = self.loaders[load.model].index.tensor_paths
        for names in (self._same_layer(load), list(everything)):
            for target in (load.tensor, *(load.aliases or ())):
                if (stack := self._converted(load, names, target)) is not None:
                    return stack
        return None

    def _converted(
        self, load: LoadTensor, names: list[str], target: str
    ) -> tuple[list[Stored], tuple[int, ...]] | None:
        """Run mergekit's conversion to ``target`` on tensors without data."""
        loader = self.loaders[load.model]
        parts: list[Stored] = []
        sources = {name: partial(self._without_data, loader, name, parts) for name in names}
        try:
            tensor = convert_checkpoint_tensors(self._type(load.model), sources, target)
        except RuntimeError as error:  # a stack of experts, of which some are missing
            raise LackingError(f"{load.model} lacks parts of {load.tensor}: {error}") from error
        return None if tensor is None else (parts, tuple(tensor.shape))

    def _same_layer(self, load: LoadTensor) -> list[str]:
        if load.model not in self._layers:
            layers: dict[Layer, list[str]] = defaultdict(list)
            for name in self.loaders[load.model].index.tensor_paths:
                layers[layer(name)].append(name)
            self._layers[load.model] = layers
        return self._layers[load.model].get(layer(load.tensor), [])

    def _without_data(
        self, loader: LazyTensorLoader, name: str, parts: list[Stored]
    ) -> torch.Tensor:
        """Return a tensor of that name's shape, and note in ``parts`` that it was read."""
        stored = self._stored(loader, name)
        parts.append(stored)
        return torch.empty(stored.shape, device="meta")

    def _type(self, model: ModelReference) -> str:
        """Return the model type by which mergekit chooses a conversion."""
        if model not in self._types:
            config = model.config(trust_remote_code=self.trust_remote_code)
            self._types[model] = config.model_type
        return self._types[model]

    def _stored(self, loader: LazyTensorLoader, name: str) -> Stored:
        file = os.path.join(loader.index.base_path, loader.index.tensor_paths[name])
        tensors = self.headers.of_file(file)
        if name not in tensors:
            raise LackingError(
                f"{file} lacks {name}, which the index beside it lists: is the checkpoint complete?"
            )
        return tensors[name]
