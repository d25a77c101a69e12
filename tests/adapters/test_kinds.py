"""Every kind of layer that LoRA has: peft's own ΔW of the edited adapter is the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import oracle
from helpers.lora import fallen
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from mergekit_monosoup.cli import main

# Of ‖ΔW‖, for factors in float32. Measured: at most 6e-8.
TOLERANCE = 1e-6


class Network(torch.nn.Module):
    """A layer of each kind; some are narrower than the rank."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(20, 12)
        self.narrow = torch.nn.Linear(3, 12)
        self.words = torch.nn.Embedding(30, 8)
        self.conv1 = torch.nn.Conv1d(4, 9, 3)
        self.conv2 = torch.nn.Conv2d(3, 14, (3, 5))
        self.point = torch.nn.Conv2d(6, 5, 1)


class OfGpt2(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = Conv1D(14, 9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", [Network, OfGpt2])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gets_the_edited_update(network, rslora, tmp_path):
    import peft

    names = [name for name, _ in network().named_children()]
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=names, fan_in_fan_out=network is OfGpt2, use_rslora=rslora
    )
    peft.get_peft_model(network(), config).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(fallen(load_file(file), 3, 0.05), file)
    words = ["adapter", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--mode", "variance"]
    done = CliRunner().invoke(main, [*words, "--R", "0.7"])
    assert done.exit_code == 0, done.output
    before, after = (updates(network(), tmp_path / folder) for folder in "ab")
    assert set(before) == set(names)
    for name, update in before.items():
        _, expected, numbers = oracle.monosoup(0 * update, update, "variance", 0.7)
        error = np.linalg.norm(after[name] - expected)
        assert error <= TOLERANCE * np.linalg.norm(update), name
        assert numbers["k"] == numbers["rank"] or not np.allclose(after[name], update), name


def updates(network: torch.nn.Module, folder) -> dict[str, np.ndarray]:
    """ΔW of each module as peft forms it, as a matrix."""
    import peft

    model = peft.PeftModel.from_pretrained(network, folder).base_model.model
    return {
        name: layer.get_delta_weight("default").detach().flatten(1).double().numpy()
        for name, layer in model.named_children()
    }
