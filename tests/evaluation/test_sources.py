"""Models that a comparison names: folders, and merges that run first."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
import yaml
from mergekit import merge
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from evaluation import sources
from evaluation.sources import SourceError
from mergekit_monosoup.distributed import driver
from mergekit_monosoup.distributed.publication import FolderError
from mergekit_monosoup.distributed.worker import Failed


def test_a_merge_with_an_adapter_runs_and_follows_its_weights(models, tmp_path):
    base = models / "pretrained"
    config = tmp_path / "lora.yml"
    given = {"model": f"{base}+{tmp_path / 'adapter'}"}
    config.write_text(
        yaml.safe_dump({"merge_method": "monosoup", "base_model": str(base), "models": [given]})
    )
    merged = []
    for seed in range(2):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(Qwen3ForCausalLM.from_pretrained(base), lora).save_pretrained(
            tmp_path / "adapter"
        )
        merged.append(sources.find("lora", str(config), tmp_path / "cache"))
    assert merged[0].origin.fingerprint.weights != merged[1].origin.fingerprint.weights
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        source.folder.name for source in merged
    }
    before, after = (load_file(place / "model.safetensors") for place in (base, merged[0].folder))
    name = "model.layers.0.self_attn.{}.weight"
    assert torch.equal(before[name.format("k_proj")], after[name.format("k_proj")])
    assert not torch.equal(before[name.format("q_proj")], after[name.format("q_proj")])


def test_a_merge_is_done_anew_only_if_something_changed(models, tmp_path, monkeypatch):
    merges = []
    original = merge.run_merge
    monkeypatch.setattr(merge, "run_merge", lambda *a, **k: (merges.append(1), original(*a, **k)))
    config = tmp_path / "soup.yml"
    text = (models / "soup.yml").read_text()

    def merged(content: str) -> Path:
        config.write_text(content)
        return sources.find("soup", str(config), tmp_path / "merged").folder

    first = merged(text)
    assert merges == [1]
    assert merged(text + "# a comment changes nothing\n") == first and merges == [1]
    assert merged(text.replace("0.7", "0.6")) != first and merges == [1, 1]


def test_a_file_of_several_stages_is_merged_and_told_as_one(models, tmp_path):
    base, tuned = models / "pretrained", models / "finetuned"
    pair = {"base_model": str(base), "models": [{"model": str(tuned)}]}
    stages = [
        {"merge_method": "linear", "models": [{"model": "edited"}], "parameters": {"weight": 1.0}},
        {"name": "edited", "merge_method": "monosoup", **pair, "parameters": {"R": 0.5}},
    ]
    config, single = tmp_path / "two.yml", tmp_path / "one.yml"
    config.write_text(yaml.safe_dump_all(stages))
    single.write_text(yaml.safe_dump(stages[1]))
    one, two = (sources.find("soup", str(path), tmp_path / "cache") for path in (single, config))
    weights = [load_file(source.folder / "model.safetensors") for source in (one, two)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    merge_of = two.origin.merge
    assert merge_of.inputs.keys() == {str(base), str(tuned)}
    assert merge_of.config == {**stages[0], "stages": stages[1:]}
    assert '{"R": 0.5}' in sources.chosen_settings(merge_of)[1]
    # As for whoever gives the folder that `run` made of it.
    assert sources.find("soup", str(two.folder), tmp_path).origin.merge.config == merge_of.config
    assert {path.name for path in two.folder.iterdir()} == {
        path.name for path in one.folder.iterdir()
    }


def test_what_a_killed_merge_left_is_removed(models, tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    left, other = (
        tmp_path / f"{name}.unfinished-{number}"
        for name, number in (("a", child.pid), ("b", os.getppid()))
    )
    left.mkdir()
    other.mkdir()
    for path in (left, other):
        os.utime(path, (0, 0))  # younger ones may be another machine's
    sources.find("soup", str(models / "soup.yml"), tmp_path)
    assert not left.exists() and other.exists()


def test_two_runs_that_make_the_same_merge_share_it(models, tmp_path, monkeypatch):
    """The second one to finish finds the folder there, and takes it."""
    run_merge = sources._run_merge

    def with_another(*given):
        run_merge(*given)
        folder = given[-1]
        target = folder.with_name(folder.name.partition(".")[0])
        shutil.copytree(folder, target)

    monkeypatch.setattr(sources, "_run_merge", with_another)
    source = sources.find("soup", str(models / "soup.yml"), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [source.folder.name]
    assert (source.folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        driver.MergeError(Failed("No space left on device", "node@1-2", "Traceback")),
        FolderError("inputs were changed"),
    ],
)
def test_what_stops_a_merge_on_threads_is_one_line(models, tmp_path, monkeypatch, error):
    """Not a traceback: `options.ERRORS` holds none of what threads raise."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(driver, "merge_claimed", fail)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SourceError, match=f"the merge failed: {error}"):
        sources.find("soup", str(models / "soup.yml"), tmp_path / "cache")
