"""Merge configurations and the controls of equal norm."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import checkpoints
from safetensors.torch import save_file

from evaluation import configs, sources


def test_configurations():
    made = dict(configs.grid("base", "tuned", configs.KINDS, [0.5, 0.8], [0.0, 0.5, 1.0]))
    settings = ("free", "R0.5", "R0.8")
    curves = {"wise_ft_0.5", "lines_0.5", "monosoup_wise_0.5"}
    pairs = {f"{kind}_{setting}" for kind in ("monosoup", "scalar") for setting in settings}
    assert set(made) == curves | pairs
    for setting in settings:  # a control differs in the coefficients alone
        soup, control = made[f"monosoup_{setting}"], made[f"scalar_{setting}"]
        parameters = {**soup["parameters"], "coefficients": "scalar"}
        assert control == {**soup, "parameters": parameters}
    assert made["lines_0.5"]["models"][0]["parameters"] == {"weight": [0.5, 1.0]}


def test_norm_of_an_update(tmp_path):
    base, [tuned] = checkpoints.pair(tmp_path)
    before, after = checkpoints.state_dict(base), checkpoints.state_dict(tuned)
    expected = torch.cat(
        [(after[name] - weight).double().flatten() for name, weight in before.items()]
    ).norm()
    norm = math.hypot(*configs.update_norms(tuned, base).values())
    assert norm == pytest.approx(float(expected), rel=1e-6)
    assert configs.same_norm_weight(tuned, tuned, base) == 1.0
    assert configs.same_norm_weight(base, tuned, base) == 0.0
    with pytest.raises(sources.SourceError, match="no update to sweep"):
        configs.same_norm_weight(tuned, base, base)


def test_one_tensor_that_is_most_of_the_update_is_named(tmp_path):
    weights = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}
    for folder, size in (("base", 0.0), ("even", 1.0), ("odd", 3.0)):
        (tmp_path / folder).mkdir()
        moved = {"a": weights["a"] + float(size > 0), "b": weights["b"] + size}
        save_file(moved, tmp_path / folder / "model.safetensors")
    assert configs.dominant_tensor(tmp_path / "even", tmp_path / "base") is None
    assert "b alone is 90 %" in (configs.dominant_tensor(tmp_path / "odd", tmp_path / "base") or "")
