"""What mergekit reads for each tensor: by other names, as stacks of experts, or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import checkpoints
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import GatherTensors, LoadTensor
from safetensors.torch import save_file

from mergekit_monosoup.checkpoints.headers import Headers, LackingError
from mergekit_monosoup.checkpoints.inputs import Inputs, loads

UP = "model.layers.1.mlp.up_proj.weight"


def inputs(*folders) -> Inputs:
    headers = Headers()
    loaders = {
        ModelReference.parse(str(folder)): LazyTensorLoader(headers.index(str(folder)))
        for folder in folders
    }
    return Inputs(loaders, headers=headers)


def load(folder, tensor: str, **more) -> LoadTensor:
    return LoadTensor(model=ModelReference.parse(str(folder)), tensor=tensor, **more)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return checkpoints.pair(tmp_path_factory.mktemp("qwen3"), sharded=True)[0]


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory):
    return checkpoints.pair(tmp_path_factory.mktemp("moe"), "qwen3_moe")[0]


def test_a_tensor_of_that_name(qwen3):
    (stored,), shape = inputs(qwen3).sources(load(qwen3, UP))
    assert stored.name == UP and stored.shape == shape == (48, 32)
    assert stored.size == 4 * 48 * 32 and stored.dtype == "F32"


def test_other_names_in_their_order(qwen3):
    for key in ("aliases", "tied_names"):
        (stored,), _ = inputs(qwen3).sources(load(qwen3, "no.such", **{key: ("nor.such", UP)}))
        assert stored.name == UP


def test_a_tensor_that_a_model_lacks(qwen3):
    assert inputs(qwen3).sources(load(qwen3, "no.such", optional=True)) == ([], ())
    with pytest.raises(LackingError, match=r"lacks no\.such, which the merge needs"):
        inputs(qwen3).sources(load(qwen3, "no.such"))


def test_experts_are_read_one_by_one_as_a_stack(qwen3_moe, tmp_path):
    stack = "model.layers.1.mlp.experts.down_proj"
    state = checkpoints.state_dict(qwen3_moe)
    parts = {name for name in state if "layers.1.mlp.experts" in name and "down_proj" in name}
    assert len(parts) == 4, "they are stored one by one"
    stored, shape = inputs(qwen3_moe).sources(load(qwen3_moe, stack))
    assert {s.name for s in stored} == parts and shape == (4, 32, 24)
    shutil.copytree(qwen3_moe, tmp_path / "broken")
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(state, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(LackingError, match="lacks parts of"):
        inputs(tmp_path / "broken").sources(load(tmp_path / "broken", stack))


def test_an_index_that_lists_what_no_file_holds(qwen3, tmp_path):
    shutil.copytree(qwen3, tmp_path / "other")
    place = tmp_path / "other" / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"][UP]
    place.write_text(json.dumps(index))
    with pytest.raises(LackingError, match="which the index beside it lists"):
        inputs(tmp_path / "other").sources(load(tmp_path / "other", "model.extra.weight"))


def test_what_a_task_reads_through_others(qwen3):
    names = (UP, "model.norm.weight")
    read = [load(qwen3, name) for name in names]
    weights = {r.model: WeightInfo(name=name) for r, name in zip(read, names, strict=True)}
    gather = GatherTensors(weight_info=ImmutableMap(data=weights))
    assert list(loads(read[0])) == [read[0]]
    assert list(loads(gather)) == read[1:], "one model, one weight: the last"
