"""The soups of the demo."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from helpers.tiny import WORLD
from transformers import Qwen3ForCausalLM

from demo import merge
from demo.__main__ import grade_checkpoint
from evaluation.worlds import training


@pytest.mark.parametrize("soup", merge.SOUPS, ids=lambda soup: soup.file)
def test_yaml_says_what_the_title_says(soup):
    config = yaml.safe_load(soup.yaml)
    assert config["base_model"] == f"./{training.PRETRAINED}"
    assert [source["model"] for source in config["models"]] == [f"./{training.FINETUNED}"]
    parameters = config.get("parameters", {})
    assert parameters.get("report") == (soup.report.as_posix() if soup.reports else None)
    if soup is merge.WISE:
        assert config["merge_method"] == "task_arithmetic"
        assert soup.title.endswith(str(config["models"][0]["parameters"]["weight"]))
    else:
        assert config["merge_method"] == "monosoup" and parameters["mode"] in soup.title
        assert "R" not in parameters or f"R={parameters['R']}" in soup.title
        assert (parameters.get("coefficients") == "scalar") == soup.title.endswith(merge.CONTROL)


@pytest.mark.slow
def test_wise_ft_is_the_mean_of_the_two_and_can_be_graded(folder):
    assert merge.merge(merge.WISE, folder) == "mergekit-yaml configs/wise-ft.yml merged/wise-ft"
    base, tuned, soup = (
        Qwen3ForCausalLM.from_pretrained(folder / name).state_dict()
        for name in (training.PRETRAINED, training.FINETUNED, merge.WISE.merged)
    )
    for name, weight in soup.items():
        torch.testing.assert_close(weight, (base[name] + tuned[name]) / 2)
    grades = grade_checkpoint(folder / merge.WISE.merged, {"home": WORLD.test["home"][:2]})
    assert grades["home"].shape == (2,)


@pytest.mark.slow
def test_mergekit_failing_stops_the_demo_with_its_message(folder):
    config = merge.WISE_FT.replace("task_arithmetic", "no_such_method")
    broken = replace(merge.WISE, file="broken", yaml=config)
    left = folder / broken.merged / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("of an earlier run")
    with pytest.raises(merge.CommandError, match=r"(?s)exit code 1.*no_such_method"):
        merge.merge(broken, folder)
    assert not left.exists()
    assert "no_such_method" in (folder / "logs" / "broken.log").read_text()


def test_a_missing_tool_is_named():
    with pytest.raises(merge.CommandError, match="mergekit-no-such-tool is not in"):
        merge.tool("mergekit-no-such-tool")
