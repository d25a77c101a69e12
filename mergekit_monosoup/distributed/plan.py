"""mergekit's plan divided into batches.

Which tensors one worker merges in one go, in which order, and within which memory. Sizes are read
from file headers, never from the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, SaveTensor, TensorWriterTask
from mergekit.tokenizer import BuildTokenizer

from mergekit_monosoup.checkpoints.inputs import Inputs, loads
from mergekit_monosoup.checkpoints.names import matrices
from mergekit_monosoup.kernel.batch import at_once, buffers_of
from mergekit_monosoup.parameters import METHODS

# Every worker gets about this many batches: enough to even out batches of different cost, few
# enough for decent shards.
BATCHES_PER_WORKER = 8
SMALLEST_BATCH = 64 * 10**6  # bytes; below it a shard is all overhead
# What Ctrl-C loses is the batches at work. Where editing is slow they are smaller than that: of
# about half a minute each, or one matrix.
BATCH_SECONDS = 30.0
SMALLEST_SLOW_BATCH = 8 * 10**6
# Seconds of one thread for each entry and direction of a matrix that is edited. Measured on busy
# cores: 0.3e-9 (30000 x 1024), 0.6e-9 (1024 x 3072), 1.5e-9 (1024 x 1024), 3.6e-9 (4096 x 4096).
SECONDS = 1e-9

# What a worker holds beside the tensors: Python, torch, transformers and mergekit, imported
# (measured: 0.5 GB), rounded up.
PROCESS = 10**9
# What the kernels of this package need for a matrix they say themselves.
LEAN = frozenset(METHODS)
# Bytes for each entry of the inputs that any other method may need meanwhile: float32 copies,
# masks, an order of 64-bit integers. Measured with stacks of experts: ties 17 with inputs and
# result, linear 7. Both stay below the estimate.
WORKING = 16


class PlanError(ValueError):
    """mergekit's plan holds what this package does not know how to divide."""


@dataclass(frozen=True)
class Plan:
    """mergekit's plan by kinds of tasks: the merged tensors, their writer, and the tokenizer."""

    tensors: tuple[SaveTensor, ...]
    writer: TensorWriterTask
    tokenizer: BuildTokenizer | None


def split_plan(targets: Sequence[Task[Any]]) -> Plan:
    """Return mergekit's plan by kinds of tasks.

    Raises:
        PlanError: there is a task of a kind unknown here; leaving it out would change the result in
            silence.
    """
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
            f"mergekit's plan is not made as in 0.1.5 (it holds {kinds}), so it cannot be divided "
            "among workers: merge with mergekit-yaml, and report the version of mergekit"
        )
    return Plan(tensors, final[0].writer_task, tokenizers[0] if tokenizers else None)


@dataclass(frozen=True)
class Footprint:
    """The files that merging one tensor reads, and the bytes that it needs.

    Attributes:
        files: those it reads, in the order of the models.
        read: bytes from files.
        written: bytes of the merged tensor, as far as known beforehand: a new vocabulary may make
            it larger.
        memory: bytes at the peak, without the process and the result; an estimate.
        seconds: of one thread, where a method of this package edits it; a rough estimate.
    """

    files: tuple[str, ...]
    read: int
    written: int
    memory: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Tensors that one worker merges and writes in one go.

    Attributes:
        number: place in the plan, from 0; the output shards are numbered in this order.
        tensors: mergekit's tasks that save them.
        read, written, memory: as in :class:`Footprint`, of all tensors; memory with the process and
            all results, held until written.
    """

    number: int
    tensors: tuple[SaveTensor, ...]
    read: int
    written: int
    memory: int


def batch_bytes(total: int, workers: int, shard_size: int, seconds: float = 0.0) -> int:
    """Return the bytes of output that make a batch.

    `--out-shard-size` bounds them; 0 or less is no bound, as in mergekit.

    Args:
        total: bytes of the merged model.
        workers: that share it.
        shard_size: see above.
        seconds: of one thread for all of it, see :class:`Footprint`.
    """
    fair = max(SMALLEST_BATCH, math.ceil(total / (workers * BATCHES_PER_WORKER)))
    if seconds:
        fair = min(fair, max(SMALLEST_SLOW_BATCH, int(total * BATCH_SECONDS / seconds)))
    return min(fair, shard_size) if shard_size > 0 else fair


def divide(
    tensors: Sequence[SaveTensor], footprints: Sequence[Footprint], limit: int
) -> list[Batch]:
    """Return batches of at most ``limit`` bytes of output; a larger tensor is one of its own.

    Neighbours in a batch, and then batches, read the same input files as far as the models are
    sharded alike.
    """
    parts: list[list[int]] = []
    open_part: list[int] = []  # the norms between large matrices share one
    filled = limit
    for i in sorted(range(len(tensors)), key=lambda i: (footprints[i].files, i)):
        written = footprints[i].written
        if written > limit:
            parts.append([i])
            continue
        if filled + written > limit or not open_part:
            open_part, filled = [], 0
            parts.append(open_part)
        open_part.append(i)
        filled += written
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


def start_order(batches: Sequence[Batch], limit: int) -> list[Batch]:
    """Return batches as they should start: single tensors above ``limit`` first.

    So no worker is left alone with one at the end. The rest follows the order of the input files.
    """
    return sorted(
        batches, key=lambda batch: (-batch.read if batch.written > limit else 0, batch.number)
    )


# -- sizes -----------------------------------------------------------------------------------------


def footprint(inputs: Inputs, task: SaveTensor, threads: int) -> Footprint:
    """Return what merging one output tensor takes, from the headers of what it loads.

    ``threads``: of the worker that will merge it.

    Raises:
        LackingError: mergekit could not load one of its inputs.
    """
    sources = [(load, *inputs.sources(load)) for load in dict.fromkeys(loads(task.tensor_task))]
    lean = getattr(task.tensor_task, "method_name", "") in LEAN
    memory = written = 0
    shapes = [shape for _, _, shape in sources]
    buffers = _kernel_buffers(
        task.tensor_name, max(shapes, key=math.prod, default=()), len(shapes), threads
    )
    seconds = 0.0
    for load, stored, shape in sources:
        seconds = max(seconds, _seconds(task.tensor_name, shape) if lean else 0.0)
        if not stored:
            continue
        entries = math.prod(shape)
        # Alive twice while it is cast, or stacked from single experts.
        memory += entries * _itemsize(load.dtype, stored[0].itemsize)
        memory += sum(part.size for part in stored)
        memory += 0 if lean else WORKING * entries
        written = written or entries * _itemsize(task.dtype or load.dtype, stored[0].itemsize)
    parts = dict.fromkeys(part for _, stored, _ in sources for part in stored)
    return Footprint(
        files=tuple(dict.fromkeys(part.file for part in parts)),
        read=sum(part.size for part in parts),
        written=written,
        memory=memory + buffers,
        seconds=seconds,
    )


def _seconds(name: str, shape: tuple[int, ...]) -> float:
    """Return about how long one thread edits the matrices of a tensor, see :data:`SECONDS`."""
    parts = matrices(name, shape)
    if not parts:
        return 0.0
    matrix = torch.empty(shape, device="meta")[parts[0][1]]
    return SECONDS * math.prod(shape) * min(len(matrix), math.prod(matrix.shape[1:]))


def _kernel_buffers(name: str, shape: tuple[int, ...], models: int, threads: int) -> int:
    """Return the bytes that the kernels need for a tensor beside the tensor, of so many models."""
    parts = matrices(name, shape)
    if not parts:
        return 0
    matrix = torch.empty(shape, device="meta")[parts[0][1]]
    need = buffers_of(matrix, max(1, models - 1), torch.device("cpu"))
    return need * min(at_once(need, threads), len(parts))


def _itemsize(dtype: str | None, otherwise: int) -> int:
    """Return the bytes per entry of a dtype that mergekit names; ``otherwise`` if it names none."""
    named = dtype_from_name(dtype)
    return named.itemsize if named else otherwise
