"""Fixtures of several folders."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.hub_server import Hub

# A shell script's `make test &` has Ctrl-C ignored, and every process that a test starts inherits
# that; tests of Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """Stands in for the hub.

    A base, two fine-tunes, two LoRA adapters, a ConvNeXt-like pair of state dicts.
    """
    # Here, because pytest-xdist's first process, which only hands out tests, reads this file, too:
    # six seconds of a core that the others need.
    import peft
    import torch
    from helpers import checkpoints
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("hub")
    checkpoints.pair(folder, tuned=2, dtype=torch.bfloat16)
    torch.manual_seed(7)
    for name, rank in (("adapter", 4), ("other_adapter", 2)):
        lora = peft.LoraConfig(
            r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / "base"), lora
        ).save_pretrained(folder / name)
    base = {
        "stages.0.conv.weight": torch.randn(12, 4, 3, 3),
        "stages.0.norm.weight": torch.randn(12),
    }
    tuned = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in base.items()}
    save_file(base, folder / "convnext_small.in12k.safetensors")
    save_file(tuned, folder / "convnext_small.in12k_ft_in1k.safetensors")
    # One direction is most of the update: of noise alone, freevariance keeps all as fine-tuned.
    strong = {name: torch.outer(*torch.randn(2, 12)) for name in ("model_31", "model_61")}
    for name, direction in strong.items():
        kernel = tuned["stages.0.conv.weight"].clone()
        kernel[:, :, 0, 0] += direction[:, :4]
        strong[name] = {**tuned, "stages.0.conv.weight": kernel}
    files = {"model_0": base, "model_43": strong["model_31"], **strong}
    for name, state in files.items():
        torch.save(state, folder / f"{name}.pt")
    for name, model in (("pretrained", "model_0"), ("finetuned", "model_31")):
        (folder / "pair" / name).mkdir(parents=True)
        save_file(files[model], folder / "pair" / name / "model.safetensors")
    return folder


@pytest.fixture
def served(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub without repositories, which this process takes for the real one."""
    from helpers import hub_server

    with hub_server.serving() as server:
        hub_server.connect(monkeypatch, server, tmp_path / "home")
        yield server
