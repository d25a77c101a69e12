"""What checks look at: one document, and what is read or planned for it on demand.

Everything here is frozen; what takes time (headers, mergekit's plan) is computed when a check
first needs it, and once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from pydantic import ValidationError
from transformers import PretrainedConfig

from mergekit_monosoup import parameters
from mergekit_monosoup.check.document import model_entries, tokenizer_source
from mergekit_monosoup.check.finding import Finding, Level
from mergekit_monosoup.check.planning import Planning
from mergekit_monosoup.checkpoints import quantisation
from mergekit_monosoup.checkpoints.beside import Beside
from mergekit_monosoup.checkpoints.coverage import Reads
from mergekit_monosoup.checkpoints.headers import Headers, LackingError, Stored
from mergekit_monosoup.checkpoints.paths import NotThereError, check_model_path, is_single_file
from mergekit_monosoup.checkpoints.renaming import Renaming, renaming
from mergekit_monosoup.checkpoints.sections import Section, entries, mapping, parameter_sections


@dataclass(frozen=True)
class Document:
    """One merge configuration, and what is known about it.

    Attributes:
        data: as YAML has it.
        label: what findings call it: a stage, a document, or nothing.
        stages: names of the stages in its file, whose models do not exist yet.
        origins: stage → the model whose configuration and tokenizer it will have.
        headers: the reader of its models' headers.
        sound: no error was found so far; without that mergekit would not get to its plan.
    """

    data: dict[str, Any]
    label: str = ""
    stages: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
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
            isinstance(m, str) and is_single_file(m) for m in [*models, self.data.get("base_model")]
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
    def adapters(self) -> dict[str, dict[str, Stored] | Exception]:
        """Name → tensors of its adapter, or why they cannot be read; of BASE+ADAPTER only."""
        return {
            name: self._open_adapter(reference.lora)
            for name, reference in self.references.items()
            if isinstance(reference, ModelReference) and reference.lora and name not in self.missing
        }

    def _open_adapter(self, adapter: ModelPath) -> dict[str, Stored] | Exception:
        try:
            return self.headers.of_adapter(adapter.path, adapter.revision)
        except Exception as error:  # as above
            return error

    @cached_property
    def tensors(self) -> dict[str, dict[str, Stored]]:
        """Name → tensors, of the models that could be read."""
        return {n: tensors for n, tensors in self.opened.items() if isinstance(tensors, dict)}

    @cached_property
    def renamed(self) -> dict[str, Renaming]:
        """Name → what tells its tensors' names from the first model's, as a wrapper's does."""
        first, *others = self.tensors.items() or [("", {})]
        found = {name: renaming(first[1], tensors) for name, tensors in others}
        return {name: how for name, how in found.items() if how is not None}

    @cached_property
    def beside(self) -> dict[str, Beside]:
        """Name → the files beside its weights, of every local folder that the document names."""
        names = [*self.models, *self.origins.values(), str(tokenizer_source(self.data))]
        folders = {name: _local_folder(_reference(name), "model") for name in names}
        read = {folder: Beside(folder) for folder in folders.values()}  # BASE and BASE+ADAPTER
        return {name: read[folder] for name, folder in folders.items() if folder}

    @cached_property
    def adapter_folders(self) -> dict[str, Beside]:
        """Name → the files beside its adapter, of adapters in local folders."""
        folders = {n: _local_folder(reference, "lora") for n, reference in self.references.items()}
        return {name: Beside(folder) for name, folder in folders.items() if folder}

    @cached_property
    def configs(self) -> dict[str, PretrainedConfig | Exception]:
        """Name → config.json as mergekit loads it, or its error; of folders that have one.

        Code of the model's own is not run: without it transformers raises.
        """
        return {
            name: _config(_reference(name))
            for name, beside in self.beside.items()
            if beside.has("config.json")
        }

    @cached_property
    def quantised(self) -> dict[str, str]:
        """Name → what is wrong, of the models whose matrices are stored as codes."""
        faults = {
            name: quantisation.fault(tensors, self._quantiser(name))
            for name, tensors in self.tensors.items()
        }
        return {name: fault for name, fault in faults.items() if fault}

    def _quantiser(self, name: str) -> str:
        return quantisation.method(self.beside[name]) if name in self.beside else ""

    @property
    def comparable(self) -> dict[str, dict[str, Stored]]:
        """Name → tensors, of the models that hold numbers.

        The tensors of a quantised one have other names and shapes, which says nothing new.
        """
        return {n: tensors for n, tensors in self.tensors.items() if n not in self.quantised}

    # -- mergekit's plan ---------------------------------------------------------------------------

    @cached_property
    def planning(self) -> Planning:
        """What mergekit would plan; nothing after an error, or for mergekit-pytorch."""
        config = self.config
        unreadable = any(isinstance(outcome, LackingError) for outcome in self.opened.values())
        if not self.sound or unreadable or not isinstance(config, MergeConfiguration):
            config = None
        return Planning(config, self.headers)

    @property
    def reads(self) -> Reads:
        """What the planned merge reads; nothing without a plan, or where a model is unreadable."""
        complete = len(self.comparable) == len(self.models)
        return self.planning.reads if complete and self.planning.is_made else Reads()


def _reference(name: str) -> ModelReference | Exception:
    try:
        return ModelReference.model_validate(name)
    except (ValueError, RuntimeError) as error:  # pydantic's, and mergekit's own
        return error


def _local_folder(reference: ModelReference | Exception, part: str) -> str:
    """Return the folder of a model or of its adapter; empty if it is none that lies here."""
    place = getattr(reference, part, None)
    return place.path if place is not None and os.path.isdir(place.path) else ""


def _config(reference: ModelReference | Exception) -> PretrainedConfig | Exception:
    assert isinstance(reference, ModelReference)  # or there would be no folder
    try:
        return reference.config()
    except Exception as error:  # of JSON, of transformers' validation, of the configuration's class
        return error


def _missing(reference: ModelReference | Exception) -> NotThereError | None:
    """Return the error of a path that cannot be a model, the adapter's first."""
    if isinstance(reference, Exception):
        return None
    if reference.lora:
        try:
            check_model_path(reference.lora.path)
        except NotThereError as error:
            return NotThereError(f"the adapter {reference.lora.path}: {error}")
    try:
        check_model_path(reference.model.path)
    except NotThereError as error:
        return error
    return None
