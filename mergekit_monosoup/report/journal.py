"""Writes the records of a merge to its report, and warns once per merge when rounding eats the edit."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from mergekit_monosoup.report.record import REALISED_WARNING, Record

LOG = logging.getLogger("mergekit_monosoup")

# Set while somebody plans a merge that will not be run.
REHEARSAL: ContextVar[bool] = ContextVar("rehearsal", default=False)

OLD = ".old"  # what the report of an earlier merge is called


def check_path(path: str) -> str:
    """The absolute path of a report that may be written: a new file, or one that holds a report already.

    Raises:
        ValueError: it is anything else, which replacing would lose; the message says what and what to do.
    """
    place = os.path.abspath(os.path.expanduser(path))
    if not path.strip():
        raise ValueError("is empty; leave the line out for no report")
    if "\0" in path:
        raise ValueError(f"{path!r} is no file name: it holds a null byte")
    if os.path.isdir(place):
        raise ValueError(
            f"{path} is a folder; name a file in it, {os.path.join(path, 'report.jsonl')}"
        )
    above = os.path.dirname(place)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise ValueError(f"{path} cannot be written: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission to write in {above}")
    for suffix in ("", OLD) if os.path.exists(place) else ("",):
        if not _replaceable(place + suffix):
            spelled = path + suffix
            raise ValueError(
                f"{spelled} exists and is not a report; it would be replaced: name another file, or move that one"
            )
    return place


def _replaceable(place: str) -> bool:
    """Nothing is there, or a report (an empty one has no lines)."""
    if not os.path.exists(place):
        return True
    if not os.path.isfile(place):
        return False  # a pipe or a device: opening it may wait for ever, and renaming it would be worse
    if not os.path.getsize(place):
        return True
    try:
        with open(place, encoding="utf-8") as file:
            return {"name", "action", "shape"} <= set(json.loads(file.readline(2**16)))
    except (OSError, ValueError, TypeError):
        return False


def start(path: str) -> str:
    """Clears the way for a new report and returns its absolute path. That of an earlier merge is kept once, as ``….old``.

    Raises:
        ValueError: the report cannot be written there, see :func:`check_path`.
        OSError: likewise, says the file system.
    """
    place = check_path(path)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.exists(place):
        os.replace(place, place + OLD)
    return place


class Journal:
    """Writes records as they come and warns once per merge.

    mergekit tells a method neither when a merge starts nor when it ends. It does ask methods about whole slices while it
    plans (:meth:`begin`), and elsewhere a tensor seen for the second time can only belong to a new merge.
    Thread-safe: mergekit's multi-GPU executor calls methods from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str | None, set[str]] = defaultdict(set)
        self._started: set[str | None] = set()
        self._warned: set[str | None] = set()
        self._diversion: list[tuple[str | None, str, Record]] | None = None

    @contextmanager
    def diverted(self) -> Iterator[list[tuple[str | None, str, Record]]]:
        """Collects (path, method, record) in the list that it yields: nothing is written, nothing warned.

        For the workers of a distributed merge: each would take its first tensor for the start of a merge, and put the
        report of the others away as an old one. Holds for all threads of the process.
        """
        collected: list[tuple[str | None, str, Record]] = []
        with self._lock:
            self._diversion = collected
        try:
            yield collected
        finally:
            with self._lock:
                self._diversion = None

    def begin(self) -> None:
        """A merge is being planned: what comes next belongs to it, whatever its tensors are called."""
        if REHEARSAL.get():
            return
        with self._lock:
            self._started.clear()

    def add(
        self, records: Sequence[Record], path: str | None = None, method: str = "monosoup"
    ) -> None:
        """Append ``records`` (all of one tensor) to ``path``; the first of a merge starts the file anew.

        A report of an earlier merge is kept once, as ``path + ".old"``.

        Raises:
            ValueError: the report cannot be written there, see :func:`check_path`.
        """
        key = os.path.abspath(os.path.expanduser(path)) if path else None
        with self._lock:
            if self._diversion is not None:
                self._diversion += [(path, method, record) for record in records]
                return
            seen = self._seen[key]
            # Unnamed tensors (merge_tensors without a name) cannot be told apart, so they never start a new one.
            starts = key not in self._started or any(
                record.name and record.name in seen for record in records
            )
            if starts:
                self._started.add(key)
                seen.clear()
                self._warned.discard(key)
            seen.update(record.name for record in records)
            if key:
                self._write(key, records, starts)
            self._warn(key, records, method)

    @staticmethod
    def _write(path: str, records: Sequence[Record], starts: bool) -> None:
        try:
            if starts:
                start(path)
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(record.to_json() + "\n" for record in records))
        except (OSError, ValueError) as error:
            raise ValueError(f"the report cannot be written: {error}") from error

    def _warn(self, key: str | None, records: Sequence[Record], method: str) -> None:
        lost = [
            r
            for r in records
            if r.action == "edited" and r.realised is not None and r.realised < REALISED_WARNING
        ]
        if lost and key not in self._warned:
            self._warned.add(key)
            LOG.warning(
                "%s: rounding to %s keeps only %.0f %% of the intended edit of %s, and may of other tensors (said once "
                "per merge; a `report` lists `realised` for all). The update is small against the spacing of %s numbers: "
                "set `dtype: float32` and `out_dtype: float32` to keep the edit.",
                method,
                lost[0].dtype,
                100 * max(lost[0].realised or 0.0, 0.0),
                lost[0].name or "a tensor",
                lost[0].dtype,
            )
