"""Models that mergekit has no fitting definition of, and the way out that a message gives."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import merge_raw_pytorch

from helpers import checkpoints
from mergekit_monosoup.planner import strictly


def fine_tuned(write, model, folder: Path, **changes) -> Path:
    """Save a model and its fine-tune, and return the configuration that merges them."""
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned")
    return write(
        **{"base_model": str(folder / "base"), "models": [{"model": str(folder / "tuned")}]}
        | changes
    )


def names_of(folder: Path) -> set[str]:
    return set(checkpoints.state_dict(folder))


def by_pytorch(message: str, folder: Path) -> set[str]:
    """Do what a message says, and return the names of the tensors that come out."""
    (text,) = re.findall(r"write (\{.*\}) to raw\.yml", message)
    (folder / "raw.yml").write_text(text)
    arguments = re.findall(r"`mergekit-pytorch raw\.yml OUT(.*?)`", message)[0].split()
    CliRunner().invoke(
        merge_raw_pytorch.main,
        [str(folder / "raw.yml"), str(folder / "raw"), *arguments, "--quiet"],
        catch_exceptions=False,
    )
    return names_of(folder / "raw")


def run_strictly(path: Path, out: Path, **options) -> None:
    """Merge as `mergekit-monosoup run` has mergekit do it."""
    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    with strictly(**{"allow_incomplete": False, "in_process": True} | options):
        run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False))
