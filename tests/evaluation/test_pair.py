"""A pretrained body with the head of its fine-tune, tensor by tensor."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation import pair


@pytest.fixture
def models(tmp_path):
    """Two folders of timm: a body of 7 classes, and its fine-tune of 3."""
    torch.manual_seed(0)
    for name, classes in (("body", 7), ("tuned", 3)):
        folder = tmp_path / name
        folder.mkdir()
        state = {"stem.weight": torch.randn(4, 3, 2, 2), "norm.bias": torch.randn(4)}
        state |= {"head.fc.weight": torch.randn(classes, 4), "head.fc.bias": torch.randn(classes)}
        save_file(state, folder / "model.safetensors")
        config = {"architecture": "x", "pretrained_cfg": {"classifier": "head.fc"}, "of": name}
        (folder / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_body_keeps_all_but_its_head(models, capsys):
    out = models / "out"
    assert pair.main([str(models / "body"), str(models / "tuned"), "--out", str(out)]) == 0
    body, tuned, paired, copied = (
        load_file(folder / "model.safetensors")
        for folder in (models / "body", models / "tuned", out / "pretrained", out / "finetuned")
    )
    for name in tuned:
        source = tuned if name.startswith("head") else body
        assert torch.equal(paired[name], source[name]) and torch.equal(copied[name], tuned[name])
    assert json.loads((out / "pretrained" / "config.json").read_text())["of"] == "tuned"
    assert "head.fc.bias, head.fc.weight" in capsys.readouterr().out


def test_another_architecture_is_refused(models, capsys):
    state = load_file(models / "body" / "model.safetensors")
    del state["norm.bias"]
    state["stem.weight"] = torch.zeros(5, 3, 2, 2)
    save_file(state, models / "body" / "model.safetensors")
    words = [str(models / "body"), str(models / "tuned"), "--out", str(models / "out")]
    assert pair.main(words) == 1
    assert "not of the architecture" in (said := capsys.readouterr().err)
    assert "norm.bias, stem.weight" in said and not (models / "out").exists()


def test_what_is_not_there_is_one_line(models, capsys):
    assert pair.main(["/no/such", str(models / "tuned")]) == 1
    assert capsys.readouterr().err == "error: /no/such: no such folder or file\n"
