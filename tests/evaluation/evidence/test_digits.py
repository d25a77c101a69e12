"""One seed of the world of digits, from training to JSON and tables, with models that know nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("timm", reason="needs the extra vision")

from evaluation.evidence import collect, digits, digits_page, page
from evaluation.worlds import digits as world_of_digits
from evaluation.worlds import digits_training


@pytest.fixture
def hasty(monkeypatch):
    """Two steps of each training, ten images of each drawn set."""
    phase = digits_training.Phase(steps=2, batch=4, learning_rate=1e-3)
    hasty = {
        name: replace(architecture, pretraining=phase, finetuning=phase)
        for name, architecture in digits_training.ARCHITECTURES.items()
    }
    monkeypatch.setattr(digits_training, "ARCHITECTURES", hasty)
    monkeypatch.setattr(world_of_digits, "TEST_IMAGES", 40)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_what_claims_tables_and_figures_name_is_made():
    made = {"pretrained", "finetuned", *(f"same_norm_{label}" for label in digits.CONTROLLED)}
    made |= {name for name, _ in digits.merges("", "")}
    assert {*digits_page.SHOWN, *digits_page.WISE, *digits.COMPARED} <= made
    assert digits.model_count() == 2 * len(made)


@pytest.mark.slow
def test_a_seed_from_training_to_tables_and_again(tmp_path, hasty, monkeypatch, capsys):
    monkeypatch.setattr(digits, "ENERGIES", (0.8,))
    monkeypatch.setattr(digits_page, "ENERGIES", (0.8,))
    for seed in (0, 1):
        digits.run_seed(seed, tmp_path / f"digits-{seed}", tmp_path / "evidence", limit=20)
    found = page.read(tmp_path / "evidence", digits_page.STEM)
    text = found[0].path.read_text()
    assert str(tmp_path) not in text
    capsys.readouterr()
    digits.run_seed(0, tmp_path / "digits-0", tmp_path / "evidence", limit=20)
    printed = capsys.readouterr().out
    assert "loading" not in printed and "merging" not in printed
    again = json.loads(found[0].path.read_text())
    assert {**again, "minutes": 0} == {**json.loads(text), "minutes": 0}

    assert set(found[0].content.suites) == {"vit", "convnext"}
    cka = found[0].content.cka["convnext OOD"]
    assert cka["pretrained"] == pytest.approx([1] * 5) and cka["finetuned"][-1] < 1
    assert {record.mode for record in found[0].content.records["vit"]} == {
        "freevariance",
        "variance",
    }
    digits_page.write(tmp_path)
    written = (tmp_path / digits_page.PAGE).read_text()
    assert "ViT: freevariance − fine-tuned, OOD" in written and "nan" not in written
    pictures = {path.name for path in (tmp_path / "evidence").glob("*.png")}
    assert pictures == {"digits.png", "digits-energy.png", "digits-cka.png"}
    expected = collect.effect(found, "vit", "monosoup_free", "finetuned", "OOD")
    assert digits_page.page.with_interval(expected.mean, expected.low, expected.high) in written
