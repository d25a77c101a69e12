"""How much memory this process may still take, and how threads share it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# Left to the system and to what the estimates of the plan do not know.
RESERVE = 0.1
_CGROUPS = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")


def available_memory() -> float:
    """Return the bytes that this process may still take, without those kept in reserve.

    The smaller of what the machine has and of what the control groups (version 2) of a container
    or a batch system leave.
    """
    return (1 - RESERVE) * min([psutil.virtual_memory().available, *_left_by_groups()])


def _left_by_groups() -> Iterator[int]:
    """Yield what each control group of this process, from its own to the root, leaves."""
    with suppress(OSError, StopIteration):
        lines = _OF_PROCESS.read_text(encoding="utf-8").splitlines()
        path = next(line[len("0::/") :] for line in lines if line.startswith("0::/"))
        for group in (_CGROUPS / path, *(_CGROUPS / path).parents):
            if not group.is_relative_to(_CGROUPS):
                return
            with suppress(OSError, ValueError):  # "max" is no number: no limit
                limit = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                yield max(0, limit - used + _cached(group))


def _cached(group: Path) -> int:
    """Return the bytes of files that the group holds in memory and would give away first.

    They count as used, and a merge reads more bytes of files than any machine has memory.
    """
    match = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    return int(match.group(1)) if match else 0


class Budget:
    """Bytes that several threads share. Who needs more than all of them gets them alone."""

    def __init__(self, size: float):
        self._size, self._taken = size, 0.0
        self._change = threading.Condition()

    @contextmanager
    def taken(self, size: float) -> Iterator[None]:
        """Wait until ``size`` bytes are left, and hold them for as long as the block runs."""
        with self._change:
            self._change.wait_for(lambda: not self._taken or self._taken + size <= self._size)
            self._taken += size
        try:
            yield
        finally:
            with self._change:
                self._taken -= size
                self._change.notify_all()
