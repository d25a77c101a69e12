"""mergekit's plan: what it would refuse at its start."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from helpers import checkpoints
from helpers.findings import messages
from helpers.misfits import by_pytorch, fine_tuned, names_of, run_strictly
from safetensors.torch import save_file

from mergekit_monosoup.check import check
from mergekit_monosoup.planner import PlanningError

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
        and "a Qwen3ForCausalLM; with --allow-crimes mergekit" in message
    )


@finds("PLAN402")
def test_whether_allow_crimes_would_help(write, tmp_path):
    """mergekit then takes the architecture of any of the models, and with it what it needs."""
    base, (tuned,) = checkpoints.pair(tmp_path, "llama")
    path = write(base_model=str(base), models=[{"model": str(tuned)}])

    def as_class(name, **tensors):
        config = json.loads((tuned / "config.json").read_text())
        (tuned / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        state = checkpoints.state_dict(tuned) | tensors
        save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
        (error,) = messages(path)
        return error

    assert as_class("MistralForCausalLM").endswith("merges them with --allow-crimes only")
    error = as_class("LlamaForSequenceClassification", **{"score.weight": torch.zeros(1, 32)})
    assert f"mergekit may stop: {base} lacks score.weight. `mergekit-pytorch CONFIG" in error


@finds("PLAN404")
def test_modules_that_the_architecture_lacks(write, models):
    path = write(models=None, modules={"text_decoder": {"models": [{"model": models[1][0]}]}})
    assert [m for m in messages(path) if "module" in m] == [
        f"modules.text_decoder: {models[0]} has no such module, it has: default"
    ]


def test_an_error_before_it_is_not_reported_again(write):
    """The planner fails at a wrong value too, in worse words."""
    assert len(messages(write(merge_method="breadcrumbs", parameters={"weight": "heavy"}))) == 1


@finds("PLAN406")
def test_models_of_different_depth(write, models, tmp_path):
    """One line of ours, not mergekit's words, which name no model."""
    config = checkpoints.config()
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    found = check(write(models=[{"model": str(tmp_path / "deep")}]))
    (error,) = [finding for finding in found if finding.level == "error"]
    assert error.code == "PLAN406"
    assert f"{models[0]} has 2, {tmp_path}/deep has 3" in error.message


BERT = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)


@finds("PLAN407")
@pytest.mark.parametrize("kind", ["bert", "convnext"])
def test_a_planner_that_fails_gives_one_line_and_the_way_that_works(write, tmp_path, kind):
    """mergekit adds a list to a tuple; of some classes it cannot infer an architecture."""
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**BERT))
    else:
        sizes = dict(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32)
        model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes))
    path = fine_tuned(write, model, tmp_path)
    (error,) = check(path)
    assert error.code == "PLAN407" and "\n" not in error.message
    assert type(model).__name__ in error.message and f"{tmp_path}/base" in error.message
    assert by_pytorch(error.message, tmp_path) == names_of(tmp_path / "base")
    with pytest.raises(PlanningError, match="by a fault of its own") as caught:
        run_strictly(path, tmp_path / "out")
    assert "mergekit-pytorch raw.yml OUT" in str(caught.value)
    assert not (tmp_path / "out").exists()
