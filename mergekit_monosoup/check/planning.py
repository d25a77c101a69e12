"""mergekit's plan of a merge, made from configurations and headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_monosoup.checkpoints.headers import Headers, LackingError
from mergekit_monosoup.checkpoints.inputs import Inputs, loads


@dataclass(frozen=True)
class Reads:
    """What a planned merge reads, compared with what the models hold.

    Attributes:
        lacking: model → tensors (by mergekit's names) without which mergekit would stop.
        unread: model → tensors (by the files' names) that mergekit passes by.
    """

    lacking: Mapping[str, set[str]] = field(default_factory=dict)
    unread: Mapping[str, set[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Planning:
    """What mergekit would plan for a merge, as far as that is known from the files that lie here.

    Attributes:
        config: what is to be merged; None where mergekit would not get that far.
        headers: the reader of the models' headers.
    """

    config: MergeConfiguration | None
    headers: Headers = field(default_factory=Headers)

    @cached_property
    def models(self) -> tuple[ModelReference, ...]:
        """The models, if all of them lie here as folders and without adapters; else none."""
        if self.config is None:
            return ()
        references = self.config.referenced_models()
        local = all(not r.lora and os.path.isdir(r.model.path) for r in references)
        return tuple(references) if local else ()

    @cached_property
    def architectures(self) -> dict[ModelReference, ModelArchitecture]:
        """What mergekit takes each model for, the base or first one first.

        Empty where that needs more than the files: code of the model's own, which is not to be
        run here, or an architecture that mergekit infers from all tensors.
        """
        known = {}
        for reference in self.models:
            try:
                known[reference] = arch_info_for_config(reference.config())
            except Exception:  # code of its own, or unknown to this version of transformers
                return {}
        if not known or not all(known.values()):
            return {}
        assert self.config is not None
        first = self.config.base_model or self.models[0]
        return {first: known[first], **known}  # type: ignore[dict-item] # None is gone

    @cached_property
    def loaders(self) -> dict[ModelReference, LazyTensorLoader]:
        """mergekit's loaders of the local models that can be read, made from our headers."""
        loaders = {}
        for reference in self.models:
            with suppress(Exception):  # which check TEN501 reports
                loaders[reference] = LazyTensorLoader(self.headers.index(reference.model.path))
        return loaders

    @cached_property
    def _planned(self) -> tuple[SaveTensor, ...] | Exception | None:
        """What mergekit's planner makes, or raises now as it would in the merge."""
        if not self.architectures or self.config is None:
            return None
        (first, architecture), *_ = self.architectures.items()
        try:
            planner = MergePlanner(  # on a copy, for it rewrites the configuration
                self.config.model_copy(deep=True),
                architecture,
                MergeOptions(quiet=True),
                first.config(),
            )
            with _lent_to_mergekit(self.loaders):
                tasks = planner.plan_to_disk("")  # which only writes when it is executed
            return tuple(task for task in tasks if isinstance(task, SaveTensor))
        except Exception as error:
            return error

    @property
    def tasks(self) -> tuple[SaveTensor, ...]:
        """The tensors that mergekit would make; none where that is not known."""
        return self._planned if isinstance(self._planned, tuple) else ()

    @property
    def error(self) -> Exception | None:
        """What mergekit's planner raises."""
        return self._planned if isinstance(self._planned, Exception) else None

    @cached_property
    def reads(self) -> Reads:
        """What the merge reads, where every model can be read."""
        every = dict.fromkeys(load for task in self.tasks for load in loads(task.tensor_task))
        models = dict.fromkeys(load.model for load in every)
        inputs = Inputs(self.loaders, headers=self.headers)
        lacking: dict[str, set[str]] = {}
        read: set[str] = set()
        for load in every:
            # Tied weights are stored under several names, and any of them will do.
            read |= {load.tensor, *(load.aliases or ()), *(load.tied_names or ())}
            try:
                read |= {source.name for source in inputs.sources(load)[0]}
            except LackingError:
                lacking.setdefault(str(load.model), set()).add(load.tensor)
        # What is read of any model is in the merged one: modules may take their tensors from
        # different models.
        unread = {
            str(model): rest
            for model in models
            if str(model) not in lacking
            and (rest := set(self.loaders[model].index.tensor_paths) - read)
        }
        return Reads(lacking, unread)


@contextmanager
def _lent_to_mergekit(loaders: dict[ModelReference, LazyTensorLoader]) -> Iterator[None]:
    """Let mergekit's planner use these loaders, in this thread.

    It would open every file again, and what it opened would stay for the life of the process,
    also when the file has changed since.
    """
    cache = LoaderCache()  # one per thread; its dictionary is the class's, and so everybody's
    cache.loaders = loaders
    try:
        yield
    finally:
        del cache.loaders
