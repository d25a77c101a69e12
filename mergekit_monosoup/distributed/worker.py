"""What a worker does with a batch.

It merges the tensors as mergekit does, writes them, and returns a record of the batch or its error.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import random
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.graph import Executor, TaskUniverse
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer
from transformers.trainer_utils import set_seed

from mergekit_monosoup.distributed import making
from mergekit_monosoup.distributed.dependencies import sha256, versions
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.distributed.plan import Batch
from mergekit_monosoup.distributed.records import Done, Shard
from mergekit_monosoup.methods import JOURNAL


@dataclass(frozen=True)
class MergeContext:
    """What every worker has to know about a merge, whatever its batch.

    Attributes:
        out: the output folder.
        token: what `WorkFolder.token` must hold.
        node, cwd, versions: of the driver.
        sources: folder of each model as the driver resolved it (downloaded, adapters merged).
        methods: names of the merge methods that the plan needs.
        options: mergekit's.
        writer: mergekit's task that makes the writer of the output.
        tokenizer: mergekit's task that builds the tokenizer, if the merge builds one.
        built: what that task made, pickled: from the driver's memory to the worker's, never by a
            file in OUT, where somebody else's pickle could run code.
        math_device, storage_device: as mergekit gives them to its executor.
        threads: for the arithmetic; None leaves them as they are.
        seed: each tensor gets a stream of random numbers of its own, from this and its name;
            None: drawing any is an error.
        own_process: the worker is not in the driver's process, so it opens the models itself, in
            the driver's folder, and collects its logging for the driver.
    """

    out: str
    token: str
    node: str
    cwd: str
    versions: Mapping[str, str]
    sources: Mapping[ModelReference, str]
    methods: frozenset[str]
    options: MergeOptions
    writer: TensorWriterTask
    tokenizer: BuildTokenizer | None
    built: bytes
    math_device: str
    storage_device: str
    threads: int | None
    seed: int | None
    own_process: bool


@dataclass(frozen=True)
class Failed:
    """Why a batch could not be merged.

    Attributes:
        message: of the merge method, of mergekit or of the machine.
        worker: see :func:`mergekit_monosoup.distributed.making.worker_name`.
        traceback: as Python prints it.
    """

    message: str
    worker: str
    traceback: str


class WorkerError(RuntimeError):
    """This worker cannot take part in the merge."""


class StoppedError(RuntimeError):
    """The merge is being given up."""


class RandomError(ValueError):
    """A merge method drew random numbers where that would break the promise of an equal result."""


def _never() -> bool:
    return False


def execute(
    context: MergeContext, batch: Batch, stopping: Callable[[], bool] = _never
) -> Done | Failed:
    """Merge and write a batch.

    Errors are returned, not raised: an exception would arrive wrapped in three of Ray's.

    ``stopping``: asked before each tensor; True gives up the batch.
    """
    current: list[str] = []  # its last entry is the tensor at work
    try:
        _join(context)
        with _collected_log(context) as logs:
            record = _merge_batch(context, batch, current, stopping)
        return replace(record, logs=logs)
    except Exception as error:
        message = str(error) or type(error).__name__
        if current and current[-1] not in message and not isinstance(error, OSError):
            message = f"{current[-1]}: {message}"
        return Failed(message, making.worker_name(), traceback.format_exc())


def _merge_batch(
    context: MergeContext, batch: Batch, current: list[str], stopping: Callable[[], bool]
) -> Done:
    started = time.perf_counter()
    work = WorkFolder(context.out)
    place, worker = making.attempt(work, batch.number)
    try:
        writer_task = context.writer.model_copy(update={"out_path": str(place)})
        writer = writer_task.execute()
        with JOURNAL.diverted() as reports:
            for save in batch.tensors:
                if stopping():
                    raise StoppedError("the merge is being given up")
                current.append(save.tensor_name)
                with _random_numbers(context, save):
                    _merge_tensor(context, save, writer_task, writer)
            current.clear()
        writer.finalize()
        files, shards = _shards(batch, place, writer)
        done = Done(
            batch=batch.number,
            tensors=len(batch.tensors),
            shards=shards,
            bytes=writer.total_size,
            worker=worker,
            seconds=time.perf_counter() - started,
            peak=peak_memory(),
            reports=[(path, method, record.to_json()) for path, method, record in reports],
        )
        making.keep(work, done, files)
        return done
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _merge_tensor(
    context: MergeContext, save: SaveTensor, writer_task: TensorWriterTask, writer: TensorWriter
) -> None:
    """Merge one tensor into the writer, by mergekit's own executor."""
    save = save.model_copy(update={"writer_task": writer_task})
    universe = TaskUniverse([save])
    values: dict[Any, Any] = {universe.get_handle(writer_task): writer}
    task = context.tokenizer
    if task is not None and (tokenizer := universe.get_handle(task)) is not None:
        # Built once, by the driver: a union of vocabularies is ordered by Python's string hashes,
        # which differ by process.
        values[tokenizer] = pickle.loads(context.built)
    executor = Executor(
        [universe.add_task(save)],
        math_device=torch.device(context.math_device),
        storage_device=torch.device(context.storage_device),
        cached_values=values,
    )
    for _ in executor.run(quiet=True):
        pass


def _shards(batch: Batch, place: Path, writer: TensorWriter) -> tuple[list[Path], list[Shard]]:
    """Return the files that the writer left in ``place``, and a record of each with its final name.

    Both are empty if all tensors were optional and absent.
    """
    names: dict[str, list[str]] = {}
    for tensor, file in writer.weight_map.items():
        names.setdefault(file, []).append(tensor)
    if len(names) == 1:  # the writer renames a single file without telling its map
        (tensors,) = names.values()
        (only,) = (file.name for file in place.iterdir())
        names = {only: tensors}
    files = [place / file for file in sorted(names)]
    shards = []
    for number, path in enumerate(files, start=1):
        shards.append(
            Shard(
                file=f"{batch.number:05d}-{number}{path.suffix}",
                bytes=path.stat().st_size,
                sha256=sha256(path),
                tensors=names[path.name],
            )
        )
    return files, shards


# -- the worker and the merge ----------------------------------------------------------------------

_joined = ""  # the token of the merge that this process has been prepared for


def _join(context: MergeContext) -> None:
    """Make this process ready for the merge, once per merge.

    Raises:
        WorkerError: it sees other files or has other programs than the driver; what it wrote would
            be lost, or differ.
    """
    global _joined
    _check_token(context)
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    if _joined == context.token:
        return
    _check_programs(context)
    if context.own_process:
        if os.path.isdir(context.cwd):
            # For relative paths of models, whose config.json mergekit reads anew.
            os.chdir(context.cwd)
        _open_models(context)
    _joined = context.token


def _check_token(context: MergeContext) -> None:
    """Raise WorkerError unless this process sees the driver's folder, and of this merge."""
    work, node = WorkFolder(context.out), socket.gethostname()
    try:
        token = work.token.read_text(encoding="utf-8")
    except OSError as error:
        raise WorkerError(
            f"{node} cannot read {work.token}, which {context.node} has written ({error}): OUT "
            "must lie on storage that all nodes share, under the same path"
        ) from None
    if token != context.token:
        raise WorkerError(
            f"{context.out}: another driver has taken over this merge, or {node} has another "
            "folder there"
        )


def _check_programs(context: MergeContext) -> None:
    """Raise WorkerError if a package has another version here, or a merge method is unknown."""
    node, installed = socket.gethostname(), versions()
    different = [
        f"{name} {installed[name]} (driver: {context.versions[name]})"
        for name in installed
        if installed[name] != context.versions[name]
    ]
    if different:
        raise WorkerError(
            f"{node} has other versions than {context.node}: {', '.join(different)}. Install the "
            "same on all nodes"
        )
    for method in context.methods:
        try:
            merge_methods.get(method)
        except RuntimeError:
            raise WorkerError(
                f"{node} does not know the merge method {method}: install what brings it on all "
                "nodes"
            ) from None


def _open_models(context: MergeContext) -> None:
    """Give mergekit's loaders the folders of the models, as the driver resolved them."""
    cache = LoaderCache()
    cache.setup(context.options)
    for model, source in context.sources.items():
        if not os.path.isdir(source):
            raise WorkerError(
                f"{socket.gethostname()} has no folder {source}, where {context.node} has {model}: "
                "all inputs must lie on storage that all nodes share (--transformers-cache and "
                "--lora-merge-cache choose where downloads and adapters go)"
            )
        cache.loaders[model] = LazyTensorLoader.from_disk(
            source, lazy_unpickle=context.options.lazy_unpickle
        )


@contextmanager
def _random_numbers(context: MergeContext, save: SaveTensor) -> Iterator[None]:
    """Let a merge method draw random numbers only from a stream of the tensor's own.

    Raises:
        RandomError: it drew some though no seed for such streams was given.
    """
    if context.seed is not None:
        digest = hashlib.sha256(f"{context.seed}:{save.tensor_name}".encode()).digest()
        set_seed(int.from_bytes(digest[:4], "big"))
        yield
        return
    before = _random_state(context.math_device)
    yield
    if _random_state(context.math_device) != before:
        raise RandomError(
            f"merge method {method_of(save)} draws random numbers. mergekit-yaml takes them for "
            "one tensor after the other from one stream, which several workers cannot repeat. "
            "Merge with --workers 1, as mergekit-yaml, or add --seed-per-tensor: each tensor gets "
            "a stream of its own, from --random-seed and its name; the same with any number of "
            "workers, but other numbers than mergekit-yaml's"
        )


def method_of(save: SaveTensor) -> str:
    """Return the merge method of a tensor; empty for other kinds of tasks, should there be any."""
    return getattr(save.tensor_task, "method_name", "")


def _random_state(device: str) -> Hashable:
    """Return the state of all generators that a merge method may draw from, for comparison."""
    _, keys, *rest = np.random.get_state()
    states = [
        random.getstate(),
        np.asarray(keys).tobytes(),
        *rest,
        torch.get_rng_state().numpy().tobytes(),
    ]
    if torch.device(device).type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state().numpy().tobytes())
    return tuple(states)


class _Collector(logging.Handler):
    """Log records as (logger, level, message)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))


@contextmanager
def _collected_log(context: MergeContext) -> Iterator[list[tuple[str, int, str]]]:
    """Collect what is logged meanwhile, for the driver to repeat.

    A worker's own stderr ends in a file of Ray's.
    """
    collector = _Collector()
    if not context.own_process:
        yield collector.lines
        return
    root = logging.getLogger()
    levels = {0: logging.WARNING, 1: logging.INFO}
    root.setLevel(levels.get(context.options.verbosity, logging.DEBUG))
    root.addHandler(collector)
    try:
        yield collector.lines
    finally:
        root.removeHandler(collector)


def peak_memory() -> int:
    """Return the bytes this process has held at most, pages of mapped files included.

    0 where the system does not tell.
    """
    try:
        # getrusage would start from the peak of the parent process.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
