"""Tensors that are not floating point, through mergekit-pytorch: they stay as fine-tuned."""

from __future__ import annotations

import pytest
import torch
from helpers import checkpoints
from mergekit.graph import Executor
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
from safetensors.torch import save_file

from mergekit_monosoup import report

W = torch.randn(6, 4)


def merge(folder, method, *states, weights=(1.0, 1.0), **parameters):
    """Merge state dicts, the base first; returns what is written."""
    paths = [str(folder / f"model{number}.safetensors") for number in range(len(states))]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    models = [
        {"model": path, "parameters": {"weight": weight}}
        for path, weight in zip(paths[1:], weights, strict=False)
    ]
    config = RawPyTorchMergeConfig.model_validate(
        {
            "merge_method": method,
            "base_model": paths[0],
            "models": models,
            "parameters": {"report": str(folder / "r.jsonl"), **parameters},
        }
    )
    Executor(plan_flat_merge(config, str(folder / "out"), False, False, MergeOptions())).execute()
    return checkpoints.state_dict(folder / "out")


@pytest.mark.parametrize(
    ("name", "base", "tuned"),
    [
        ("bn.num_batches_tracked", torch.tensor(0), torch.tensor(900)),
        ("position_ids", torch.arange(5)[None], torch.arange(5.0)[None]),
        ("position_ids", torch.arange(5.0)[None], torch.arange(5)[None]),
        ("relative_position_index", torch.zeros(3, 3).long(), torch.ones(2, 2).long()),
        ("attn.bias", torch.ones(4, 4).bool(), torch.ones(4, 4).bool().tril()),
        ("mask", torch.ones(4).to(torch.uint8), torch.ones(4).to(torch.uint8)),
        ("code.weight", torch.ones(4, 4).to(torch.int8), torch.ones(4, 4).to(torch.int8)),
    ],
)
def test_they_stay_as_fine_tuned(tmp_path, name, base, tuned):
    """Counters of batch normalisation, positions of another type, masks, codes that agree."""
    states = {"w": W, name: base}, {"w": W + torch.randn(6, 4), name: tuned}
    out = merge(tmp_path, "monosoup", *states, mode="variance", R=0.3)
    assert out[name].dtype == tuned.dtype and torch.equal(out[name], tuned)
    records = {record.name: record for record in report.read(tmp_path / "r.jsonl")}
    assert records.keys() == {"w", name} and records["w"].action == "edited"
    assert records[name].action == "copied"
    alike = base.dtype == tuned.dtype and torch.equal(base, tuned)
    assert records[name].reason == "not floating point" + (
        "" if alike else f", as in {tmp_path}/model1.safetensors"
    )


def state(steps, shift=0.0):
    return {"w": W + shift * torch.randn(6, 4), "steps": torch.tensor(steps)}


def test_of_several_models_the_one_with_the_largest_weight(tmp_path):
    states = state(0), state(1, 0.1), state(2, 0.1)
    assert merge(tmp_path, "monosoup", *states)["steps"] == 1, "the first of equals"
    assert merge(tmp_path, "monosoup", *states, weights=(1, 3))["steps"] == 2
    assert merge(tmp_path, "svc", *states)["steps"] == 1


def test_codes_of_quantised_weights_are_refused_by_name(tmp_path):
    codes = [{"w": W, "layer.qweight": torch.full((4, 4), n, dtype=torch.int32)} for n in (1, 2)]
    with pytest.raises(ValueError, match=r"monosoup: layer\.qweight is not .*int32.* bfloat16"):
        merge(tmp_path, "monosoup", *codes)


def test_other_methods_are_left_to_mergekit(tmp_path):
    with pytest.raises(ValueError, match="differs between inputs"):
        merge(tmp_path, "task_arithmetic", state(0), state(1, 0.1))
