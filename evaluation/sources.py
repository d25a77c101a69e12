"""Where the models of a comparison come from: a folder, a hub name, or a merge that runs first."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evaluation import fingerprint


class SourceError(ValueError):
    """A model cannot be had; the message says which and what to do."""


@dataclass(frozen=True)
class Source:
    """One model, ready to be loaded from `folder`."""

    name: str
    given: str  # as on the command line
    folder: Path
    fingerprint: dict[str, str]
    merge: (
        dict[str, Any] | None
    )  # the merge that made it: {"config": YAML as data, "inputs": {path: weights digest}}

    def record(self) -> dict[str, Any]:
        return {"given": self.given, "fingerprint": self.fingerprint, "merge": self.merge}


def find(name: str, given: str, cache: Path) -> Source:
    """The source called `name`; a `.yml` is merged into `cache` first, unless that was done before."""
    if given.lower().endswith((".yml", ".yaml")):
        folder, content = _merged(Path(given), cache)
        merge: dict[str, Any] | None = content
    else:
        folder = local(given)
        made_by = folder / "mergekit_config.yml"  # mergekit leaves it beside what it made
        try:
            config = (
                yaml.safe_load(made_by.read_text(encoding="utf-8")) if made_by.is_file() else None
            )
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise SourceError(
                f"{made_by}: not YAML, though mergekit writes it ({error}); delete it if it is none"
            ) from error
        merge = {"config": config, "inputs": {}} if isinstance(config, dict) else None
    return Source(name, given, folder, _fingerprint(folder), merge)


def local(given: str) -> Path:
    """A folder as it is; a hub name as its snapshot on this machine, downloaded if there is a network."""
    if Path(given).is_dir():
        return Path(given)
    if given.startswith((".", "/", "~")) or given.count("/") != 1:
        raise SourceError(f"{given}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(given))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"{given}: neither a folder here nor a model that can be had from the hub. Offline, download it elsewhere with "
            f"`hf download {given} --local-dir FOLDER`, copy the folder and give its path."
        ) from error


def _fingerprint(folder: Path) -> dict[str, str]:
    try:
        return fingerprint.of_model(folder)
    except FileNotFoundError as error:
        raise SourceError(str(error)) from error


def _merged(path: Path, cache: Path) -> tuple[Path, dict[str, Any]]:
    """Run mergekit in this process. The cache is keyed by the configuration's content, by the weights that go in, and by
    the code that merges, so no edit of any of them can hand out a stale model."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_monosoup.check import check

    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if errors := [f"{f.where}: {f.message}" for f in check(path) if f.level == "error"]:
        raise SourceError("\n".join(f"{path}: {error}" for error in errors))
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    if len(documents) != 1:
        raise SourceError(
            f"{path}: has several stages; run mergekit-multi and give the folder that it writes"
        )
    config = MergeConfiguration.model_validate(documents[0])
    inputs = {}
    for reference in config.referenced_models():
        for part in filter(None, (reference.model, reference.lora)):
            inputs[part.path] = fingerprint.of_weights(local(part.path))
    content = {"config": documents[0], "inputs": inputs}
    key = fingerprint.digest({**content, "code": _merge_code()})[:32]
    target, unfinished = cache / key, cache / f"{key}.unfinished-{os.getpid()}"
    if not target.exists():
        for left in cache.glob("*.unfinished-*"):
            if _abandoned(left):
                shutil.rmtree(left, ignore_errors=True)  # a killed run's, as large as a model
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        print(f"merging {path}", flush=True)
        # mergekit names a merged adapter after its path: kept longer, it would stand for another adapter under that path.
        with tempfile.TemporaryDirectory(
            dir=cache, suffix=f".unfinished-{os.getpid()}"
        ) as adapters:
            LoaderCache.loaders.clear()  # of the whole process, by path: would hand out what an earlier merge read there
            options = MergeOptions(quiet=True, copy_tokenizer=True, lora_merge_cache=adapters)
            run_merge(config, str(unfinished), options)
        (unfinished / "evaluation-merge.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
        unfinished.rename(target)  # last: what is interrupted must not look finished
    return target, content


def _abandoned(unfinished: Path) -> bool:
    """No process of this machine has its number, nor, most likely, one of another that shares the folder."""
    if time.time() - unfinished.stat().st_mtime < 86400:
        return False
    try:
        os.kill(int(unfinished.name.rpartition("-")[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        return False
    return False


def _merge_code() -> dict[str, str]:
    import mergekit_monosoup

    found = fingerprint.versions()
    own = fingerprint.of_tree(Path(mergekit_monosoup.__file__).parent, "*.py")
    return {"mergekit": found["mergekit"], "torch": found["torch"], "mergekit_monosoup": own}


def knobs(merge: dict[str, Any] | None) -> tuple[str, str] | None:
    """(method, its parameters as text) of a merge: what somebody chose. None for a model that is no merge."""
    if not merge or not isinstance(merge.get("config"), dict):
        return None
    config = merge["config"]
    found = [config.get("parameters")] + [
        m.get("parameters") for m in config.get("models") or [] if isinstance(m, dict)
    ]
    chosen = [{k: v for k, v in (p or {}).items() if k != "report"} for p in found]
    return str(config.get("merge_method")), json.dumps([p for p in chosen if p], sort_keys=True)


def tuning_warning(public: bool, merges: dict[str, dict[str, Any] | None]) -> str | None:
    """Said when settings of one method are compared on a public test set: picking the best of them tunes on it."""
    by_method: dict[str, set[str]] = {}
    for merge in merges.values():
        if found := knobs(merge):
            by_method.setdefault(found[0], set()).add(found[1])
    several = sorted(method for method, settings in by_method.items() if len(settings) > 1)
    if not public or not several:
        return None
    return (
        f"Several settings of {', '.join(several)} are compared on a public test set. Choosing the best of them by these "
        "scores tunes on the test set: choose on other data, or report all of them."
    )
