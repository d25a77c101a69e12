"""How many threads the arithmetic of a matrix takes, and several matrices at a time.

Tridiagonalisation is bound by memory and gains little from many threads on one matrix, so the cores
of a machine are used best by a matrix each: :func:`in_order`. Where matrices come one by one, as
from mergekit-yaml, the kernel takes the threads that the user allows only where they pay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from mergekit_monosoup.kernel.lapack import one_thread_each

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # calls begun for each thread before the first of their results is taken


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread inside the `with` block, where BLAS has the work.

    Threads of both libraries wait for work by spinning, in each other's way. Gram matrix of
    37984 x 1024 on two quiet cores, seconds of wall and of processor time: one thread 1.15 and
    1.17; two threads of BLAS 0.66 and 1.29; two threads of each 1.00 and 1.98.
    """
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


@contextmanager
def restored_threads() -> Iterator[bool]:
    """Let SciPy use one thread a call, and set its and torch's numbers back afterwards.

    Yields False where SciPy's BLAS takes no orders or somebody else gave some.
    """
    before = torch.get_num_threads()
    with one_thread_each() as alone:
        try:
            yield alone
        finally:
            # What a thread sets for itself is also what threads to come start with.
            torch.set_num_threads(before)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Yield ``function(item)`` of every item, in their order, computed by so many threads.

    Results are, bit for bit, those of one call after the other with one thread. Where SciPy's BLAS
    takes no orders they are computed one after another, on this thread.

    Raises:
        What the first call that fails raises.
    """
    if threads > 1:
        with restored_threads() as alone:
            if alone:
                yield from _in_pool(function, items, threads)
                return
    yield from map(function, items)


def _in_pool(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > AHEAD * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
