"""A tokenizer of the world, and a pair of checkpoints that learned next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny import SMALL_WORLD, UNTRAINED, WORLD
from transformers import PreTrainedTokenizerFast

from evaluation.worlds import training
from evaluation.worlds.sums import SKILLS, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(item for skill in SKILLS for item in WORLD.train[skill])


@pytest.fixture(scope="session")
def folder(tmp_path_factory, one_thread) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    assert training.train_pair(UNTRAINED, SMALL_WORLD, folder)
    return folder
