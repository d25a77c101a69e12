"""mergekit's planner, watched: what a plan leaves out is said, or refused, before the merge begins.

mergekit merges what its definition of an architecture names, and nothing says what that leaves
out. :func:`watch` has every plan compared with the names in the models' files. A merge by a method
of this package gets a warning and lines in its report, and is never stopped. Within
:func:`strictly`, which is `mergekit-monosoup run`, any merge that would lose matrices is refused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor
from pydantic import ValidationError

from mergekit_monosoup.checkpoints import misfit
from mergekit_monosoup.checkpoints.coverage import (
    Reads,
    compare,
    is_computed,
    is_matrix,
    is_sliced,
)
from mergekit_monosoup.checkpoints.inputs import Inputs, loads
from mergekit_monosoup.checkpoints.lineage import looks_swapped
from mergekit_monosoup.checkpoints.sections import unmatched
from mergekit_monosoup.ending import report_of
from mergekit_monosoup.parameters import METHODS
from mergekit_monosoup.report import LEFT_OUT, PLANNING_ONLY, Journal, Record

LOG = logging.getLogger("mergekit_monosoup")

# As Python has what safetensors files call so.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Planner = Any  # mergekit.plan.MergePlanner, whose attributes are not annotated


class PlanningError(ValueError):
    """A merge that mergekit cannot plan, or would lose matrices in."""


@dataclass
class Strict:
    """How `run` wants a plan to be looked at.

    Attributes:
        allow_incomplete: merge although matrices will be missing.
        in_process: the methods run in this process and write their report themselves.
        left_out: (report, record) of what is left out, for whoever writes the report otherwise.
    """

    allow_incomplete: bool
    in_process: bool
    left_out: list[tuple[str, Record]] = field(default_factory=list)


_STRICT: ContextVar[Strict | None] = ContextVar("strict", default=None)


@contextmanager
def strictly(*, allow_incomplete: bool, in_process: bool) -> Iterator[Strict]:
    """Refuse merges that would lose matrices or cannot be planned, while the block runs.

    The block then raises :class:`PlanningError`, before anything is written.
    """
    watch()
    strict = Strict(allow_incomplete, in_process)
    token = _STRICT.set(strict)
    module: Any = import_module("mergekit.merge")
    original = module.get_architecture_info
    module.get_architecture_info = _explained(original)
    try:
        yield strict
    finally:
        module.get_architecture_info = original
        _STRICT.reset(token)


def _explained(get_architecture_info: Callable[..., Any]) -> Callable[..., Any]:
    """Return mergekit's function with faults of its own named as such."""

    @functools.wraps(get_architecture_info)
    def explained(config: MergeConfiguration, *arguments: Any, **named: Any) -> Any:
        with _explained_errors(config):
            return get_architecture_info(config, *arguments, **named)

    return explained


def watch() -> None:
    """Have plans compared with the files from now on; does nothing the second time."""
    cls: Any = import_module("mergekit.plan").MergePlanner
    if getattr(cls.plan_to_disk, "watched", False):
        return
    original = cls.plan_to_disk

    @functools.wraps(original)
    def plan_to_disk(self: Planner, *arguments: Any, **named: Any) -> Any:
        if PLANNING_ONLY.get():
            return original(self, *arguments, **named)
        plan = functools.partial(original, self, *arguments, **named)
        strict = _STRICT.get()
        return _plan_aloud(self, plan) if strict is None else _plan_strictly(self, plan, strict)

    plan_to_disk.watched = True  # type: ignore[attr-defined]
    cls.plan_to_disk = plan_to_disk


# -- a merge by mergekit-yaml: never stopped -------------------------------------------------------


def _plan_aloud(planner: Planner, plan: Callable[[], Any]) -> Any:
    """Plan, and say what is left out if the method is one of this package."""
    if planner.config.merge_method not in METHODS:
        return plan()
    written = planner.config.model_copy(deep=True)
    tasks = plan()
    _warn(written, tasks)
    try:
        reads = _compare(planner, tasks, written)
        if not reads.merged:  # nothing that we know how to read: then nothing is known
            return tasks
        _announce(reads)
        for path, record in _records(reads, tasks):
            _journal().add([record], path, written.merge_method)
    except Exception as error:  # of whatever kind: it would be ours, and the merge is theirs
        LOG.debug("what the merge leaves out is not known: %r", error)
    return tasks


def _announce(reads: Reads) -> None:
    """Warn of what was learned and will be missing."""
    for models, tensors in reads.unread_together.items():
        learned = {name: tensor for name, tensor in tensors.items() if not is_computed(tensor)}
        if learned:
            LOG.warning(
                "%s: %s. `mergekit-monosoup check` says how to merge them too",
                " and ".join(models),
                misfit.unread(learned),
            )


def _warn(config: MergeConfiguration, tasks: Iterable[Any]) -> None:
    """Warn of what a configuration says that no tensor or no model file bears out."""
    try:
        names = set()
        for task in tasks:
            if isinstance(task, SaveTensor):
                # A filter of a slice may be meant for the input's name.
                names |= {task.tensor_name, *(load.tensor for load in loads(task.tensor_task))}
        _warn_of_filters(config.model_dump(exclude_none=True), names)
        for said in _swapped(config):
            LOG.warning(said)
    except Exception as error:  # as above
        LOG.debug("the configuration could not be compared with the models: %r", error)


def _warn_of_filters(config: Any, names: Collection[str]) -> None:
    for place, text in unmatched(config, names):
        LOG.warning(
            "%s: filter %r is part of no tensor's name, so its value is used nowhere", place, text
        )


def _swapped(config: MergeConfiguration) -> Iterator[str]:
    """Yield a warning for each fine-tune of which the base model says that it was made of it."""
    loaders, base = _loaders(config), config.base_model
    if base is None:
        return
    folders = {model: loader.index.base_path for model, loader in loaders.items()}
    for model, folder in folders.items():
        if model != base and not model.lora:
            yield from looks_swapped((base.model.path, folders[base]), (model.model.path, folder))


def watch_flat(script: Any) -> None:
    """Have the plans of mergekit-pytorch looked at; ``script``: the module of the command."""
    original = script.plan_flat_merge
    if getattr(original, "watched", False):
        return

    @functools.wraps(original)
    def plan_flat_merge(config: Any, *arguments: Any, **named: Any) -> Any:
        if config.merge_method in METHODS and not PLANNING_ONLY.get():
            _journal().begin()
        tasks = original(config, *arguments, **named)
        if config.merge_method in METHODS:
            names = {task.tensor_name for task in tasks if isinstance(task, SaveTensor)}
            _warn_of_filters(config.model_dump(exclude_none=True), names)
        return tasks

    plan_flat_merge.watched = True  # type: ignore[attr-defined]
    script.plan_flat_merge = plan_flat_merge


# -- a merge by `run` ------------------------------------------------------------------------------


def _plan_strictly(planner: Planner, plan: Callable[[], Any], strict: Strict) -> Any:
    """Plan, and raise what stands against the plan.

    Raises:
        PlanningError: mergekit cannot plan the merge, would stop in its middle, or would leave out
            matrices without consent.
    """
    written = planner.config.model_copy(deep=True)
    trust = planner.options.trust_remote_code
    with _explained_errors(written):
        layers = misfit.depths(written, planner.arch_info, trust)
        if layers:
            raise PlanningError(misfit.uneven_depths(layers))
        tasks = plan()
    reads = _compare(planner, tasks, written)
    for fault in _faults(reads, written, strict, trust):
        raise PlanningError(fault)
    _announce(reads)
    if written.merge_method in METHODS:
        _warn(written, tasks)
    strict.left_out = list(_records(reads, tasks))
    if strict.in_process:
        for path, record in strict.left_out:
            _journal().add([record], path, written.merge_method)
    return tasks


def _faults(
    reads: Reads, written: MergeConfiguration, strict: Strict, trust_remote_code: bool
) -> Iterator[str]:
    """Yield what stands against a merge."""
    everywhere = reads.lacking_everywhere
    if everywhere:
        model = written.base_model or written.referenced_models()[0]
        said = misfit.lacking_everywhere(everywhere, misfit.class_of(model, trust_remote_code))
        yield f"{said}. {_way_out(written)}"
    for name, names in reads.lacking.items():
        yield f"{name} {misfit.lacking(name, names)}"
    for name, said in misfit.uneven(reads):
        yield f"{name} {said}"
    for models, tensors in reads.unread_together.items():
        if not strict.allow_incomplete and any(map(is_matrix, tensors.values())):
            yield (
                f"{' and '.join(models)}: {misfit.unread(tensors)}. {_way_out(written)}; "
                "--allow-incomplete merges without them"
            )


# -- shared ----------------------------------------------------------------------------------------


def _loaders(config: MergeConfiguration) -> dict[ModelReference, LazyTensorLoader]:
    """Return mergekit's loaders, which it has opened before it plans."""
    cache, base = LoaderCache(), config.base_model
    # Whose order is another in each process.
    models = sorted(config.referenced_models(), key=lambda model: (model != base, str(model)))
    return {model: cache.get(model) for model in models}


@contextmanager
def _explained_errors(config: MergeConfiguration) -> Iterator[None]:
    """Name mergekit's own faults as such; what it rightly refuses passes.

    Raises:
        PlanningError: in the place of an error of mergekit's.
    """
    try:
        yield
    except ValidationError as error:  # three lines that name no parameter
        values = "; ".join(f"{m['msg']}: {m['input']!r:.100}" for m in error.errors())
        raise PlanningError(f"{values} (`mergekit-monosoup check` says where)") from error
    except Exception as error:
        if misfit.is_refusal(error):
            raise
        model = config.base_model or config.referenced_models()[0]
        said = misfit.cannot_plan(error, model, misfit.class_of(model))
        raise PlanningError(f"{said}. {_way_out(config)}") from error


def _way_out(config: MergeConfiguration) -> str:
    try:
        return misfit.way_out(config, _loaders(config))
    except Exception:  # a model that cannot be read, or lies elsewhere
        return misfit.way_out(config, {})


def _compare(planner: Planner, tasks: Iterable[Any], written: MergeConfiguration) -> Reads:
    saved = [task for task in tasks if isinstance(task, SaveTensor)]
    inputs = Inputs(_loaders(written), planner.options.trust_remote_code)
    return compare(saved, inputs, sliced=is_sliced(written))


def _records(reads: Reads, tasks: Iterable[Any]) -> Iterator[tuple[str, Record]]:
    """Yield (report, record) of each tensor that is left out, if the merge writes a report."""
    path = next(filter(None, map(report_of, tasks)), None)
    if path is None:
        return
    for tensors in reads.unread_together.values():
        for name, tensor in tensors.items():
            dtype = _DTYPES.get(tensor.dtype, tensor.dtype.removeprefix("torch."))
            reason = "mergekit does not read it: it is missing from the merged model"
            yield path, Record(name, tensor.shape, dtype, action=LEFT_OUT, reason=reason)


def _journal() -> Journal:
    """Return the journal of the methods that mergekit knows now; it may have been reloaded."""
    journal: Journal = import_module("mergekit_monosoup.methods").JOURNAL
    return journal
