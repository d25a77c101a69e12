"""Many matrices at once: the experts of a stack, or whatever else a caller has several of.

On the CPU one matrix per thread: tridiagonalisation is bound by memory and gains little from many
threads on one matrix. On an accelerator matrices of one shape share one batched Gram product and
one batched eigensolver call; each goes through the same code as alone from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from mergekit_monosoup.errors import SolverError
from mergekit_monosoup.kernel.eigen import (
    FAILURES,
    LOG,
    Eigen,
    SolvedElsewhere,
    Solver,
    eigh,
    out_of_memory,
)
from mergekit_monosoup.kernel.monosoup import edit
from mergekit_monosoup.kernel.svc import calibrate
from mergekit_monosoup.kernel.task_vector import TaskVector, block_elements
from mergekit_monosoup.kernel.threads import in_order
from mergekit_monosoup.report.record import Record

# Bound on the buffers of all matrices in work at one time: with 64 cores and a matrix each they
# would be as large as models.
MEMORY = 8 * 2**30


@dataclass(frozen=True)
class Job:
    """One matrix: W0, the fine-tuned ones, and the name for its record."""

    pretrained: Tensor
    tuned: Sequence[Tensor]
    name: str


Result = tuple[Tensor, Record]


def buffers(job: Job) -> int:
    """Return the bytes that a matrix needs at most, beside its inputs and its output.

    :func:`svc.calibrate` needs most; see there. At least 1: memory is divided by it, and a matrix
    with no entries needs none.
    """
    return buffers_of(job.pretrained, len(job.tuned), job.pretrained.device)


def buffers_of(pretrained: Tensor, tuned: int, device: torch.device) -> int:
    """Return what :func:`buffers` does, of a matrix whose entries need not be there.

    ``tuned``: number of fine-tuned models; ``device``: where the arithmetic will be.
    """
    side = TaskVector.tall(pretrained).shape[1]
    block = min(pretrained.numel(), block_elements(device))
    return max(1, 8 * (5 * side**2 + (2 * tuned + 5) * block))


def at_once(need: int, threads: int) -> int:
    """Return how many matrices are in work together, each of which needs ``need`` bytes."""
    return max(1, min(threads, MEMORY // need))


# -- one matrix per thread -------------------------------------------------------------------------


def call_each(calls: Sequence[Callable[[], Result]], jobs: Sequence[Job]) -> Iterator[Result]:
    """Make a call for every job, in their order, on the CPU several at a time.

    As many as torch has threads and memory allows; results are, bit for bit, those of one call
    after the other with one thread. One after the other it stays on an accelerator, with one
    thread, and where SciPy's BLAS takes no orders.

    Raises:
        What the first call that fails raises.
    """
    on_cpu = all(job.pretrained.device.type == "cpu" for job in jobs)
    need = max(map(buffers, jobs), default=1)
    threads = at_once(need, min(torch.get_num_threads(), len(jobs))) if on_cpu else 1
    return in_order(methodcaller("__call__"), calls, threads)


def edit_each(jobs: Sequence[Job], **settings: Any) -> Iterator[Result]:
    """Return the results of :func:`monosoup.edit` for every job, in their order.

    ``settings`` are its keywords.
    What it raises for the first job that fails, this raises, too.
    """
    if _one_batch(jobs):
        return edit_batched(jobs, **settings)
    calls = [partial(edit, job.pretrained, job.tuned, name=job.name, **settings) for job in jobs]
    return call_each(calls, jobs)


def calibrate_each(
    jobs: Sequence[Job], *, with_merged: bool = False, **settings: Any
) -> Iterator[Result]:
    """Return the results of :func:`svc.calibrate` for every job, in their order.

    Args:
        jobs: the task models of each matrix.
        with_merged: the last one of each is the merge of the others.
        settings: keywords of :func:`svc.calibrate`.

    Raises:
        What :func:`svc.calibrate` raises, for the first job that fails.
    """
    calls = []
    for job in jobs:
        inputs: dict[str, Any] = {"tasks": job.tuned}
        if with_merged:
            inputs = {"tasks": job.tuned[:-1], "merged": job.tuned[-1]}
        calls.append(partial(calibrate, job.pretrained, name=job.name, **inputs, **settings))
    return call_each(calls, jobs)


# -- one batch of matrices -------------------------------------------------------------------------


def _one_batch(jobs: Sequence[Job]) -> bool:
    shapes = {(job.pretrained.shape, job.pretrained.dtype, job.pretrained.device) for job in jobs}
    if len(jobs) < 2 or len(shapes) > 1:
        return False
    # MPS has no float64: each of its matrices goes to the CPU by itself. Without entries there is
    # nothing to decompose.
    first = jobs[0].pretrained
    return first.ndim > 1 and first.numel() > 0 and first.device.type not in ("cpu", "mps")


def edit_batched(jobs: Sequence[Job], **settings: Any) -> Iterator[Result]:
    """Yield the results of :func:`edit_each` for matrices of one shape, dtype and device.

    A batch takes one Gram product and one eigensolver call. One that the solver refuses is solved
    matrix by matrix; the records say so.
    """
    size = max(1, MEMORY // buffers(jobs[0]))
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        for job, eigen in zip(batch, _decomposed(batch, settings.get("weights")), strict=True):
            yield edit(job.pretrained, job.tuned, name=job.name, eigen=eigen, **settings)


@torch.no_grad()
def _decomposed(
    batch: Sequence[Job], weights: Sequence[float] | None
) -> list[Callable[[], Eigen] | None]:
    """Return the solver ladder of every matrix, with what the batch gave as its first rung."""
    updates = [TaskVector(job.pretrained, job.tuned, weights, name=job.name) for job in batch]
    name = f"batched eigh on {batch[0].pretrained.device}"
    try:
        grams = stacked_gram(updates)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        LOG.warning("%s: %s; one matrix at a time", batch[0].name or "a stack", error)
        return [None] * len(batch)
    try:
        values, vectors = eigh(grams)
        values = values.cpu()  # one transfer for the batch
    except FAILURES as error:
        return [partial(Eigen, gram, [(name, partial(_fail, str(error)))]) for gram in grams]
    solved = [partial(SolvedElsewhere, name, *pair) for pair in zip(values, vectors, strict=True)]
    return [partial(Eigen, gram, [(name, rung)]) for gram, rung in zip(grams, solved, strict=True)]


def _fail(reason: str) -> Solver:
    raise SolverError(reason)


def stacked_gram(updates: Sequence[TaskVector]) -> Tensor:
    """Return XᵀX of every update X, (B, s, s) float64; both triangles."""
    width = updates[0].width
    total = torch.zeros(len(updates), width, width, dtype=torch.float64, device=updates[0].device)
    for parts in zip(*(update.deltas() for update in updates), strict=True):
        x = torch.stack(parts).double()
        total.baddbmm_(x.mT, x)
    return total
