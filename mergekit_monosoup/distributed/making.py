"""The side of the workers: a batch is made in a folder of its own, and kept by renaming."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from mergekit_monosoup import files
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.distributed.records import Done

WORKER_THREAD = "worker "  # and its number: the name of a thread that is one of several workers


def worker_name() -> str:
    """Return NODE@PID of this worker, or NODE@PID-NUMBER on a thread that is one of several."""
    thread = threading.current_thread()
    number = (
        thread.name.removeprefix(WORKER_THREAD) if thread.name.startswith(WORKER_THREAD) else ""
    )
    return f"{socket.gethostname()}@{os.getpid()}" + (f"-{number}" if number else "")


def attempt(folder: WorkFolder, batch: int) -> tuple[Path, str]:
    """Make a folder to write a batch to; return it and this worker, which it names."""
    worker = worker_name()
    path = folder.making / f"{batch:05d}@{worker}@{time.time():.0f}@{uuid.uuid4().hex[:8]}"
    path.mkdir()
    return path, worker


def attempts(folder: WorkFolder) -> Iterable[tuple[int, str, float]]:
    """Yield (batch, worker, time of start) of each batch at work, as far as the folder tells."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder.making):
            batch, node, pid, begun, _ = entry.name.split("@")
            yield int(batch), f"{node}@{pid}", float(begun)


def keep(folder: WorkFolder, record: Done, paths: Sequence[Path]) -> None:
    """Move the files of a batch (as ``record.shards``) to `done`, and then its record.

    Both are on the disk by then. If the disk is full, the batch leaves nothing there.
    """
    try:
        for path, shard in zip(paths, record.shards, strict=True):
            files.sync_file(path)
            os.replace(path, folder.done / shard.file)
        files.sync_folder(folder.done)
        files.write_text(folder.done / f"{record.batch:05d}.json", json.dumps(asdict(record)))
    except OSError:
        for shard in record.shards:
            with contextlib.suppress(OSError):
                os.remove(folder.done / shard.file)
        raise
