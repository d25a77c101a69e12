"""Where the models of a comparison come from: a folder, a hub name, or a merge that runs first."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from evaluation import file_merges, fingerprint
from evaluation.fingerprint import ModelDigests
from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.stored import MODEL_SUFFIXES
from mergekit_monosoup.checkpoints.texts import UnreadableError
from mergekit_monosoup.checkpoints.yaml import PlainLoader, read_documents

PRETRAINED, FINETUNED = "pretrained", "finetuned"  # models of these names are W0 and W1
MERGE_CACHE = Path("results", "merged")
CONFIGURATION = "mergekit_config.yml"  # as mergekit writes it beside a model
# Of a hub repository: configuration, tokenizer and chat template.
BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


class SourceError(ValueError):
    """A model cannot be had; the message says which and what to do."""


@dataclass(frozen=True)
class Merge:
    """The merge that made a model: its configuration as data, and the digests of what went in."""

    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)  # weights' digest by path; {}: not known

    @property
    def models(self) -> list[dict[str, Any]]:
        """The entries of its models; the configuration is another program's, and may hold none."""
        listed = self.config.get("models")
        entries = listed if isinstance(listed, list) else []
        return [entry for entry in entries if isinstance(entry, dict)]


@dataclass(frozen=True)
class Origin:
    """What a result says of where its model came from."""

    given: str  # as on the command line
    fingerprint: ModelDigests
    merge: Merge | None = None


@dataclass(frozen=True)
class Source:
    """One model, ready to be loaded from `folder`, or from a file."""

    name: str
    folder: Path  # or a file of weights alone
    origin: Origin


def find(name: str, given: str, cache: Path) -> Source:
    """Return the model called `name`; a `.yml` is merged into `cache` unless that was done before.

    Raises:
        SourceError: there is no such checkpoint, or the configuration cannot be merged.
    """
    if given.lower().endswith((".yml", ".yaml")):
        folder, merge = _merged(Path(given), cache)
        return Source(name, folder, Origin(given, _fingerprint(folder), merge))
    folder = local(given)
    return Source(name, folder, Origin(given, _fingerprint(folder), _recorded_merge(folder)))


def local(given: str, weights: tuple[str, ...] = hub.WEIGHTS) -> Path:
    """Return a folder or file as it is; of a hub name the snapshot, downloaded if it is not here.

    `weights` are the names that the weights may have. Nothing else is downloaded but what
    transformers reads beside them.

    Raises:
        SourceError: there is neither.
    """
    if Path(given).is_dir() or file_merges.holds_weights(given):
        return Path(given)
    if Path(given).is_file():
        raise SourceError(f"{given}: neither a folder nor weights ({', '.join(MODEL_SUFFIXES)})")
    if given.startswith((".", "/", "~")) or given.count("/") != 1:
        raise SourceError(f"{given}: no such folder or file")
    name, _, revision = given.partition("@")
    try:
        return Path(hub.download(name, revision or None, weights, BESIDE_WEIGHTS))
    except hub.HubError as error:
        raise SourceError(f"{given}: {error}") from error
    except OSError as error:  # no space, say
        raise SourceError(
            f"{given}: cannot be downloaded: {' '.join(str(error).split())}"
        ) from error


def _recorded_merge(folder: Path) -> Merge | None:
    """Return the merge that mergekit says made this folder; it leaves its configuration there."""
    file = folder / CONFIGURATION  # beside the weights; none for a file
    try:
        documents = read_documents(file, PlainLoader) if file.exists() else []
    except UnreadableError as error:
        raise SourceError(
            f"{file}: {error}; mergekit writes it, delete it if it is none"
        ) from error
    written = [_as_json(document) for document in documents if isinstance(document, dict)]
    return Merge(_as_one(written)) if written else None


def _as_one(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a file's document; of several stages the last, with the others as its `stages`."""
    last = next((document for document in documents if "name" not in document), documents[-1])
    others = [document for document in documents if document is not last]
    return {**last, "stages": others} if others else last


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as results hold it: YAML also has dates, sets and bytes."""
    data: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return data


def _fingerprint(folder: Path) -> ModelDigests:
    try:
        return fingerprint.of_model(folder)
    except FileNotFoundError as error:
        raise SourceError(str(error)) from error


def _merged(path: Path, cache: Path) -> tuple[Path, Merge]:
    """Return what a configuration merges to, made by mergekit in this process.

    Models that are folders give a folder, as mergekit-yaml merges them; files of weights a file, as
    mergekit-pytorch does. The cache is keyed by the configuration's content, by the weights that go
    in, and by the code that merges, so no edit of any of them can hand out a stale model.
    """
    documents = _checked(path)
    data = _as_one(documents)
    if file_merges.of_files(data):
        merge = Merge(
            data, {name: fingerprint.of_weights(Path(name)) for name in file_merges.names(data)}
        )
        target = _cached(path, merge, partial(_merge_files, data), cache)
        return target / file_merges.OUTPUT, merge
    references = _models(path, documents)
    inputs = {n: fingerprint.of_weights(p) for n, p in _inputs(references).items()}
    merge = Merge(data, inputs)
    return _cached(path, merge, partial(_run_merge, path, documents, references), cache), merge


def _inputs(references: Sequence[Any]) -> dict[str, Path]:
    """Return the places of everything that goes into a merge, by the name it is given."""
    inputs = {}
    for reference in references:
        inputs[str(reference.model)] = local(str(reference.model))
        if reference.lora:
            inputs[str(reference.lora)] = local(str(reference.lora), hub.ADAPTER)
    return inputs


def _cached(path: Path, merge: Merge, run: Callable[[Path], None], cache: Path) -> Path:
    """Return the folder of a merge in the cache; `run` merges into an empty one."""
    key = fingerprint.digest({**asdict(merge), "code": _merge_code()})[:32]
    target, unfinished = cache / key, cache / f"{key}.unfinished-{os.getpid()}"
    if not target.exists():
        for folder in cache.glob("*.unfinished-*"):
            if _abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)  # a killed run's, as large as a model
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        print(f"merging {path}", flush=True)
        run(unfinished)
        (unfinished / "evaluation-merge.json").write_text(
            json.dumps(asdict(merge), indent=1) + "\n", encoding="utf-8"
        )
        try:
            unfinished.rename(target)  # last: what is interrupted must not look finished
        except OSError:  # another run made the same merge meanwhile
            if not target.exists():
                raise
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _merge_files(data: Mapping[str, Any], folder: Path) -> None:
    try:
        file_merges.merge(data, folder)
    except file_merges.FileMergeError as error:
        raise SourceError(f"the merge failed: {error}") from error


def _checked(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a merge configuration in which `check` finds no error.

    They are several where it is of several stages.
    """
    from mergekit_monosoup.check import check

    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if folders := file_merges.folders_for_files(path):
        raise SourceError("\n".join(f"{path}: {line}" for line in folders))
    findings = check(path)
    if errors := [f"{f.where}: {f.message}" for f in findings if f.level == "error"]:
        raise SourceError("\n".join(f"{path}: {error}" for error in errors))
    for finding in findings:
        if finding.code == file_merges.UNPAIRED:  # a missing head, say
            print(f"warning: {path}: {finding.where}: {finding.message}", file=sys.stderr)
    try:
        documents = read_documents(path)
    except UnreadableError as error:
        raise SourceError(f"{path}: {error}") from error
    found = [_as_json(document) for document in documents if document is not None]
    # mergekit ignores the name of a stage that is alone.
    return found if len(found) > 1 else [{k: v for k, v in found[0].items() if k != "name"}]


def _recipe(path: Path, documents: list[dict[str, Any]], out: Path) -> Any:
    """Return the stages of a file, in an order in which they can be merged into a folder."""
    from mergekit_monosoup.distributed import stages

    try:
        source = yaml.safe_dump_all(documents, sort_keys=False)
        recipe = stages.read(str(path), source, documents, out, None)
        recipe.check_names(str(path))
    except ValueError as error:
        raise SourceError(str(error)) from error
    return recipe


def _models(path: Path, documents: list[dict[str, Any]]) -> list[Any]:
    """Return the models that go into a merge, without those of its stages."""
    recipe = _recipe(path, documents, path.parent)
    models = {model: None for stage in recipe.stages for model in stage.foreign}
    return sorted(models, key=str)


def _run_merge(
    path: Path, documents: list[dict[str, Any]], references: list[Any], folder: Path
) -> None:
    """Merge into a folder, with the methods of this package on as many threads as torch has.

    Raises:
        SourceError: an adapter or a model cannot be had, or a thread failed, as at a full disk.
    """
    import torch
    from mergekit.options import MergeOptions

    from mergekit_monosoup.checkpoints import adapters
    from mergekit_monosoup.checkpoints.storage import Options
    from mergekit_monosoup.distributed import stages
    from mergekit_monosoup.distributed.alone import merge_alone
    from mergekit_monosoup.distributed.driver import MergeError, Request, merge_claimed
    from mergekit_monosoup.distributed.folder import WorkFolder
    from mergekit_monosoup.distributed.publication import FolderError
    from mergekit_monosoup.distributed.records import Done
    from mergekit_monosoup.distributed.threads import InThreads
    from mergekit_monosoup.parameters import METHODS

    recipe, threads = _recipe(path, documents, folder), torch.get_num_threads()

    def request_of(stage: stages.Stage) -> Request:
        text, engine = yaml.safe_dump(stage.document, sort_keys=False), partial(InThreads, threads)
        place, part = recipe.folder(stage), recipe.part(stage)
        return Request(stage.config, text, place, options, 1, None, False, engine, part)

    def merge_one(request: Request, work: WorkFolder) -> list[Done]:
        if request.config.merge_method in METHODS and threads > 1:
            return merge_claimed(request, work, None)
        merge_alone(request, work)  # other methods may draw random numbers, which threads share
        return []

    # mergekit names a merged adapter after its path: kept longer, it would stand for another
    # adapter under that path. Its readers of files are forgotten before each stage, for the same.
    suffix = f".unfinished-{os.getpid()}"
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=suffix) as cache:
        # A card would ask the hub whether folder/name, a relative path, is a model there. What is
        # written beside it tells `_recorded_merge` how the folder was made.
        options = MergeOptions(
            quiet=True, copy_tokenizer=True, lora_merge_cache=cache, write_model_card=False
        )
        try:
            for reference in references:
                adapters.merged(reference, Options(cache))
            with hub.explained():
                stages.merge_all(
                    recipe, request_of, merge_one, lambda _: None, resume=False, force=False
                )
        except (adapters.AdapterError, hub.HubError, FolderError, MergeError) as error:
            raise SourceError(f"the merge failed: {error}") from error
    text = yaml.safe_dump_all(documents, sort_keys=False)
    (folder / CONFIGURATION).write_text(text, encoding="utf-8")


def _abandoned(unfinished: Path) -> bool:
    """Return whether nobody works on this folder any more.

    That is so if it is a day old and no process of this machine has its number. A process of
    another machine that shares the folder would have finished within a day.
    """
    try:
        age = time.time() - unfinished.stat().st_mtime
    except FileNotFoundError:  # it has been finished and renamed just now
        return False
    if age < 86400:
        return False
    try:
        os.kill(int(unfinished.name.rpartition("-")[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        return False
    return False


def _merge_code() -> dict[str, str]:
    """Return the versions and the digest of the code that merges."""
    import mergekit_monosoup

    installed = fingerprint.versions()
    own = fingerprint.of_tree(Path(mergekit_monosoup.__file__).parent, "*.py")
    return {
        "mergekit": installed["mergekit"],
        "torch": installed["torch"],
        "mergekit_monosoup": own,
    }


def parameters_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a configuration, or of one of its models."""
    parameters = entry.get("parameters")
    return parameters if isinstance(parameters, dict) else {}


def chosen_settings(merge: Merge | None) -> tuple[str, str] | None:
    """Return (method, parameters as text) of a merge; None for a model that is no merge."""
    if merge is None:
        return None
    stages = merge.config.get("stages")
    earlier = [Merge(stage) for stage in stages] if isinstance(stages, list) else []
    given = [parameters_of(entry) for m in (merge, *earlier) for entry in (m.config, *m.models)]
    chosen = [{k: v for k, v in parameters.items() if k != "report"} for parameters in given]
    method = str(merge.config.get("merge_method"))
    return method, json.dumps([parameters for parameters in chosen if parameters], sort_keys=True)


def tuning_warning(public: bool, merges: Mapping[str, Merge | None]) -> str | None:
    """Return a warning if settings of one method are compared on a public test set.

    Picking the best of them tunes on the test set.
    """
    by_method: dict[str, set[str]] = {}
    for merge in merges.values():
        if choice := chosen_settings(merge):
            by_method.setdefault(choice[0], set()).add(choice[1])
    several = sorted(method for method, settings in by_method.items() if len(settings) > 1)
    if not public or not several:
        return None
    return (
        f"Several settings of {', '.join(several)} are compared on a public test set. Choosing "
        "the best of them by these scores tunes on the test set: choose on other data, or report "
        "all of them."
    )
