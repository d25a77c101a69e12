"""A hub on this machine, for the real client: folders of models and data sets over HTTP.

It answers what huggingface_hub asks for to list, read and download a repository, keeps the answers
in a log with the bytes that were sent, and can refuse, break off and stall like the real one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

KINDS = ("models", "datasets")


@dataclass(frozen=True)
class Answer:
    """What was sent: bytes of file contents count, those of lists and errors do not."""

    method: str
    path: str
    status: int
    content: int


@dataclass(frozen=True)
class Fault:
    """What goes wrong with requests whose path contains ``path``.

    Attributes:
        status, code, words: an error, as the hub words it in its headers.
        cut: the connection ends after so many bytes of the body.
        stall: no answer before the server stops.
        times: of so many requests.
    """

    path: str
    status: int = 0
    code: str = ""
    words: str = ""
    cut: int | None = None
    stall: bool = False
    times: int = 10**6


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit."""

    folder: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    @cached_property
    def digests(self) -> dict[str, str]:
        return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in self.files.items()}

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps([str(self.folder), self.digests]).encode()).hexdigest()

    def file(self, name: str) -> dict[str, Any]:
        """Return a file's entry in lists."""
        size = self.files[name].stat().st_size
        lfs = {"oid": self.digests[name], "size": size, "pointerSize": 134}
        return {"type": "file", "path": name, "oid": self.digests[name][:40], "size": size} | (
            {"lfs": lfs} if name.endswith((".safetensors", ".bin")) else {}
        )

    def listed(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """Return files and folders below a folder, "" for all."""
        prefix = f"{under}/" if under else ""
        entries, folders = [], {}
        for name in self.files:
            if name.startswith(prefix):
                first, _, deeper = name.removeprefix(prefix).partition("/")
                if deeper:
                    folders[prefix + first] = directory(prefix + first)
                if recursive or not deeper:
                    entries.append(self.file(name))
        return [*folders.values(), *entries]


def directory(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        repositories: by kind and name: branches, tags and commits.
        renamed: old name → new name.
        faults: what goes wrong.
        requests: paths that were asked for.
        log: what was answered.
    """

    url: str = ""
    repositories: dict[tuple[str, str], dict[str, Snapshot]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    log: list[Answer] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, *, kind: str = "models", **others: Path) -> str:
        """Serve ``folder`` as a repository's main branch, others as its branches and tags.

        Returns the commit of main.
        """
        branches = {b: Snapshot(f) for b, f in {"main": folder, **others}.items()}
        commits = {snapshot.commit: snapshot for snapshot in branches.values()}
        self.repositories[kind, name] = {**branches, **commits}
        return branches["main"].commit

    def main(self, name: str, kind: str = "models") -> Snapshot:
        """Return a repository's main branch."""
        return self.repositories[kind, name]["main"]

    def sent(self, name: str = "") -> int:
        """Return how many bytes of files went out, of one repository or all."""
        return sum(answer.content for answer in self.log if f"/{name}" in answer.path)

    def fault(self, path: str) -> Fault | None:
        """Return what goes wrong with this request, and count it."""
        for number, fault in enumerate(self.faults):
            if fault.path in path and fault.times:
                values = {**vars(fault), "times": fault.times - 1}
                self.faults[number] = Fault(**values)
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing; answers are in the hub's log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.hub.requests.append(self.path)
        self.cut: int | None = None
        if fault := self.hub.fault(self.path):
            if fault.stall:
                self.hub.stopping.wait()
                self.close_connection = True
                return
            if fault.status:
                self._refuse(fault.status, fault.code, fault.words)
                return
            self.cut = fault.cut
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and len(parts) > 3 and parts[1] in KINDS:
            self._api(parts[1], "/".join(parts[2:4]), parts[4:], body)
        elif "resolve" in parts:
            place = parts.index("resolve")
            kind = parts[0] if parts[0] in KINDS else "models"
            revision, *file = parts[place + 1 :]
            self._resolve(kind, "/".join(parts[place - 2 : place]), revision, "/".join(file))
        else:
            self._refuse(404, "", "no such address")

    def _snapshot(self, kind: str, name: str, revision: str) -> Snapshot | None:
        """Return a snapshot, or answer why there is none."""
        if new := self.hub.renamed.get(name):
            self._send(307, b"", {"Location": self.path.replace(name, new, 1)})
        elif (kind, name) not in self.hub.repositories:
            # What the hub tells people who are not logged in: it may be private.
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif snapshot := self.hub.repositories[kind, name].get(revision):
            return snapshot
        else:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _api(self, kind: str, name: str, rest: list[str], body: str) -> None:
        command, revision, *folders = [*rest, *["", "main"][len(rest) :]]
        snapshot = self._snapshot(kind, name, revision)
        if snapshot is None:
            return
        if command == "tree":
            recursive = "recursive=true" in self.path.lower()
            entries = snapshot.listed("/".join(folders), recursive)
            if folders and not entries:
                self._refuse(404, "EntryNotFound", "Entry not found")
            else:
                self._send_json(entries)
        elif command == "paths-info":
            asked = json.loads(body)["paths"] if body[:1] == "{" else parse_qs(body)["paths"]
            self._send_json(
                [snapshot.file(path) for path in asked if path in snapshot.files]
                + [directory(path) for path in asked if snapshot.listed(path, True)]
            )
        elif command in ("", "revision"):
            self._send_json(
                {"id": name, "sha": snapshot.commit, "private": False, "tags": []}
                | {"siblings": [{"rfilename": file} for file in snapshot.files]}
            )
        else:
            self._refuse(404, "", "no such address")

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        snapshot = self._snapshot(kind, name, revision)
        if snapshot is None:
            return
        commit = {"X-Repo-Commit": snapshot.commit}
        if file not in snapshot.files:
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
            return
        data, status = snapshot.files[file].read_bytes(), 200
        headers = {**commit, "ETag": f'"{snapshot.digests[file]}"', "Accept-Ranges": "bytes"}
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        self._send(status, data, headers, is_file=True)

    def _refuse(
        self, status: int, code: str, words: str, headers: dict[str, str] | None = None
    ) -> None:
        named = {"X-Error-Message": words} | ({"X-Error-Code": code} if code else {})
        body = json.dumps({"error": words}).encode()
        self._send(status, body, {**named, **(headers or {})})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], is_file: bool = False
    ) -> None:
        sent = b"" if self.command == "HEAD" else body[: self.cut]
        self.hub.log.append(Answer(self.command, self.path, status, len(sent) * is_file))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # the client has seen enough
            self.wfile.write(sent)
        if len(sent) < len(body) and self.command != "HEAD":
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve on a free port of the loopback for as long as the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield hub
    finally:
        hub.stopping.set()
        server.shutdown()
        server.server_close()


def connect(patch: pytest.MonkeyPatch, hub: Hub, home: Path) -> None:
    """Let this process take ``hub`` for the hub, and ``home`` for its caches, until undone.

    The client reads its environment once, when it is imported.
    """
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
