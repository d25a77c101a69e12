"""Training of small image classifiers on a world of digits: a pair for each architecture.

A checkpoint is a folder as timm saves one: config.json, from which timm builds the model, and
model.safetensors, which mergekit-pytorch merges.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from evaluation.sources import FINETUNED, PRETRAINED
from evaluation.worlds import digits, finished
from evaluation.worlds.digits import Images, Style, World

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Phase:
    """One training run on one style; every image is new."""

    steps: int
    batch: int
    learning_rate: float  # peak: linear warm-up over the first twentieth, then cosine to zero


@dataclass(frozen=True)
class Architecture:
    """A model of timm's, made small, and how it is trained.

    The fine-tuning rate is high on purpose: the tuned model then forgets part of what it knew, the
    case that a soup is for.
    """

    model: str  # timm's name of the full size
    arguments: Mapping[str, Any]  # that make it small
    pretraining: Phase
    finetuning: Phase


VIT = Architecture(
    "vit_tiny_patch16_224",
    {
        "img_size": digits.SIDE,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 3.0,
        "global_pool": "avg",
    },
    pretraining=Phase(steps=1800, batch=48, learning_rate=2e-3),
    finetuning=Phase(steps=150, batch=64, learning_rate=2e-3),
)
CONVNEXT = Architecture(
    "convnext_tiny",
    {
        "depths": [1, 1, 1, 1],
        "dims": [16, 32, 64, 64],
        "patch_size": 2,
        "kernel_sizes": 5,
    },
    pretraining=Phase(steps=700, batch=64, learning_rate=4e-3),
    finetuning=Phase(steps=150, batch=64, learning_rate=3e-3),
)
ARCHITECTURES = {"vit": VIT, "convnext": CONVNEXT}


def train_pair(
    name: str, architecture: Architecture, world: World, folder: Path, *, fresh: bool = False
) -> bool:
    """Train `folder`/pretrained and `folder`/finetuned, unless they are there.

    Returns:
        True if they were trained, False if the folder had them, made with the same settings.
    """
    places = (folder / PRETRAINED, folder / FINETUNED)
    mark = fingerprint(architecture, world)
    if not fresh and all(finished.is_finished(place, mark) for place in places):
        return False
    torch.manual_seed(world.seed)
    model = build(architecture)
    styles = (world.pretraining, world.finetuning)
    phases = (architecture.pretraining, architecture.finetuning)
    for number, (place, style, phase) in enumerate(zip(places, styles, phases, strict=True)):
        _train(model, style, phase, 2 * world.seed + number, f"{name}, {place.name}")
        _save(model, architecture, place, mark)
    return True


def fingerprint(architecture: Architecture, world: World) -> str:
    """Return a digest of what weights depend on: settings, styles, drawing, this file, versions."""
    settings = dataclasses.asdict(architecture), world.seed
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for style in (world.pretraining, world.finetuning):
        drawn = digits.draw(style, 4, torch.Generator().manual_seed(0))
        digest.update(json.dumps(dataclasses.asdict(style)).encode())
        digest.update(drawn.pixels.numpy().tobytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(f"{torch.__version__} {timm.__version__}".encode())
    return digest.hexdigest()


def build(architecture: Architecture) -> nn.Module:
    """Return an untrained model of ten classes."""
    arguments = dict(architecture.arguments)
    model: nn.Module = timm.create_model(
        architecture.model, num_classes=digits.CLASSES, **arguments
    )
    return model


def _train(model: nn.Module, style: Style, phase: Phase, seed: int, title: str) -> None:
    """Train in place on images of one style."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, weight_decay=0.02)
    warm_up = max(1, phase.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / phase.steps)),
    )
    model.train()
    progress = tqdm(_batches(style, phase, seed), total=phase.steps, desc=title, unit="step")
    for step, (pixels, wanted) in enumerate(progress):
        loss = functional.cross_entropy(model(normalised(pixels)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == phase.steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _batches(style: Style, phase: Phase, seed: int) -> Iterator[Images]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(phase.steps):
        yield digits.draw(style, phase.batch, generator)


MEAN = 0.5  # and standard deviation of what a model reads; config.json says so to others


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels of [0, 1] as the models read them."""
    return (pixels - MEAN) / MEAN


def _save(model: nn.Module, architecture: Architecture, place: Path, mark: str) -> None:
    def save(folder: Path) -> None:
        save_for_hf(
            model,
            str(folder),
            model_config={
                "label_names": [str(digit) for digit in range(digits.CLASSES)],
                "pretrained_cfg": {"tag": "digits", "license": ""},  # not those of the full size
            },
            model_args=dict(architecture.arguments),
            safe_serialization=True,
            data_config={
                "input_size": (3, digits.SIDE, digits.SIDE),
                "mean": (MEAN,) * 3,
                "std": (MEAN,) * 3,
                "interpolation": "bilinear",
                "crop_pct": 1.0,
            },
        )

    finished.write(place, save, dataclasses.asdict(architecture), mark)
