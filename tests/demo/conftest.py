"""A tokenizer of the world, and a pair of checkpoints that learned next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import SMALL_WORLD, UNTRAINED

from evaluation.worlds import training


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert training.train_pair(UNTRAINED, SMALL_WORLD, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
