"""Trained checkpoints that evaluations ask, results with known numbers, and caches of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import evaluations
from helpers.runs import start
from helpers.tiny import RECIPE, WORLD, trained

from evaluation import suite
from evaluation.configs import monosoup
from evaluation.engines import language


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A pretrained and a fine-tuned checkpoint, and a configuration that merges them."""
    few = replace(WORLD, train={skill: items[:120] for skill, items in WORLD.train.items()})
    folder = trained(RECIPE, few, tmp_path_factory.mktemp("models"))
    pretrained, finetuned = str(folder / "pretrained"), str(folder / "finetuned")
    config = monosoup(pretrained, [finetuned], mode="variance", R=0.7)
    (folder / "soup.yml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def finished(models, tmp_path_factory) -> Path:
    """One complete run of three models, to read and copy."""
    out = tmp_path_factory.mktemp("results") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets")
        )
        assert start(models, out, "--limit", "40", names=("pretrained", "finetuned", "soup")) == 0
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results of three models with known outcomes."""
    evaluations.write(tmp_path, "finetuned", evaluations.TUNED)
    evaluations.write(tmp_path, "soup", evaluations.SOUP)
    evaluations.write(tmp_path, "pretrained", evaluations.PRETRAINED)
    return tmp_path


@pytest.fixture
def make_suite(tmp_path) -> Callable[..., suite.Suite]:
    """Writes a minimal suite with changes to mine.yml, and loads it."""

    def make(**changes: Any) -> suite.Suite:
        path = tmp_path / "mine.yml"
        path.write_text(yaml.safe_dump({**evaluations.MINIMAL, **changes}))
        return suite.load(str(path))

    return make


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets")
    )


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The tasks that a model is really asked, in order."""
    tasks: list[str] = []
    ask = language.Model.ask

    def recorded(self, task, *arguments):
        result = ask(self, task, *arguments)
        tasks.append(task.task)
        return result

    monkeypatch.setattr(language.Model, "ask", recorded)
    return tasks
