"""Trained checkpoints that evaluations ask, and caches of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import RECIPE, WORLD

from evaluation.worlds import training as train


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A pretrained and a fine-tuned checkpoint, and a configuration that merges them."""
    folder = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.train_pair(
        RECIPE, replace(WORLD, train={k: v[:120] for k, v in WORLD.train.items()}), folder
    )
    torch.set_num_threads(threads)
    config = {
        "merge_method": "monosoup",
        "base_model": str(folder / "pretrained"),
        "models": [{"model": str(folder / "finetuned")}],
        "parameters": {"mode": "variance", "R": 0.7},
    }
    (folder / "soup.yml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets")
    )
