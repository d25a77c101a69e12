"""From mergekit's plan to batches: which tensors one worker merges in one go, in which order, within which memory.

Sizes are read from file headers, never from the data.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from zipfile import is_zipfile

import torch
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import FinalizeModel, LoadTensor, SaveTensor, TensorWriterTask
from mergekit.tokenizer import BuildTokenizer

from mergekit_monosoup.checkpoints.names import layer, matrices
from mergekit_monosoup.kernel.batch import MEMORY as STACK_BUFFERS
from mergekit_monosoup.methods import METHODS

# Every worker gets about this many batches: enough to even out batches of different cost, few enough for decent shards.
BATCHES_PER_WORKER = 8
SMALLEST_BATCH = 64 * 10**6  # bytes; below it a shard is all overhead

# What a worker holds beside the tensors: Python, torch, transformers and mergekit, imported (measured: 0.5 GB), rounded up.
PROCESS = 10**9
# The kernels of this package need five float64 squares of a matrix's shorter side (docs/method.md), in a stack of experts
# for each thread, within a bound.
SQUARES = 5 * 8
LEAN = frozenset(method.spec.name for method in METHODS)
# Bytes for each entry of the inputs that any other method may need meanwhile: float32 copies, masks, an order of 64-bit
# integers. Measured with stacks of experts: ties 17 with inputs and result, linear 7. Both stay below the estimate.
WORKING = 16


class PlanError(ValueError):
    """mergekit's plan holds what this package does not know how to divide."""


class LackingError(ValueError):
    """A model does not have a tensor that the merge needs."""


@dataclass(frozen=True)
class Plan:
    """What mergekit's planner asks for, taken apart."""

    tensors: tuple[SaveTensor, ...]
    writer: TensorWriterTask
    tokenizer: BuildTokenizer | None


def take_apart(targets: Sequence[Task[Any]]) -> Plan:
    """Raises PlanError: there is a task of a kind unknown here; leaving it out would change the result in silence."""
    tensors = tuple(task for task in targets if isinstance(task, SaveTensor))
    final = [task for task in targets if isinstance(task, FinalizeModel)]
    tokenizers = [task for task in targets if isinstance(task, BuildTokenizer)]
    if (
        len(tensors) + len(final) + len(tokenizers) != len(targets)
        or len(final) != 1
        or len(tokenizers) > 1
    ):
        kinds = ", ".join(sorted({type(task).__name__ for task in targets}))
        raise PlanError(
            f"mergekit's plan is not made as in 0.1.5 (it holds {kinds}), so it cannot be divided among workers: merge with "
            "mergekit-yaml, and report the version of mergekit"
        )
    return Plan(tensors, final[0].writer_task, tokenizers[0] if tokenizers else None)


@dataclass(frozen=True)
class Footprint:
    """What merging one tensor takes; bytes.

    Attributes:
        files: that it reads, in the order of the models.
        read: from files.
        written: the merged tensor, as far as known beforehand: a new vocabulary may make it larger.
        memory: at the peak, without the process and the result; an estimate.
    """

    files: tuple[str, ...]
    read: int
    written: int
    memory: int


@dataclass(frozen=True)
class Batch:
    """Tensors that one worker merges and writes in one go.

    Attributes:
        number: place in the plan, from 0; the output shards are numbered in this order.
        read, written, memory: as in :class:`Footprint`; memory with the process and all results, held until written.
    """

    number: int
    tensors: tuple[SaveTensor, ...]
    read: int
    written: int
    memory: int


def batch_bytes(total: int, workers: int, shard_size: int) -> int:
    """The bytes of output that make a batch: `--out-shard-size` bounds them (0 or less: no bound, as in mergekit)."""
    fair = max(SMALLEST_BATCH, math.ceil(total / (workers * BATCHES_PER_WORKER)))
    return min(fair, shard_size) if shard_size > 0 else fair


def divide(
    tensors: Sequence[SaveTensor], footprints: Sequence[Footprint], limit: int
) -> list[Batch]:
    """Batches of at most ``limit`` bytes of output; a larger tensor is one of its own.

    Neighbours in a batch, and then batches, read the same input files as far as the models are sharded alike.
    """
    parts: list[list[int]] = []
    filled = limit
    for i in sorted(range(len(tensors)), key=lambda i: (footprints[i].files, i)):
        if filled + footprints[i].written > limit:
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += footprints[i].written
    return [_batch(number, part, tensors, footprints) for number, part in enumerate(parts)]


def _batch(
    number: int, part: list[int], tensors: Sequence[SaveTensor], footprints: Sequence[Footprint]
) -> Batch:
    written = sum(footprints[i].written for i in part)
    return Batch(
        number=number,
        tensors=tuple(tensors[i] for i in part),
        read=sum(footprints[i].read for i in part),
        written=written,
        memory=PROCESS + written + max(footprints[i].memory for i in part),
    )


def in_order(batches: Sequence[Batch], limit: int) -> list[Batch]:
    """Batches as they should start: single tensors above ``limit`` first, so that no worker is left alone with one at the
    end; then as the input files lie."""
    return sorted(
        batches, key=lambda batch: (-batch.read if batch.written > limit else 0, batch.number)
    )


# -- sizes -----------------------------------------------------------------------------------------------------------------


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


@dataclass
class Inputs:
    """Where the tensors of each model lie, and how large they are. ``threads``: of the worker that will load them."""

    loaders: Mapping[ModelReference, LazyTensorLoader]
    trust_remote_code: bool = False
    threads: int = 1
    _headers: dict[str, dict[str, Stored]] = field(default_factory=dict)
    _layers: dict[ModelReference, dict[tuple[int, ...], list[str]]] = field(default_factory=dict)
    _kinds: dict[ModelReference, str] = field(default_factory=dict)

    def footprint(self, task: SaveTensor) -> Footprint:
        """Of one output tensor, from the headers of what it loads.

        Raises:
            LackingError: mergekit could not load one of its inputs.
        """
        inputs = [(load, *self.sources(load)) for load in dict.fromkeys(loads(task.tensor_task))]
        held, written = 0, 0
        lean = getattr(task.tensor_task, "method_name", "") in LEAN
        for load, stored, shape in inputs:
            if not stored:
                continue
            # Alive twice while it is cast, or stacked from single experts.
            held += math.prod(shape) * _itemsize(load.dtype, stored[0].itemsize) + sum(
                source.size for source in stored
            )
            held += 0 if lean else WORKING * math.prod(shape)
            written = written or math.prod(shape) * _itemsize(
                task.dtype or load.dtype, stored[0].itemsize
            )
        buffers = max((self._buffers(task.tensor_name, shape) for _, _, shape in inputs), default=0)
        sources = dict.fromkeys(source for _, stored, _ in inputs for source in stored)
        return Footprint(
            files=tuple(dict.fromkeys(source.file for source in sources)),
            read=sum(source.size for source in sources),
            written=written,
            memory=held + buffers,
        )

    def _buffers(self, name: str, shape: tuple[int, ...]) -> int:
        """Of the kernels of this package, for a tensor of this shape."""
        parts = matrices(name, shape)
        if not parts:
            return 0
        matrix = torch.empty(shape, device="meta")[parts[0][1]]
        one = SQUARES * min(len(matrix), matrix.numel() // len(matrix)) ** 2
        return max(one, min(one * min(self.threads, len(parts)), STACK_BUFFERS))

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


def _itemsize(dtype: str | None, otherwise: int) -> int:
    named = dtype_from_name(dtype)
    return named.itemsize if named else otherwise


def loads(task: Task[Any]) -> Iterator[LoadTensor]:
    """What a task reads, directly or through others; a tensor that several of these ask for comes several times."""
    if isinstance(task, LoadTensor):
        yield task
    for argument in task.arguments().values():
        yield from loads(argument)


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
