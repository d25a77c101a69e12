"""A word to whoever waits: importing mergekit takes up to ten seconds, which look like a hang."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE = 1.0  # seconds of silence that nobody takes for a hang
ERASE_LINE = "\r\x1b[K"


@contextmanager
def announced(
    message: str, patience: float = PATIENCE, stream: TextIO | None = None
) -> Iterator[None]:
    """Show ``message`` on a terminal while the block runs, if it runs longer than ``patience``.

    The line is erased at the end. Where ``stream`` (stderr by default) is no terminal, nothing is
    written.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None or not stream.isatty():  # pythonw and some services have no stderr
        yield
        return
    ended, lock, shown = False, threading.Lock(), False

    def show() -> None:
        nonlocal shown
        with lock:
            if not ended:  # the timer may fire while the block ends
                stream.write(message)
                stream.flush()
                shown = True

    timer = threading.Timer(patience, show)
    timer.daemon = True  # an interrupt during the import must not wait for it
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            ended = True
        if shown:
            stream.write(ERASE_LINE)
            stream.flush()
