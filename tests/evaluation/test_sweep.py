"""One small sweep from end to end."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import checkpoints

from evaluation import configs, sources, store, sweep


def norm(model: Path, base: Path) -> float:
    return math.hypot(*configs.update_norms(model, base).values())


def test_unknown_methods_are_named():
    with pytest.raises(argparse.ArgumentTypeError, match="unknown: magic"):
        sweep._methods("monosoup,magic")


@pytest.mark.slow
def test_a_sweep(models, tmp_path, capsys):
    words = ["tiny", "--methods=monosoup", "--R=0.8", "--limit=8", "--device=cpu"]
    words += [f"--{name}={models / name}" for name in ("pretrained", "finetuned")]
    words += [f"--out={tmp_path / 'out'}", f"--merge-cache={tmp_path / 'merged'}"]
    assert sweep.main(words) == 0
    printed = capsys.readouterr().out
    for name in ("free", "R0.8"):
        for control in ("scalar", "same_norm"):
            assert f"monosoup_{name} minus {control}_{name}: ID " in printed
    results = {evaluation.result.model for evaluation in store.read(tmp_path / "out")}
    soups = {
        f"{kind}_{name}"
        for kind in ("monosoup", "scalar", "same_norm")
        for name in ("free", "R0.8")
    }
    assert results == {"pretrained", "finetuned", *soups}
    assert (tmp_path / "out" / "tiny-plane.png").exists()

    # The controls do what their names say: the same norm, of the whole update and of each edited
    # matrix.
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
    file = tmp_path / "out" / "configs" / "same_norm_R0.8.yml"
    [entry] = yaml.safe_load(file.read_text())["models"]
    assert 0 < entry["parameters"]["weight"] < 1

    assert sweep.main(words) == 0
    # All finished: nothing is merged or asked again.
    assert "loading" not in capsys.readouterr().out
