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

from mergekit_monosoup.checkpoints.headers import LackingError, Stored, read_header
from mergekit_monosoup.checkpoints.names import layer


def loads(task: Task[Any]) -> Iterator[LoadTensor]:
    """What a task reads, directly or through others; a tensor that several of these ask for comes several times."""
    if isinstance(task, LoadTensor):
        yield task
    for argument in task.arguments().values():
        yield from loads(argument)


@dataclass
class Inputs:
    """Where the tensors of each model lie, and how large they are."""

    loaders: Mapping[ModelReference, LazyTensorLoader]
    trust_remote_code: bool = False
    _headers: dict[str, dict[str, Stored]] = field(default_factory=dict)
    _layers: dict[ModelReference, dict[tuple[int, ...], list[str]]] = field(default_factory=dict)
    _kinds: dict[ModelReference, str] = field(default_factory=dict)

    def sources(self, load: LoadTensor) -> tuple[list[Stored], tuple[int, ...]]:
        """What is read for a tensor and its shape; nothing of an optional tensor that the model lacks.

        Raises:
            LackingError: the model lacks it, or a part of it.
        """
        loader = self.loaders[load.model]
        paths = loader.index.tensor_paths
        for name in (load.tensor, *(load.aliases or ()), *(load.tied_names or ())):
            if name in paths:
                stored = self._stored(loader, name)
                return [stored], stored.shape
        # Experts are stored one by one and loaded as a stack. All names of the layer first: with the 36 thousand of a large
        # model each stack would take half a second here.
        for names in (self._near(load.model)[layer(load.tensor)], list(paths)):
            for target in (load.tensor, *(load.aliases or ())):
                read: list[Stored] = []
                sources = {name: partial(self._empty, loader, name, read) for name in names}
                try:
                    made = convert_checkpoint_tensors(self._kind(load.model), sources, target)
                except RuntimeError as error:  # a stack of experts, of which some are missing
                    raise LackingError(
                        f"{load.model} lacks parts of {load.tensor}: {error}"
                    ) from error
                if made is not None:
                    return read, tuple(made.shape)
        if not load.optional:
            raise LackingError(
                f"{load.model} lacks {load.tensor}, which the merge needs: is the checkpoint complete?"
            )
        return [], ()

    def _near(self, model: ModelReference) -> dict[tuple[int, ...], list[str]]:
        if model not in self._layers:
            self._layers[model] = defaultdict(list)
            for name in self.loaders[model].index.tensor_paths:
                self._layers[model][layer(name)].append(name)
        return self._layers[model]

    def _empty(self, loader: LazyTensorLoader, name: str, read: list[Stored]) -> torch.Tensor:
        stored = self._stored(loader, name)
        read.append(stored)
        return torch.empty(stored.shape, device="meta")

    def _kind(self, model: ModelReference) -> str:
        if model not in self._kinds:
            self._kinds[model] = model.config(trust_remote_code=self.trust_remote_code).model_type
        return self._kinds[model]

    def _stored(self, loader: LazyTensorLoader, name: str) -> Stored:
        file = os.path.join(loader.index.base_path, loader.index.tensor_paths[name])
        if file not in self._headers:
            self._headers[file] = read_header(file)
        if name not in self._headers[file]:
            raise LackingError(
                f"{file} lacks {name}, which the index beside it lists: is the checkpoint complete?"
            )
        return self._headers[file][name]
