"""The output folder of a merge that is not finished, and how it becomes a model.

It is claimed by one driver, filled under names that no program takes for a model, and published by
renaming.

    OUT/.mergekit-monosoup/     all of an unfinished merge; one driver at a time holds `lock`
        merge.json              what is being merged (fingerprint) and how it was divided
        vocabulary.json         the order of the tokens, where the merge builds a tokenizer
        done/00012.json         record of a finished batch: its files with checksums, its tensors
        done/00012-1.safetensors
        making/00012@NODE@PID@… what a worker is writing; worthless once the worker is gone
        files/OUT/              config, index, tokenizer, model card, as mergekit writes them
        stages.json             of a merge of several stages: their names, and where they lie
        stages/NAME/            their models, each an output folder like OUT
        publish.json            written when all of it is there: which file goes where
    OUT/config.json             last of all

Every step can be cut off by kill -9: what counts is renamed into place when it is on the disk, and
publishing can be repeated.

Whoever resumes a merge reads a folder that somebody else may have written to: everything in it is
JSON of known types, or tensors that are never opened; nothing is unpickled, no name in it leads
out of OUT, and links are refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mergekit_monosoup import files
from mergekit_monosoup.distributed import publication as publications
from mergekit_monosoup.distributed.dependencies import (
    ABSENT,
    HASHED,
    READERS,
    THREADS,
    Dependencies,
    differences,
    sha256,
    states,
)
from mergekit_monosoup.distributed.publication import RECORD, WEIGHTS, FolderError
from mergekit_monosoup.distributed.records import Done, Header, StageList, read_done

LOG = logging.getLogger("mergekit_monosoup")

NAME = ".mergekit-monosoup"
FORMAT = 2  # of what lies in the folder; raised when an older version could not continue it


class WorkFolder:
    """The unfinished merge in an output folder, as the driver and the workers see it."""

    def __init__(self, out: str | Path):
        self.out = Path(out).absolute()
        self.path = self.out / NAME
        self.done = self.path / "done"
        self.making = self.path / "making"
        # mergekit's model card bears the name of the folder that it is written to.
        self.files = self.path / "files" / (self.out.name or "model")
        self.vocabulary = self.path / "vocabulary.json"
        self.token = self.path / "token"
        self._lock = self.path / "lock"
        self._header = self.path / "merge.json"
        self._publish = self.path / "publish.json"
        self._stage_list = self.path / "stages.json"
        self.own_stages = self.path / "stages"

    # -- of the driver -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self, *, resume: bool, force: bool) -> Iterator[WorkFolder]:
        """Hold the folder for one driver, and yield it.

        The lock goes with the process, however it ends. What is not worth resuming is removed at
        the end, before others may come.

        Raises:
            FolderError: another driver is at work, there is a finished model, or an unfinished
                merge that is neither to be resumed nor to be dropped.
        """
        check_free(self.out, resume=resume, force=force)
        made = files.missing(self.out)
        try:
            lock = self._claim()
        except BaseException:
            files.remove_empty([self.path, *made])
            raise
        try:
            check_free(self.out, resume=resume, force=force)  # nobody else can change it now
            if force or not self.resumable:
                self.clear()
            elif not self.begun:
                # A vocabulary that a killed driver left may be another merge's.
                self.clear(keep=(self._stage_list, self.own_stages))
            self._make_folders()
            yield self
        finally:
            try:
                if not self.resumable:  # leave no trace
                    self._erase()
            finally:
                if lock is not None:
                    os.close(lock)
            if sys.platform == "win32" and not self.resumable:  # no open file can be removed there
                self._erase()
            files.remove_empty(made)

    def _claim(self) -> int | None:
        """Make the folder and lock it; return the lock, None where there are none.

        Raises:
            FolderError: another driver has it, or links in it lead elsewhere.
        """
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._refuse_links()
                return files.lock(self._lock)
            except files.LockedError:
                raise FolderError(
                    f"{self.out}: another `mergekit-monosoup run` is merging into it right now"
                ) from None
            except FileNotFoundError:  # another driver has just removed the folder
                continue
            except NotImplementedError:
                LOG.warning(
                    "%s: the file system has no locks; take care that only one driver merges into "
                    "it",
                    self.out,
                )
                return None

    def _refuse_links(self) -> None:
        """Raise FolderError if anything at the top of the folder is a symbolic link.

        What is written or removed through it would be somebody else's.
        """
        links = [path for path in (self.path, *self.path.iterdir()) if path.is_symlink()]
        for path in links:
            raise FolderError(
                f"{path} is a symbolic link, which no merge makes: it leads to files that a merge "
                "must not touch. Remove it and merge again"
            )

    def _make_folders(self) -> None:
        if not self.publishing:
            for leftover in (self.making, self.files.parent):
                shutil.rmtree(leftover, ignore_errors=True)
        for folder in (self.done, self.making, self.files):
            folder.mkdir(parents=True, exist_ok=True)
        self._drop_strays()
        # Workers compare it: one that sees another folder, or was left over by a killed driver,
        # stops.
        files.write_text(self.token, f"{uuid.uuid4().hex} of {socket.gethostname()}")

    def _drop_strays(self) -> None:
        """Remove shards that a full disk or a kill left without the record of their batch."""
        if not self.publishing:
            for path in self.done.iterdir():
                batch = re.split("[-.]", path.name)[0]
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif not (self.done / f"{batch}.json").exists():
                    path.unlink()

    def clear(self, keep: Sequence[Path] = ()) -> None:
        """Remove what an earlier merge left unfinished; the lock and ``keep`` stay."""
        # First, and in this order: without the header the rest means nothing, and what is being
        # published must not outlive the word of which merge it is.
        for path in (self._publish, self._header):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        for entry in self.path.iterdir():
            if entry in keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != self._lock:
                entry.unlink()

    def _erase(self) -> None:
        """Remove the folder, the lock last: until then no other driver can begin in it."""
        try:
            self.clear()
            self._lock.unlink(missing_ok=True)
            self.path.rmdir()
        except OSError as error:
            if sys.platform != "win32" and self.path.exists():
                LOG.warning("%s is left over and may be removed (%s)", self.path, error)

    def division(self, needs: Dependencies, limit: int) -> int:
        """Return the bytes per batch of the merge that is resumed.

        A new merge gets ``limit``, which is recorded with its dependencies.

        Raises:
            FolderError: the unfinished merge depends on something else than ``needs``.
        """
        if not self.begun:
            self.record(needs, limit)
            return limit
        return self.check_same(needs).batch_bytes

    def record(self, needs: Dependencies, batch_bytes: int = 0) -> None:
        """Write down what is merged."""
        header = Header(FORMAT, needs, batch_bytes)
        files.write_text(self._header, json.dumps(asdict(header), indent=1))

    def check_same(self, needs: Dependencies) -> Header:
        """Return merge.json, if it agrees in the sections of ``needs``.

        Raises:
            FolderError: it does not; the message says where.
        """
        header = self._read_header()
        self._compare(header, needs)
        return header

    def _compare(self, header: Header, needs: Dependencies) -> None:
        needs = json.loads(json.dumps(needs))  # tuples become lists, as in the file
        before = {section: header.fingerprint.get(section, {}) for section in needs}
        if changes := differences(before, needs):
            raise FolderError(
                f"{self.out}: cannot resume, for the result would be half of one merge and half of "
                "another:\n  "
                + "\n  ".join(changes)
                + "\nUndo the change, or start over with --force (without --resume)."
            )

    def check_complete(self, needs: Dependencies) -> None:
        """Check that the model that only has to be put into place is the one that is asked for.

        Inputs may be gone by now, but not have changed: the same command would merge others.

        Raises:
            FolderError: it is another one; the message says where.
        """
        self._compare_complete(self._read_header(), needs)

    def _compare_complete(self, header: Header, needs: Dependencies) -> None:
        inputs = header.fingerprint.get("inputs", {})
        now = _states_as(inputs)
        there = {file: now[file] for file in inputs if now[file] != ABSENT}
        gone = {file: state for file, state in inputs.items() if file not in there}
        self._compare(header, {**needs, "inputs": {**there, **gone}})

    def _read_header(self, path: Path | None = None) -> Header:
        """Return merge.json, or what ``path`` holds of the same form.

        Raises:
            FolderError: it is missing, damaged, or of another version.
        """
        path = path or self._header
        try:
            header = TypeAdapter(Header).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise FolderError(
                f"{self.out}: nothing says what the unfinished merge in it is of ({path} "
                "is missing), so it cannot be resumed; --force starts over"
            ) from None
        except (OSError, ValidationError):
            raise FolderError(f"{path}: damaged; --force starts over") from None
        if header.format != FORMAT:
            raise FolderError(
                f"{self.out}: the unfinished merge was begun by another version of "
                "mergekit-monosoup; --force starts over"
            )
        return header

    def finished(self) -> Iterator[Done | str]:
        """Yield the records of finished batches in order, or a line about damaged files of one.

        The record of a batch with damaged files is removed: it is merged again.
        """
        paths = sorted(self.done.glob("*.json"))
        with ThreadPoolExecutor(READERS) as pool:
            for path, found in zip(paths, pool.map(self._checked, paths), strict=True):
                if isinstance(found, str):
                    os.remove(path)
                yield found

    def records(self) -> list[Done]:
        """Return the records of finished batches, without a look at their files."""
        return [done for path in sorted(self.done.glob("*.json")) if (done := _readable(path))]

    def _checked(self, path: Path) -> Done | str:
        """Return the record of a batch, or what is wrong with it or its files."""
        try:
            record = read_done(path)
        except ValueError:
            return f"{path} is not what was written; merged again"
        for shard in record.shards:
            file = self.done / shard.file
            if not file.exists():
                return f"{file} is gone; merged again"
            if file.is_symlink() or not file.is_file():
                return f"{file} is no file of weights; merged again"
            if file.stat().st_size != shard.bytes or sha256(file) != shard.sha256:
                return f"{file} is not what was written; merged again"
        return record

    # -- several stages ----------------------------------------------------------------------------

    @property
    def resumable(self) -> bool:
        """Whether this merge or one of its stages has something to go on with."""
        return self.begun or any(stage.begun or stage.holds_model for stage in self.stages())

    @property
    def holds_model(self) -> bool:
        """Whether a whole model is in its place, and nothing has begun that would replace it."""
        return (self.out / "config.json").exists() and not self.begun

    def stages(self) -> list[WorkFolder]:
        """Return the output folders of the earlier stages of a merge that is not finished."""
        try:
            listed = TypeAdapter(StageList).validate_json(self._stage_list.read_bytes())
        except (OSError, ValidationError):
            return []
        return [WorkFolder(Path(listed.folder, name)) for name in listed.names]

    @property
    def finished_stages(self) -> int:
        """How many of the stages are merged."""
        return sum(stage.holds_model for stage in self.stages())

    @property
    def finished_batches(self) -> int:
        """How many batches are done, of this merge and of stages that are not."""
        return sum(len(list(work.done.glob("*.json"))) for work in (self, *self.stages()))

    def threads(self) -> int | None:
        """Return how many threads each worker of the unfinished merge had; None if there is none.

        Of several stages that of the one that is at work.
        """
        for work in (self, *self.stages()):
            if work.begun:
                with contextlib.suppress(FolderError):
                    threads = work._read_header().fingerprint.get("options", {}).get(THREADS)
                    return threads if isinstance(threads, int) else None
        return None

    def list_stages(self, folder: Path, names: Sequence[str]) -> None:
        """Write down which stages this merge has, before the first of them.

        Raises:
            FolderError: the unfinished merge in the folder has others.
        """
        before, now = self.stages(), [WorkFolder(folder / name) for name in names]
        if self.begun or any(stage.begun or stage.holds_model for stage in before):
            self.check_stages(now)
        for stage in now if folder == self.own_stages else ():
            for path in (folder, stage.out):
                if path.is_symlink():
                    raise FolderError(f"{path} is a symbolic link, which no merge makes: remove it")
        text = json.dumps(asdict(StageList(str(folder.absolute()), list(names))))
        files.write_text(self._stage_list, text)

    def check_stages(self, stages: Sequence[WorkFolder]) -> None:
        """Check that a merge that is resumed has these stages before its last.

        Raises:
            FolderError: it has others.
        """
        before, now = ({stage.out for stage in these} for these in (self.stages(), stages))
        if before != now and (before or not self.publishing):
            names = [", ".join(sorted(path.name for path in these)) for these in (before, now)]
            raise FolderError(
                f"{self.out}: cannot resume, for the unfinished merge in it has other stages: "
                f"{names[0] or 'none'}, not {names[1] or 'none'} (or in another folder). Undo the "
                "change, or start over with --force (without --resume)."
            )

    def keep_record(self, shards: dict[str, str], *, hashed: bool) -> None:
        """Leave a record beside the model of a stage of what it is made from, for --resume.

        ``shards``: see :meth:`prepare`, before which it is called.
        """
        weights = {name: str(self.done / file) for name, file in shards.items()}
        weights |= {p.name: str(p) for p in self.files.iterdir() if WEIGHTS.match(p.name)}
        found = states(weights.values(), hashed=hashed)
        outputs = {name: found[file] for name, file in weights.items()}
        header = replace(self._read_header(), outputs=outputs)
        files.write_text(self.files / RECORD, json.dumps(asdict(header), indent=1))

    def check_finished(self, needs: Dependencies) -> None:
        """Check that the model in its place is the stage that is asked for.

        With how many threads it was merged is no matter: it is whole.

        Raises:
            FolderError: it is another one, was changed, or nothing says what it is.
        """
        record = self.out / RECORD
        if not record.exists():
            raise FolderError(
                f"{self.out} holds a model of which nothing says what it is made from ({RECORD} is "
                "missing), so it is not taken for this stage; --force replaces it, or name another "
                "folder"
            )
        header = self._read_header(record)
        threads = header.fingerprint.get("options", {}).get(THREADS)
        options = {**needs["options"], THREADS: threads}
        self._compare_complete(header, {**needs, "options": options})
        outputs = {str(self.out / name): state for name, state in header.outputs.items()}
        if changes := differences({"weights": outputs}, {"weights": _states_as(outputs)}):
            raise FolderError(
                f"{self.out}: the model of this stage was changed after it was merged:\n  "
                + "\n  ".join(changes)
                + "\n--force (without --resume) merges all stages again."
            )

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
            path.relative_to(self.files).as_posix()
            for path in self.files.rglob("*")
            if path.is_file()
        )
        publication = publications.compose(
            self.out,
            {name: f"done/{file}" for name, file in shards.items()},
            {name: f"files/{self.files.name}/{name}" for name in others},
        )
        publications.check(publication, self.out, self.path)
        files.write_text(self._publish, json.dumps(asdict(publication)))

    def publish(self) -> None:
        """Rename everything into place; may be repeated after a crash in the middle.

        Raises:
            FolderError: a file that should be renamed is gone, or is none of this merge.
        """
        publications.execute(publications.read(self._publish), self.out, self.path)

    def remove(self) -> None:
        """Let the folder be removed when it is released, after publishing.

        The records of batches and the stages go first, and then publish.json: in another order,
        what a kill leaves would look like work to do.
        """
        shutil.rmtree(self.done, ignore_errors=True)
        shutil.rmtree(self.own_stages, ignore_errors=True)
        for path in (self._stage_list, self._publish, self._header):
            path.unlink(missing_ok=True)


def _states_as(known: Mapping[str, str]) -> dict[str, str]:
    """Return the states of files now, told in the way of the states that are given."""
    return states(known, hashed=any(HASHED in str(state) for state in known.values()))


def _readable(path: Path) -> Done | None:
    with contextlib.suppress(ValueError):
        return read_done(path)
    return None


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
    if folder.resumable:
        if not resume:
            stages = f"{folder.finished_stages} stages, " if folder.finished_stages else ""
            raise FolderError(
                f"{out} holds an unfinished merge ({stages}{folder.finished_batches} batches "
                "done): --resume continues it, --force starts over"
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
