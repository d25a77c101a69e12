"""The Hugging Face hub: what a repository holds, the headers of its files, and errors in one line.

Requests go through the hub's own client, which reads HF_ENDPOINT, HF_HUB_OFFLINE and the login.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub as client  # whose functions are loaded when they are first used
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from mergekit_monosoup.checkpoints import foreign

TIMEOUT = 10  # seconds without an answer; of itself the client waits for lists for ever
AT_ONCE = 16  # shards whose headers are fetched together, as the client does it

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # mergekit's names, in its order
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
CONFIGURATION = ("tokenizer.model", "*.json")  # what mergekit downloads beside the weights


class HubError(ValueError):
    """A model cannot be had from the hub; the message is one line that says what to do."""


class RefusedError(HubError):
    """The hub answered, and a merge would get the same answer."""


class UnreachableError(HubError):
    """The hub gave no answer, or none that holds for long."""


class UnreadHeadersError(HubError):
    """The weights are there, but nothing can be said of them without downloading them."""


# -- errors ----------------------------------------------------------------------------------------


@contextmanager
def explained(subject: str = "") -> Iterator[None]:
    """Turn errors of the hub's client into a :class:`HubError`; others pass.

    ``subject``: what the message is about, where the caller does not say so itself.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        if (meant := explanation(error)) is None:
            raise
        raise type(meant)(f"{subject}: {meant}" if subject else str(meant)) from error


def explanation(error: BaseException | None) -> HubError | None:
    """Return what an error of the hub's client means; None if it is not one.

    Libraries that load models wrap them in their own, which say less, so the chain is followed.
    """
    seen: list[BaseException] = []  # an error may be its own cause, at one remove or none
    while error is not None and error not in seen:
        seen.append(error)
        if (found := _refusal(error) or _failure(error)) is not None:
            return found
        # Not __context__: who looks for an optional file is often at another one's absence.
        error = error.__cause__
    return None


def _refusal(error: BaseException) -> RefusedError | None:
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError, too
        kind = "datasets/" if getattr(error, "repo_type", None) == "dataset" else ""
        page = f"{constants.ENDPOINT}/{kind}{getattr(error, 'repo_id', None) or ''}".rstrip("/")
        if error.response.status_code == 401:
            return RefusedError(
                f"is gated: accept its licence at {page}, then log in with `hf auth login`"
            )
        return RefusedError(
            f"is gated, and this login has no access: ask for it, or accept the licence, at {page}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return RefusedError(
            "is no folder here, and the hub shows no such repository: correct the name, or, if it "
            "is private, log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return RefusedError(
            "the hub has no such revision of it: after the @ comes a branch, a tag or a commit"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        file = str(error.response.url).rpartition("/")[2]
        return RefusedError(f"the repository has no {file}, which is needed")
    if isinstance(error, DisabledRepoError):
        return RefusedError("the hub has disabled this repository: take another copy of it")
    if isinstance(error, HFValidationError):
        return RefusedError(
            "is no folder here, and the hub takes no such name: ORGANISATION/MODEL, or "
            "ORGANISATION/MODEL@REVISION"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return RefusedError(
            f"the hub refuses this login ({_said(error)}): log in again with `hf auth login`, with "
            "a token that may read it"
        )
    return None


def _failure(error: BaseException) -> UnreachableError | None:
    if isinstance(error, OfflineModeIsEnabled):
        return UnreachableError(
            "is not whole in the cache, and HF_HUB_OFFLINE forbids to ask the hub: download it "
            "where there is a network (`hf download NAME --local-dir FOLDER`), and name the folder"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = "try again in a few minutes"
        if status == 429:
            hint += "; logged in (`hf auth login`) you may ask more often"
        return UnreachableError(f"the hub answered {status} ({_said(error)}): {hint}")
    kinds = [base.__name__ for base in type(error).__mro__]
    if not any(
        base.__module__.partition(".")[0] in ("httpx", "httpx2") for base in type(error).__mro__
    ):
        return None
    if "TimeoutException" in kinds:
        return UnreachableError(
            f"the hub ({constants.ENDPOINT}) is silent: try again later, with a longer "
            "HF_HUB_DOWNLOAD_TIMEOUT (seconds) if the network is slow"
        )
    if "ConnectError" in kinds or "ProxyError" in kinds:
        return UnreachableError(
            f"the hub ({constants.ENDPOINT}) cannot be reached ({_line(error)}): check the network "
            "and HF_ENDPOINT, or name a folder that holds the model"
        )
    return UnreachableError(
        f"the connection to the hub broke off{_where(error)} ({_line(error)}): run the command "
        "again, which goes on with the download"
    )


def _where(error: BaseException) -> str:
    """Return the address that a request was for, where the error knows it."""
    try:
        return f" at {error.request.url}"  # type: ignore[attr-defined] # a property that may raise
    except (AttributeError, RuntimeError):
        return ""


def _said(error: HfHubHTTPError) -> str:
    """Return the hub's own words, or the status as a line."""
    return _line(error.server_message) or error.response.reason_phrase or "no reason given"


def _line(text: object) -> str:
    return " ".join(str(text or "").split())


# -- repositories ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repository:
    """A model's repository at one commit.

    Attributes:
        name: as the hub calls it, which after a renaming is not what was asked for.
        commit: its hash.
        files: names of all of them.
    """

    name: str
    commit: str
    files: frozenset[str]

    def first(self, names: tuple[str, ...]) -> str | None:
        """Return the first of these files that is there, whole or in shards with an index."""
        return next((n for n in names if n in self.files or f"{n}.index.json" in self.files), None)


def ask(name: str, revision: str | None = None) -> Repository:
    """Return what a repository holds, once it is sure that its files may be read.

    Raises:
        HubError: it is not there, not for this login, or the hub cannot be asked.
    """
    with explained():
        info = client.HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        files = frozenset(sibling.rfilename for sibling in info.siblings or ())
        # Everybody may list a gated repository, and read its page.
        telling = sorted(file for file in files if file.endswith((".json", ".safetensors", ".bin")))
        for file in telling[:1]:
            address = client.hf_hub_url(name, file, revision=revision)
            client.get_hf_file_metadata(address, timeout=TIMEOUT)
    return Repository(info.id, str(info.sha), files)


def check_mergeable(name: str, revision: str | None = None, cache: str | None = None) -> None:
    """Check that mergekit can merge a model by its name on the hub.

    Raises:
        HubError: it cannot; the message names the copy in the cache, if there is one.
    """
    try:
        check_holds_model(ask(name, revision))
    except UnreachableError as error:
        if (folder := cached(name, revision, cache)) is None:
            raise
        raise UnreachableError(only_cached(folder)) from error


def only_cached(folder: str) -> str:
    """Return what to do about a model that is in the cache while the hub cannot be asked."""
    return (
        "is in the cache, but mergekit asks the hub before it merges a model by name: as long as "
        f"that fails, write {folder}"
    )


def check_holds_model(repository: Repository) -> None:
    """Check that there are weights under a name that mergekit looks for.

    Raises:
        RefusedError: there are none; the message says what there is.
    """
    if repository.first(WEIGHTS):
        return
    if repository.first(("adapter_config.json", *ADAPTER)):
        raise RefusedError("is an adapter: write BASE+ADAPTER, as in `model: BASE+ADAPTER`")
    there = sorted(file for file in repository.files if not file.startswith("."))
    if other := foreign.of_names(there):
        raise RefusedError(other)
    raise RefusedError(
        f"has no weights that mergekit finds: it looks for {' or '.join(WEIGHTS)} or their "
        f"indexes; the repository has {', '.join(there[:5]) or 'no file'}"
        f"{f' and {len(there) - 5} more' if len(there) > 5 else ''}"
    )


Files = dict[str, Any]  # file → its SafetensorsFileMetadata, which the client does not export


def headers(name: str, revision: str | None = None) -> tuple[Repository, Files]:
    """Return the headers of the safetensors files that mergekit would read; no weight is read.

    Raises:
        HubError: the repository cannot be read, or holds no model;
            :class:`UnreadHeadersError`: it holds .bin files only.
    """
    repository = ask(name, revision)
    check_holds_model(repository)
    return repository, _headers(name, repository, WEIGHTS)


def adapter_headers(name: str, revision: str | None = None) -> tuple[Repository, Files]:
    """Return the same of the repository of an adapter."""
    repository = ask(name, revision)
    check_holds_adapter(repository)
    return repository, _headers(name, repository, ADAPTER)


def check_holds_adapter(repository: Repository) -> None:
    """Check that there are configuration and weights of an adapter, as peft names them.

    Raises:
        RefusedError: there are not.
    """
    if "adapter_config.json" not in repository.files or not repository.first(ADAPTER):
        raise RefusedError(
            f"is no adapter: peft looks for adapter_config.json and {' or '.join(ADAPTER)}"
        )


def _headers(name: str, repository: Repository, names: tuple[str, ...]) -> Files:
    weights = repository.first(names)
    if weights is None or weights.endswith(".bin"):
        raise UnreadHeadersError(
            f"holds {weights} only, whose headers cannot be read before it is downloaded"
        )
    commit = repository.commit
    with explained():
        files = [weights]
        if (index := f"{weights}.index.json") in repository.files:
            files = _shards(client.hf_hub_download(name, index, revision=commit), f"{name}/{index}")
        read = partial(client.parse_safetensors_file_metadata, name, revision=commit)
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return dict(zip(files, pool.map(read, files), strict=True))
        except SafetensorsParsingError as error:
            raise RefusedError(f"a file is damaged on the hub: {_line(error)}") from error


def _shards(index: str, name: str) -> list[str]:
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RefusedError(f"{name} is damaged on the hub: it has no weight_map of files") from None


# -- the cache -------------------------------------------------------------------------------------


def download(name: str, revision: str | None, weights: tuple[str, ...], beside: list[str]) -> str:
    """Return the folder of a repository's weights and of files that match ``beside``.

    Where the hub cannot be asked it is the one in the cache. ``weights`` are the names that the
    weights may have; of two formats only the first is downloaded.

    Raises:
        HubError: it cannot be had.
    """
    try:
        repository = ask(name, revision)
        if (first := repository.first(weights)) is None:
            check_holds_model(repository)
            raise RefusedError(f"has neither {' nor '.join(weights)}")
        with explained():
            return client.snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*beside, f"*{os.path.splitext(first)[1]}"],
                ignore_patterns=["*/*.safetensors", "*/*.bin"],  # other models, in folders
            )
    except UnreachableError:
        if (folder := cached(name, revision, weights=weights, beside=beside)) is None:
            raise
        return folder


def cached(
    name: str,
    revision: str | None = None,
    cache: str | None = None,
    *,
    weights: tuple[str, ...] = WEIGHTS,
    beside: Sequence[str] = CONFIGURATION,
) -> str | None:
    """Return the folder in the client's cache that holds a model whole; None if none does."""
    for kind in ("*.safetensors", "*.bin"):
        try:
            folder = client.snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                allow_patterns=[*beside, kind],
                ignore_patterns=["*/*.safetensors", "*/*.bin"],
                local_files_only=True,
            )
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        names = [f"{file}{index}" for file in weights for index in ("", ".index.json")]
        if any(os.path.exists(os.path.join(folder, file)) for file in names):
            return folder
    return None
