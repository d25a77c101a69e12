"""The output folder of a merge: claimed, filled under names that no program takes for a model, published by renaming.

    OUT/.mergekit-monosoup/     all of an unfinished merge; one driver at a time holds `lock`
        merge.json              what is being merged (fingerprint) and how it was divided
        done/00012.json         the record of a finished batch: its files with checksums, its tensors
        done/00012-1.safetensors
        making/00012@NODE@PID@… what a worker is writing; worthless once the worker is gone
        files/OUT/              config, index, tokenizer, model card, as mergekit writes them
        publish.json            written when all of it is there: which file goes where
    OUT/config.json             last of all

Every step can be cut off by kill -9: what counts is renamed into place when it is on the disk, and publishing can be repeated.
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

from mergekit_monosoup.distributed.fingerprint import Fingerprint, differences

LOG = logging.getLogger("mergekit_monosoup")

NAME = ".mergekit-monosoup"
FORMAT = 1  # of what lies in the folder; raised when an older version could not continue it
# As mergekit and transformers name them; model-1.safetensors is what mergekit-yaml leaves when it is interrupted.
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?$")
# What else belongs to a model: left beside another one, it would be loaded with that.
BESIDE = re.compile(
    r"(tokenizer(_config)?|special_tokens_map|added_tokens|vocab|generation_config|(pre)?processor_config|chat_template)\.json$"
    r"|mergekit_config\.yml$|(merges|vocab)\.txt$|(tokenizer|spiece|sentencepiece.*)\.model$|chat_template\.jinja$"
)
CHUNK = 2**22  # bytes read at a time for a checksum
READERS = 8  # files checked at a time


class FolderError(ValueError):
    """The output folder cannot be used for this merge; the message says why and what to do."""


@dataclass(frozen=True)
class Shard:
    """A finished file. ``tensors``: names in it."""

    file: str
    bytes: int
    sha256: str
    tensors: list[str]


@dataclass(frozen=True)
class Done:
    """Record of a finished batch.

    Attributes:
        batch: its number.
        tensors: how many were asked for; optional ones may be in no shard.
        bytes: of the tensors, without headers of files.
        worker: who did it, NODE@PID.
        seconds, peak: wall time, and peak memory of the process so far (bytes).
        reports: [path, method, record as JSON text] for each line of a report.
        logs: [logger, level, message] of what the worker had to say.
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

    # -- of the driver ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self, *, resume: bool, force: bool) -> Iterator[None]:
        """Holds the folder for one driver. The lock goes with the process, however it ends.

        Raises:
            FolderError: another driver is at work, there is a finished model, or an unfinished merge nobody asked to resume.
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
            if (
                force or not self.begun
            ):  # a tokenizer that a killed driver left may be another merge's
                self.clear()
            if not self.publishing:
                for leftover in (self.making, self.files):
                    shutil.rmtree(leftover, ignore_errors=True)
            for folder in (self.done, self.making, self.files):
                folder.mkdir(parents=True, exist_ok=True)
            # Workers compare it: one that sees another folder, or was left over by a killed driver, stops.
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
        """Throws away what an earlier merge left unfinished; the lock stays."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._header)  # first: the rest means nothing without it
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def division(self, wanted: Fingerprint, limit: int) -> int:
        """The bytes per batch of the merge that is resumed, or ``limit`` for a new one, which is recorded.

        Raises:
            FolderError: what is there was merged from something else.
        """
        if not self.begun:
            header = {"format": FORMAT, "batch_bytes": limit, "fingerprint": wanted}
            write_text(self._header, json.dumps(header, indent=1))
            return limit
        return self.check_same(wanted)["batch_bytes"]

    def check_same(self, wanted: Fingerprint) -> dict[str, Any]:
        """merge.json, if it agrees in the sections of ``wanted``.

        Raises:
            FolderError: it does not; the message says in what.
        """
        if not self._header.exists():  # one process with --force has none: its model is complete
            return {}
        wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
        header: dict[str, Any] = json.loads(self._header.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise FolderError(
                f"{self.out}: the unfinished merge was begun by another version of mergekit-monosoup; --force starts over"
            )
        if changed := differences(
            {section: header["fingerprint"][section] for section in wanted}, wanted
        ):
            raise FolderError(
                f"{self.out}: cannot resume, for the result would be half of one merge and half of another:\n  "
                + "\n  ".join(changed)
                + "\nUndo the change, or start over with --force (without --resume)."
            )
        return header

    def finished(self) -> Iterator[Done | str]:
        """Records of the finished batches whose files are whole, in order; a line about each that is not."""
        records = [read_done(path) for path in sorted(self.done.glob("*.json"))]
        with ThreadPoolExecutor(READERS) as pool:
            for record, fault in zip(records, pool.map(self._fault, records), strict=True):
                if fault:
                    os.remove(self.done / f"{record.batch:05d}.json")
                    yield fault
                else:
                    yield record

    def _fault(self, record: Done) -> str:
        for shard in record.shards:
            path = self.done / shard.file
            if not path.exists():
                return f"{path} is gone; merged again"
            if path.stat().st_size != shard.bytes or sha256(path) != shard.sha256:
                return f"{path} is not what was written; merged again"
        return ""

    # -- publishing -----------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether there is something to resume: at least one finished batch, or a model on its way into place."""
        return self.publishing or (self._header.exists() and any(self.done.glob("*.json")))

    @property
    def publishing(self) -> bool:
        """Whether everything is merged and written, and only renaming was cut off."""
        return self._publish.exists()

    def prepare(self, shards: dict[str, str]) -> None:
        """Decides which file goes where. ``shards``: final name → file in `done`; the rest is what lies in `files`."""
        others = sorted(
            str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()
        )
        moves = {name: f"done/{file}" for name, file in shards.items()}
        moves |= {name: f"files/{self.files.name}/{name}" for name in others}
        moves["config.json"] = moves.pop("config.json")  # last: without it no program sees a model
        there = os.listdir(self.out)
        # A tokenizer without a model is no old model's: somebody put it there.
        model = any(name == "config.json" or WEIGHTS.match(name) for name in there)
        old = [
            name
            for name in there
            if name not in moves and (WEIGHTS.match(name) or (model and BESIDE.match(name)))
        ]
        write_text(self._publish, json.dumps({"remove": old, "move": moves}))

    def publish(self) -> None:
        """Renames everything into place and removes the folder; may be repeated after a crash in the middle.

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
        """After publishing. publish.json goes first, or a rest of the folder would look like work to do."""
        for path in (self._header, self._publish):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def check_free(out: str | Path, *, resume: bool, force: bool) -> None:
    """Whether a merge into ``out`` may begin, or go on; changes nothing.

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
                f"{out} holds an unfinished merge ({count} batches done): --resume continues it, --force starts over"
            )
        return
    there = sorted(
        name for name in os.listdir(folder.out) if name == "config.json" or WEIGHTS.match(name)
    )
    if "config.json" in there:
        raise FolderError(f"{out} holds a finished model; --force replaces it")
    if there:
        raise FolderError(
            f"{out} holds weights without a config.json ({there[0]}, …); --force replaces them"
        )


# -- of the workers ------------------------------------------------------------------------------------------------------


def attempt(folder: WorkFolder, batch: int) -> tuple[Path, str]:
    """A new folder to write a batch to, whose name tells who does, and that name's NODE@PID."""
    worker = f"{socket.gethostname()}@{os.getpid()}"
    path = folder.making / f"{batch:05d}@{worker}@{time.time():.0f}@{uuid.uuid4().hex[:8]}"
    path.mkdir()
    return path, worker


def attempts(folder: WorkFolder) -> Iterable[tuple[int, str, float]]:
    """(batch, worker, time of start) of what is being made, as far as the folder tells."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder.making):
            batch, node, pid, begun, _ = entry.name.split("@")
            yield int(batch), f"{node}@{pid}", float(begun)


def keep(folder: WorkFolder, record: Done, files: Sequence[Path]) -> None:
    """Moves the files of a batch (as ``record.shards``) to `done`, and then its record; both are on the disk by then."""
    for path, shard in zip(files, record.shards, strict=True):
        sync_file(path)
        os.replace(path, folder.done / shard.file)
    sync_folder(folder.done)
    write_text(folder.done / f"{record.batch:05d}.json", json.dumps(asdict(record)))


def read_done(path: Path) -> Done:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values["shards"] = [Shard(**shard) for shard in values["shards"]]
    return Done(**values)


# -- files ---------------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all, and on the disk afterwards."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Makes renames in it last; some file systems know no such thing, and Windows opens no folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
