"""mergekit's plan of a merge, made from configurations and headers alone."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit.architecture import ModelArchitecture, arch_info_for_config, auto
from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import PretrainedConfig

from mergekit_monosoup.checkpoints import misfit
from mergekit_monosoup.checkpoints.coverage import Reads, compare, is_sliced
from mergekit_monosoup.checkpoints.headers import Headers
from mergekit_monosoup.checkpoints.inputs import Inputs
from mergekit_monosoup.checkpoints.names import layer

# Loggers that mergekit warns with while it plans; also the root, see :func:`_silent`.
_TALKATIVE = ("mergekit.architecture", "mergekit.architecture.auto")

_MANY = 5000  # names of a model, from which on it pays to look at those of one layer


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
    def configs(self) -> dict[ModelReference, PretrainedConfig | Exception]:
        """Each model's config.json as transformers reads it without the model's own code."""
        found: dict[ModelReference, PretrainedConfig | Exception] = {}
        for reference in self.models:
            try:
                with _silent():
                    found[reference] = reference.config()
            except Exception as error:
                found[reference] = error
        return found

    @cached_property
    def known(self) -> dict[ModelReference, ModelArchitecture | None]:
        """mergekit's definition of each model, the base or first one first; None: it infers one.

        Empty where mergekit would not get so far, or only with code of the model's own, which is
        not to be run here.
        """
        found = {}
        for reference, config in self.configs.items():
            if isinstance(config, Exception):
                return {}
            if not is_one_class(config.architectures):
                return {}
            with _silent():
                found[reference] = arch_info_for_config(config)
        if not found or self.config is None:
            return {}
        first = self.config.base_model or self.models[0]
        return {first: found[first], **found}

    @property
    def is_inferred(self) -> bool:
        """Whether mergekit has no definition of one of the models, and infers one for all."""
        return None in self.known.values()

    @cached_property
    def _inferred(self) -> ModelArchitecture | Exception:
        """What mergekit makes of the models' tensors, or raises."""
        assert self.config is not None
        infer = getattr(infer_architecture_info, "__wrapped__", infer_architecture_info)
        try:
            with _silent(), _names_lent_to_mergekit(self.loaders):
                made: ModelArchitecture = infer(
                    self.models, self.config.base_model, MergeOptions(quiet=True)
                )
            return made
        except Exception as error:
            return error

    @cached_property
    def architectures(self) -> dict[ModelReference, ModelArchitecture]:
        """What mergekit takes each model for, the base or first one first.

        Empty where that is not known: see :attr:`known`, and where a model cannot be read.
        """
        if not self.is_inferred:
            return {reference: made for reference, made in self.known.items() if made is not None}
        if len(self.loaders) < len(self.models) or isinstance(self._inferred, Exception):
            return {}
        return dict.fromkeys(self.known, self._inferred)

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
        if self.config is None or len(self.loaders) < len(self.models):
            return None
        if self.is_inferred and isinstance(self._inferred, Exception):
            return self._inferred
        if not self.architectures:
            return None
        (first, architecture), *_ = self.architectures.items()
        try:
            planner = MergePlanner(  # on a copy, for it rewrites the configuration
                self.config.model_copy(deep=True),
                architecture,
                MergeOptions(quiet=True),
                first.config(),
            )
            with _silent(), _lent_to_mergekit(self.loaders):
                tasks = planner.plan_to_disk("")  # which only writes when it is executed
            return tuple(task for task in tasks if isinstance(task, SaveTensor))
        except Exception as error:
            return error

    @property
    def is_made(self) -> bool:
        """Whether mergekit's planner made a plan, be it an empty one."""
        return isinstance(self._planned, tuple)

    @property
    def tasks(self) -> tuple[SaveTensor, ...]:
        """The tensors that mergekit would make; none where that is not known."""
        return self._planned if isinstance(self._planned, tuple) else ()

    @property
    def error(self) -> Exception | None:
        """What mergekit's planner raises."""
        return self._planned if isinstance(self._planned, Exception) else None

    @property
    def way_out(self) -> str:
        """How to merge the models without a definition of their architecture."""
        assert self.config is not None
        return misfit.way_out(self.config, self.loaders)

    @cached_property
    def reads(self) -> Reads:
        """What the merge reads, where every model can be read."""
        assert self.config is not None
        inputs = Inputs(self.loaders, headers=self.headers)
        return compare(self.tasks, inputs, sliced=is_sliced(self.config))


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


@contextmanager
def _names_lent_to_mergekit(loaders: dict[ModelReference, LazyTensorLoader]) -> Iterator[None]:
    """Let mergekit infer an architecture from these names; it would open every file again.

    Of a model with many names, also let it look for the parts of a stack in its layer only: with
    the 45 thousand of DeepSeek V3 it takes eight seconds to find that a dense layer has none.
    """
    module: Any = auto
    original, convertible = module.get_model_tensor_names, module.can_convert_checkpoint_keys
    layers: dict[int, dict[tuple[int, ...], set[str]]] = {}

    def names(model: ModelReference, options: MergeOptions) -> list[str]:
        lent = loaders.get(model)
        return original(model, options) if lent is None else list(lent.index.tensor_paths)

    def can_convert(kind: str | None, keys: set[str], target: str) -> bool:
        if len(keys) < _MANY or not layer(target):
            return bool(convertible(kind, keys, target))
        if id(keys) not in layers:
            by_layer = layers.setdefault(id(keys), {})
            for key in keys:
                by_layer.setdefault(layer(key), set()).add(key)
        return bool(convertible(kind, layers[id(keys)].get(layer(target), set()), target))

    module.get_model_tensor_names, module.can_convert_checkpoint_keys = names, can_convert
    try:
        yield
    finally:
        module.get_model_tensor_names = original
        module.can_convert_checkpoint_keys = convertible


@contextmanager
def _silent() -> Iterator[None]:
    """Keep back what mergekit logs in this thread: it says in its own words what we report."""
    thread = threading.get_ident()
    root, null = logging.getLogger(), logging.NullHandler()
    loggers = [root, *map(logging.getLogger, _TALKATIVE)]

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    root.addHandler(null)  # without any, `logging.warning` would set one up for good
    for logger in loggers:
        logger.addFilter(elsewhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(elsewhere)
        root.removeHandler(null)


def is_one_class(architectures: Any) -> bool:
    """Whether what config.json has under `architectures` is the list of one name."""
    return isinstance(architectures, list) and list(map(type, architectures)) == [str]
