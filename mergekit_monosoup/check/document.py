"""Finds what mergekit drops in silence, before hours of merging: misspelt keys and parameters, parameters in a place
where nobody reads them, wrong values, a missing base, tensors whose shapes differ (from file headers only).

Works for every merge method: what a key or parameter may be is read off mergekit's own models and method specs.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.base import MergeMethod, ParameterScope
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from pydantic import BaseModel, ValidationError

from mergekit_monosoup.checkpoints.headers import LackingError
from mergekit_monosoup.checkpoints.inputs import Inputs, loads
from mergekit_monosoup.checkpoints.reader import FILE_SUFFIXES, SHOWN, NotThereError, check_path
from mergekit_monosoup.checkpoints.yaml import UniqueKeyLoader
from mergekit_monosoup.report import PLANNING_ONLY

# This package's methods and which of their parameters may differ between models; the others hold for the whole merge.
PER_MODEL = {"monosoup": {"weight"}, "svc": {"weight", "merged"}}

Shapes = dict[str, tuple[int, ...]]
Headers = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype, as the file has it


@dataclass(frozen=True)
class Finding:
    """``error``: the merge would fail, or not do what the file says. ``warning``: worth a look, or not checkable."""

    level: Literal["error", "warning"]
    where: str
    message: str


class _RefusedError(Exception):
    """mergekit would not begin with this merge."""

    def __init__(self, finding: Finding):
        super().__init__(finding.message)
        self.finding = finding


def check(path: str | Path) -> list[Finding]:
    """Findings for a file meant for mergekit-yaml, mergekit-multi (several documents) or mergekit-pytorch."""
    rehearsal = PLANNING_ONLY.set(True)  # a merge that runs in another thread goes on with its report
    try:
        return _check(path)
    finally:
        PLANNING_ONLY.reset(rehearsal)


def _check(path: str | Path) -> list[Finding]:
    try:
        with open(path, encoding="utf-8") as file:
            documents = [d for d in yaml.load_all(file, Loader=UniqueKeyLoader) if d is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [Finding("error", str(path), f"cannot be read as YAML: {error}")]
    if not documents:
        return [
            Finding("error", str(path), "is empty; it needs at least `merge_method` and `models`")
        ]
    stages = [str(d["name"]) for d in documents if isinstance(d, dict) and "name" in d]
    findings = list(_stage_names(documents, stages))
    for number, document in enumerate(documents):
        where = "" if len(documents) == 1 else f"document {number + 1}"
        if isinstance(document, dict) and "name" in document:
            where = f"stage {document['name']}"
        findings += _Document(document, where, stages).findings()
    return findings


def _stage_names(documents: list[Any], stages: list[str]) -> Iterator[Finding]:
    """mergekit-multi replaces every string equal to a stage name by a path, also methods and option values."""
    for stage in stages:
        if any(stage in _strings(d) for d in documents if isinstance(d, dict)):
            yield Finding(
                "error",
                f"stage {stage}",
                f"mergekit-multi also replaces the option value or method {stage!r} by a path: "
                "rename the stage",
            )
    reports = [
        path
        for d in documents
        if isinstance(d, dict)
        for path in {_place(report) for report in _reports(d)}
    ]
    for report in {r for r in reports if reports.count(r) > 1}:
        yield Finding(
            "warning",
            "report",
            f"several stages write {report}: only the last is kept, give each its own file",
        )


def _strings(document: dict[str, Any]) -> set[str]:
    """Strings that are not model references: method, dtypes, parameter values."""
    references = ("name", "base_model", "tokenizer_source")
    found = {v for k, v in document.items() if k not in references and isinstance(v, str)}
    for _, parameters, _ in _parameter_sections(document):
        found |= {
            leaf
            for value in parameters.values()
            for leaf in _leaves(value)
            if isinstance(leaf, str)
        }
    return found


def _reports(document: dict[str, Any]) -> Iterator[str]:
    for _, parameters, _ in _parameter_sections(document):
        yield from (leaf for leaf in _leaves(parameters.get("report")) if isinstance(leaf, str))


def _place(path: str) -> str:
    """One spelling of a local path."""
    try:
        return os.path.realpath(os.path.expanduser(path))
    except ValueError:  # a null byte
        return path


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(value.get("value"))
    elif value is not None:
        yield value


def _parameter_sections(
    document: Any, where: str = ""
) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """(where, parameters, model they stand under or None) of every `parameters` mapping."""
    if isinstance(document, list):
        for number, item in enumerate(document):
            yield from _parameter_sections(item, f"{where}[{number}]")
    elif isinstance(document, dict):
        for key, value in document.items():
            place = f"{where}.{key}" if where else str(key)
            if key == "parameters":
                if isinstance(value, dict):
                    model = document.get("model")
                    yield place, value, str(model) if model is not None else None
            else:
                yield from _parameter_sections(value, place)


def _mapping(value: Any) -> dict[Any, Any]:
    """What is written where a mapping belongs; pydantic names anything else."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(sorted(known))}"


class _Document:
    """One merge configuration."""

    def __init__(self, document: Any, where: str, stages: list[str]):
        self.data = document
        self.where = where
        self.stages = stages

    def _at(self, place: str) -> str:
        return ": ".join(part for part in (self.where, place) if part)

    def findings(self) -> Iterator[Finding]:
        if not isinstance(self.data, dict):
            yield Finding(
                "error", self._at("top level"), f"must be a mapping, not {type(self.data).__name__}"
            )
            return
        schema = RawPyTorchMergeConfig if self._is_raw() else MergeConfiguration
        found = list(self._unknown_keys([schema], self.data, ""))
        config = None
        try:
            config = schema.model_validate({k: v for k, v in self.data.items() if k != "name"})
        except ValidationError as error:
            found += [
                Finding("error", self._at(place), message)
                for place, message in _plain(error).items()
            ]
        except RuntimeError as error:  # mergekit's own validators raise it
            found.append(Finding("error", self._at("top level"), str(error)))
        name = self.data.get("merge_method")
        methods = {m.spec.name: m for m in merge_methods.registered_methods()}
        method = methods.get(name) if isinstance(name, str) else None
        if method is not None:
            found += self._parameters(method)
            if config is not None:
                found += self._inputs(method)
        elif isinstance(name, str):
            found.append(
                Finding(
                    "error",
                    self._at("merge_method"),
                    f"{name!r} is not a merge method{_nearest(name, methods)}",
                )
            )
        found += self._dtypes()
        yield from found
        planned: list[SaveTensor] | None = None
        if isinstance(config, MergeConfiguration) and not any(
            finding.level == "error" for finding in found
        ):
            try:
                planned = self._plan(config)
            except _RefusedError as error:
                yield error.finding
        yield from self._tensors(planned)

    def _plan(self, config: MergeConfiguration) -> list[SaveTensor] | None:
        """The tensors that mergekit would make; None where that takes more than the files that lie here."""
        references = config.referenced_models()
        if any(r.lora or not os.path.isdir(r.model.path) for r in references):
            return None
        kinds: dict[ModelReference, ModelArchitecture] = {}
        for reference in references:
            if not os.path.exists(os.path.join(reference.model.path, "config.json")):
                raise self._refused(str(reference), "has no config.json, which mergekit needs")
            try:
                kind = arch_info_for_config(reference.config())
            except (
                Exception
            ):  # it has code of its own, not to be run here, or this transformers does not know it
                return None
            if kind is None:
                return None  # mergekit infers such architectures from all files
            kinds[reference] = kind
        first = config.base_model or references[0]
        for other in references:
            if kinds[other] != kinds[first]:
                names = [next(iter(r.config().architectures or []), "?") for r in (other, first)]
                raise self._refused(
                    str(other),
                    f"is a {names[0]} and {first} a {names[1]}; mergekit merges them with --allow-crimes only",
                )
        for number, piece in enumerate(config.slices or []):
            for source in piece.sources:
                layers = getattr(source.model.config(), "num_hidden_layers", math.inf)
                if (
                    source.layer_range is not None
                    and not 0 <= source.layer_range[0] <= source.layer_range[1] <= layers
                ):
                    raise self._refused(
                        f"slices[{number}]",
                        f"layer_range {list(source.layer_range)}: {source.model} has {layers}",
                    )
        shape = first.config()
        if unknown := sorted(set(config.modules or {}) - set(kinds[first].modules)):
            known = ", ".join(kinds[first].modules)
            raise self._refused(
                f"modules.{unknown[0]}", f"{first} has no such module, it has: {known}"
            )
        try:  # on a copy, for the planner rewrites the configuration
            planner = MergePlanner(
                config.model_copy(deep=True), kinds[first], MergeOptions(quiet=True), shape
            )
            tasks = planner.plan_to_disk("")  # which only writes when it is executed
            return [task for task in tasks if isinstance(task, SaveTensor)]
        except Exception as error:  # whatever it raises now it would raise in the merge
            raise self._refused("top level", f"mergekit cannot plan this merge: {error}") from error

    def _refused(self, place: str, message: str) -> _RefusedError:
        return _RefusedError(Finding("error", self._at(place), message))

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _is_raw(self) -> bool:
        models = [m.get("model") for m in _list(self.data.get("models")) if isinstance(m, dict)]
        return any(
            isinstance(m, str) and m.lower().endswith(FILE_SUFFIXES)
            for m in [*models, self.data.get("base_model")]
        )

    def _unknown_keys(
        self, schemas: list[type[BaseModel]], data: Mapping[str, Any], place: str
    ) -> Iterator[Finding]:
        """Keys that none of ``schemas`` has, the members of a union that ``data`` may be."""
        known = {key: field for schema in schemas for key, field in schema.model_fields.items()}
        for key, value in data.items():
            here = f"{place}.{key}" if place else str(key)
            if key in known:
                for models, sub, sub_place in _nested(known[key].annotation, value, here):
                    yield from self._unknown_keys(models, sub, sub_place)
            elif not (place == "" and key == "name"):  # a stage of a mergekit-multi file
                yield Finding(
                    "error",
                    self._at(here),
                    f"unknown key, mergekit ignores it{_nearest(str(key), known)}",
                )

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _parameters(self, method: MergeMethod) -> Iterator[Finding]:
        known = {p.name: p for p in method.spec.parameters}
        base = self.data.get("base_model")
        for place, parameters, model in _parameter_sections(self.data):
            for name, value in parameters.items():
                here = self._at(f"{place}.{name}")
                if name not in known:
                    yield Finding(
                        "error",
                        here,
                        f"{method.spec.name} has no such parameter, mergekit ignores it{_nearest(str(name), known)}",
                    )
                    continue
                scope = known[name].scope
                if model is not None and scope == ParameterScope.SHARED:
                    yield Finding(
                        "error",
                        here,
                        "is ignored under a model: write it under the top-level `parameters`",
                    )
                if model is not None and model == str(base) and scope == ParameterScope.NON_BASE:
                    yield Finding(
                        "error",
                        here,
                        "is ignored under base_model: write it under a fine-tuned model or top-level",
                    )
                yield from self._values(here, known[name].validate, value)
        if (per_model := PER_MODEL.get(method.spec.name)) is not None:
            yield from self._agreement([name for name in known if name not in per_model])
            yield from self._weightless()
        if "merged" in known:
            yield from self._merged()
        if "mode" in known and "R" in known:
            yield from self._unread()

    def _tuned(self) -> list[dict[str, Any]]:
        base = str(self.data.get("base_model"))
        return [
            m
            for m in _list(self.data.get("models"))
            if isinstance(m, dict) and str(m.get("model")) != base
        ]

    def _unread(self) -> Iterator[Finding]:
        """`R` without the mode that reads it; a filter that no tensor's name contains is looked for in `_tensors`."""
        written = [parameters for _, parameters, _ in _parameter_sections(self.data)]
        modes = {leaf for parameters in written for leaf in _leaves(parameters.get("mode"))}
        if any("R" in parameters for parameters in written) and "variance" not in modes:
            yield Finding(
                "warning",
                self._at("R"),
                "is read by `mode: variance` only, and the mode is freevariance",
            )

    def _weightless(self) -> Iterator[Finding]:
        shared = _mapping(self.data.get("parameters")).get("weight", 1.0)
        weights = [_mapping(m.get("parameters")).get("weight", shared) for m in self._tuned()]
        if weights and all(isinstance(weight, int | float) and weight == 0 for weight in weights):
            yield Finding(
                "error",
                self._at("weight"),
                "is 0 for every fine-tuned model; give at least one a weight > 0",
            )

    def _values(self, here: str, validate: Any, value: Any) -> Iterator[Finding]:
        conditions = [
            c for c in (value if isinstance(value, list) else [value]) if isinstance(c, dict)
        ]
        for number, condition in enumerate(conditions):
            for key in condition:
                if key not in ConditionalParameter.model_fields:
                    yield Finding(
                        "error",
                        here,
                        f"unknown key `{key}` in a filter{_nearest(str(key), ConditionalParameter.model_fields)}",
                    )
            if condition.get("filter") in (None, "*") and number < len(conditions) - 1:
                yield Finding(
                    "error",
                    here,
                    "an entry without `filter` comes before others, which are never reached: put it last",
                )
        if value is None:
            yield Finding("error", here, "has no value; leave the line out to get the default")
        for leaf in _leaves(value):
            try:
                validate(leaf)
            except ValidationError as error:
                yield Finding("error", here, error.errors()[0]["msg"].removeprefix("Value error, "))

    def _agreement(self, merge_wide: list[str]) -> Iterator[Finding]:
        for name in merge_wide:
            values = [_mapping(m.get("parameters")).get(name, "unset") for m in self._tuned()]
            if any(value != values[0] for value in values):
                yield Finding(
                    "error",
                    self._at(name),
                    f"holds for the whole merge but the models disagree ({values}): write it under the top-level `parameters`",
                )

    def _merged(self) -> Iterator[Finding]:
        """`svc`: at most one model is the merge of the others, and those are two or more."""
        tuned = self._tuned()
        flagged = [
            str(m.get("model"))
            for m in tuned
            if _mapping(m.get("parameters")).get("merged") is True
        ]
        if len(flagged) > 1:
            yield Finding(
                "error",
                self._at("merged"),
                f"is true for {', '.join(flagged)}; at most one can be the merge",
            )
        elif flagged and len(tuned) < 3:
            yield Finding(
                "error",
                self._at("models"),
                f"svc needs two task models beside {flagged[0]}, which is `merged`",
            )

    # -- models -------------------------------------------------------------------------------------------------------

    def _inputs(self, method: MergeMethod) -> Iterator[Finding]:
        for place, group, base in self._groups():
            ids = [str(m.get("model")) for m in group]
            if twice := sorted({name for name in ids if ids.count(name) > 1}):
                yield Finding("error", self._at("models"), f"listed twice: {', '.join(twice)}")
            ids = list(dict.fromkeys(ids))
            places: dict[str, str] = {}
            for name in [*([str(base)] if base is not None else []), *ids]:
                if os.path.exists(name) and places.setdefault(_place(name), name) != name:
                    yield Finding(
                        "error",
                        self._at(name),
                        f"is the same model as {places[_place(name)]}; mergekit takes two spellings for two models",
                    )
            if base is not None and str(base) not in ids and place is None:
                ids.append(str(base))
            try:
                method.validate_inputs(
                    ids,
                    str(base) if base is not None else None,
                    group_name=place,
                )
            except ValueError as error:
                yield Finding("error", self._at("models"), str(error))

    def _groups(self) -> Iterator[tuple[str | None, list[Any], Any]]:
        """(name of the slice or None, models, base model) of everything that is merged as one."""
        for section in (self.data, *_mapping(self.data.get("modules")).values()):
            base = self.data.get("base_model")
            if section.get("models"):
                yield None, section["models"], base
            for number, piece in enumerate(section.get("slices") or []):
                yield (
                    f"model.slices[{number}]",
                    piece.get("sources") or [],
                    piece.get("base_model") or base,
                )

    def _dtypes(self) -> Iterator[Finding]:
        sizes = {}
        for key in ("dtype", "out_dtype"):
            if isinstance(name := self.data.get(key), str):
                try:
                    dtype = dtype_from_name(name)
                except (RuntimeError, AttributeError, KeyError) as error:
                    yield Finding("error", self._at(key), f"{name!r} is not a dtype ({error})")
                else:
                    sizes[key] = dtype.itemsize if dtype else 0
        if str(self.data.get("merge_method")) in PER_MODEL and sizes.get(
            "out_dtype", 9
        ) < sizes.get("dtype", 0):
            yield Finding(
                "warning",
                self._at("out_dtype"),
                "mergekit rounds to it after the method: `realised` in the report is that "
                "of `dtype`, what is stored may be less",
            )

    def _tensors(self, planned: list[SaveTensor] | None) -> Iterator[Finding]:
        """Compares tensors of the same name between the base (or first) model and each other one."""
        names = [str(m["model"]) for m in _models(self.data)]
        if self.data.get("base_model") is not None:
            names.insert(0, str(self.data["base_model"]))
        found: dict[str, Shapes] = {}
        dtypes: set[str] = set()
        for name in dict.fromkeys(names):
            if name in self.stages:
                continue  # does not exist yet
            try:
                reference = ModelReference.model_validate(name)
                path = reference.model.path
                hub_like = (
                    os.path.exists(path)
                    and not path.startswith((".", "/"))
                    and path.count("/") <= 1
                )
                if hub_like and not self._is_raw():  # mergekit-pytorch writes no model card
                    yield Finding(
                        "warning",
                        self._at(name),
                        f"looks like a hub name to mergekit's model card: write ./{path}, or an offline merge fails at its end",
                    )
                tensors = headers(reference)
                found[name] = {tensor: shape for tensor, (shape, _) in tensors.items()}
                stored_as = {tensor: dtype for tensor, (_, dtype) in tensors.items()}
                dtypes |= set(stored_as.values())
                yield from self._stored(name, stored_as, found[name])
                if reference.lora:
                    yield Finding(
                        "warning", self._at(name), "the LoRA adapter's own shapes are not checked"
                    )
            except NotThereError as error:
                yield Finding("error", self._at(name), str(error))
            except Exception as error:  # a hub that does not answer is no fault of the file; what lies here and is damaged is
                if os.path.exists(name):
                    yield Finding(
                        "error", self._at(name), f"cannot be read: {type(error).__name__}: {error}"
                    )
                else:
                    yield Finding(
                        "warning",
                        self._at(name),
                        f"shapes not checked: {type(error).__name__}: {error}",
                    )
        if not found:
            return
        yield from self._working_dtype(dtypes)
        stored = {tensor for tensors in found.values() for tensor in tensors}
        yield from self._filters(
            stored if planned is None else {task.tensor_name for task in planned}, stored
        )
        # Of models that are cut into slices not every tensor is merged, nor with that of the same name.
        sections = (self.data, *map(_mapping, _mapping(self.data.get("modules")).values()))
        sliced = any(s.get("slices") for s in sections)
        level: Literal["error", "warning"] = "warning" if sliced else "error"
        lacking, unread = (
            _missed(planned) if planned and len(found) == len(set(names)) else ({}, {})
        )
        for model in [] if sliced else sorted(unread, key=[*found, *unread].index):
            yield Finding(
                "warning",
                self._at(model),
                f"{len(unread[model])} tensor(s) that mergekit does not read, so the merged model will not have them: "
                f"{', '.join(sorted(unread[model])[:SHOWN])}",
            )
        for model, needed in lacking.items():
            yield Finding(
                "error",
                self._at(model),
                f"lacks {len(needed)} tensor(s) that the merge needs, whole or in part: {', '.join(sorted(needed)[:SHOWN])}; "
                "is the checkpoint complete?",
            )
        first, *others = found
        aligned = (
            self.data.get("tokenizer") is not None or self.data.get("tokenizer_source") is not None
        )
        for other in others:
            differing = [
                t
                for t in found[first]
                if t in found[other]
                and found[first][t] != found[other][t]
                and not (aligned and _only_vocabulary(t, found[first][t], found[other][t]))
            ]
            for tensor in differing[:SHOWN]:
                hint = ""
                if _only_vocabulary(tensor, found[first][tensor], found[other][tensor]):
                    hint = "; the vocabularies differ: add `tokenizer: {source: base}`"
                yield Finding(
                    level,
                    self._at(tensor),
                    f"{found[first][tensor]} in {first} but {found[other][tensor]} in {other}{hint}",
                )
            if len(differing) > SHOWN:
                yield Finding(
                    level,
                    self._at(other),
                    f"{len(differing) - SHOWN} more tensors differ in shape from {first}",
                )
            if found[first] and found[other] and not set(found[first]) & set(found[other]):
                yield Finding(
                    "error",
                    self._at(other),
                    f"has no tensor name in common with {first}: another architecture?",
                )
                continue
            for missing, here, there in (
                (set(found[first]) - set(found[other]), other, first),
                (set(found[other]) - set(found[first]), first, other),
            ):
                if missing and here not in lacking:
                    yield Finding(
                        "warning",
                        self._at(here),
                        f"lacks {len(missing)} tensor(s) of {there}: {', '.join(sorted(missing)[:SHOWN])}",
                    )

    def _filters(self, tensors: set[str], stored: set[str]) -> Iterator[Finding]:
        """Filters that match nothing; ``tensors``: by the names that mergekit matches, if known, ``stored``: in the files."""
        for place, parameters, _ in _parameter_sections(self.data):
            for name, value in parameters.items():
                for condition in value if isinstance(value, list) else [value]:
                    wanted = condition.get("filter") if isinstance(condition, dict) else None
                    if (
                        isinstance(wanted, str)
                        and wanted != "*"
                        and not any(wanted in tensor for tensor in tensors)
                    ):
                        renamed = (
                            "as mergekit has them: it stacks or renames what the files call so"
                        )
                        why = (
                            renamed
                            if any(wanted in tensor for tensor in stored)
                            else "it is plain text, not a pattern"
                        )
                        yield Finding(
                            "warning",
                            self._at(f"{place}.{name}"),
                            f"filter {wanted!r} is part of no tensor's name ({why})",
                        )

    def _stored(self, model: str, dtypes: dict[str, str], shapes: Shapes) -> Iterator[Finding]:
        """Codes that no method knows what to do with."""
        codes = sorted(
            name
            for name, dtype in dtypes.items()
            if len(shapes[name]) > 1
            and _bits(dtype) <= 8
            and (
                "float" in dtype.lower()
                or dtype.startswith("F")
                or name.endswith(("weight", "blocks"))
            )
        )
        if codes:
            yield Finding(
                "error",
                self._at(model),
                f"is quantised: {len(codes)} tensor(s) hold {dtypes[codes[0]]} codes, {codes[0]} for "
                "one, and mergekit would merge the codes; convert the checkpoint to bfloat16 first",
            )

    def _working_dtype(self, dtypes: Iterable[str]) -> Iterator[Finding]:
        """`out_dtype` without `dtype`: the methods compute and round in what the checkpoints are stored in."""
        name = self.data.get("out_dtype")
        ours = str(self.data.get("merge_method")) in PER_MODEL
        if not ours or self.data.get("dtype") is not None or not isinstance(name, str):
            return
        widest = max((d for d in dtypes if "F" in d.upper()), key=_bits, default=None)
        try:
            out = dtype_from_name(name)
        except (RuntimeError, AttributeError, KeyError):
            return  # said already
        if widest is None or out is None or 8 * out.itemsize == _bits(widest):
            return
        if 8 * out.itemsize > _bits(widest):
            message = f"only stores wider what was rounded to {widest} before: add `dtype: {name}`"
        else:
            message = (
                f"mergekit rounds to it after the method: `realised` in the report is that of {widest}, what is stored may "
                "be less"
            )
        yield Finding("warning", self._at("out_dtype"), message)


def _bits(dtype: str) -> int:
    """Of safetensors' names (BF16, F8_E4M3) and torch's (torch.bfloat16)."""
    return int(found[0]) if (found := re.findall(r"\d+", dtype)) else 8


def _plain(error: ValidationError) -> dict[str, str]:
    """Place -> message. One mistake in a parameter fails every member of pydantic's union of what it may be."""
    found: dict[str, str] = {}
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        if "parameters" in loc[:-1]:
            place = ".".join(loc[: loc.index("parameters") + 2])
            found.setdefault(
                place,
                "must be a value, a list of values (a gradient), or a list of `filter` and `value`",
            )
        else:
            found.setdefault(".".join(loc), item["msg"])
    return found


def _only_vocabulary(tensor: str, left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return left[1:] == right[1:] and ("embed" in tensor or "lm_head" in tensor)


def _models(data: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping with a `model` key, at any depth."""
    if isinstance(data, list):
        for item in data:
            yield from _models(item)
    elif isinstance(data, dict):
        if isinstance(data.get("model"), str):
            yield data
        for value in data.values():
            yield from _models(value)


def _nested(
    annotation: Any, value: Any, place: str
) -> Iterator[tuple[list[type[BaseModel]], Mapping[str, Any], str]]:
    """(models, mapping, place) of every mapping in ``value`` that pydantic would read as one of these models."""
    members = list(_members(annotation))
    if isinstance(value, dict):
        # References (plain strings in YAML) and parameter values are looked at elsewhere.
        models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        models = [m for m in models if m not in (ModelReference, ConditionalParameter)]
        if models:
            yield models, value, place
    for member in members:
        arguments = typing.get_args(member)
        if isinstance(value, list) and typing.get_origin(member) is list:
            for number, item in enumerate(value):
                yield from _nested(arguments[0], item, f"{place}[{number}]")
        elif isinstance(value, dict) and typing.get_origin(member) is dict:
            for key, item in value.items():
                yield from _nested(arguments[1], item, f"{place}.{key}")


def _members(annotation: Any) -> Iterator[Any]:
    """Of a union, however deep; anything else is its own."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


def _missed(tasks: Sequence[SaveTensor]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Model -> tensors (mergekit's names) without which mergekit would stop, and tensors (of the files) that it passes by.

    All models are readable folders.
    """
    loads = dict.fromkeys(load for task in tasks for load in loads(task.tensor_task))
    models = dict.fromkeys(load.model for load in loads)
    inputs = Inputs(
        {m: LazyTensorLoader(ShardedTensorIndex.from_disk(m.model.path)) for m in models}
    )
    lacking: dict[str, set[str]] = {}
    stored = {str(model): set(inputs.loaders[model].index.tensor_paths) for model in models}
    read: set[str] = set()
    for load in loads:
        # Tied weights are stored under several names, and any of them will do.
        read |= {load.tensor, *(load.aliases or ()), *(load.tied_names or ())}
        try:
            read |= {source.name for source in inputs.sources(load)[0]}
        except LackingError:
            lacking.setdefault(str(load.model), set()).add(load.tensor)
    # What is read of any model is in the merged one: modules may take their tensors from different models.
    return lacking, {
        m: left for m, names in stored.items() if m not in lacking and (left := names - read)
    }


def headers(model: ModelReference) -> Headers:
    """Shapes and dtypes of a model's tensors from file headers: a local folder or file, or a hub repository of safetensors.

    Raises:
        NotThereError: the path, or that of the adapter, looks local but does not exist.
    """
    if model.lora:
        try:
            check_path(model.lora.path)
        except NotThereError as error:
            raise NotThereError(f"the adapter {model.lora.path}: {error}") from None
    path = model.model.path
    if os.path.isdir(path):
        index = ShardedTensorIndex.from_disk(path)
        files = [os.path.join(index.base_path, shard.filename) for shard in index.shards]
        return {name: header for file in files for name, header in _file_headers(file).items()}
    if os.path.isfile(path):
        return _file_headers(path)
    check_path(path)
    from huggingface_hub import get_safetensors_metadata

    metadata = get_safetensors_metadata(path, revision=model.model.revision)
    return {
        n: (tuple(t.shape), t.dtype)
        for file in metadata.files_metadata.values()
        for n, t in file.tensors.items()
    }


def _file_headers(path: str) -> Headers:
    if path.lower().endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    import torch

    state = torch.load(path, map_location="meta", weights_only=True)
    if "state_dict" in state:
        raise ValueError(
            "wrapped in {'state_dict': …}, which mergekit-pytorch does not unwrap; save the inner dictionary"
        )
    return {
        name: (tuple(t.shape), str(t.dtype))
        for name, t in state.items()
        if isinstance(t, torch.Tensor)
    }
