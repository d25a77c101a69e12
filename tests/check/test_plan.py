"""mergekit's plan: what it would refuse at its start."""

from __future__ import annotations

import shutil

import pytest
from helpers import checkpoints
from helpers.findings import messages

finds = pytest.mark.finds


@finds("PLAN401")
def test_a_folder_without_config(write, models, tmp_path):
    shutil.copytree(models[1][0], tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    (message,) = messages(write(models=[{"model": str(tmp_path / "bare")}]))
    assert message == f"{tmp_path}/bare: has no config.json, which mergekit needs"


@finds("PLAN402", "PLAN403", "PLAN405")
def test_what_mergekit_would_refuse_at_its_start(write, models, tmp_path):
    layers = [
        {"sources": [{"model": name, "layer_range": [0, 9]} for name in (models[0], models[1][0])]}
    ]
    assert (
        f"layer_range [0, 9]: {models[0]} has 2" in messages(write(models=None, slices=layers))[0]
    )
    assert "cannot plan this merge" in messages(write(merge_method="breadcrumbs"))[0]
    _, (llama,) = checkpoints.pair(tmp_path, "llama")
    (message,) = messages(write(models=[{"model": str(llama)}]))[:1]
    assert (
        "is a LlamaForCausalLM" in message
        and "a Qwen3ForCausalLM; mergekit merges them with --allow-crimes" in message
    )


@finds("PLAN404")
def test_modules_that_the_architecture_lacks(write, models):
    path = write(models=None, modules={"text_decoder": {"models": [{"model": models[1][0]}]}})
    assert [m for m in messages(path) if "module" in m] == [
        f"modules.text_decoder: {models[0]} has no such module, it has: default"
    ]


def test_an_error_before_it_is_not_reported_again(write):
    """The planner fails at a wrong value too, in worse words."""
    assert len(messages(write(merge_method="breadcrumbs", parameters={"weight": "heavy"}))) == 1
