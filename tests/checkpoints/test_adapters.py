"""Merging adapters into mergekit's cache: what a failure leaves, and what is made anew."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers import checkpoints
from mergekit.common import ModelReference
from safetensors.torch import load_file, save_file

from mergekit_monosoup.checkpoints import adapters
from mergekit_monosoup.checkpoints.adapters import AdapterError, Options, merged, place
from mergekit_monosoup.checkpoints.headers import ForeignError


@pytest.fixture
def reference(hub, tmp_path) -> ModelReference:
    """A base with an adapter of its own copy, to spoil."""
    shutil.copytree(hub / "adapter", tmp_path / "adapter")
    return ModelReference.parse(f"{hub / 'base'}+{tmp_path / 'adapter'}")


@pytest.fixture
def options(tmp_path) -> Options:
    return Options(str(tmp_path / "cache"))


@pytest.fixture
def weight(reference, options):
    """Merges, and returns a weight that the adapter changes."""

    def of_merged():
        folder = Path(merged(reference, options).model.path)
        assert os.listdir(options.lora_merge_cache) == [folder.name]
        return checkpoints.state_dict(folder)["model.layers.0.self_attn.q_proj.weight"]

    return of_merged


def adapter_file(reference: ModelReference) -> Path:
    return Path(reference.lora.path, "adapter_model.safetensors")


def test_mergekit_finds_the_merged_model_and_it_is_made_once(reference, options, weight):
    first = weight()
    assert (
        place(reference, options.lora_merge_cache)
        == reference.merged(options.lora_merge_cache).model.path
    )
    base = checkpoints.state_dict(Path(reference.model.path))
    assert not first.equal(base["model.layers.0.self_attn.q_proj.weight"].float())
    made = os.stat(merged(reference, options).model.path).st_mtime_ns
    assert os.stat(merged(reference, options).model.path).st_mtime_ns == made


def test_a_failed_merge_leaves_nothing_in_the_cache(reference, options, monkeypatch, weight):
    def out_of_memory(*_, **__):
        raise RuntimeError("not enough\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.from_pretrained", out_of_memory)
        with pytest.raises(AdapterError, match=r"into its base: RuntimeError: not enough memory$"):
            merged(reference, options)
    assert os.listdir(options.lora_merge_cache) == []
    weight()  # and now it works


def test_what_a_failure_of_mergekit_left_is_made_anew(reference, options, weight):
    expected = weight()
    folder = Path(place(reference, options.lora_merge_cache))
    shutil.rmtree(folder)
    folder.mkdir()  # a failed merge
    assert weight().equal(expected)
    os.truncate(folder / "model.safetensors", 1000)  # a killed one
    assert weight().equal(expected)


def test_another_adapter_under_the_old_name_is_merged(reference, options, weight):
    before, file = weight(), adapter_file(reference)
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    assert not weight().equal(before)


def test_an_adapter_of_another_shape_is_refused_before_anything_is_loaded(
    reference, options, monkeypatch
):
    file = adapter_file(reference)
    state = load_file(file)
    save_file(
        state | {"base_model.model.lm_head.weight": state.popitem()[1].new_zeros(104, 32)}, file
    )
    monkeypatch.setattr(adapters, "_merge", None)
    with pytest.raises(AdapterError, match=r"lm_head.weight is \(104, 32\) in the adapter"):
        merged(reference, options)


def test_a_damaged_adapter_is_one_line(reference, options):
    file = adapter_file(reference)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ForeignError, match=r"adapter_model\.bin is a safetensors file"):
        merged(reference, options)
    assert os.listdir(options.lora_merge_cache) == []
