"""What JSON files in the folder of an unfinished merge hold: the types, and reading a batch's."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from mergekit_monosoup import report
from mergekit_monosoup.distributed.dependencies import Dependencies

SHARD = re.compile(r"\d{5,}-\d+\.(safetensors|bin)")  # a finished file of weights, in `done`


@dataclass(frozen=True)
class Shard:
    """A finished file of weights; ``tensors`` are the names in it."""

    file: str
    bytes: int
    sha256: str
    tensors: list[str]


@dataclass(frozen=True)
class Done:
    """The record of a finished batch.

    Attributes:
        batch: its number.
        tensors: how many were asked for; optional ones may be in no shard.
        shards: the files that hold them.
        bytes: of the tensors, without headers of files.
        worker: the process or thread that merged it, see
            :func:`mergekit_monosoup.distributed.making.worker_name`.
        seconds, peak: wall time, and peak memory of the process so far (bytes).
        reports: [path, method, record as JSON text] for each line of a report.
        logs: [logger, level, message] of each line that the worker logged.
    """

    batch: int
    tensors: int
    shards: list[Shard]
    bytes: int
    worker: str
    seconds: float
    peak: int
    reports: list[tuple[str | None, str, str]] = field(default_factory=list)
    logs: list[tuple[str, int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Header:
    """What merge.json holds: what the merge depends on, and how it was divided.

    ``batch_bytes`` is 0 where it was not. ``outputs``: file of weights → its state, in the record
    of a finished stage.
    """

    format: int
    fingerprint: Dependencies
    batch_bytes: int = 0
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageList:
    """What stages.json holds: the names of the stages before the last, and their folder."""

    folder: str
    names: list[str]


def read_done(path: Path) -> Done:
    """Return the record of a finished batch, from its file in `done`.

    Raises:
        ValueError: it is none, or names files and lines that no worker writes.
    """
    try:
        record = TypeAdapter(Done).validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error}") from error
    if path.name != f"{record.batch:05d}.json":
        raise ValueError(f"{path}: of batch {record.batch}")
    for shard in record.shards:
        if not SHARD.fullmatch(shard.file) or not shard.file.startswith(f"{record.batch:05d}-"):
            raise ValueError(f"{path}: {shard.file!r} is no name of a worker's file")
    for _, _, line in record.reports:
        report.Record.from_json(line)
    return record
