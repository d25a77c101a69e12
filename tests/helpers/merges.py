"""One merge by mergekit-yaml and by `mergekit-monosoup run`, and whether both wrote the same."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts import run_yaml

from helpers import checkpoints
from mergekit_monosoup.cli import main
from mergekit_monosoup.distributed import engines, worker
from mergekit_monosoup.distributed import folder as folders

SMALL = ("--out-shard-size", "20K")  # several batches of so small a model
ALONE = ("--workers", "1", "--resume")  # in this thread, and as batches


def config(
    world: Path,
    folder: Path,
    method: str = "monosoup",
    family: str = "qwen3",
    tuned: int = 1,
    **more,
) -> Path:
    text = {
        "merge_method": method,
        "base_model": f"{world}/{family}/base",
        "models": [{"model": f"{world}/{family}/tuned{number}"} for number in range(tuned)],
        **more,
    }
    path = folder / "merge.yml"
    path.write_text(yaml.dump(text))
    return path


def mergekit(path: Path, out: Path, *options: str) -> Path:
    CliRunner().invoke(
        run_yaml.main, [str(path), str(out), *options, "--quiet"], catch_exceptions=False
    )
    return out


def run(path: Path, out: Path, *options: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["run", str(path), str(out), *map(str, options)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def stop() -> None:
    """End a merge as Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def interrupted_after(batches: int) -> Iterator[None]:
    """Let a merge that is run meanwhile be stopped by Ctrl-C after some batches."""
    count = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engines, "execute", lambda *a: worker.execute(*a) if next(count) < batches else stop()
        )
        yield


class Killed(BaseException):
    """As after kill -9: from one moment on, nothing of the process reaches the disk."""


@contextmanager
def killed_at(moment: int, pattern: str) -> Iterator[None]:
    """Let the first rename or removal of a matching path from a moment on, and all after it, fail.

    Raises:
        Killed: from the block, if there are so many.
    """
    count = itertools.count()

    def mortal(operation, *arguments, **options):
        if re.search(pattern, str(arguments[0])) and next(count) >= moment:
            raise Killed
        return operation(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "remove", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, functools.partial(mortal, getattr(os, name)))
        yield


def stored(folder: Path) -> dict[str, torch.Tensor]:
    pickles = [torch.load(file) for file in sorted(folder.glob("*.bin"))]
    return checkpoints.state_dict(folder) | {
        name: t for state in pickles for name, t in state.items()
    }


def assert_same(out: Path, reference: Path) -> None:
    """Tensor for tensor bitwise, and byte for byte what is not a shard or its index."""
    ours, theirs = stored(out), stored(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    beside = [
        {p.name for p in folder.iterdir() if not folders.WEIGHTS.match(p.name)}
        for folder in (out, reference)
    ]
    assert beside[0] == beside[1]
    for name in beside[0]:
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    if index := next(iter(out.glob("*.index.json")), None):
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map.keys() == theirs.keys() and {
            out / file for file in weight_map.values()
        } == {p for p in out.iterdir() if folders.WEIGHTS.match(p.name) and p != index}


def without_time(path: Path) -> list[dict]:
    return sorted(
        ({**json.loads(line), "seconds": 0} for line in path.open()),
        key=lambda record: record["name"],
    )
