"""Models that `run` merges, and a merge method that waits for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers import checkpoints
from helpers.merges import ALONE, SMALL, config, interrupted_after, run
from transformers import AutoModelForCausalLM

from mergekit_monosoup.distributed import folder

sys.path.append(str(Path(__file__).with_name("gated")))
import gated  # noqa: F401 - registers the methods


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Pairs of several architectures, sharded.

    `wide` has more words, `faint` an update that rounding eats.
    """
    folder = tmp_path_factory.mktemp("world")
    for family in ("qwen3", "qwen3_moe", "llama"):
        checkpoints.pair(folder / family, family, dtype=torch.bfloat16, sharded=True, tuned=2)
    checkpoints.pair(folder / "faint", "qwen3_moe", dtype=torch.bfloat16, sharded=True, size=1e-3)
    checkpoints.pair(folder / "tied", tied=True, dtype=torch.bfloat16, sharded=True)
    checkpoints.pair(folder / "wide", vocabulary=104, dtype=torch.bfloat16)
    torch.manual_seed(7)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3" / "base")
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def interrupted(world, tmp_path) -> tuple[Path, Path]:
    """A merge that Ctrl-C stopped after two batches."""
    path, out = config(world, tmp_path), tmp_path / "b" / "out"
    with interrupted_after(2):
        output = run(path, out, *SMALL, *ALONE, code=130)
    assert "2 finished batch(es), " in output and output.endswith(" --resume\n")
    assert [p.name for p in out.iterdir()] == [folder.NAME]
    return path, out
