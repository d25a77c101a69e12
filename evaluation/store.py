"""Results on disk: one JSON file per model and suite, its answers beside it, and what is finished of a run in progress.

    NAME/<model>.<suite>.json              scores, settings, versions, fingerprints
    NAME/<model>.<suite>.samples.jsonl.gz  one line per item
    NAME/<model>.<suite>.partial/KEY/      one file per finished task, until all are; KEY: of model, suite and settings

Every file is written under another name and renamed: what has its name is whole.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One item of one task, and what a model made of it."""

    task: str  # as in the suite
    leaf: str  # lm-eval's own task: differs from `task` for groups
    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str
    cluster: str
    values: dict[str, float]  # by "metric,filter"
    answers: dict[str, Any]  # by filter

    def item(self) -> tuple[str, int, str, str, str]:
        """What has to be the same for two models' answers to be answers to the same question."""
        return self.leaf, self.doc_id, self.doc_hash, self.prompt_hash, self.target_hash


@dataclass(frozen=True)
class TaskResult:
    """One finished task."""

    task: str
    rows: list[Row]
    info: dict[str, Any] = field(
        default_factory=dict
    )  # shots, version, generation settings as lm-eval used them


@dataclass(frozen=True)
class Result:
    """A finished pair of model and suite, as read back."""

    path: Path
    data: dict[str, Any]
    rows: dict[str, list[Row]]  # by task


class DamagedError(ValueError):
    """A result file does not hold what was written."""


class Pair:
    """The files of one model and one suite in a results folder."""

    def __init__(self, folder: Path, model: str, suite: str) -> None:
        self.result = folder / f"{model}.{suite}.json"
        self.samples = folder / f"{model}.{suite}.samples.jsonl.gz"
        self.partial = folder / f"{model}.{suite}.partial"

    def finished(self, key: str) -> dict[str, Any] | None:
        """The result under this key; None if there is none, of an other key, or damaged."""
        try:
            data = json.loads(self.result.read_text(encoding="utf-8"))
            whole = data["key"] == key and data["samples"]["sha256"] == _sha256(self.samples)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return data if whole else None

    def keep_old(self) -> bool:
        """Puts a result that another one is about to replace aside, once, as ….old; whether there was one.

        It was made from other weights, settings or versions, and may have taken hours.
        """
        there = self.result.exists()
        for path in (self.result, self.samples):
            if path.exists():
                os.replace(path, path.with_name(path.name + ".old"))
        return there

    def resume(self, key: str) -> dict[str, TaskResult]:
        """Tasks finished under this key by a run that was interrupted."""
        found = {}
        for path in sorted(self._parts(key).glob("*.json.gz")):
            try:
                with gzip.open(path, "rt", encoding="utf-8") as file:
                    data = json.load(file)
            except (OSError, EOFError, ValueError):
                continue
            if data.get("key") == key:
                found[data["task"]] = TaskResult(
                    data["task"], [Row(**row) for row in data["rows"]], data["info"]
                )
        return found

    def _parts(self, key: str) -> Path:
        # A folder for each key: a quick look with --limit must not cost the tasks of the whole run that it came between.
        return self.partial / key[:16]

    def keep(self, key: str, result: TaskResult) -> None:
        """Save one finished task."""
        content = {
            "key": key,
            "task": result.task,
            "rows": [asdict(row) for row in result.rows],
            "info": result.info,
        }
        _write(
            self._parts(key) / f"{result.task}.json.gz",
            _zipped([json.dumps(content, ensure_ascii=False)]),
        )

    def finish(self, data: dict[str, Any], results: Iterable[TaskResult]) -> None:
        """Write the answers, then the result that names their digest, then drop the parts."""
        rows = [row for result in results for row in result.rows]
        _write(self.samples, _zipped(json.dumps(asdict(row), ensure_ascii=False) for row in rows))
        samples = {"file": self.samples.name, "rows": len(rows), "sha256": _sha256(self.samples)}
        self.rewrite({"format": FORMAT, **data, "samples": samples})
        shutil.rmtree(self._parts(data["key"]), ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: parts of another run
            self.partial.rmdir()

    def rewrite(self, data: dict[str, Any]) -> None:
        _write(self.result, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())

    def forget(self) -> None:
        """Drops what interrupted runs have finished, under any key."""
        shutil.rmtree(self.partial, ignore_errors=True)


def read(folder: Path, only: Collection[str] | None = None) -> list[Result]:
    """The finished results of a folder, of all models or `only` some."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedError(f"{path}: {error}") from error
        if not isinstance(data, dict) or "samples" not in data or data.get("format") != FORMAT:
            raise DamagedError(f"{path}: not a result of this version of evaluation.run")
        if only is not None and data["model"] not in only:
            continue
        samples = path.parent / data["samples"]["file"]
        if not samples.is_file() or _sha256(samples) != data["samples"]["sha256"]:
            raise DamagedError(
                f"{samples}: missing, or not the answers that {path.name} was made from; run it again"
            )
        rows: dict[str, list[Row]] = {}
        with gzip.open(samples, "rt", encoding="utf-8") as file:
            for line in file:
                row = Row(**json.loads(line))
                rows.setdefault(row.task, []).append(row)
        found.append(Result(path, data, rows))
    return found


def _zipped(lines: Iterable[str]) -> bytes:
    # Without the time, equal answers are equal files.
    return gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_name(f".{path.name}.{os.getpid()}")
    other.write_bytes(content)
    os.replace(other, path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
