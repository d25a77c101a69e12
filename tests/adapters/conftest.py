"""Adapters that peft has written for one small Qwen3, with spectra that fall like a real one's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import checkpoints
from helpers.lora import fallen
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]


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
