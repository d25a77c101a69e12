"""Runs of evaluation.run with the tiny suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation import run
from evaluation.suite import load

TASKS = [task.task for task in load("tiny").tasks]


def start(
    models: Path,
    out: Path,
    *more: str,
    suite: str = "tiny",
    names: tuple[str, ...] = ("finetuned",),
) -> int:
    """Run the suite on some of the models of the fixture `models`, and return the exit code."""
    paths = {
        "pretrained": models / "pretrained",
        "finetuned": models / "finetuned",
        "soup": models / "soup.yml",
    }
    named = [f"--model={name}={paths[name]}" for name in names]
    places = ["--out", str(out), "--merge-cache", str(out / "merged")]
    return run.main([suite, *named, *places, "--device", "cpu", *more])


def result(folder: Path, model: str, suite: str = "tiny") -> dict[str, Any]:
    """Return a result file as plain JSON, as other programs see it."""
    return json.loads((folder / f"{model}.{suite}.json").read_text())
