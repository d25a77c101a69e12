"""The output folder of a merge that is not finished, and how it becomes a model.

It is claimed by one driver, filled under names that no program takes for a model, and published by
renaming.

    OUT/.mergekit-monosoup/     all of an unfinished merge; one driver at a time holds `lock`
        merge.json              what is being merged (fingerprint) and how it was divided
        done/00012.json         record of a finished batch: its files with checksums, its tensors
        done/00012-1.safetensors
        making/00012@NODE@PID@… what a worker is writing; worthless once the worker is gone
        files/OUT/              config, index, tokenizer, model card, as mergekit writes them
        publish.json            written when all of it is there: which file goes where
    OUT/config.json             last of all

Every step can be cut off by kill -9: what counts is renamed into place when it is on the disk, and
publishing can be repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mergekit_monosoup.distributed.dependencies import Dependencies, differences

LOG = logging.getLogger("mergekit_monosoup")

NAME = ".mergekit-monosoup"
FORMAT = 1  # of what lies in the folder; raised when an older version could not continue it
# As mergekit and transformers name them; model-1.safetensors is what mergekit-yaml leaves when it
# is interrupted.
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?$")
# What else belongs to a model: left beside another one, it would be loaded with that.
SIDE_FILES = re.compile(
    r"(tokenizer(_config)?|special_tokens_map|added_tokens|vocab|generation_config"
    r"|(pre)?processor_config|chat_template)\.json$"
    r"|mergekit_config\.yml$|(merges|vocab)\.txt$"
    r"|(tokenizer|spiece|sentencepiece.*)\.model$|chat_template\.jinja$"
)
CHUNK = 2**22  # bytes read at a time for a checksum
READERS = 8  # files checked at a time


class FolderError(ValueError):
    """The output folder cannot be used for this merge; the message says why and what to do."""


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
        worker: the process that merged it, NODE@PID.
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


class WorkFolder:
    """The unfinished merge in an output folder, as the driver and the workers see it."""

    def __init__(self, out: str | Path):
        self.out = Path(out).absolute()
        self.path = self.out / NAME
        self.done = self.path / "done"
        self.making = self.path / "making"
        # mergekit's model card bears the name of the folder that it is written to.
        self.files = self.path / "files" / (self.out.name or "model")
        self.tokenizer = self.path / "tokenizer.pickle"
        self.token = self.path / "token"
        self._header = self.path / "merge.json"
        self._publish = self.path / "publish.json"

    # -- of the driver -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self, *, resume: bool, force: bool) -> Iterator[None]:
        """Hold the folder for one driver. The lock goes with the process, however it ends.

        Raises:
            FolderError: another driver is at work, there is a finished model, or an unfinished
                merge that is neither to be resumed nor to be dropped.
        """
        check_free(self.out, resume=resume, force=force)
        new = not self.out.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise FolderError(
                f"{self.out}: another `mergekit-monosoup run` is merging into it right now"
            ) from None
        except NotImplementedError:
            LOG.warning(
                "%s: the file system has no locks; take care that only one driver merges into it",
                self.out,
            )
        try:
            if force or not self.begun:
                # A tokenizer that a killed driver left may be another merge's.
                self.clear()
            if not self.publishing:
                for leftover in (self.making, self.files):
                    shutil.rmtree(leftover, ignore_errors=True)
            for folder in (self.done, self.making, self.files):
                folder.mkdir(parents=True, exist_ok=True)
            # Workers compare it: one that sees another folder, or was left over by a killed
            # driver, stops.
            write_text(self.token, f"{uuid.uuid4().hex} of {socket.gethostname()}")
            yield
        finally:
            lock.release()
            if not self.begun:  # nothing to resume: leave no trace
                shutil.rmtree(self.path, ignore_errors=True)
                if new:
                    with contextlib.suppress(OSError):
                        self.out.rmdir()  # only if empty

    def clear(self) -> None:
        """Remove what an earlier merge left unfinished; the lock stays."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._header)  # first: the rest means nothing without it
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def division(self, needs: Dependencies, limit: int) -> int:
        """Return the bytes per batch of the merge that is resumed.

        A new merge gets ``limit``, which is recorded with its dependencies.

        Raises:
            FolderError: the unfinished merge depends on something else than ``needs``.
        """
        if not self.begun:
            header = {"format": FORMAT, "batch_bytes": limit, "fingerprint": needs}
            write_text(self._header, json.dumps(header, indent=1))
            return limit
        return self.check_same(needs)["batch_bytes"]

    def check_same(self, needs: Dependencies) -> dict[str, Any]:
        """Return merge.json, if it agrees in the sections of ``needs``.

        Raises:
            FolderError: it does not; the message says where.
        """
        if not self._header.exists():  # one process with --force has none: its model is complete
            return {}
        needs = json.loads(json.dumps(needs))  # tuples become lists, as in the file
        header: dict[str, Any] = json.loads(self._header.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise FolderError(
                f"{self.out}: the unfinished merge was begun by another version of "
                "mergekit-monosoup; --force starts over"
            )
        before = {section: header["fingerprint"][section] for section in needs}
        if changes := differences(before, needs):
            raise FolderError(
                f"{self.out}: cannot resume, for the result would be half of one merge and half of "
                "another:\n  "
                + "\n  ".join(changes)
                + "\nUndo the change, or start over with --force (without --resume)."
            )
        return header

    def finished(self) -> Iterator[Done | str]:
        """Yield the records of finished batches in order, or a line about damaged files of one.

        The record of a batch with damaged files is removed: it is merged again.
        """
        records = [read_done(path) for path in sorted(self.done.glob("*.json"))]
        with ThreadPoolExecutor(READERS) as pool:
            for record, fault in zip(records, pool.map(self._fault, records), strict=True):
                if fault:
                    os.remove(self.done / f"{record.batch:05d}.json")
                    yield fault
                else:
                    yield record

    def _fault(self, record: Done) -> str:
        """Return what is wrong with the files of a batch; empty if nothing is."""
        for shard in record.shards:
            path = self.done / shard.file
            if not path.exists():
                return f"{path} is gone; merged again"
            if path.stat().st_size != shard.bytes or sha256(path) != shard.sha256:
                return f"{path} is not what was written; merged again"
        return ""

    # -- publishing --------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether there is something to resume: a finished batch, or a model being published."""
        return self.publishing or (self._header.exists() and any(self.done.glob("*.json")))

    @property
    def publishing(self) -> bool:
        """Whether everything is merged and written, and only renaming was cut off."""
        return self._publish.exists()

    def prepare(self, shards: dict[str, str]) -> None:
        """Decide which file goes where, and write it down.

        ``shards``: final name → file in `done`; the rest is what lies in `files`.
        """
        others = sorted(
            str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()
        )
        moves = {name: f"done/{file}" for name, file in shards.items()}
        moves |= {name: f"files/{self.files.name}/{name}" for name in others}
        moves["config.json"] = moves.pop("config.json")  # last: without it no program sees a model
        entries = os.listdir(self.out)
        # A tokenizer without a model is no old model's: somebody put it there.
        model = any(name == "config.json" or WEIGHTS.match(name) for name in entries)
        old = [
            name
            for name in entries
            if name not in moves and (WEIGHTS.match(name) or (model and SIDE_FILES.match(name)))
        ]
        write_text(self._publish, json.dumps({"remove": old, "move": moves}))

    def publish(self) -> None:
        """Rename everything into place; may be repeated after a crash in the middle.

        Raises:
            FolderError: a file that should be renamed is gone.
        """
        steps = json.loads(self._publish.read_text(encoding="utf-8"))
        # An old model in the folder stops being one before the first new file comes.
        old = ["config.json"] if (self.path / steps["move"]["config.json"]).exists() else []
        for name in [*old, *steps["remove"]]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.out / name)
        for name, source in steps["move"].items():
            target = self.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (self.path / source).exists():
                os.replace(self.path / source, target)
            elif not target.exists():
                raise FolderError(
                    f"{target} is gone, and {self.path / source} too; start over with --force"
                )
        sync_folder(self.out)

    def remove(self) -> None:
        """Remove the work folder, after publishing.

        merge.json and publish.json go first, or a rest of the folder would look like work to do.
        """
        for path in (self._header, self._publish):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def check_free(out: str | Path, *, resume: bool, force: bool) -> None:
    """Check that a merge into ``out`` may begin, or go on; change nothing.

    Raises:
        FolderError: it would destroy a model, or an unfinished merge.
    """
    folder = WorkFolder(out)
    if folder.out.exists() and not folder.out.is_dir():
        raise FolderError(f"{out} is a file, not a folder")
    if resume and force:
        raise FolderError("--resume continues what is there and --force throws it away: choose one")
    if force or not folder.out.exists():
        return
    if folder.begun:
        if not resume:
            count = len(list(folder.done.glob("*.json")))
            raise FolderError(
                f"{out} holds an unfinished merge ({count} batches done): --resume continues it, "
                "--force starts over"
            )
        return
    model_files = sorted(
        name for name in os.listdir(folder.out) if name == "config.json" or WEIGHTS.match(name)
    )
    if "config.json" in model_files:
        raise FolderError(f"{out} holds a finished model; --force replaces it")
    if model_files:
        raise FolderError(
            f"{out} holds weights without a config.json ({model_files[0]}, …); --force replaces "
            "them"
        )


# -- of the workers --------------------------------------------------------------------------------


def attempt(folder: WorkFolder, batch: int) -> tuple[Path, str]:
    """Make a folder to write a batch to; return it and this worker, NODE@PID, which it names."""
    worker = f"{socket.gethostname()}@{os.getpid()}"
    path = folder.making / f"{batch:05d}@{worker}@{time.time():.0f}@{uuid.uuid4().hex[:8]}"
    path.mkdir()
    return path, worker


def attempts(folder: WorkFolder) -> Iterable[tuple[int, str, float]]:
    """Yield (batch, worker, time of start) of each batch at work, as far as the folder tells."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder.making):
            batch, node, pid, begun, _ = entry.name.split("@")
            yield int(batch), f"{node}@{pid}", float(begun)


def keep(folder: WorkFolder, record: Done, files: Sequence[Path]) -> None:
    """Move the files of a batch (as ``record.shards``) to `done`, and then its record.

    Both are on the disk by then.
    """
    for path, shard in zip(files, record.shards, strict=True):
        sync_file(path)
        os.replace(path, folder.done / shard.file)
    sync_folder(folder.done)
    write_text(folder.done / f"{record.batch:05d}.json", json.dumps(asdict(record)))


def read_done(path: Path) -> Done:
    """Return the record of a finished batch, from its file in `done`."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values["shards"] = [Shard(**shard) for shard in values["shards"]]
    return Done(**values)


# -- files -----------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write text as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it is on the disk afterwards."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Return when the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return when renames in a folder are on the disk.

    Some file systems know no such thing, and Windows opens no folders.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
