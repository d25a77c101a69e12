"""`python -m demo` with the merges replaced; the whole takes minutes and is run as such."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import RECIPE

from demo import merge, summary
from demo.__main__ import main
from evaluation.worlds import training
from evaluation.worlds.sums import OTHER_SKILLS, SKILLS


@pytest.mark.slow
def test_results_hold_every_number(tmp_path, monkeypatch, capsys):
    """The whole run with the merges replaced: each soup is a copy of the fine-tuned model."""
    monkeypatch.setattr(training, "Recipe", lambda seed: replace(RECIPE, seed=seed))

    def copied(soup: merge.Soup, out: Path) -> str:
        return shutil.copytree(out / training.FINETUNED, out / soup.merged).name

    monkeypatch.setattr(merge, "merge", copied)
    monkeypatch.setattr(merge, "print_report", lambda soup, out: None)
    monkeypatch.setattr(merge, "tool", lambda name: name)
    assert main(["--out", str(tmp_path / "out"), "--seed", "3"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    items = [
        json.loads(line)
        for line in (tmp_path / "out" / "test-items.jsonl").read_text("utf-8").splitlines()
    ]
    assert results["seed"] == 3 and results["recipe"]["seed"] == 3
    assert results["versions"]["torch"] == torch.__version__
    titles = {soup.title for soup in merge.SOUPS}
    assert set(results["models"]) == {summary.PRETRAINED, summary.FINETUNED, *titles}
    base, tuned, soup = (
        results["models"][name]
        for name in (summary.PRETRAINED, summary.FINETUNED, merge.FREE.title)
    )
    assert soup["weights_sha256"] == tuned["weights_sha256"] != base["weights_sha256"]
    nothing = {"mean": 0.0, "standard_error": 0.0, "interval_95": [0.0, 0.0]}
    assert soup["minus fine-tuned"]["ood"] == nothing
    assert [item["skill"] for item in items] == [
        skill for skill in SKILLS for _ in tuned["skills"][skill]["right"]
    ]
    for skill in SKILLS:
        for model in results["models"].values():
            counted = model["skills"][skill]
            assert counted["mean"] == pytest.approx(counted["right"].count("1") / counted["items"])
    assert tuned["ood"]["mean"] == pytest.approx(
        np.mean([tuned["skills"][skill]["mean"] for skill in OTHER_SKILLS])
    )
    assert base["skills"]["home"]["mean"] > 0
    shown = capsys.readouterr().out
    assert all(sentence[:80] in shown for sentence in results["sentences"])


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "thesis.txt").write_text("precious")
    assert main(["--out", str(tmp_path), "--fresh"]) == 1
    assert "--out" in capsys.readouterr().out
    assert (tmp_path / "pretrained" / "thesis.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained"]
