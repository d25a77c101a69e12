"""What checks look at: a file, each document in it, and what is read or planned on demand.

Everything here is frozen; what takes time (headers, mergekit's plan) is computed when a check
first needs it, and once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge_methods.base import MergeMethod
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from pydantic import ValidationError

from mergekit_monosoup import parameters
from mergekit_monosoup.check.finding import Finding, Level
from mergekit_monosoup.checkpoints.headers import Headers, LackingError, Stored
from mergekit_monosoup.checkpoints.inputs import Inputs, loads
from mergekit_monosoup.checkpoints.reader import FILE_SUFFIXES, NotThereError, check_path
from mergekit_monosoup.checkpoints.yaml import UniqueKeyLoader

Section = tuple[str, dict[str, Any], str | None]


def mapping(value: Any) -> dict[Any, Any]:
    """Return what is written where a mapping belongs; of anything else, which pydantic names, {}."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[Any]:
    """Return what is written where a list belongs; of anything else, which pydantic names, []."""
    return value if isinstance(value, list) else []


def leaves(value: Any) -> Iterator[Any]:
    """Yield the single values of a parameter: of gradients and filters each."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(value.get("value"))
    elif value is not None:
        yield value


def parameter_sections(data: Any, place: str = "") -> Iterator[Section]:
    """Yield (place, parameters, model they stand under or None) of every `parameters` mapping."""
    if isinstance(data, list):
        for number, item in enumerate(data):
            yield from parameter_sections(item, f"{place}[{number}]")
    elif isinstance(data, dict):
        for key, value in data.items():
            here = f"{place}.{key}" if place else str(key)
            if key != "parameters":
                yield from parameter_sections(value, here)
            elif isinstance(value, dict):
                model = data.get("model")
                yield here, value, str(model) if model is not None else None


def model_entries(data: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping with a `model` key, at any depth."""
    if isinstance(data, list):
        for item in data:
            yield from model_entries(item)
    elif isinstance(data, dict):
        if isinstance(data.get("model"), str):
            yield data
        for value in data.values():
            yield from model_entries(value)


def real_path(path: str) -> str:
    """Return one spelling of a local path."""
    try:
        return os.path.realpath(os.path.expanduser(path))
    except ValueError:  # a null byte
        return path


@dataclass(frozen=True)
class File:
    """A file meant for mergekit-yaml, mergekit-multi (several documents) or mergekit-pytorch.

    Attributes:
        path: as given.
        documents: what it holds, as YAML has it.
        fault: why it could not be read, or empty.
    """

    path: str
    documents: tuple[Any, ...] = ()
    fault: str = ""

    @classmethod
    def read(cls, path: str | Path) -> File:
        """Read a file, whatever is in it."""
        try:
            with open(path, encoding="utf-8") as file:
                documents = list(yaml.load_all(file, Loader=UniqueKeyLoader))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return cls(str(path), fault=str(error))
        return cls(str(path), tuple(d for d in documents if d is not None))

    @cached_property
    def mappings(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """(label, document) of those that may be merges."""
        return tuple(
            (self.label(number), document)
            for number, document in enumerate(self.documents)
            if isinstance(document, dict)
        )

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages of a mergekit-multi file."""
        return tuple(str(d["name"]) for d in self.documents if isinstance(d, dict) and "name" in d)

    def label(self, number: int) -> str:
        """Return what findings call a document; nothing if there is but one."""
        document = self.documents[number]
        if isinstance(document, dict) and "name" in document:
            return f"stage {document['name']}"
        return "" if len(self.documents) == 1 else f"document {number + 1}"


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
class Document:
    """One merge configuration, and what is known about it.

    Attributes:
        data: as YAML has it.
        label: what findings call it: a stage, a document, or nothing.
        stages: names of the stages in its file, whose models do not exist yet.
        headers: the reader of its models' headers.
        sound: no error was found so far; without that mergekit would not get to its plan.
    """

    data: dict[str, Any]
    label: str = ""
    stages: tuple[str, ...] = ()
    headers: Headers = field(default_factory=Headers)
    sound: bool = True

    # -- findings ----------------------------------------------------------------------------------

    def finding(self, level: Level, place: str, message: str) -> Finding:
        """Return a finding at ``place`` in this document."""
        return Finding(level, ": ".join(part for part in (self.label, place) if part), message)

    def error(self, place: str, message: str) -> Finding:
        return self.finding("error", place, message)

    def warning(self, place: str, message: str) -> Finding:
        return self.finding("warning", place, message)

    # -- what is written ---------------------------------------------------------------------------

    @cached_property
    def raw(self) -> bool:
        """Whether it is for mergekit-pytorch, which merges single files."""
        models = [mapping(m).get("model") for m in entries(self.data.get("models"))]
        return any(
            isinstance(m, str) and m.lower().endswith(FILE_SUFFIXES)
            for m in [*models, self.data.get("base_model")]
        )

    @cached_property
    def schema(self) -> type[MergeConfiguration] | type[RawPyTorchMergeConfig]:
        """mergekit's own model of such a file."""
        return RawPyTorchMergeConfig if self.raw else MergeConfiguration

    @cached_property
    def _validated(
        self,
    ) -> MergeConfiguration | RawPyTorchMergeConfig | ValidationError | RuntimeError:
        try:
            written = {key: value for key, value in self.data.items() if key != "name"}
            return self.schema.model_validate(written)
        except (ValidationError, RuntimeError) as error:  # mergekit's own validators raise the last
            return error

    @property
    def config(self) -> MergeConfiguration | RawPyTorchMergeConfig | None:
        """The configuration as mergekit reads it; None where it does not."""
        return None if isinstance(self._validated, Exception) else self._validated

    @property
    def config_error(self) -> ValidationError | RuntimeError | None:
        """Why mergekit does not read it."""
        return self._validated if isinstance(self._validated, Exception) else None

    @cached_property
    def methods(self) -> dict[str, MergeMethod]:
        """All merge methods that mergekit knows, by name."""
        return {method.spec.name: method for method in merge_methods.registered_methods()}

    @cached_property
    def method(self) -> MergeMethod | None:
        """mergekit's merge method of that name."""
        name = self.data.get("merge_method")
        return self.methods.get(name) if isinstance(name, str) else None

    @property
    def own_method(self) -> parameters.Method | None:
        """This package's description of the method, if it is one of its own."""
        return parameters.METHODS.get(str(self.data.get("merge_method")))

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """(place, parameters, model they stand under or None) of every `parameters` mapping."""
        return tuple(parameter_sections(self.data))

    @cached_property
    def tuned(self) -> list[dict[str, Any]]:
        """Entries of the models under `models` that are not the base."""
        base = str(self.data.get("base_model"))
        models = [m for m in entries(self.data.get("models")) if isinstance(m, dict)]
        return [m for m in models if str(m.get("model")) != base]

    # -- models ------------------------------------------------------------------------------------

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Every model that is named, the base first; also stages, which do not exist yet."""
        names = [str(m["model"]) for m in model_entries(self.data)]
        if self.data.get("base_model") is not None:
            names.insert(0, str(self.data["base_model"]))
        return tuple(dict.fromkeys(names))

    @cached_property
    def references(self) -> dict[str, ModelReference | Exception]:
        """Name → what mergekit makes of it, or why it cannot; without stages."""
        return {name: _reference(name) for name in self.models if name not in self.stages}

    @cached_property
    def missing(self) -> dict[str, NotThereError]:
        """Name → error, of models whose path, or that of their adapter, looks local and is not."""
        faults = {name: _missing(reference) for name, reference in self.references.items()}
        return {name: error for name, error in faults.items() if error is not None}

    @cached_property
    def opened(self) -> dict[str, dict[str, Stored] | Exception]:
        """Name → its tensors from headers, or why they cannot be read."""
        return {
            name: self._open(reference)
            for name, reference in self.references.items()
            if name not in self.missing
        }

    def _open(self, reference: ModelReference | Exception) -> dict[str, Stored] | Exception:
        if isinstance(reference, Exception):
            return reference
        try:
            return self.headers.of_model(reference.model.path, reference.model.revision)
        except Exception as error:  # of safetensors, zip, pickle, the hub and its client
            return error

    @cached_property
    def tensors(self) -> dict[str, dict[str, Stored]]:
        """Name → tensors, of the models that could be read."""
        return {n: tensors for n, tensors in self.opened.items() if isinstance(tensors, dict)}

    # -- mergekit's plan ---------------------------------------------------------------------------

    @cached_property
    def local_models(self) -> tuple[ModelReference, ...]:
        """Models of a merge that can be planned from the files that lie here; else none."""
        if not self.sound or not isinstance(self.config, MergeConfiguration):
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
        for reference in self.local_models:
            try:
                known[reference] = arch_info_for_config(reference.config())
            except Exception:  # code of its own, or unknown to this version of transformers
                return {}
        if not known or not all(known.values()):
            return {}
        assert self.config is not None
        first = getattr(self.config, "base_model", None) or self.local_models[0]
        return {first: known[first], **known}  # type: ignore[dict-item] # None is gone

    @cached_property
    def loaders(self) -> dict[ModelReference, LazyTensorLoader]:
        """mergekit's loaders of the local models that can be read, made from our headers."""
        loaders = {}
        for reference in self.local_models:
            with suppress(Exception):  # which `opened` holds
                loaders[reference] = LazyTensorLoader(self.headers.index(reference.model.path))
        return loaders

    @cached_property
    def _planned(self) -> tuple[SaveTensor, ...] | Exception | None:
        """What mergekit's planner makes, or raises now as it would in the merge."""
        if not self.architectures or not isinstance(self.config, MergeConfiguration):
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
    def plan(self) -> tuple[SaveTensor, ...]:
        """The tensors that mergekit would make; none where that is not known."""
        return self._planned if isinstance(self._planned, tuple) else ()

    @property
    def plan_error(self) -> Exception | None:
        """What mergekit's planner raises."""
        return self._planned if isinstance(self._planned, Exception) else None

    @cached_property
    def reads(self) -> Reads:
        """What the planned merge reads; nothing where there is no plan or a model is unreadable."""
        complete = len(self.tensors) == len(self.models)
        return self._compare_reads() if self.plan and complete else Reads()

    def _compare_reads(self) -> Reads:
        every = dict.fromkeys(load for task in self.plan for load in loads(task.tensor_task))
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


def _reference(name: str) -> ModelReference | Exception:
    try:
        return ModelReference.model_validate(name)
    except (ValueError, RuntimeError) as error:  # pydantic's, and mergekit's own
        return error


def _missing(reference: ModelReference | Exception) -> NotThereError | None:
    """Return the error of a path that cannot be a model, the adapter's first."""
    if isinstance(reference, Exception):
        return None
    if reference.lora:
        try:
            check_path(reference.lora.path)
        except NotThereError as error:
            return NotThereError(f"the adapter {reference.lora.path}: {error}")
    try:
        check_path(reference.model.path)
    except NotThereError as error:
        return error
    return None
