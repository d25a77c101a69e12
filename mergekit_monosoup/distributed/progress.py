"""One bar on stderr: tensors, bytes, time left; with -v what each worker is at."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from mergekit_monosoup.distributed.folder import Done

LOG_EVERY = 30  # seconds between lines where stderr is a file
SHOWN = 16  # workers under the bar

Attempts = Callable[[], Iterable[tuple[int, str, float]]]


class Bar(AbstractContextManager["Bar"]):
    """Counts batches off.

    Args:
        tensors, size: of the whole merge; ``size`` in bytes of output.
        attempts: (batch, worker, time of start) of what is being made.
    """

    def __init__(self, tensors: int, size: int, *, attempts: Attempts, quiet: bool, verbose: bool):
        self.console = Console(stderr=True)
        self._all, self._size, self._quiet, self._verbose = tensors, size, quiet, verbose
        self._tensors = self._bytes = 0
        self._begun, self._told, self._before = time.monotonic(), time.monotonic(), 0
        self._live = _Live(
            attempts if verbose else list,
            self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._live.add_task("merging", total=max(size, 1), state=self._state())

    def __enter__(self) -> Bar:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def already(self, done: Iterable[Done]) -> None:
        """Counts what an earlier run has finished; no part of the speed."""
        for record in done:
            self._add(record)
        self._before = self._bytes
        self._live.reset(self._task, completed=self._bytes, state=self._state())

    def count(self, record: Done) -> None:
        self._add(record)
        self._live.update(self._task, completed=self._bytes, state=self._state())
        if self._verbose:
            speed = f"{record.seconds:.1f} s, peak {record.peak / 1e9:.1f} GB"
            self.say(
                f"{record.worker}  batch {record.batch}: {record.tensors} tensors, {_size(record.bytes)} in {speed}"
            )
        elif self._live.disable and not self._quiet and time.monotonic() > self._told + LOG_EVERY:
            self._told = time.monotonic()
            self.say(f"{self._state()}, {self._left()} left")

    def say(self, line: str) -> None:
        if not self._live.disable:
            self._live.console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def _add(self, record: Done) -> None:
        self._tensors += record.tensors
        self._bytes += record.bytes

    def _state(self) -> str:
        return f"{self._tensors}/{self._all} tensors, {_size(self._bytes)} of {_size(self._size)}"

    def _left(self) -> str:
        speed = (self._bytes - self._before) / max(time.monotonic() - self._begun, 1e-3)
        seconds = int((self._size - self._bytes) / speed) if speed else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class _Live(Progress):
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
        for batch, worker, begun in running[:SHOWN]:
            yield Text(f"  {worker}  batch {batch}, {time.time() - begun:.0f} s")
        if len(running) > SHOWN:
            yield Text(f"  and {len(running) - SHOWN} more")


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
