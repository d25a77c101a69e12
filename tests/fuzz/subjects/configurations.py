"""Configurations of merges, for `check` and the reading part of `run`."""

from __future__ import annotations

import random
from typing import Any

import yaml

from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command
from fuzz.subjects import models

MERGE = {"merge_method": "linear"}
SVC = [{"model": "tuned0"}, {"model": "tuned1"}]
STARTS: list[Any] = [
    {
        **{"merge_method": "monosoup", "base_model": "base", "dtype": "float32"},
        "models": [{"model": "tuned0", "parameters": {"R": 0.8, "mode": "variance"}}],
        **{"parameters": {"report": "r.jsonl"}, "out_dtype": "bfloat16"},
        "tokenizer": {"source": "base"},
    },
    {
        **MERGE,
        "models": [
            {
                "model": "tuned0",
                "parameters": {"weight": [{"filter": "mlp", "value": 1.0}, {"value": 0.5}]},
            },
            {"model": "tuned1", "parameters": {"weight": [0, 1]}},
        ],
        "chat_template": "auto",
    },
    {
        **{"merge_method": "monosoup", "base_model": "base", "tokenizer_source": "union"},
        "slices": [
            {
                "sources": [
                    {"model": "tuned0", "layer_range": [0, 1]},
                    {"model": "base", "layer_range": [0, 1]},
                ],
                "parameters": {"alpha": 0.5},
            }
        ],
    },
    {
        **{"merge_method": "monosoup", "base_model": "base"},
        "modules": {"default": {"models": [{"model": "tuned0"}]}},
    },
    {
        **{"merge_method": "svc", "base_model": "base", "models": SVC},
        "parameters": {"alpha": 1.0},
    },
    {
        **{"name": "stage", **MERGE},
        "models": [
            {
                "model": {"model": {"path": "tuned0", "revision": None}, "lora": None},
                "parameters": {"weight": 1},
            }
        ],
    },
    {**MERGE, "models": [{"model": "tuned1/pytorch_model.bin", "parameters": {"weight": 1}}]},
    {**MERGE, "models": [{"model": "base+adapter", "parameters": {"weight": 1}}]},
]
KEYS = [
    *("model", "models", "parameters", "weight", "filter", "value", "layer_range", "sources"),
    *("slices", "modules", "base_model", "R", "mode", "alpha", "report", "tokenizer", "source"),
    *("tokens", "dtype", "out_dtype", "name", "lora", "path", "revision", "merge_method", "kind"),
    *("pad_to_multiple_of", "chat_template", "merged", "coefficients", "min_rel_update", "force"),
    *("tokenizer_source", "token_id", "stack_reduction", "gamma_max"),
]


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Write a configuration of one stage, or now and then of two."""
    mutation.copied(models.good(), place.work)
    stages = [_changed(rng) for _ in range(1 if rng.random() < 0.85 else 2)]
    text = yaml.safe_dump_all(stages, allow_unicode=True).encode("utf-8", "surrogatepass")
    place.write("m.yml", mutation.content(rng, text) if rng.random() < 0.2 else text)
    more = ["--json"] if rng.random() < 0.2 else []
    return [models.check(("m.yml", '"code"'), *more), models.run(())]


def _changed(rng: random.Random) -> Any:
    stage: Any = rng.choice(STARTS)
    for _ in range(rng.randint(1, 3)):
        stage = mutation.tree(rng, stage, KEYS, yaml=True)
    return stage
