"""What a sweep merges and says: its configurations, its controls, and one small sweep from end to end."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import checkpoints
from safetensors.torch import save_file

from evaluation import sources, store, sweep


class TestNumbers:
    def test_both_ends_count(self):
        assert sweep.numbers("0.5:0.95:0.05") == [
            0.5,
            0.55,
            0.6,
            0.65,
            0.7,
            0.75,
            0.8,
            0.85,
            0.9,
            0.95,
        ]
        assert len(sweep.numbers("0:1:0.1")) == 11 and sweep.numbers("0.5,0.8") == [0.5, 0.8]

    @pytest.mark.parametrize("text", ["0.5:0.9", "0.9:0.5:0.1", "0:1:0", "a", "0.5,1.5", ""])
    def test_nonsense(self, text):
        with pytest.raises(argparse.ArgumentTypeError):
            sweep.numbers(text)
        with pytest.raises(argparse.ArgumentTypeError, match="unknown: magic"):
            sweep._methods("monosoup,magic")


def test_configurations():
    made = dict(sweep.configs("base", "tuned", sweep.METHODS, [0.5, 0.8], [0.0, 0.5, 1.0]))
    assert sorted(made) == [
        "lines_0.5",
        "monosoup_R0.5",
        "monosoup_R0.8",
        "monosoup_free",
        "monosoup_wise_0.5",
        "scalar_R0.5",
        "scalar_R0.8",
        "scalar_free",
        "wise_ft_0.5",
    ]
    for name, config in made.items():
        if (
            name.startswith("monosoup_") and "wise" not in name
        ):  # a control differs in the coefficients alone
            control = made[name.replace("monosoup", "scalar")]
            assert control == {
                **config,
                "parameters": {**config["parameters"], "coefficients": "scalar"},
            }
    assert made["lines_0.5"]["models"][0]["parameters"] == {"weight": [0.5, 1.0]}


def test_norm_of_an_update(tmp_path):
    base, [tuned] = checkpoints.pair(tmp_path)
    before, after = checkpoints.state_dict(base), checkpoints.state_dict(tuned)
    expected = torch.cat(
        [(after[name] - weight).double().flatten() for name, weight in before.items()]
    ).norm()
    assert norm(tuned, base) == pytest.approx(float(expected), rel=1e-6)
    assert (
        sweep.same_norm_weight(tuned, tuned, base) == 1.0
        and sweep.same_norm_weight(base, tuned, base) == 0.0
    )
    with pytest.raises(sources.SourceError, match="no update to sweep"):
        sweep.same_norm_weight(tuned, base, base)


def test_one_tensor_that_is_most_of_the_update_is_named(tmp_path):
    weights = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}
    for folder, size in (("base", 0.0), ("even", 1.0), ("odd", 3.0)):
        (tmp_path / folder).mkdir()
        moved = {"a": weights["a"] + float(size > 0), "b": weights["b"] + size}
        save_file(moved, tmp_path / folder / "model.safetensors")
    assert sweep.dominated(tmp_path / "even", tmp_path / "base") is None
    assert "b alone is 90 %" in (sweep.dominated(tmp_path / "odd", tmp_path / "base") or "")


def norm(model: Path, base: Path) -> float:
    return math.hypot(*sweep.update_norms(model, base).values())


def test_a_sweep(models, tmp_path, capsys):
    words = [
        "tiny",
        "--pretrained",
        models / "pretrained",
        "--finetuned",
        models / "finetuned",
        "--methods",
        "monosoup",
    ]
    words += [
        "--R",
        "0.8",
        "--limit",
        "8",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
        "--merge-cache",
        tmp_path / "merged",
    ]
    assert sweep.main(list(map(str, words))) == 0
    said = capsys.readouterr().out
    for name in ("free", "R0.8"):
        assert (
            f"monosoup_{name} minus scalar_{name}: ID " in said
            and f"monosoup_{name} minus same_norm_{name}: ID " in said
        )
    results = {result.data["model"] for result in store.read(tmp_path / "out")}
    soups = {
        f"{kind}_{name}"
        for kind in ("monosoup", "scalar", "same_norm")
        for name in ("free", "R0.8")
    }
    assert results == {"pretrained", "finetuned", *soups}
    assert (tmp_path / "out" / "tiny-plane.png").exists()

    # The controls do what their names say: the same norm, of the whole update and of each edited matrix.
    def merged(name: str) -> Path:
        return sources.find(
            name, str(tmp_path / "out" / "configs" / f"{name}.yml"), tmp_path / "merged"
        ).folder

    base = models / "pretrained"
    norms = {
        kind: norm(merged(f"{kind}_R0.8"), base) for kind in ("monosoup", "scalar", "same_norm")
    }
    assert norms["scalar"] == pytest.approx(norms["monosoup"], rel=1e-4)
    assert norms["same_norm"] == pytest.approx(norms["monosoup"], rel=1e-4)
    assert norms["monosoup"] < 0.95 * norm(models / "finetuned", base)
    name = "model.layers.0.mlp.up_proj.weight"
    w0, soup, scalar = (
        checkpoints.state_dict(f)[name]
        for f in (base, merged("monosoup_R0.8"), merged("scalar_R0.8"))
    )
    assert (scalar - w0).norm() == pytest.approx(float((soup - w0).norm()), rel=1e-4)
    assert not torch.allclose(scalar, soup, atol=1e-5)
    weight = yaml.safe_load((tmp_path / "out" / "configs" / "same_norm_R0.8.yml").read_text())[
        "models"
    ][0]["parameters"]
    assert 0 < weight["weight"] < 1

    assert sweep.main(list(map(str, words))) == 0
    assert (
        "loading" not in capsys.readouterr().out
    )  # all finished: nothing is merged or asked again
