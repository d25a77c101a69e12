"""The world of the suite `tiny`, and a model so small that it trains in a second."""

from __future__ import annotations

from evaluation.worlds import training as train
from evaluation.worlds.sums import TUNED_SKILL, build_world

WORLD = build_world(0)
# Enough to answer one city to every "lives in", so that some answers are right.
RECIPE = train.Recipe(
    hidden=16,
    intermediate=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    pretraining=train.Phase(("home",), steps=40, batch=16, learning_rate=1e-2),
    finetuning=train.Phase((TUNED_SKILL,), steps=15, batch=16, learning_rate=1e-2),
)
