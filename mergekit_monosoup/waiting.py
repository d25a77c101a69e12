"""A word to whoever waits: silence of more than some seconds looks like a hang.

Importing mergekit takes up to ten of them, a large matrix minutes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE = 1.0  # seconds of silence that nobody takes for a hang
EVERY = 10.0  # seconds between lines where stderr is a file, or a pipe
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


@contextmanager
def repeated(
    line: Callable[[], str], every: float = EVERY, stream: TextIO | None = None
) -> Iterator[None]:
    """Print a line to ``stream`` (stderr by default) now and then, while the block runs.

    For where no bar can be shown, also in the middle of a matrix that takes long.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None:
        yield
        return
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(every):
            try:
                print(line(), file=stream, flush=True)
            except (OSError, ValueError):  # a closed pipe: then nobody listens
                return

    thread = threading.Thread(target=speak, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
