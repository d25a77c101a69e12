"""The paragraph for a model card: the numbers of the records, in Markdown that is harmless."""

from __future__ import annotations

import re
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from click.testing import CliRunner
from helpers import reports

from mergekit_monosoup.cli import main
from mergekit_monosoup.kernel.svc import calibrate
from mergekit_monosoup.report.card import card, code


@pytest.fixture(scope="module")
def merge():
    return reports.merge(mode="variance", R=0.7)


def test_its_numbers_are_those_of_the_records(merge):
    text = card(merge)
    edited = [record for record in merge if record.action == "edited"]
    high, low = (fmean(getattr(r, f"lambda_{part}") for r in edited) for part in ("high", "low"))
    assert "the method [MonoSoup](https://arxiv.org/abs/2602.09689)" in text
    assert "(mode `variance`, R = 0.7)" in text and "It edited 9 of 12 tensors." in text
    assert "`fewer than two dimensions` (3)" in text
    assert f"kept {high:.2f} of the strong directions" in text
    assert f"{low:.2f} of the weak ones" in text
    assert "100% survived rounding to `float32`" in text and "\n" not in text


def test_gradients_and_several_merges(merge, tmp_path):
    graded = [*merge, *(replace(r, R=0.9) for r in merge if r.R)]
    assert "R from 0.7 to 0.9" in card(graded)
    paths = [reports.written(tmp_path / f"{n}.jsonl", merge) for n in range(2)]
    printed = CliRunner().invoke(main, ["report", *map(str, paths), "--card"]).output
    assert printed == f"{card(merge)}\n\n{card(merge)}\n"


def test_calibration_has_its_own_words():
    torch.manual_seed(0)
    W0 = torch.randn(24, 16)
    tuned = [W0 + 0.1 * torch.randn(24, 16) for _ in range(2)]
    _, record = calibrate(W0, tuned, name="layers.0.w")
    text = card([record])
    assert "the method [SVC](https://arxiv.org/abs/2602.05536)" in text and "λ" not in text
    assert f"γ from {record.gamma_min:.2f} to {record.gamma_max:.2f}" in text
    assert f"{record.amplified:.0%} of them were amplified" in text


def test_nothing_edited_and_tensors_left_out(merge):
    copied = [replace(merge[0], action="copied", reason="no update", lambda_low=None, mode=None)]
    text = card([*copied, replace(merge[1], action="left out", lambda_low=None, mode=None)])
    assert "and a method of `mergekit-monosoup`." in text and "It edited 0 of 1 tensors." in text
    assert "lacks 1 tensors that mergekit did not read" in text


def test_reasons_are_code_whatever_they_say(merge):
    text = card([replace(merge[0], action="copied", reason="[a](b) `x` ``y`` <b>\n# z")])
    (fenced,) = re.findall(r"(?<!`)```(?!`) (.*?) ```", text)
    assert fenced == r"[a](b) `x` ``y`` <b>\n# z"
    assert code("plain") == "`plain`"


def test_an_inspection_has_none(tmp_path):
    path = reports.written(tmp_path / "i.jsonl", reports.inspection(16))
    refused = CliRunner().invoke(main, ["report", str(path), "--card"])
    assert refused.exit_code == 1
    assert "i.jsonl holds an inspection, not a merge" in refused.output
