"""Several calls at a time on the CPU, each with one thread for its own arithmetic.

Tridiagonalisation is bound by memory and gains little from many threads on one matrix, so the cores
of a machine are used best by a matrix each.
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
