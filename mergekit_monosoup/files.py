"""Files that are written whole or not at all, and locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LONGEST_STEM = 100  # characters of a name that its temporary file keeps: names end at 255 bytes


class LockedError(OSError):
    """Another process holds the lock, or another part of this one."""


# -- whole or not at all ---------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write text as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it is on the disk afterwards.

    Raises:
        OSError: it cannot be written; what was there before is untouched, and nothing is left over.
    """
    if path.exists() and not path.is_file():  # a pipe or a device keeps its place
        path.write_bytes(content)
        return
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to and rename; a failure leaves no file there."""
    temporary = path.with_name(f".{path.name[:LONGEST_STEM]}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk says no name
        raise


def missing(folder: Path) -> list[Path]:
    """Return the folders that making this one will make, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, each within the next, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


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


# -- locks -----------------------------------------------------------------------------------------


def lock(path: str | Path) -> int:
    """Lock a file, which is made if need be, and return its descriptor: closing it unlocks.

    The lock is the kernel's: it ends with the process, also after kill -9. A symbolic link is not
    followed.

    Raises:
        LockedError: somebody else holds it.
        NotImplementedError: the file system has no locks.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            _take(descriptor, path)
            # Between the two calls the holder may have removed the file, or put another in its
            # place: that lock would be worth nothing.
            if is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_locked(path: str | Path) -> bool:
    """Return whether somebody else is holding the lock of a file; False where nobody can tell."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int, path: str | Path) -> None:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise LockedError(error.errno, "locked by another process", str(path)) from None
        raise NotImplementedError(f"{path}: the file system has no locks ({error})") from error


def is_at(descriptor: int, path: str | Path) -> bool:
    """Return whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
