"""Small models under the names of README's first lines, on a hub of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import checkpoints
from helpers.hub import HUB
from helpers.hub_server import Hub
from safetensors.torch import save_file

BASE, TUNED, OTHER, ADAPTER, *_ = HUB


@pytest.fixture(scope="session")
def variants(hub, tmp_path_factory) -> Path:
    """Repositories of other make: sharded, of .bin files, large."""
    folder = tmp_path_factory.mktemp("variants")
    checkpoints.pair(folder / "sharded", dtype=torch.bfloat16, sharded=True)
    shutil.copytree(hub / "tuned0", folder / "bin")
    torch.save(checkpoints.state_dict(hub / "tuned0"), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    for name in ("base", "tuned0"):
        (folder / "large" / name).mkdir(parents=True)
        # 4 MB, of which the client reads the first 100 kB for the header.
        state = {"w": torch.randn(1000, 1000)}
        save_file(state, folder / "large" / name / "model.safetensors")
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model-q4.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture
def models(served, hub) -> Hub:
    """The hub with the base, two fine-tunes and an adapter; v1 of the first is the second."""
    for name, folder in HUB.items():
        served.add(name, hub / folder)
    served.add(TUNED, hub / "tuned0", v1=hub / "tuned1")
    return served


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """Writes a configuration and returns its path."""

    def make(*tuned: str, base: str = BASE, **more: Any) -> str:
        config = {"merge_method": "monosoup", "base_model": base} | more
        config["models"] = [{"model": name} for name in tuned or (TUNED,)]
        path = tmp_path / "merge.yml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return make
