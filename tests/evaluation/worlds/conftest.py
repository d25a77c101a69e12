"""A tokenizer of the world, and a pair of checkpoints that learned next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny
from transformers import PreTrainedTokenizerFast

from evaluation.worlds.sums import SKILLS, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(item for skill in SKILLS for item in tiny.WORLD.train[skill])


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tiny.trained(tiny.UNTRAINED, tiny.SMALL_WORLD, tmp_path_factory.mktemp("worlds"))


@pytest.fixture(autouse=True)
def one_thread():
    with tiny.one_thread():
        yield
