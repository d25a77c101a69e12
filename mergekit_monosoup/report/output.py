"""The file of a report: where it may lie, which process writes it, and what is kept of the last.

A merge that has begun its report holds a lock on the file: a second one with the same path would
mix its lines with those of the first. The lock ends with the process, however that ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mergekit_monosoup import files
from mergekit_monosoup.report.record import LONGEST_LINE, Record

OLD = ".old"  # what is appended to the name of the report of an earlier merge

BUSY = (
    "{} is being written by another merge (or by a process that has merged and still runs): give "
    "each merge a report of its own"
)

# Descriptors of the reports that this process is writing, locked, by their real path.
_held: dict[str, int] = {}
_put_away: set[str] = set()  # those of them that the last report made way for


# -- where it may lie ------------------------------------------------------------------------------


def check_path(path: str) -> str:
    """Return the absolute path of a report that may be written.

    That is a new file, or one that holds a report already.

    Raises:
        ValueError: it is anything else, which replacing would lose; the message says what and what
            to do.
    """
    if not path.strip():
        raise ValueError("is empty; leave the line out for no report")
    if "\0" in path:
        raise ValueError(f"{path!r} is no file name: it holds a null byte")
    place = _place(path)
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
    if place not in _held and files.is_locked(place):
        raise ValueError(BUSY.format(path))
    return os.path.abspath(os.path.expanduser(path))


def _place(path: str) -> str:
    """Return where the file really lies: what a link leads to is the report, not the link."""
    return os.path.realpath(os.path.expanduser(path))


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


# -- writing ---------------------------------------------------------------------------------------


def replace(path: str, lines: str) -> None:
    """Begin a new report with some lines, or all; this process holds its lock from here on.

    The report of an earlier merge is kept once, under its name with :data:`OLD`; but one that was
    cut off does not drive out the whole one that is kept there.

    Raises:
        ValueError: the report cannot be written there, see :func:`check_path`.
        OSError: likewise, says the file system; everything is as it was then.
    """
    check_path(path)
    place = _place(path)
    release(place)
    made = [Path(place), *files.missing(Path(place).parent)] if not os.path.exists(place) else []
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        last = _lock(place, path)
        try:
            _held[place] = _put(place, path, lines)
        finally:
            os.close(last)
    except BaseException:
        for path_made in made[:1]:
            path_made.unlink(missing_ok=True)
        files.remove_empty(made[1:])
        raise
    if sys.platform == "win32":  # where nobody could replace or move a file that is open
        release(place)


def _put(place: str, path: str, lines: str) -> int:
    """Write lines to a new file and give it the name; return its descriptor, locked."""
    with files.replacing(Path(place)) as new:
        descriptor = _lock(str(new), path)
        try:
            _write(descriptor, lines)
            os.fsync(descriptor)
            _keep_old(place)
            os.replace(new, place)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def append(path: str, lines: str) -> None:
    """Add lines to the report that :func:`replace` has begun, all of them or none.

    Raises:
        ValueError: another file has taken its place.
        OSError: they cannot be written; the report of the last merge is back in its place then.
    """
    place = _place(path)
    if place not in _held or not os.path.exists(place):  # somebody has taken it away: write anew
        release(place)
        _held[place] = _lock(place, path)
    elif not files.is_at(_held[place], place):
        raise ValueError(f"{path} was replaced by another file while the merge was writing to it")
    try:
        _write(_held[place], lines)
    except OSError as error:
        error.filename = path  # a full disk says no name
        # The merge ends here. What it has written would drive out the report of the last one when
        # it is tried again.
        if place in _put_away:
            os.replace(place + OLD, place)
        release(place)
        raise


def release(place: str | None = None) -> None:
    """Unlock one report, or all that this process has written."""
    for held in [place] if place else list(_held):
        if held in _held:
            os.close(_held.pop(held))
        _put_away.discard(held)


def _lock(place: str, path: str) -> int:
    """Return the descriptor of a file, locked where the file system has locks."""
    try:
        return files.lock(place)
    except files.LockedError:
        raise ValueError(BUSY.format(path)) from None
    except NotImplementedError:
        return os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)


def _write(descriptor: int, lines: str) -> None:
    size, rest = os.fstat(descriptor).st_size, memoryview(lines.encode())
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, size)  # no half line on a full disk
        raise


def _keep_old(place: str) -> None:
    """Give the report at ``place`` its other name too; the caller replaces it at this one."""
    if not os.path.getsize(place) or _cut_off(place):
        return
    _put_away.add(place)
    try:
        # Not by renaming: for a moment there would be no file to be locked.
        with files.replacing(Path(place + OLD)) as other:
            os.link(place, other)
            os.replace(other, place + OLD)
    except OSError:
        os.replace(place, place + OLD)


def _cut_off(place: str) -> bool:
    """Return whether the report has some, but not all of the tensors of the one kept as old.

    It is what a merge of the same model left that failed.
    """
    if not os.path.exists(place + OLD):
        return False
    return _tensors(place) < _tensors(place + OLD)


def _tensors(place: str) -> set[tuple[str, tuple[int, ...]]]:
    """Return names and shapes in a report; those in its sound lines."""
    found = set()
    with open(place, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = Record.from_json(line)
            except ValueError:
                continue
            found.add((record.name, record.shape))
    return found
