"""Many matrices at once: the experts of a stack, or whatever else a caller has several of.

On the CPU one matrix per thread: tridiagonalisation is bound by memory and gains little from many threads on one matrix.
On an accelerator matrices of one shape share one batched Gram product and one batched eigensolver call; each goes through
the same code as alone from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_monosoup.kernel.assemble import check_inputs
from mergekit_monosoup.kernel.eigen import (
    FAILURES,
    LOG,
    Decomposed,
    Eigen,
    Solver,
    SolverError,
    eigh,
    out_of_memory,
)
from mergekit_monosoup.kernel.lapack import one_thread_each
from mergekit_monosoup.kernel.monosoup import edit
from mergekit_monosoup.kernel.task_vector import TaskVector, block_elements
from mergekit_monosoup.report import Record

# Bound on the buffers of all matrices in work at one time: with 64 cores and a matrix each they would be as large as models.
MEMORY = 8 * 2**30


@dataclass(frozen=True)
class Job:
    """One matrix: W0, the fine-tuned ones, and the name for its record."""

    pretrained: Tensor
    tuned: Sequence[Tensor]
    name: str


Result = tuple[Tensor, Record]


def buffers(job: Job) -> int:
    """Bytes that a matrix needs at most, beside its inputs and its output; see :func:`svc.calibrate`, which needs most."""
    side = TaskVector.tall(job.pretrained).shape[1]
    return 8 * (
        5 * side**2
        + (2 * len(job.tuned) + 5)
        * min(job.pretrained.numel(), block_elements(job.pretrained.device))
    )


def each(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """``work(job)`` of every job, in their order; on the CPU as many at a time as torch has threads and memory allows.

    Results are, bit for bit, those of one job after the other with one thread. An error is that of the first job that
    fails. One after the other it stays on an accelerator, with one thread, and where SciPy's BLAS takes no orders.
    """
    budget = torch.get_num_threads()
    fit = max(1, MEMORY // max(map(buffers, jobs), default=1))
    threads = min(budget, len(jobs), fit)
    if threads < 2 or any(job.pretrained.device.type != "cpu" for job in jobs):
        yield from map(work, jobs)
        return
    with one_thread_each() as alone:
        if not alone:
            yield from map(work, jobs)
            return
        try:
            with ThreadPoolExecutor(
                threads, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                yield from pool.map(work, jobs)
        finally:
            torch.set_num_threads(
                budget
            )  # what a worker sets is also what threads to come start with


def edit_each(jobs: Sequence[Job], **settings: Any) -> Iterator[Result]:
    """:func:`monosoup.edit` of every job, in their order; ``settings`` are its keywords.

    Raises:
        What :func:`monosoup.edit` raises, for the first job that fails.
    """
    if _one_batch(jobs):
        yield from edit_batched(jobs, **settings)
    else:
        yield from each(
            lambda job: edit(job.pretrained, job.tuned, name=job.name, **settings), jobs
        )


def _one_batch(jobs: Sequence[Job]) -> bool:
    if (
        len(jobs) < 2
        or len(
            {(job.pretrained.shape, job.pretrained.dtype, job.pretrained.device) for job in jobs}
        )
        > 1
    ):
        return False
    # MPS has no float64: each of its matrices goes to the CPU by itself.
    return jobs[0].pretrained.ndim > 1 and jobs[0].pretrained.device.type not in ("cpu", "mps")


def edit_batched(jobs: Sequence[Job], **settings: Any) -> Iterator[Result]:
    """The same for matrices of one shape, dtype and device (any), with one Gram product and one eigensolver call a batch.

    A batch that the solver refuses is solved matrix by matrix; the records say so.
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
    """The ladder of every matrix, with what the batch gave as its first rung."""
    for job in batch:
        check_inputs(job.pretrained, job.tuned, job.name)
    name = f"batched eigh on {batch[0].pretrained.device}"
    try:
        grams = stacked_gram([TaskVector(job.pretrained, job.tuned, weights) for job in batch])
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        LOG.warning("%s: %s; one matrix at a time", batch[0].name or "a stack", error)
        return [None] * len(batch)
    try:
        values, vectors = eigh(grams)
        values = values.cpu()  # one transfer for the batch
    except FAILURES as error:
        return [partial(Eigen, gram, [(name, partial(_refuse, str(error)))]) for gram in grams]
    solved = [partial(Decomposed, name, *pair) for pair in zip(values, vectors, strict=True)]
    return [
        partial(Eigen, gram, [(name, solver)]) for gram, solver in zip(grams, solved, strict=True)
    ]


def _refuse(reason: str) -> Solver:
    raise SolverError(reason)


def stacked_gram(updates: Sequence[TaskVector]) -> Tensor:
    """XᵀX of every update X, (B, s, s) float64; both triangles."""
    width = updates[0].width
    total = torch.zeros(len(updates), width, width, dtype=torch.float64, device=updates[0].device)
    for parts in zip(*(update.blocks() for update in updates), strict=True):
        x = torch.stack([part.delta for part in parts]).double()
        total.baddbmm_(x.mT, x)
    return total
