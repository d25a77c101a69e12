"""Adapters that peft has written for one small Qwen3, with spectra that fall like a real one's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]


def fallen(state: dict[str, torch.Tensor], seed: int, last: float) -> dict[str, torch.Tensor]:
    """Random factors in the place of those of a state dict, with σ from about 1 to ``last``."""
    torch.manual_seed(seed)
    new = {}
    for name, tensor in state.items():
        new[name] = tensor
        if ".lora_" in name:
            new[name] = torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5
            if "_B" in name and tensor.ndim > 1:
                falls = torch.logspace(0, math.log10(last), tensor.shape[1])
                new[name] = new[name] * falls.view(1, -1, *[1] * (tensor.ndim - 2))
    return new


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return checkpoints.pair(tmp_path_factory.mktemp("adapters"), tuned=0)[0]


@pytest.fixture(scope="session")
def make(base) -> Make:
    """Writes an adapter beside the base, once for each name; keywords are those of LoraConfig."""

    def of_name(name: str, seed: int = 0, last: float = 0.01, **settings) -> Path:
        import peft
        from transformers import AutoModelForCausalLM

        folder = base.parent / name
        if not folder.exists():
            chosen = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]}
            config = peft.LoraConfig(**chosen | settings)
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
            model.save_pretrained(folder)
            file = folder / "adapter_model.safetensors"
            save_file(fallen(load_file(file), seed, last), file)
        return folder

    return of_name


@pytest.fixture(scope="session")
def plain(make) -> Path:
    return make("plain")


@pytest.fixture(scope="session")
def other(make) -> Path:
    return make("other", 1, r=3, lora_alpha=5)


def configured(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())
