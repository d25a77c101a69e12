"""What a worker does with a batch: merge its tensors as mergekit does, write them, say what came of it."""

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
from collections.abc import Hashable, Iterator, Mapping
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

from mergekit_monosoup.distributed import folder as folders
from mergekit_monosoup.distributed.fingerprint import versions
from mergekit_monosoup.distributed.folder import Done, Shard, WorkFolder
from mergekit_monosoup.distributed.plan import Batch
from mergekit_monosoup.methods import JOURNAL


@dataclass(frozen=True)
class Job:
    """All that a worker has to know about the merge.

    Attributes:
        out: the output folder.
        token: what `WorkFolder.token` must hold.
        node, cwd, versions: of the driver.
        methods: that the plan asks for.
        sources: folder of each model as the driver resolved it (downloaded, adapters merged).
        math_device, storage_device: as mergekit gives them to its executor.
        threads: for the arithmetic; None leaves them as they are.
        seed: each tensor gets a stream of random numbers of its own, from this and its name; None: drawing any is an error.
        own_process: the worker's logging is collected for the driver, who is elsewhere.
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
    math_device: str
    storage_device: str
    threads: int | None
    seed: int | None
    own_process: bool


@dataclass(frozen=True)
class Failed:
    """Why a batch could not be done: what the merge method (or mergekit, or the machine) said, and where."""

    message: str
    worker: str
    traceback: str


class WorkerError(RuntimeError):
    """This worker cannot take part in the merge."""


class RandomError(ValueError):
    """A merge method drew random numbers where that would break the promise of an equal result."""


def execute(job: Job, batch: Batch) -> Done | Failed:
    """Merges and writes a batch. Errors come back as values: an exception would arrive wrapped in three of Ray's."""
    tensor: list[str] = []  # the one at work
    try:
        _take_part(job)
        with _logging(job) as logs:
            record = _make(job, batch, tensor)
        return replace(record, logs=logs)
    except Exception as error:
        message = str(error) or type(error).__name__
        if tensor and tensor[-1] not in message and not isinstance(error, OSError):
            message = f"{tensor[-1]}: {message}"
        return Failed(message, f"{socket.gethostname()}@{os.getpid()}", traceback.format_exc())


def _make(job: Job, batch: Batch, tensor: list[str]) -> Done:
    started = time.perf_counter()
    work = WorkFolder(job.out)
    place, worker = folders.attempt(work, batch.number)
    try:
        writer_task = job.writer.model_copy(update={"out_path": str(place)})
        writer = writer_task.execute()
        with JOURNAL.diverted() as reports:
            for save in batch.tensors:
                tensor.append(save.tensor_name)
                with _random_numbers(job, save):
                    _merge(job, save, writer_task, writer)
            tensor.clear()
        writer.finalize()
        files, shards = _shards(batch, place, writer)
        record = Done(
            batch=batch.number,
            tensors=len(batch.tensors),
            shards=shards,
            bytes=writer.total_size,
            worker=worker,
            seconds=time.perf_counter() - started,
            peak=peak_memory(),
            reports=[(path, method, record.to_json()) for path, method, record in reports],
        )
        folders.keep(work, record, files)
        return record
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _merge(job: Job, save: SaveTensor, writer_task: TensorWriterTask, writer: TensorWriter) -> None:
    """One tensor, by mergekit's own executor, into the writer."""
    save = save.model_copy(update={"writer_task": writer_task})
    universe = TaskUniverse([save])
    known: dict[Any, Any] = {universe.get_handle(writer_task): writer}
    if job.tokenizer is not None and (handle := universe.get_handle(job.tokenizer)) is not None:
        # Built once, by the driver: a union of vocabularies is ordered by Python's string hashes, which differ by process.
        known[handle] = pickle.loads(WorkFolder(job.out).tokenizer.read_bytes())
    executor = Executor(
        [universe.add_task(save)],
        math_device=torch.device(job.math_device),
        storage_device=torch.device(job.storage_device),
        cached_values=known,
    )
    for _ in executor.run(quiet=True):
        pass


def _shards(batch: Batch, place: Path, writer: TensorWriter) -> tuple[list[Path], list[Shard]]:
    """The files that the writer left in ``place`` and what to call them. None if all tensors were optional and absent."""
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
                sha256=folders.sha256(path),
                tensors=names[path.name],
            )
        )
    return files, shards


# -- the worker and the merge ----------------------------------------------------------------------------------------------

_joined = ""  # the token of the merge that this process has been prepared for


def _take_part(job: Job) -> None:
    """Makes this process ready, once per merge.

    Raises:
        WorkerError: it sees other files or has other programs than the driver; what it wrote would be lost, or differ.
    """
    global _joined
    work, node = WorkFolder(job.out), socket.gethostname()
    try:
        seen = work.token.read_text(encoding="utf-8")
    except OSError as error:
        raise WorkerError(
            f"{node} cannot read {work.token}, which {job.node} has written ({error}): OUT must lie on storage that all "
            "nodes share, under the same path"
        ) from None
    if seen != job.token:
        raise WorkerError(
            f"{job.out}: another driver has taken over this merge, or {node} has another folder there"
        )
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if _joined == job.token:
        return
    here = versions()
    if unlike := [
        f"{name} {here[name]} (driver: {job.versions[name]})"
        for name in here
        if here[name] != job.versions[name]
    ]:
        raise WorkerError(
            f"{node} has other versions than {job.node}: {', '.join(unlike)}. Install the same on all nodes"
        )
    for method in job.methods:
        try:
            merge_methods.get(method)
        except RuntimeError:
            raise WorkerError(
                f"{node} does not know the merge method {method}: install what brings it on all nodes"
            ) from None
    if job.own_process:
        if os.path.isdir(job.cwd):
            os.chdir(job.cwd)  # for relative paths of models, whose config.json mergekit reads anew
        cache = LoaderCache()
        cache.setup(job.options)
        for model, source in job.sources.items():
            if not os.path.isdir(source):
                raise WorkerError(
                    f"{node} has no folder {source}, where {job.node} has {model}: all inputs must lie on storage that all "
                    "nodes share (--transformers-cache and --lora-merge-cache choose where downloads and adapters go)"
                )
            cache.loaders[model] = LazyTensorLoader.from_disk(
                source, lazy_unpickle=job.options.lazy_unpickle
            )
    _joined = job.token


@contextmanager
def _random_numbers(job: Job, save: SaveTensor) -> Iterator[None]:
    """Lets a merge method draw random numbers only from a stream of the tensor's own.

    Raises:
        RandomError: it drew some though no seed for such streams was given.
    """
    if job.seed is not None:
        digest = hashlib.sha256(f"{job.seed}:{save.tensor_name}".encode()).digest()
        set_seed(int.from_bytes(digest[:4], "big"))
        yield
        return
    before = _random_state(job.math_device)
    yield
    if _random_state(job.math_device) != before:
        raise RandomError(
            f"merge method {method_of(save)} draws random numbers. mergekit-yaml takes them "
            "for one tensor after the other from one stream, which several workers cannot repeat. Merge with mergekit-yaml, "
            "or add --seed-per-tensor: each tensor gets a stream of its own, from --random-seed and its name; the same with "
            "any number of workers, but other numbers than mergekit-yaml's"
        )


def method_of(save: SaveTensor) -> str:
    return getattr(
        save.tensor_task, "method_name", ""
    )  # other kinds of tasks may save tensors one day


def _random_state(device: str) -> Hashable:
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
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))


@contextmanager
def _logging(job: Job) -> Iterator[list[tuple[str, int, str]]]:
    """What is logged meanwhile, for the driver to repeat: a worker's own stderr ends in a file of Ray's."""
    collector = _Collector()
    if not job.own_process:
        yield collector.lines
        return
    root = logging.getLogger()
    root.setLevel({0: logging.WARNING, 1: logging.INFO}.get(job.options.verbosity, logging.DEBUG))
    root.addHandler(collector)
    try:
        yield collector.lines
    finally:
        root.removeHandler(collector)


def peak_memory() -> int:
    """Bytes this process has held at most, pages of mapped files included; 0 where the system does not tell."""
    try:
        status = Path(
            "/proc/self/status"
        ).read_text()  # getrusage would start from the peak of the parent process
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
