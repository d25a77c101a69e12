"""One seed from training to JSON, with a model that knows nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import UNTRAINED

from evaluation.evidence import collect, experiment, models, page
from evaluation.sources import SourceError
from evaluation.worlds import training

MERGES, TWO_TASK_MERGES = models.merges, models.two_task_merges


def few(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What CKA and the controls need, of all the merges."""
    needed = {
        f"{kind}_{label}"
        for kind in ("monosoup", "scalar", "high", "low")
        for label in models.SETTINGS
    }
    yield from ((name, config) for name, config in MERGES(folder) if name in needed)


@pytest.mark.slow
def test_a_seed_from_training_to_json_and_again(tmp_path, monkeypatch, capsys):
    """With three items per task; the second run asks nothing again."""
    monkeypatch.setattr(training, "Recipe", lambda seed: replace(UNTRAINED, seed=seed))
    monkeypatch.setattr(models, "GENTLE", replace(models.GENTLE, steps=2, batch=4))
    monkeypatch.setattr(models, "ADAPTER", replace(models.ADAPTER, steps=2, batch=4))
    monkeypatch.setattr(models, "merges", few)
    monkeypatch.setattr(models, "SETTINGS", {"free": {}})
    monkeypatch.setattr(models, "CONTROLLED", ("free",))
    monkeypatch.setattr(
        models, "rounded", lambda base, tuned: iter([("bf16_free", models.monosoup(base, [tuned]))])
    )
    monkeypatch.setattr(models, "two_task_merges", lambda folder: list(TWO_TASK_MERGES(folder))[:1])
    threads = torch.get_num_threads()
    try:
        experiment.run_seed(3, tmp_path / "seed-3", tmp_path / "evidence", limit=3)
        seed = collect.Seed.read(tmp_path / "evidence" / "seed-3.json")
        before = seed.path.read_text()
        capsys.readouterr()
        experiment.run_seed(3, tmp_path / "seed-3", tmp_path / "evidence", limit=3)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    asked = len(seed.models("tiny")) + len(seed.models("tiny-two"))
    assert printed.count("finished before") == asked and "loading" not in printed
    first, second = json.loads(before), json.loads(seed.path.read_text())
    assert {**first, "minutes": 0} == {**second, "minutes": 0}
    assert {"same_norm_free", "bf16_finetuned", "low_free", "lora"} <= set(seed.models("tiny"))
    tasks = seed.content.suites["tiny-two"].tasks.values()
    assert all(len(task.clusters) == 3 for task in tasks)
    cka = seed.content.cka["OOD"]
    assert cka["pretrained"] == pytest.approx([1, 1]) and cka["finetuned"][-1] < 1
    modes = {record.mode for record in seed.content.records["lora"]}
    assert modes == {"freevariance", "variance"}
    assert str(tmp_path) not in before
    with pytest.raises(SourceError, match="two"):
        page.read(tmp_path / "evidence", "seed")
    (tmp_path / "evidence" / "seed-4.json").write_text(
        before.replace('"limit": 3', '"limit": null')
    )
    with pytest.raises(SourceError, match="different --limit"):
        page.read(tmp_path / "evidence", "seed")
