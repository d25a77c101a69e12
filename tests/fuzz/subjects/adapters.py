"""LoRA adapters, their configuration and their factors, for what reads them without a base."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fuzz import mutation, values
from fuzz.place import Place
from fuzz.programs import Command, monosoup
from fuzz.subjects import models
from fuzz.subjects.weights import damage

KEYS = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type"),
    *("fan_in_fan_out", "init_lora_weights", "target_modules", "base_model_name_or_path", "bias"),
    *("modules_to_save", "lora_bias", "target_parameters", "layer_replication"),
]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
CONFIG, FILE = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Change configuration, header or tensors of an adapter."""
    mutation.copied(models.good(), place.work)
    how = rng.random()
    if how < 0.4:
        place.write(CONFIG, mutation.json_content(rng, (place.work / CONFIG).read_bytes(), KEYS))
    elif how < 0.7:
        damage(rng, place.work / FILE, place)
    else:
        _change_tensors(rng, place.work / FILE)
    edit = ["adapter", "adapter", "--out", "out", "--force", "--report", "r.jsonl"]
    if rng.random() < 0.5:
        edit += ["--method", "svc", "adapter", "--rank", str(rng.choice([1, 3, 10**9]))]
    others = [
        ["inspect", "adapter", "--out", "i.jsonl", "--spectra"],
        ["inspect", "base", "adapter", "--out", "i.jsonl"],
        ["soup", "adapter", "./adapter/.", "--base", "base", "--threshold", "0", "--out", "s.yml"],
    ]
    words = rng.choice([edit, edit, *others])
    return [Command(monosoup, words, ("adapter",), ("out", "r.jsonl", "i.jsonl", "s.yml"))]


def _change_tensors(rng: random.Random, file: Path) -> None:
    """Add, drop, scale or reshape a tensor, or give it another name."""
    state = load_file(file)
    name = rng.choice(sorted(state))
    tensor = state.pop(name)
    changes = [
        {},
        {name: tensor[:1]},
        {name: tensor.T.contiguous()},
        {name: tensor * rng.choice([0, 1e30, 1e-30, float("nan")])},
        {name: tensor.to(rng.choice(DTYPES))},
        {name: tensor, f"{name}.more": tensor.clone()},
        {name: tensor, name.replace("lora_", "lora_embedding_"): tensor.clone()},
        {name.replace("q_proj", ascii(rng.choice(values.TEXTS))): tensor},
    ]
    save_file(state | rng.choice(changes), file)
