"""A file of several stages, as mergekit-multi takes it: each stage a merge that can be resumed.

mergekit's own code reads the stages and puts the folder of a stage where its name stands. Until the
last one is in OUT, a merge of several stages is unfinished, and the models of the others lie in its
work folder, or in a folder of the user's (`--intermediate-dir`), where they stay.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.multimerge import load_config
from pydantic import ValidationError

from mergekit_monosoup.check.document import File, circle, stage_name
from mergekit_monosoup.check.keys import refusals
from mergekit_monosoup.distributed.dependencies import versions
from mergekit_monosoup.distributed.driver import Part, Request
from mergekit_monosoup.distributed.folder import WorkFolder, check_free
from mergekit_monosoup.distributed.publication import FolderError
from mergekit_monosoup.distributed.records import Done

# Of the folder of a stage. A + would be taken for an adapter, an @ for a revision.
NAME = re.compile(r"\w([\w. -]*[\w-])?")
LAST = "the last stage"  # what messages call the one without a name

# Merges a stage into its folder, which is claimed, and returns the records of its batches.
Way = Callable[[Request, WorkFolder], list[Done]]


@dataclass(frozen=True)
class Stage:
    """One document of the file.

    Attributes:
        name: as it says; empty for the stage whose model goes to OUT.
        config: mergekit's, with the folders of stages in place of their names.
        document: as YAML has it, without its name.
        earlier: names of the stages that it is made from, and they from, in the order of the file.
        foreign: its models that are no stages.
    """

    name: str
    config: MergeConfiguration
    document: dict[str, Any]
    earlier: tuple[str, ...]
    foreign: tuple[ModelReference, ...]


@dataclass(frozen=True)
class Recipe:
    """A file of several stages, and where their models go.

    Attributes:
        source: text of the file.
        stages: in an order in which they can be merged; the last is the one without a name.
        out: the output folder.
        intermediate: where the user wants the other models; None: nowhere, when all is done.
    """

    source: str
    stages: tuple[Stage, ...]
    out: Path
    intermediate: str | None

    @property
    def earlier(self) -> tuple[Stage, ...]:
        """All stages but the last."""
        return self.stages[:-1]

    @property
    def last(self) -> Stage:
        """The stage whose model goes to OUT."""
        return self.stages[-1]

    @property
    def root(self) -> str:
        """The folder of the folders of the stages, as configurations name it."""
        return _root(self.out, self.intermediate)

    def folder(self, stage: Stage) -> Path:
        """Return where the model of a stage goes."""
        return Path(self.root, stage.name) if stage.name else self.out

    @cached_property
    def paths(self) -> dict[str, str]:
        """Path of each earlier stage, as configurations name it → its name."""
        return {os.path.join(self.root, stage.name): stage.name for stage in self.earlier}

    @property
    def written(self) -> str:
        """The configuration that is in the finished model."""
        return self.part(self.last).card or self.last.config.to_yaml()

    def check_names(self, path: str) -> None:
        """Check that no stage is named in vain, and none that there is not.

        Raises:
            ValueError: one is; names the file, ``path``.
        """
        for stage in self.stages:
            for reference in stage.foreign:
                name = reference.model.path
                if "/" not in name and not os.path.exists(name):
                    there = ", ".join(other.name for other in self.earlier) or "none"
                    raise ValueError(
                        f"{path}: {_label(stage.name)}: {name} is no folder here, and no stage of "
                        f"this file (which has {there})"
                    )
        unused = [stage.name for stage in self.earlier if stage.name not in self.last.earlier]
        if unused and self.intermediate is None:
            raise ValueError(
                f"{path}: nothing is made from the stage {unused[0]}: its model would be removed "
                "at once. --intermediate-dir DIR keeps it, or leave it out"
            )

    def part(self, stage: Stage) -> Part:
        """Return what the merge of a stage has of its own."""
        documents = {other.name: other.document for other in self.earlier}
        quotable, card = _quotable(stage.config), yaml.safe_dump(stage.document, sort_keys=False)
        return Part(
            earlier={name: documents[name] for name in stage.earlier},
            # Without the models of the stages their names mean nothing, so it is the whole file.
            card=(None if quotable else card) if self.intermediate else self.source,
            names={} if self.intermediate else self.paths,
            kept=bool(stage.name),
        )


def _root(out: Path, intermediate: str | None) -> str:
    if intermediate is None:
        intermediate = os.path.join(out, *WorkFolder(out).own_stages.parts[-2:])
    # mergekit takes a/b for a hub name in places.
    relative = not os.path.isabs(intermediate) and not intermediate.startswith(".")
    return os.path.join(".", intermediate) if relative else intermediate


def _quotable(config: MergeConfiguration) -> bool:
    """Return whether mergekit can write a configuration: with a space in a path it cannot."""
    try:
        return bool(config.to_yaml())
    except ValueError:  # of pydantic
        return False


# -- what is read ----------------------------------------------------------------------------------


def read(path: str, source: str, documents: Sequence[Any], out: Path, keep: str | None) -> Recipe:
    """Return the stages of a file.

    Args:
        path: of the file, for errors.
        source: its text.
        documents: what YAML makes of it.
        out: the output folder.
        keep: the folder that the models of the stages stay in; None: they are removed.

    Raises:
        ValueError: mergekit does not accept them, or they cannot be merged one after the other.
    """
    written = [document for document in documents if document is not None]
    if not written:
        raise ValueError(f"{path}: is empty; it needs at least `merge_method` and `models`")
    if faults := list(_faults(path, written)):
        raise ValueError("\n".join(f"{path}: {fault}" for fault in faults))
    try:
        text = yaml.safe_dump_all(written, allow_unicode=True, sort_keys=False)
        loaded: Any = load_config(text, _root(out, keep))  # annotated as if all had names
        configs, needed = loaded
        order = _order(list(configs), needed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    by_name = {document.get("name"): _without_name(document) for document in written}
    stages = []
    for name in order:
        earlier = _all_needed(name, needed, list(by_name))
        models = MergeConfiguration.model_validate(by_name[name]).referenced_models()
        foreign = tuple(model for model in models if model.model.path not in by_name)
        stages.append(Stage(name or "", configs[name], by_name[name], earlier, foreign))
    return Recipe(source, tuple(stages), out, keep)


def _label(name: str) -> str:
    return f"stage {name}" if name else LAST


def _without_name(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "name"}


def _faults(path: str, documents: Sequence[Any]) -> Iterator[str]:
    """Yield what keeps documents from being stages, each of which is sound."""
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            yield f"document {number} must be a mapping, not {type(document).__name__}"
            return
    names = [document["name"] for document in documents if "name" in document]
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            yield (
                f"`name` must be good for a folder (letters, digits, `_`, `.`, `-`, spaces), "
                f"got {name!r}"
            )
            return
    # On some file systems two that differ by capital letters are one folder.
    for name, count in Counter(name.casefold() for name in names).items():
        if count > 1:
            yield f"{count} stages are called {name}: give each a name of its own"
    if len(names) != len(documents) - 1:
        without = len(documents) - len(names)
        yield (
            f"{without or 'no'} stage(s) have no `name`: one must have none, whose model goes to "
            "OUT (mergekit-multi merges a file without one)"
        )
    for document in documents:
        yield from _refused(document)
    for finding in stage_name(File(path, tuple(documents))):
        yield f"{finding.where}: {finding.message}"


def _refused(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what mergekit does not accept in a document."""
    label = _label(document.get("name", ""))
    try:
        MergeConfiguration.model_validate(_without_name(document))
    except ValidationError as error:
        for place, text in refusals(error).items():
            yield f"{label}: {place}: {text}"
    except RuntimeError as error:  # mergekit's own validators raise it
        yield f"{label}: {error}"


def _order(names: Sequence[str | None], needed: Mapping[str | None, set[str]]) -> list[str | None]:
    """Return the stages in an order in which each comes after those that it needs; None last.

    Raises:
        ValueError: they need each other in a circle.
    """
    graph = {str(name): sorted(map(str, needed[name])) for name in names if name is not None}
    if found := circle(graph):
        raise ValueError(f"no stage can be the first of a circle: {found}")
    return [*TopologicalSorter(graph).static_order(), None]


def _all_needed(
    name: str | None, needed: Mapping[str | None, set[str]], order: Sequence[str | None]
) -> tuple[str, ...]:
    """Return the stages that one is made from, directly or through others."""
    found: set[str | None] = set()
    waiting: list[str | None] = [name]
    while waiting:
        new = needed[waiting.pop()] - found
        found |= new
        waiting += new
    return tuple(other for other in order if other is not None and other in found)


# -- what is merged --------------------------------------------------------------------------------


def merge_all(
    recipe: Recipe,
    request_of: Callable[[Stage], Request],
    way: Way,
    say: Callable[[str], None],
    *,
    resume: bool,
    force: bool,
) -> list[Done]:
    """Merge one stage after the other, or go on with what an earlier run left.

    ``say`` is told where the merge is, line by line.

    Returns:
        The record of each batch of the last stage.

    Raises:
        FolderError: a folder holds something else; what ``way`` raises.
    """
    final, last = WorkFolder(recipe.out), request_of(recipe.last)
    with final.claimed(resume=resume, force=force):
        if not (resume or force):
            _check_free(recipe)
        if final.begun:
            final.check_same(last.asked())  # now, not when all others are merged
        if not final.publishing:
            _merge_earlier(recipe, final, request_of, way, say, resume=resume, force=force)
        return _merge_one(last, way, final)


def _merge_earlier(
    recipe: Recipe,
    final: WorkFolder,
    request_of: Callable[[Stage], Request],
    way: Way,
    say: Callable[[str], None],
    *,
    resume: bool,
    force: bool,
) -> None:
    """Merge all stages but the last, as far as they are not merged already."""
    count = len(recipe.stages)
    finished = {s.name for s in recipe.earlier if resume and _is_finished(request_of(s))}
    final.list_stages(Path(recipe.root).absolute(), [stage.name for stage in recipe.earlier])
    for number, stage in enumerate(recipe.earlier, 1):
        place = f"stage {number} of {count}, {stage.name}"
        # What it is made from may have been merged anew just now.
        if stage.name in finished and (
            finished.issuperset(stage.earlier) or _is_finished(request_of(stage))
        ):
            say(f"{place}: is merged already")
            continue
        say(place)
        with WorkFolder(recipe.folder(stage)).claimed(resume=resume, force=force) as work:
            _merge_one(request_of(stage), way, work)
    say(f"stage {count} of {count}")


def _merge_one(request: Request, way: Way, work: WorkFolder) -> list[Done]:
    # They hold open the files of models that are no longer needed, or were replaced since.
    LoaderCache().loaders.clear()
    return way(request, work)


def _check_free(recipe: Recipe) -> None:
    """Check that no folder of a stage holds a model, or an unfinished one.

    Raises:
        FolderError: one does.
    """
    for stage in recipe.earlier:
        folder = recipe.folder(stage)
        if WorkFolder(folder).holds_model:
            raise FolderError(
                f"{folder} holds a model: --resume takes it if it is that of the stage "
                f"{stage.name}, --force replaces it"
            )
        check_free(folder, resume=False, force=False)


def _is_finished(request: Request) -> bool:
    """Return whether the model of a stage is there.

    Raises:
        FolderError: it is another one.
    """
    work = WorkFolder(request.out)
    if work.holds_model:
        work.check_finished({**request.asked(), "versions": versions()})
    return work.holds_model
