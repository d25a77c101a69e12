"""From mergekit's plan to batches: which tensors one worker merges in one go, in which order, within which memory.

Sizes are read from file headers, never from the data.
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


# -- sizes -----------------------------------------------------------------------------------------


def footprint(inputs: Inputs, task: SaveTensor, threads: int) -> Footprint:
    """What merging one output tensor takes, from the headers of what it loads.

    ``threads``: of the worker that will merge it.

    Raises:
        LackingError: mergekit could not load one of its inputs.
    """
    read = [(load, *inputs.sources(load)) for load in dict.fromkeys(loads(task.tensor_task))]
    held, written = 0, 0
    lean = getattr(task.tensor_task, "method_name", "") in LEAN
    for load, stored, shape in read:
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
    buffers = max(
        (_kernel_buffers(task.tensor_name, shape, threads) for _, _, shape in read), default=0
    )
    sources = dict.fromkeys(source for _, stored, _ in read for source in stored)
    return Footprint(
        files=tuple(dict.fromkeys(source.file for source in sources)),
        read=sum(source.size for source in sources),
        written=written,
        memory=held + buffers,
    )


def _kernel_buffers(name: str, shape: tuple[int, ...], threads: int) -> int:
    """Bytes that the kernels of this package need for a tensor of this shape, beside its inputs."""
    parts = matrices(name, shape)
    if not parts:
        return 0
    matrix = torch.empty(shape, device="meta")[parts[0][1]]
    one = SQUARES * min(len(matrix), matrix.numel() // len(matrix)) ** 2
    return max(one, min(one * min(threads, len(parts)), STACK_BUFFERS))


def _itemsize(dtype: str | None, otherwise: int) -> int:
    named = dtype_from_name(dtype)
    return named.itemsize if named else otherwise
