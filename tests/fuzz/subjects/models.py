"""Three good models to start from: one file, an index of two, a .bin; and an adapter."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from helpers import checkpoints
from safetensors.torch import load_file, save_file

from fuzz.programs import Command, monosoup, reading_part_of_run

NAMES = ("base", "tuned0", "tuned1", "adapter")
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4}

_TEMPORARY = tempfile.TemporaryDirectory(prefix="fuzz-models-")  # gone with the process


@functools.cache
def good() -> Path:
    """Return the folder with the models, made once."""
    folder = Path(_TEMPORARY.name)
    checkpoints.pair(folder, tuned=2)
    _divide(folder / "tuned0")
    whole = folder / "tuned1" / "model.safetensors"
    torch.save(load_file(whole), folder / "tuned1" / "pytorch_model.bin")
    whole.unlink()
    (folder / "adapter").mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)},
        folder / "adapter" / "adapter_model.safetensors",
    )
    config = json.dumps({**ADAPTER, "target_modules": ["q_proj"]})
    (folder / "adapter" / "adapter_config.json").write_text(config)
    return folder


def _divide(model: Path) -> None:
    """Make two files and an index of a model's one file."""
    whole = model / "model.safetensors"
    tensors = load_file(whole)
    places = {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, model / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()


CONFIG = """merge_method: monosoup
base_model: base
models: [{model: tuned0}]
parameters: {report: r.jsonl}
dtype: float32
"""
SOUP = CONFIG.replace("monosoup", "svc").replace(
    "{model: tuned0}", "{model: tuned0}, {model: tuned1}"
)
WITH_ADAPTER = CONFIG.replace("tuned0", "base+adapter")


def check(names: tuple[str, ...], *more: str) -> Command:
    """Return a check of m.yml."""
    return Command(monosoup, ["check", "m.yml", *more], names)


def run(names: tuple[str, ...]) -> Command:
    """Return the beginning of a merge of m.yml; mergekit says by its plan which models it reads."""
    written = ("out", "r.jsonl")
    return Command(
        reading_part_of_run, ["m.yml", "out", "--lora-merge-cache", "out"], names, written
    )


def inspect(names: tuple[str, ...], *more: str, tuned: str = "tuned0") -> Command:
    """Return an inspection that writes i.jsonl."""
    arguments = ["inspect", "base", tuned, "--out", "i.jsonl", *more]
    return Command(monosoup, arguments, names, ("i.jsonl",))


def soup(names: tuple[str, ...], *more: str) -> Command:
    """Return a choice of both fine-tunes that writes s.yml."""
    arguments = ["soup", "tuned0", "tuned1", "--base", "base", "--threshold", "0", "--out", "s.yml"]
    return Command(monosoup, [*arguments, *more], names, ("s.yml",))
