"""A seed of digits, from training to JSON and tables, with models that know nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.evidence import coins

from evaluation.evidence import collect, digits, digits_page, page
from evaluation.formatting import with_interval
from evaluation.worlds import digits as world_of_digits


@pytest.fixture
def hasty(monkeypatch):
    """Two steps of each training, 40 images of each drawn set, the merges that CKA needs."""
    pytest.importorskip("timm", reason="needs the extra vision")
    from evaluation.worlds import digits_training

    phase = digits_training.Phase(steps=2, batch=4, learning_rate=1e-3)
    hasty = {
        name: replace(architecture, pretraining=phase, finetuning=phase)
        for name, architecture in digits_training.ARCHITECTURES.items()
    }
    monkeypatch.setattr(digits_training, "ARCHITECTURES", hasty)
    monkeypatch.setattr(world_of_digits, "TEST_IMAGES", 40)
    few_by_hand = digits_of(world_of_digits.handwritten(), 40)
    monkeypatch.setattr(world_of_digits, "handwritten", lambda: few_by_hand)
    named = ("pretrained", "finetuned", "monosoup_free", "monosoup_R0.8")
    monkeypatch.setattr(digits, "COMPARED", named)
    all_merges = digits.merges

    def few(base, tuned):
        yield from (m for m in all_merges(base, tuned) if m[0] in digits.COMPARED)

    monkeypatch.setattr(digits, "merges", few)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def digits_of(images, count):
    return type(images)(images.pixels[:count], images.digits[:count])


def names() -> set[str]:
    """The models of one architecture."""
    made = {"pretrained", "finetuned", *(f"same_norm_{label}" for label in digits.CONTROLLED)}
    return made | {name for name, _ in digits.merges("", "")}


def test_what_claims_tables_and_figures_name_is_made():
    made = names()
    assert {*digits_page.SHOWN, *digits_page.WISE, *digits.COMPARED} <= made
    assert digits.model_count() == 2 * len(made)


@pytest.mark.slow
def test_a_seed_from_training_to_json_and_again(tmp_path, hasty, capsys):
    digits.run_seed(0, tmp_path / "digits-0", tmp_path / "evidence", limit=20)
    file = tmp_path / "evidence" / "digits-0.json"
    text = file.read_text()
    (tmp_path / "evidence" / "digits-1.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    found = page.read(tmp_path / "evidence", digits_page.PAGE.stem)
    assert str(tmp_path) not in text
    capsys.readouterr()
    digits.run_seed(0, tmp_path / "digits-0", tmp_path / "evidence", limit=20)
    printed = capsys.readouterr().out
    assert "loading" not in printed and "merging" not in printed
    again = json.loads(file.read_text())
    assert {**again, "minutes": 0} == {**json.loads(text), "minutes": 0}

    assert set(found[0].content.suites) == {"vit", "convnext"}
    cka = found[0].content.cka["convnext OOD"]
    assert cka["pretrained"] == pytest.approx([1] * 5) and cka["finetuned"][-1] < 1
    assert {record.mode for record in found[0].content.records["vit"]} == {
        "freevariance",
        "variance",
    }
    assert set(found[0].models("vit")) == {*digits.COMPARED, "same_norm_free", "same_norm_R0.8"}


@pytest.mark.slow
def test_the_page_of_made_answers(tmp_path):
    """Every claim, table and figure, of models that answer at random."""
    for seed in (0, 1, 2):
        made = coins(
            seed,
            dict.fromkeys(digits.ARCHITECTURES, names()),
            digits.SUITE,
            records=digits.ARCHITECTURES,
            cka={f"{s} {group}" for s in digits.ARCHITECTURES for group in ("ID", "OOD")},
        )
        made.write(tmp_path / "evidence" / f"digits-{seed}.json")
    digits_page.PAGE.write(tmp_path)
    written = (tmp_path / digits_page.PAGE.name).read_text()
    found = page.read(tmp_path / "evidence", digits_page.PAGE.stem)
    for suite, title in digits.ARCHITECTURES.items():
        gain = collect.effect(found, suite, "monosoup_free", "finetuned", "OOD")
        shown = with_interval(gain.mean, gain.low, gain.high)
        assert f"| {title}: freevariance − fine-tuned, OOD | {shown} |" in written
    pictures = {path.name for path in (tmp_path / "evidence").glob("*.png")}
    assert pictures == {"digits.png", "digits-energy.png", "digits-cka.png"}
