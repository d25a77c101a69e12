"""Writes the records of a merge to its report, and warns once when rounding eats the edit."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from mergekit_monosoup.report.record import REALISED_WARNING, Record

LOG = logging.getLogger("mergekit_monosoup")

# Set while somebody plans a merge that will not be run, as `check` does: planning begins no report.
PLANNING_ONLY: ContextVar[bool] = ContextVar("planning_only", default=False)

OLD = ".old"  # what is appended to the name of the report of an earlier merge

# Characters of a record: the cosines of dozens of models with long names take 70 thousand. A file
# whose first line is longer is none of ours, and might not fit into memory.
LONGEST_LINE = 2**24


# -- the file --------------------------------------------------------------------------------------


def check_path(path: str) -> str:
    """Return the absolute path of a report that may be written.

    That is a new file, or one that holds a report already.

    Raises:
        ValueError: it is anything else, which replacing would lose; the message says what and what
            to do.
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
            raise ValueError(
                f"{path}{suffix} exists and is not a report; it would be replaced: name another "
                "file, or move that one"
            )
    return place


def _replaceable(place: str) -> bool:
    """Whether nothing is there, or a report (an empty one has no lines)."""
    if not os.path.exists(place):
        return True
    # A pipe or a device: opening it may wait for ever, and renaming it would be worse.
    if not os.path.isfile(place):
        return False
    if not os.path.getsize(place):
        return True
    try:
        with open(place, encoding="utf-8") as file:
            return {"name", "action", "shape"} <= set(json.loads(file.readline(LONGEST_LINE)))
    except (OSError, ValueError, TypeError):
        return False


def start(path: str) -> str:
    """Clear the way for a new report and return its absolute path.

    That of an earlier merge is kept once, under its name with :data:`OLD`.

    Raises:
        ValueError: the report cannot be written there, see :func:`check_path`.
        OSError: likewise, says the file system.
    """
    place = check_path(path)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.exists(place):
        os.replace(place, place + OLD)
    return place


def _append(path: str, records: Sequence[Record], *, anew: bool) -> None:
    try:
        if anew:
            start(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(record.to_json() + "\n" for record in records))
    except (OSError, ValueError) as error:
        raise ValueError(f"the report cannot be written: {error}") from error


# -- the journal -----------------------------------------------------------------------------------

# (path, method, record) of what would have been written.
Entry = tuple[str | None, str, Record]


@dataclass
class _Merge:
    """What the journal knows of the merge that writes to one report, or to none."""

    names: set[str] = field(default_factory=set)
    started: bool = False
    warned: bool = False


class Journal:
    """Writes records as they come and warns once per merge.

    mergekit tells a method neither when a merge starts nor when it ends. It does ask methods about
    whole slices while it plans (:meth:`begin`), and elsewhere a tensor seen for the second time
    can only belong to a new merge. Thread-safe: mergekit's multi-GPU executor calls methods from
    several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._merges: dict[str | None, _Merge] = defaultdict(_Merge)
        self._diverted: list[Entry] | None = None

    @contextmanager
    def diverted(self) -> Iterator[list[Entry]]:
        """Collect entries in the list that it yields: nothing is written, nothing warned.

        For the workers of a distributed merge: each would take its first tensor for the start of a
        merge, and put the report of the others away as an old one. Holds for all threads of the
        process.
        """
        entries: list[Entry] = []
        with self._lock:
            self._diverted = entries
        try:
            yield entries
        finally:
            with self._lock:
                self._diverted = None

    def begin(self) -> None:
        """Note that a merge is being planned: what comes next belongs to it."""
        if PLANNING_ONLY.get():
            return
        with self._lock:
            for merge in self._merges.values():
                merge.started = False

    def add(
        self, records: Sequence[Record], path: str | None = None, method: str = "monosoup"
    ) -> None:
        """Append the records of one tensor to ``path``; the first of a merge starts the file anew.

        A report of an earlier merge is kept once, under its name with :data:`OLD`.

        Raises:
            ValueError: the report cannot be written there, see :func:`check_path`.
        """
        key = os.path.abspath(os.path.expanduser(path)) if path else None
        with self._lock:
            if self._diverted is not None:
                self._diverted += [(path, method, record) for record in records]
                return
            merge = self._merges[key]
            # Unnamed tensors (merge_tensors without a name) cannot be told apart, so they never
            # start a new one.
            anew = not merge.started or any(r.name and r.name in merge.names for r in records)
            if anew:
                merge = self._merges[key] = _Merge(started=True)
            merge.names.update(record.name for record in records)
            if key:
                _append(key, records, anew=anew)
            if not merge.warned:
                merge.warned = _warn(records, method)


def _warn(records: Sequence[Record], method: str) -> bool:
    """Warn if rounding eats the edit of one of the matrices, and return whether it does."""
    for record in records:
        if (
            record.action == "edited"
            and record.realised is not None
            and record.realised < REALISED_WARNING
        ):
            LOG.warning(
                "%s: rounding to %s keeps only %.0f %% of the intended edit of %s, and may of other"
                " tensors (said once per merge; a `report` lists `realised` for all). The update "
                "is small against the spacing of %s numbers: set `dtype: float32` and `out_dtype: "
                "float32` to keep the edit.",
                method,
                record.dtype,
                100 * max(record.realised, 0.0),
                record.name or "a tensor",
                record.dtype,
            )
            return True
    return False
