"""Text files that people hand us: whatever lies under the name, reading it ends soon."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class UnreadableError(ValueError):
    """A file cannot be read; the message says why, without the file's name."""


def check_file(path: str | Path) -> int:
    """Return the size of a file that can be opened without waiting for ever.

    Raises:
        UnreadableError: there is no file, or it is a folder, a pipe or a device.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null byte, or a surrogate, in the name
        raise UnreadableError(f"cannot be read: no file can have this name ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise UnreadableError(f"cannot be read: it is {kind}; give a file")
    return status.st_size


def read_text(path: str | Path, most: int) -> str:
    """Return the text of a file in UTF-8 that has at most ``most`` bytes.

    Raises:
        UnreadableError: it is anything else.
    """
    if check_file(path) > most:
        raise UnreadableError(
            f"cannot be read: larger than {most // 1024} kB; is it another kind of file?"
        )
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableError("cannot be read: it is UTF-16, save it as UTF-8")
    try:
        # Line ends of any system, as open() has it.
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UnreadableError(
            f"cannot be read: not UTF-8 (byte 0x{content[error.start]:02x} in line {line}); "
            "save it as UTF-8"
        ) from error


def check_new_folder(path: str | Path) -> None:
    """Check the name of a folder that is to be filled.

    Raises:
        OSError: it is not UTF-8: safetensors cannot write there, and says so after the work.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        reason = "the name is not UTF-8, which model files need; take another one"
        raise OSError(errno.EILSEQ, reason, str(path)) from error
