"""Who executes batches: this process, or workers that Ray starts (threads: threads.py).

Both return results in the order in which they come, and errors as values.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from mergekit_monosoup.distributed.plan import Batch
from mergekit_monosoup.distributed.records import Done
from mergekit_monosoup.distributed.worker import Failed, MergeContext, execute

LOG = logging.getLogger("mergekit_monosoup")

# A batch is lost with its worker or node, and Ray starts it again; one that took four workers with
# it is the cause.
RETRIES = 3
LOCAL = "local"  # instead of an address: a cluster on this machine for the time of the merge
# Results are a few kilobytes each; Ray would reserve 30 % of the memory for them.
OBJECT_STORE = 100 * 2**20
PATIENCE = 0.5  # seconds until Ctrl-C is looked for again
# Environment variables that workers get from the driver: where downloads are, for nodes that were
# started with other ones. Not HF_TOKEN: Ray would store it.
DOWNLOAD_PLACES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")


class EngineError(RuntimeError):
    """The workers cannot be started or are lost; the message says what to do."""


class Engine(Protocol):
    """What executes batches.

    Attributes:
        workers: how many batches are in hand at a time.
        own_process: the workers are not in the driver's process.
    """

    workers: int
    own_process: bool

    def run(self, context: MergeContext, batches: Sequence[Batch]) -> Generator[Done | Failed]:
        """Yield results in the order in which they come. Closing the iterator stops the workers."""
        ...

    def close(self) -> None: ...


@dataclass
class InProcess:
    """One batch after the other, in this process."""

    workers: int = 1
    own_process: bool = False

    def run(self, context: MergeContext, batches: Sequence[Batch]) -> Generator[Done | Failed]:
        for batch in batches:
            yield execute(context, batch)

    def close(self) -> None:
        pass


class _Lent:
    """An engine that several merges use, one after the other; who lends it closes it."""

    def __init__(self, engine: Engine):
        self.workers, self.own_process, self.run = engine.workers, engine.own_process, engine.run

    def close(self) -> None:
        pass


@contextmanager
def started_once(start: Callable[[], Engine]) -> Iterator[Callable[[], Engine]]:
    """Yield what returns an engine, which starts at the first call and is closed at the end.

    Ray takes 20 seconds to start: not for each stage of a merge.
    """
    with ExitStack() as stack:

        @cache
        def lent() -> Engine:
            return _Lent(stack.enter_context(closing(start())))

        yield lent


class OnRay:
    """Batches as tasks of Ray.

    Ray places each where CPUs, memory and a GPU are free, and starts it anew when those are lost.
    """

    own_process = True

    def __init__(self, address: str, workers: int | None, threads: int, gpus: bool):
        """Connect to a cluster, or start one.

        Args:
            address: of a running cluster, as `ray.init` takes it; :data:`LOCAL` starts one on this
                machine for the time of the merge.
            workers: batches in hand at a time; None: as many as the cluster has room for.
            threads: of each worker, which takes as many CPUs.
            gpus: give each worker one GPU.

        Raises:
            ImportError: without Ray.
            EngineError: no such cluster, or one without a node for a single worker.
        """
        self._ray = import_ray()
        self.threads, self.gpus = threads, gpus
        self._started = not self._ray.is_initialized()
        if self._started:
            self._start(address, workers)
        try:
            self.workers = workers or self._capacity()
            self._memory = self._largest_node()
        except BaseException:
            self.close()
            raise

    def _start(self, address: str, workers: int | None) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address != LOCAL:
                _check_listening(address)
                self._ray.init(address=address, **quiet)
                return
            present = cores()
            cpus = (workers or max(1, present // self.threads)) * self.threads
            if cpus > present:
                LOG.warning(
                    "%d workers with %d thread(s) each share %d cores",
                    cpus // self.threads,
                    self.threads,
                    present,
                )
            # Never one that happens to run here: its address is how to ask for that.
            self._ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                **quiet,
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"Ray does not start: {_summary(error)}"
                if address == LOCAL
                else f"no Ray cluster at {address}: {_summary(error)}. Start one with `ray start "
                "--head`"
            ) from error

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _capacity(self) -> int:
        """Return the number of workers that the cluster has room for."""
        capacity = 0
        for node in self._nodes():
            workers = int(node.get("CPU", 0)) // self.threads
            capacity += min(workers, int(node.get("GPU", 0))) if self.gpus else workers
        return capacity

    def _largest_node(self) -> float:
        """Return the bytes of memory of the largest node that can hold a worker.

        Raises:
            EngineError: there is none.
        """
        memories = [
            node.get("memory", 0.0)
            for node in self._nodes()
            if node.get("CPU", 0) >= self.threads and (not self.gpus or node.get("GPU", 0) >= 1)
        ]
        if not memories:
            needed = f"{self.threads} CPU(s)" + (" and a GPU" if self.gpus else "")
            raise EngineError(f"no node of the Ray cluster has {needed} for a worker")
        return max(memories)

    def run(self, context: MergeContext, batches: Sequence[Batch]) -> Generator[Done | Failed]:
        ray, running = self._ray, dict[Any, Batch]()
        self._warn_of_large(batches)
        remote = ray.remote(execute)
        waiting = list(reversed(batches))
        shared = ray.put(context)
        try:
            with ctrl_c_noted() as check_ctrl_c:
                yield from self._results(remote, shared, waiting, running, check_ctrl_c)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _results(
        self,
        remote: Any,
        shared: Any,
        waiting: list[Batch],
        running: dict[Any, Batch],
        check_ctrl_c: Callable[[], None],
    ) -> Generator[Done | Failed]:
        """Move batches from ``waiting`` to ``running``, and yield the result of each."""
        ray = self._ray
        while waiting or running:
            # As many as there are workers, no more: what is queued in Ray cannot be stopped
            # cleanly, and shards that nobody has room to write would wait in memory.
            while waiting and len(running) < self.workers:
                batch = waiting.pop()
                reference = remote.options(**self._options(batch)).remote(shared, batch)
                running[reference] = batch
            ready, _ = ray.wait(list(running), timeout=PATIENCE)
            check_ctrl_c()
            for reference in ready:
                batch = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise EngineError(_loss_message(batch, error)) from error
                yield result
        check_ctrl_c()

    def _warn_of_large(self, batches: Sequence[Batch]) -> None:
        large = [batch for batch in batches if batch.memory > self._memory]
        if large:
            LOG.warning(
                "%d batches may need up to %.0f GB, more than the %.0f GB that the largest node "
                "has for Ray; the first is %s",
                len(large),
                large[0].memory / 1e9,
                self._memory / 1e9,
                large[0].tensors[0].tensor_name,
            )

    def _options(self, batch: Batch) -> dict[str, Any]:
        """Return what Ray has to know about the task of a batch."""
        environment = {name: os.environ[name] for name in DOWNLOAD_PLACES if name in os.environ}
        # Before torch and SciPy are imported: their thread pools are made then.
        pools = [f"{name}_NUM_THREADS" for name in ("OMP", "OPENBLAS", "MKL")]
        pools.append("VECLIB_MAXIMUM_THREADS")
        environment |= dict.fromkeys(pools, str(self.threads))
        return {
            "name": f"batch {batch.number}",
            "num_cpus": self.threads,
            "num_gpus": 1 if self.gpus else 0,
            "memory": min(batch.memory, self._memory),
            "max_retries": RETRIES,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": environment},
        }

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


@contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed meanwhile.

    Raised where it comes, it may hit code of Ray that cannot pass it on: a traceback would be
    printed and the merge go on. A second Ctrl-C is raised at once.
    """
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def cores() -> int:
    """Return the number of cores that this process may use.

    A container or a batch system may have left it fewer than there are.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_listening(address: str) -> None:
    """Raise OSError if nobody listens at ``address``. Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def import_ray() -> Any:
    """Import Ray, with its reports to third parties switched off.

    Raises:
        ImportError: Ray is not installed; says how to get it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ImportError(
            "--ray and --gpus need Ray, which is not installed: pip install "
            "'mergekit-monosoup[ray]' (Python below 3.14), or leave them out: threads of one "
            "process merge on all cores of this machine"
        )
    # Both are read when Ray is imported or started. The second stops a tip about GPUs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def _loss_message(batch: Batch, error: Exception) -> str:
    others = len(batch.tensors) - 1
    names = batch.tensors[0].tensor_name + (f" and {others} more" if others else "")
    return (
        f"batch {batch.number} ({names}) was lost with its worker, {1 + RETRIES} times in a row: "
        f"{_summary(error)} If memory is short (about {batch.memory / 1e9:.1f} GB are needed), "
        "take fewer workers; --resume continues"
    )


def _summary(error: Exception) -> str:
    """Return the first line of an error's text; Ray's go on for pages."""
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)
