"""One bar on stderr: tensors, bytes, time left; with -v what each worker is at."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from mergekit_monosoup.distributed.records import Done
from mergekit_monosoup.waiting import repeated

LOG_EVERY = 30  # seconds between lines where stderr is a file
MOST_WORKERS = 16  # lines under the bar

Attempts = Callable[[], Iterable[tuple[int, str, float]]]


class Bar(AbstractContextManager["Bar"]):
    """The progress of a merge, batch by batch.

    Where stderr is a file there is no bar, but a line now and then.

    Args:
        tensors, size: of the whole merge; ``size`` in bytes of output.
        attempts: returns (batch, worker, time of start) of each batch at work.
        quiet: show nothing.
        verbose: show the workers too, and a line for each batch.
    """

    def __init__(self, tensors: int, size: int, *, attempts: Attempts, quiet: bool, verbose: bool):
        self.console = Console(stderr=True)
        self._all_tensors, self._all_bytes = tensors, size
        self._quiet, self._verbose = quiet, verbose
        self._tensors = self._bytes = self._resumed_bytes = 0
        self._begun = time.monotonic()
        self._lines = ExitStack()  # what prints them, where there is no bar
        self._live = _Live(
            attempts if verbose else list,
            self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._live.add_task("merging", total=max(size, 1), state=self._state())

    def __enter__(self) -> Bar:
        self._live.start()
        if self._live.disable and not self._quiet:
            line = repeated(lambda: f"{self._state()}, {self._left()} left", LOG_EVERY)
            self._lines.enter_context(line)
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._live.stop()

    def already(self, done: Iterable[Done]) -> None:
        """Count what an earlier run has finished; it is no part of the speed."""
        for record in done:
            self._add(record)
        self._resumed_bytes = self._bytes
        self._live.reset(self._task, completed=self._bytes, state=self._state())

    def count(self, record: Done) -> None:
        """Count a batch that has just been finished."""
        self._add(record)
        self._live.update(self._task, completed=self._bytes, state=self._state())
        if self._verbose:
            speed = f"{record.seconds:.1f} s, peak {record.peak / 1e9:.1f} GB"
            self.print(
                f"{record.worker}  batch {record.batch}: {record.tensors} tensors, "
                f"{size_in_words(record.bytes)} in {speed}"
            )

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._live.disable:
            self._live.console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def _add(self, record: Done) -> None:
        self._tensors += record.tensors
        self._bytes += record.bytes

    def _state(self) -> str:
        tensors = f"{self._tensors}/{self._all_tensors} tensors"
        return f"{tensors}, {size_in_words(self._bytes)} of {size_in_words(self._all_bytes)}"

    def _left(self) -> str:
        speed = (self._bytes - self._resumed_bytes) / max(time.monotonic() - self._begun, 1e-3)
        if not speed:
            return "an unknown time"
        seconds = int((self._all_bytes - self._bytes) / speed)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class _Live(Progress):
    """rich's bar, with a line below it for each batch at work."""

    def __init__(self, attempts: Attempts, console: Console, *, disable: bool):
        self._attempts = attempts  # before super(), which renders once
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
        )
        # Batches end seldom; the usual window of 30 seconds would hold one or none.
        super().__init__(
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=disable,
            speed_estimate_period=3600,
            refresh_per_second=2,  # each refresh lists a folder on storage that may be far away
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        running = sorted(self._attempts(), key=lambda attempt: attempt[1])
        for batch, worker, begun in running[:MOST_WORKERS]:
            yield Text(f"  {worker}  batch {batch}, {time.time() - begun:.0f} s")
        if len(running) > MOST_WORKERS:
            yield Text(f"  and {len(running) - MOST_WORKERS} more")


def size_in_words(number: float) -> str:
    """Return a number of bytes in three digits, ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
