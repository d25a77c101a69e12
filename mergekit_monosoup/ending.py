"""The last word of a merge: a line of what our methods did, once its model is complete.

mergekit tells no method that a merge has ended. What ends each of its merges is the task
`FinalizeModel`, which closes the files of weights when all tensors are in them; :func:`watch_files`
has it tell us. The files beside the weights come after it, and may fail: so the line waits for the
end of `run_merge` (mergekit-yaml, each stage of mergekit-multi) or of `Executor.execute`
(mergekit-pytorch), and what raises there says nothing of success.

Where a command of mergekit's runs, the line goes to stderr, unless it is told `--quiet`. In a
program that calls mergekit as a library it is a record of the logger `mergekit_monosoup` at the
level INFO, which is shown only if the program wants it. Warnings are warnings in both.

mergekit is not imported here: the hook imports this module in the middle of mergekit's imports.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any

from mergekit_monosoup import terminal
from mergekit_monosoup.parameters import METHODS
from mergekit_monosoup.report import Tally
from mergekit_monosoup.terminal import plain

LOG = logging.getLogger("mergekit_monosoup")

Function = Callable[..., Any]
# (output folder, what was done) of merges whose model is not complete yet.
Waiting = list[tuple[str, Tally]]
_WAITING: ContextVar[Waiting | None] = ContextVar("waiting", default=None)
# Likewise, of a command that says it later, and elsewhere.
_HELD: ContextVar[Waiting | None] = ContextVar("held", default=None)


# -- mergekit, watched -----------------------------------------------------------------------------


def watch_files(tasks: ModuleType) -> None:
    """Be told of each finished set of files; ``tasks``: the module `mergekit.io.tasks`."""
    _wrap(tasks.FinalizeModel, "execute", _telling)
    _wrap(sys.modules["mergekit.graph"].Executor, "execute", _said_at_the_end)


def watch_merges(merge: ModuleType) -> None:
    """Be told of the end of each `run_merge`; ``merge``: the module `mergekit.merge`."""
    _wrap(merge, "run_merge", _said_at_the_end)


def _wrap(
    owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace a function by one around it; does nothing the second time."""
    original = getattr(owner, name)
    if not getattr(original, "watched", False):
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped.watched = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _telling(original: Function) -> Function:
    """Return `FinalizeModel.execute` with a look at what was merged."""

    def execute(self: Any, *arguments: Any, **named: Any) -> Any:
        result = original(self, *arguments, **named)
        try:
            _files_are_closed(self)
        except Exception as error:  # of whatever kind: it would be ours, and the merge is theirs
            LOG.debug("what the merge did is not known: %r", error)
        return result

    return execute


def _said_at_the_end(original: Function) -> Function:
    """Return a function of mergekit's that says what was merged meanwhile, unless it raises."""

    def watched(*arguments: Any, **named: Any) -> Any:
        waiting: Waiting = []
        token = _WAITING.set(waiting)
        try:
            result = original(*arguments, **named)
        finally:
            _WAITING.reset(token)
        for place, tally in waiting:
            say(place, tally)
        return result

    return watched


def _files_are_closed(task: Any) -> None:
    """Take what the journal has counted of a merge, if it was one by our methods."""
    saved = task.tensor_save_tasks
    if not any(getattr(save.tensor_task, "method_name", "") in METHODS for save in saved):
        return
    # What no fine-tuned model has goes to no report.
    reports = [None, *map(report_of, saved)]
    # Looked up, not imported: mergekit may have been reloaded, and our methods with it.
    tally = import_module("mergekit_monosoup.methods").JOURNAL.end(reports)
    place = str(task.writer_task.out_path).rstrip("/") or "/"
    waiting = _WAITING.get()
    if waiting is None:
        say(place, tally)
    else:
        waiting.append((place, tally))


def report_of(task: Any) -> str | None:
    """Return the report that the method of a planned tensor writes to."""
    parameters = getattr(getattr(task, "tensor_task", None), "input_parameters", None)
    values = parameters.values() if parameters is not None else ()
    return next(filter(None, (dict(value.items()).get("report") for value in values)), None)


# -- saying it -------------------------------------------------------------------------------------


@contextmanager
def held(place: str) -> Iterator[None]:
    """Say what is merged meanwhile at the end of the block, unless it raises, and of ``place``.

    For a command that has mergekit write to another folder first.
    """
    waiting: Waiting = []
    token = _HELD.set(waiting)
    try:
        yield
    finally:
        _HELD.reset(token)
    for _, tally in waiting:
        say(place, tally)


def say(place: str, tally: Tally) -> None:
    """Say what a merge into the folder ``place`` did, and warn if that was nothing; never raises.

    See the module for where it is said.
    """
    if (waiting := _HELD.get()) is not None:
        waiting.append((place, tally))
        return
    try:
        for warning in tally.warnings():
            LOG.warning("%s: %s", plain(place), warning)
        if tally.edited:
            _announce(f"{plain(place)}: {tally.sentence()}")
    except Exception as error:  # of a log handler, or of an output that is closed
        LOG.debug("what the merge did could not be said: %r", error)


def _announce(line: str) -> None:
    import click

    command = click.get_current_context(silent=True)
    if command is None or "quiet" not in command.params:  # no command with mergekit's options
        LOG.info("%s", line)
    elif not command.params["quiet"]:
        terminal.remark(line)
