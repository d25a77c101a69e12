"""Configurations that name models of the hub, run on small checkpoints in their place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml

from helpers import checkpoints

HUB = {
    "Qwen/Qwen3-0.6B": "base",
    "suayptalha/Qwen3-0.6B-Math-Expert": "tuned0",
    "suayptalha/Qwen3-0.6B-Code-Expert": "tuned1",
    "my-org/Qwen3-0.6B-lora-adapter": "adapter",
    "my-org/Qwen3-0.6B-other-adapter": "other_adapter",
}


def local(config: Path, world: Path, folder: Path) -> Path:
    """The configuration with local paths and a report, in ``folder``."""
    text = config.read_text()
    for name, place in HUB.items():
        text = re.sub(rf"{re.escape(name)}(?![-\w])", str(world / place), text)
    text = re.sub(r"(?<=model: )(convnext_small|model_|pair/)", rf"{world}/\1", text)
    text = re.sub(r"(\S+-report\.jsonl)", rf"{folder}/\1", text)
    path = folder / config.name
    path.write_text(text)
    return path


def run(config: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Merge with the command that the file names (mergekit-yaml when it names none).

    In this process: a fresh one per file would spend two minutes on imports; test_install.py starts
    real ones.
    """
    text, out = config.read_text(), folder / "out"
    command, arguments = run_yaml.main, [config, out]
    if "mergekit-multi " in text:
        command, arguments = (
            multimerge.main,
            [config, "--intermediate-dir", folder / "stages", "--out-path", out],
        )
    elif "mergekit-pytorch " in text:
        command = merge_raw_pytorch.main
    if "--lora-merge-cache" in text:
        arguments += ["--lora-merge-cache", folder / "cache"]
    CliRunner().invoke(command, [*map(str, arguments), "--quiet"], catch_exceptions=False)
    return checkpoints.state_dict(out)


def changed(file: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def able(folder: Path, to: Path) -> Path:
    """A copy of a model that can answer: room in its context, words as tokens, an end of text."""
    shutil.copytree(folder, to)
    changed(to / "config.json", max_position_embeddings=4096)
    changed(to / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    changed(to / "tokenizer_config.json", eos_token="w0")
    return to
