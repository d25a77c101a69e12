"""Plain greedy soup: the pass on made-up scores, and one small soup from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers import checkpoints

from evaluation import greedy_soup
from evaluation.greedy_soup import Step


def test_the_greedy_pass():
    """b is best; with c it falls, with a it rises; d equals the best, which is no improvement."""
    averages = {("b", "c"): 0.7, ("b", "a"): 0.9, ("b", "a", "d"): 0.9}
    asked = []

    def score(chosen):
        asked.append(tuple(chosen))
        return averages[tuple(chosen)]

    steps = greedy_soup.greedy_soup({"a": 0.5, "b": 0.8, "c": 0.6, "d": 0.1}, score)
    assert steps == [
        Step("b", 0.8, True),
        Step("c", 0.7, False),
        Step("a", 0.9, True),
        Step("d", 0.9, False),
    ]
    assert asked == list(averages)


def test_no_model_and_one_model():
    with pytest.raises(ValueError, match="at least one"):
        greedy_soup.greedy_soup({}, lambda chosen: 1.0)
    assert greedy_soup.greedy_soup({"a": 0.3}, pytest.fail) == [Step("a", 0.3, True)]


@pytest.mark.slow
def test_a_soup_from_end_to_end(models, tmp_path, capsys):
    itself = tmp_path / "b.yml"  # a configuration is averaged as what it merges to
    itself.write_text(
        yaml.safe_dump(
            {"merge_method": "passthrough", "models": [{"model": str(models / "finetuned")}]}
        )
    )
    words = ["tiny", f"--model=a={models / 'pretrained'}", f"--model=b={itself}", "--limit=4"]
    words += ["--group=OOD", "--device=cpu", f"--out={tmp_path / 'out'}"]
    assert greedy_soup.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("kept") + printed.count("left") == 2
    config = yaml.safe_load(Path(printed.rsplit("greedy soup: ", 1)[1].strip()).read_text())
    assert config["merge_method"] == "linear" and 1 <= len(config["models"]) <= 2
    folders = [
        path.parent for path in (tmp_path / "out" / "merged").glob("*/evaluation-merge.json")
    ]
    (average,) = [
        f for f in folders if "linear" in (f / "evaluation-merge.json").read_text()
    ]  # kept or not
    merged = checkpoints.state_dict(average)
    a, b = (checkpoints.state_dict(models / name) for name in ("pretrained", "finetuned"))
    assert all(
        torch.allclose(weight.float(), (a[n].float() + b[n].float()) / 2, atol=1e-3)
        for n, weight in merged.items()
    )
    assert greedy_soup.main(words) == 0
    assert "finished before" in capsys.readouterr().out
