"""Writes the records of a merge to its report, and warns once when rounding eats the edit."""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from mergekit_monosoup.report import output
from mergekit_monosoup.report.record import REALISED_WARNING, Record
from mergekit_monosoup.report.tally import Tally
from mergekit_monosoup.terminal import plain

LOG = logging.getLogger("mergekit_monosoup")

# Set while somebody plans a merge that will not be run, as `check` does: planning begins no report.
PLANNING_ONLY: ContextVar[bool] = ContextVar("planning_only", default=False)

# (path, method, record) of what would have been written.
Entry = tuple[str | None, str, Record]


@dataclass
class _Merge:
    """What the journal knows of the merge that writes to one report, or to none."""

    names: set[str] = field(default_factory=set)
    started: bool = False
    warned: bool = False
    tally: Tally = field(default_factory=Tally)


class Journal:
    """Writes records as they come and warns once per merge.

    mergekit tells a method neither when a merge starts nor when it ends. It does ask methods about
    whole slices while it plans (:meth:`begin`), and elsewhere a tensor seen for the second time
    can only belong to a new merge. Who knows of the end asks for what was done (:meth:`end`).
    Thread-safe: mergekit's multi-GPU executor calls methods from
    several threads.
    """

    def __init__(self, *, warns: bool = True) -> None:
        """Begin a journal; ``warns``: of edits that rounding eats, where that is the last word."""
        self._lock, self._warns = threading.Lock(), warns
        self._merges: dict[str | None, _Merge] = defaultdict(_Merge)
        self._diverted = threading.local()  # its `entries`, in a thread that is diverted

    @contextmanager
    def diverted(self) -> Iterator[list[Entry]]:
        """Collect entries in the list that it yields: nothing is written, nothing warned.

        For the workers of a distributed merge: each would take its first tensor for the start of a
        merge, and put the report of the others away as an old one. Holds for this thread.
        """
        entries: list[Entry] = []
        self._diverted.entries = entries
        try:
            yield entries
        finally:
            del self._diverted.entries

    def begin(self) -> None:
        """Note that a merge is being planned: what comes next belongs to it."""
        if PLANNING_ONLY.get():
            return
        with self._lock:
            for merge in self._merges.values():
                merge.started = False
            output.release()  # the earlier merges of this process have ended

    def add(
        self, records: Sequence[Record], path: str | None = None, method: str = "monosoup"
    ) -> None:
        """Append the records of one tensor to ``path``; the first of a merge starts the file anew.

        A report of an earlier merge is kept once, see :func:`output.replace`.

        Raises:
            ValueError: the report cannot be written there, see :func:`output.check_path`.
        """
        if (entries := getattr(self._diverted, "entries", None)) is not None:
            entries += [(path, method, record) for record in records]
            return
        key = _key(path)
        with self._lock:
            merge = self._merges[key]
            # Unnamed tensors (merge_tensors without a name) cannot be told apart, so they never
            # start a new one.
            anew = not merge.started or any(r.name and r.name in merge.names for r in records)
            if anew:
                merge = self._merges[key] = _Merge(started=True)
            merge.names.update(record.name for record in records)
            merge.tally.add(records, path, method)
            if key:
                _write(key, records, anew=anew)
            if self._warns and not merge.warned:
                merge.warned = _warn(records, method)

    def end(self, paths: Iterable[str | None]) -> Tally:
        """Return what a merge has done whose records went to these reports (None: to no report).

        What comes after that belongs to another merge.
        """
        tally = Tally()
        with self._lock:
            for key in dict.fromkeys(map(_key, paths)):
                merge = self._merges.pop(key, None)
                if merge is not None and merge.started:
                    tally.join(merge.tally)
        return tally


def _key(path: str | None) -> str | None:
    return os.path.abspath(os.path.expanduser(path)) if path else None


def _write(path: str, records: Sequence[Record], *, anew: bool) -> None:
    lines = "".join(record.to_json() + "\n" for record in records)
    try:
        (output.replace if anew else output.append)(path, lines)
    except (OSError, ValueError) as error:
        raise ValueError(f"the report cannot be written: {error}") from error


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
                plain(record.name) or "a tensor",
                record.dtype,
            )
            return True
    return False
