"""Batches on several threads of this process: all cores of one machine, without Ray.

LAPACK, BLAS, checksums and file access run without Python's lock, so each thread keeps a core busy.
Each uses one thread for its own arithmetic, so results are, bit for bit, those of mergekit-yaml
with one thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache

from mergekit_monosoup.checkpoints.loaders import own_loader
from mergekit_monosoup.distributed.making import WORKER_THREAD, worker_name
from mergekit_monosoup.distributed.plan import PROCESS, Batch
from mergekit_monosoup.distributed.records import Done
from mergekit_monosoup.distributed.worker import Failed, MergeContext, execute
from mergekit_monosoup.kernel.threads import restored_threads
from mergekit_monosoup.memory import available_memory
from mergekit_monosoup.parameters import METHODS

LOG = logging.getLogger("mergekit_monosoup")

NO_ORDERS = (
    "SciPy's BLAS takes no orders on its number of threads here, so one tensor is merged at a "
    "time; --ray local merges on all cores (SciPy from PyPI on Linux or Windows does, too)"
)


@dataclass
class InThreads:
    """Batches on threads, as many at a time as there are workers and memory for.

    Threads are daemons: after a second Ctrl-C the process ends without waiting for them.
    """

    workers: int
    own_process: bool = False

    def run(self, context: MergeContext, batches: Sequence[Batch]) -> Generator[Done | Failed]:
        """Yield results in the order in which they come.

        Closing the iterator lets each thread end the tensor at work, and waits for that: a thread
        must not write into a folder that another driver may have claimed since.
        """
        loaders = dict(LoaderCache().loaders)
        with restored_threads() as alone:
            workers = min(self.workers, len(batches))
            if workers > 1 and not alone and context.methods & METHODS.keys():
                # Each call would use several threads, as many times as there are workers, and
                # round otherwise than with one.
                LOG.warning(NO_ORDERS)
                workers = 1
            pool = _Pool(context, loaders, workers)
            try:
                yield from pool.run(batches, available_memory())
            finally:
                pool.stop()

    def close(self) -> None:
        pass


class _Pool:
    """Threads that take batches from a queue and put results into another."""

    def __init__(
        self,
        context: MergeContext,
        loaders: Mapping[ModelReference, LazyTensorLoader],
        workers: int,
    ):
        self._context, self._loaders = context, loaders
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Batch, Done | Failed]] = queue.SimpleQueue()
        self._running: list[Batch] = []
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"{WORKER_THREAD}{number}", daemon=True)
            for number in range(1, workers + 1)
        ]

    def run(self, batches: Sequence[Batch], memory: float) -> Iterator[Done | Failed]:
        """Yield results; batches at work need at most ``memory`` bytes, or there is only one."""
        for thread in self._threads:
            thread.start()
        waiting, running = list(batches), self._running
        while waiting or running:
            while len(running) < len(self._threads):
                free = memory - sum(map(_memory, running))
                fitting = (batch for batch in waiting if _memory(batch) <= free or not running)
                batch = next(fitting, None)
                if batch is None:
                    break
                waiting.remove(batch)
                running.append(batch)
                self._batches.put(batch)
            batch, result = self._results.get()
            running.remove(batch)
            yield result

    def stop(self) -> None:
        """Return when no thread is at work any more."""
        self._stopping.set()
        for _ in self._threads:
            self._batches.put(None)
        if self._running:
            LOG.warning(
                "waiting for the tensors at work to be finished; press Ctrl-C to stop at once"
            )
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _work(self) -> None:
        opened = False
        while (batch := self._batches.get()) is not None:
            try:
                if not opened:
                    self._open_models()
                    opened = True
                result = execute(self._context, batch, self._stopping.is_set)
            except BaseException as error:  # SystemExit of a method: the driver waits for an answer
                message = f"{type(error).__name__}: {error}"
                result = Failed(message, worker_name(), traceback.format_exc())
            self._results.put((batch, result))

    def _open_models(self) -> None:
        """Give this thread loaders of its own.

        A loader holds one open file, and two threads would close each other's at every tensor.
        """
        cache = LoaderCache()  # mergekit has one for each thread
        cache.setup(self._context.options)
        cache.loaders = {model: own_loader(loader) for model, loader in self._loaders.items()}


def _memory(batch: Batch) -> int:
    """Return the bytes that a batch needs in a process that is there already."""
    return batch.memory - PROCESS
