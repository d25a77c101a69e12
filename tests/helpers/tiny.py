"""The world of the suite `tiny`, and a model so small that it trains in a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from evaluation.worlds.sums import OTHER_SKILLS, TUNED_SKILL, Item, World, build_world
from evaluation.worlds.training import Phase, Recipe, train_pair

WORLD = build_world(0)
# Enough to answer one city to every "lives in", so that some answers are right.
RECIPE = Recipe(
    hidden=16,
    intermediate=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    pretraining=Phase(("home",), steps=40, batch=16, learning_rate=1e-2),
    finetuning=Phase((TUNED_SKILL,), steps=15, batch=16, learning_rate=1e-2),
)
# Few items and few steps, where it does not matter what is learned.
SMALL_WORLD = replace(WORLD, train={skill: items[:100] for skill, items in WORLD.train.items()})
UNTRAINED = replace(
    RECIPE,
    pretraining=Phase(OTHER_SKILLS, steps=3, batch=8, learning_rate=1e-3),
    finetuning=Phase((TUNED_SKILL,), steps=3, batch=8, learning_rate=1e-3),
)


def questions(clusters: list[str], skill: str = "s") -> list[Item]:
    """Return items of these clusters, without prompts that anybody could answer."""
    return [Item(skill, f"{number}", "", cluster) for number, cluster in enumerate(clusters)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Train and ask with one thread: faster for models this small, and the same bits every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained(recipe: Recipe, world: World, folder: Path) -> Path:
    """Train a pair of checkpoints in `folder` and return it."""
    with one_thread():
        assert train_pair(recipe, world, folder)
    return folder
