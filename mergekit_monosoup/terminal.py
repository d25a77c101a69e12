"""What a terminal is shown: text from files made harmless, in whatever encoding the output has.

Names of tensors, models and tasks come from other people's files. Printed as they are, they could
move the cursor, hide themselves or break a table; so all of them go through :func:`plain` or
:func:`cell`. Every program runs inside :func:`output`.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LONGEST_MESSAGE = 2000  # characters: more than any message of ours has, less than fills a screen
LONGEST_CELL = 300
REPLACING = "mergekit_monosoup.replacing"  # handler of characters that the output cannot encode
_FAULTS = {
    getattr(errno, name, None) for name in ("EPIPE", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EBADF")
} - {None}
# One for one, so that tables stay aligned; for any other character a question mark.
LOOK_ALIKES = str.maketrans("λσγρτΔα‖−–—·×±≈≥≤…→─‘’“”", "lsgrtDa|---*x+~><.>-''\"\"")


# -- text from files -------------------------------------------------------------------------------


def plain(text: object) -> str:
    """Return a text with its line breaks, control and invisible characters written as escapes.

    Invisible are also the marks that turn the direction of writing, and lone surrogates.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def plain_lines(text: object) -> str:
    """Return :func:`plain` of each line of a text that has lines on purpose."""
    return "\n".join(map(plain, str(text).split("\n")))


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Return a text of at most ``most`` characters, without its middle if it was longer."""
    if len(text) <= most:
        return text
    mark = f" … {len(text) - most} more … "
    kept = most - len(mark)
    return text[: kept - kept // 2] + mark + text[len(text) - kept // 2 :]


def message(text: object) -> str:
    """Return an error, or a remark, as people are shown it: lines that are safe and not endless."""
    return plain_lines(shortened(str(text)))


def cell(text: object) -> Text:
    """Return a text for a table of rich, which takes what is in brackets in a string for markup."""
    from rich.text import Text

    return Text(plain(shortened(str(text), LONGEST_CELL)))


# -- the output ------------------------------------------------------------------------------------


def console() -> Console:
    """Return a console on stdout that shows strings as they are.

    160 columns where it is no terminal: a pipe has no width, and 80 columns would fold every
    number.
    """
    from rich.console import Console

    if Console().is_terminal:
        return Console(markup=False, emoji=False, highlight=False)
    return Console(markup=False, emoji=False, highlight=False, width=160)


def echo(text: str) -> None:
    """Print a text, with its colours if stdout is a terminal."""
    import click

    # Without the file click would write UTF-8 where the output says that it is ASCII.
    click.echo(text, file=sys.stdout)


def remark(text: str) -> None:
    """Print a line on stderr, whatever characters that can show."""
    import click

    codecs.register_error(REPLACING, _replacement)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, REPLACING).decode(encoding), err=True)


@contextmanager
def output() -> Iterator[None]:
    """Let a program print to any output; also a decorator of its main function.

    What the output's encoding lacks is replaced. An output that cannot be written ends the program
    with exit code 1: quietly if it is a closed pipe, as that of `head`, else with a line on stderr.
    """
    codecs.register_error(REPLACING, _replacement)
    _lenient(sys.stdout)
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as under pythonw
                sys.stdout.flush()
    except OSError as error:
        if not of_output(error):
            raise
        if error.errno != errno.EPIPE:
            with suppress(OSError):
                reason = error.strerror or error
                print(f"Error: the output cannot be written: {reason}", file=sys.stderr)
        _discard(sys.stdout)
        raise SystemExit(1) from None


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = error.object[error.start : error.end].translate(LOOK_ALIKES)
    return "".join(c if c.isascii() else "?" for c in shown), error.end


def _lenient(stream: TextIO | None) -> None:
    """Make a stream replace what it cannot encode, unless the user has said what to do."""
    if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors=REPLACING)  # type: ignore[union-attr]


def of_output(error: BaseException) -> bool:
    """Whether an error is that of an output that cannot be written: the only one without a name."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _FAULTS


def _discard(stream: TextIO) -> None:
    """Lead a stream that fails to nowhere: Python would try it again, and complain, at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
