"""A pair of checkpoints that learned next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tiny.trained(tiny.UNTRAINED, tiny.SMALL_WORLD, tmp_path_factory.mktemp("demo"))


@pytest.fixture(autouse=True)
def one_thread():
    with tiny.one_thread():
        yield
