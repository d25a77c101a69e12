"""Adapters of every format that is read, and what is said about all others."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_monosoup.checkpoints.lora import PREFIX, is_adapter, open_adapter
from mergekit_monosoup.checkpoints.lora_config import LoraError

Q, CONV, EMBED = "layers.0.q_proj", "stem", "embed"
STATE = {
    f"{PREFIX}{Q}.lora_A.weight": torch.arange(12.0).reshape(2, 6),
    f"{PREFIX}{Q}.lora_B.weight": torch.ones(4, 2),
    f"{PREFIX}{CONV}.lora_A.weight": torch.ones(2, 3, 5, 5),
    f"{PREFIX}{CONV}.lora_B.weight": torch.ones(8, 2, 1, 1),
    f"{PREFIX}{EMBED}.lora_embedding_A": torch.ones(2, 30),
    f"{PREFIX}{EMBED}.lora_embedding_B": torch.ones(4, 2),
    f"{PREFIX}{EMBED}.base_layer.weight": torch.ones(30, 4),
    f"{PREFIX}head.weight": torch.ones(30, 4),
}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "init_lora_weights": True}


def write(folder: Path, state: dict | None = None, kind: str = "safetensors", **settings) -> Path:
    folder.mkdir(exist_ok=True)
    state = STATE if state is None else state
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    file = folder / f"adapter_model.{kind}"
    if kind == "bin":
        torch.save(state, file)
    elif kind == "safetensors":
        save_file(state, file)
    else:  # in shards
        names, shards = sorted(state), {}
        for place, name in enumerate(names):
            shards.setdefault(f"adapter_model-{place % 2}.safetensors", {})[name] = state[name]
        for shard, tensors in shards.items():
            save_file(tensors, folder / shard)
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
        index = folder / "adapter_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_every_format_is_read(kind, tmp_path):
    adapter = open_adapter(str(write(tmp_path / "a", kind=kind)))
    shapes = {name: module.shape for name, module in adapter.modules.items()}
    assert shapes == {Q: (4, 6), CONV: (8, 3, 5, 5), EMBED: (30, 4)}
    assert {name: module.weight for name, module in adapter.modules.items()} == {
        name: f"{name}.weight" for name in shapes
    }
    assert adapter.modules[EMBED].flipped and not adapter.modules[CONV].flipped
    assert adapter.whole == [f"{PREFIX}head.weight"]
    assert adapter.untrained == [f"{PREFIX}{EMBED}.base_layer.weight"]
    for name, tensor in STATE.items():
        assert adapter.load(adapter.tensors[name]).equal(tensor)
    assert is_adapter(str(tmp_path / "a"))


def test_the_linear_layers_of_gpt2_are_stored_transposed(tmp_path):
    modules = open_adapter(str(write(tmp_path / "a", fan_in_fan_out=True))).modules
    assert modules[Q].flipped and modules[Q].shape == (6, 4)
    assert not modules[CONV].flipped


def test_scales_are_those_of_peft(tmp_path):
    """Against peft's own layers, patterns and all."""
    import peft

    names = ["enc.layers.1.q", "layers.1.q", "layers.11.q", "layers.2.q", "other"]
    tree = torch.nn.Module()
    for name in names:
        parent = tree
        for part in name.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], torch.nn.Linear(6, 6))
    patterns = {"rank_pattern": {"layers.1.q": 3, "^layers.2.q": 2}, "alpha_pattern": {"q": 7}}
    for rslora in (False, True):
        config = peft.LoraConfig(
            r=4, lora_alpha=5, target_modules=["q", "other"], use_rslora=rslora, **patterns
        )
        model = peft.get_peft_model(tree, config)
        model.save_pretrained(tmp_path / "a")
        modules = open_adapter(str(tmp_path / "a")).modules
        for name in names:
            layer = model.base_model.model.get_submodule(name)
            assert modules[name].scale == pytest.approx(layer.scaling["default"]), name
            assert modules[name].rank == layer.r["default"]
        tree = model.unload()
    assert modules["other"].scale == pytest.approx(5 / math.sqrt(4))


def changed(name: str, tensor: torch.Tensor | None) -> dict:
    state = STATE | {f"{PREFIX}{name}": tensor}
    return {n: t for n, t in state.items() if t is not None}


REFUSED = [
    ({"peft_type": "LOHA"}, None, r"type 'LOHA': .*`model: BASE\+ADAPTER` in mergekit-yaml"),
    ({"use_dora": True}, None, "is DoRA, which scales"),
    ({"target_parameters": ["mlp.experts"]}, None, "on parameters of stacked experts"),
    ({"init_lora_weights": "pissa_niter_4"}, None, "began as 'pissa_niter_4'"),
    ({"r": 0}, None, r"adapter_config.json: `r` must be a whole number > 0, got 0"),
    ({"lora_alpha": "8"}, None, "`lora_alpha` must be a finite number, got '8'"),
    ({"rank_pattern": {"q": True}}, None, "`rank_pattern`: 'q' must be a whole number"),
    ({"rank_pattern": {"q(": 2}}, None, r"'q\(' is no regular expression"),
    ({"alpha_pattern": [1]}, None, "`alpha_pattern` must map modules"),
    ({"r": 5}, None, r"and its B \(4, 2\), but .* the rank 5"),
    ({}, changed(f"{Q}.lora_B.weight", None), "no lora_B.weight beside it"),
    ({}, changed(f"{Q}.lora_A.weight", None), f"has {PREFIX}{Q}.lora_B.weight, but no A"),
    ({}, changed(f"{Q}.lora_magnitude_vector", torch.ones(4)), "no part of a LoRA"),
    ({}, changed(f"{Q}.lora_A.weight", torch.ones(0)), "gathered weights"),
    ({}, changed(f"{CONV}.lora_B.weight", torch.ones(8, 1, 1, 1)), "a grouped convolution"),
    ({}, changed(f"{Q}.lora_B.weight", torch.ones(4, 2).char()), "quantised factors are codes"),
    ({}, {"lora_unet_q.lora_down.weight": torch.ones(2, 2)}, "begin with base_model.model."),
    ({}, {f"{PREFIX}head.weight": torch.ones(2, 2)}, "holds no factors of a LoRA"),
]


@pytest.mark.parametrize(("settings", "state", "words"), REFUSED)
def test_what_is_refused_and_why(settings, state, words, tmp_path):
    folder = write(tmp_path / "a", state, **settings)
    with pytest.raises(LoraError, match=words) as refused:
        open_adapter(str(folder))
    assert str(refused.value).startswith(f"{folder}: ")


def test_places_that_hold_no_adapter(tmp_path):
    folder = write(tmp_path / "a")
    for name, words in {
        str(tmp_path / "nothing"): "no such file or folder",
        str(folder / "adapter_model.safetensors"): "is a file: name the folder",
        f"base+{folder}": "name the adapter alone",
    }.items():
        with pytest.raises(LoraError, match=words):
            open_adapter(name)
        assert not is_adapter(name)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoraError, match=r"adapter_config\.json is no JSON"):
        open_adapter(str(folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LoraError, match=r"adapter_config\.json is not there"):
        open_adapter(str(folder))
    shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors")
    write(folder)
    assert not is_adapter(str(folder)), "a whole model lies beside it"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_damaged_file_is_named(kind, tmp_path):
    folder = write(tmp_path / "a", kind=kind)
    file = folder / f"adapter_model.{kind}"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoraError, match=f"{file} (is|cannot be read)"):
        open_adapter(str(folder))


class Harmful:
    def __reduce__(self):
        return print, ("code of a file has run",)


def test_no_code_of_a_bin_file_runs(tmp_path, capsys):
    state = STATE | {f"{PREFIX}x.weight": Harmful()}
    with pytest.raises(LoraError, match="is not opened, for that could run code"):
        open_adapter(str(write(tmp_path / "a", state, "bin")))
    assert "has run" not in capsys.readouterr().out


def test_a_repository_of_the_hub(served, tmp_path):
    folder = write(tmp_path / "a")
    served.add("me/lora", folder)
    assert is_adapter("me/lora")
    adapter = open_adapter("me/lora")
    assert adapter.name == "me/lora" and set(adapter.modules) == {Q, CONV, EMBED}
    file = folder / "adapter_model.safetensors"
    assert adapter.load(adapter.modules[Q].A).equal(load_file(file)[f"{PREFIX}{Q}.lora_A.weight"])
    with pytest.raises(LoraError, match=r"me/missing: .*no such repository"):
        open_adapter("me/missing")
