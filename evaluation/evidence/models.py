"""What one seed compares: the checkpoints of its world, and the merges made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation import configs
from evaluation.configs import Config, monosoup
from evaluation.options import numbers
from evaluation.worlds import training
from evaluation.worlds.sums import TUNED_SKILL, build_world, italian

# Of evaluation/suites; the world of each seed takes the place of theirs.
SUITE, TWO_TASKS = "tiny", "tiny-two"

PRETRAINED, FINETUNED = training.PRETRAINED, training.FINETUNED
# Fine-tunes beside `finetuned`, each from `pretrained`.
SECOND, ITALIAN, LORA = "second", "italian", "lora"
TRAINED = (PRETRAINED, FINETUNED, SECOND, LORA)  # asked as they are, in either suite
TWO_TASKS_TRAINED = (PRETRAINED, SECOND, ITALIAN)
IN_BFLOAT16 = (PRETRAINED, FINETUNED)

GENTLE = training.Phase((TUNED_SKILL,), steps=300, batch=64, learning_rate=1e-3)
# Adapters learn at higher rates.
ADAPTER = training.Phase((TUNED_SKILL,), steps=300, batch=64, learning_rate=1e-2)
RANK = 8

ENERGIES, ALPHAS = numbers("0.5:0.95:0.05"), numbers("0.1:0.9:0.1")
R = 0.8  # the paper's fixed threshold, and what ablations are made at
SETTINGS: dict[str, dict[str, Any]] = {"free": {}, f"R{R:g}": {"mode": "variance", "R": R}}
ABLATIONS = ("rho", "cos", "uniform", "high", "low")
# Energies at which the tail is cut off and nothing is reweighted.
TRUNCATIONS = (0.5, 0.9, 0.95, 0.99)
CONTROLLED = ("free", f"R{R:g}")  # settings that also get Wise-FT of the same norm


def make_checkpoints(seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Train what is missing in `folder`; return the settings of each, by name."""
    world, recipe = build_world(seed), training.Recipe(seed=seed)
    training.train_pair(recipe, world, folder)
    english = world.train[TUNED_SKILL]
    tunes = {
        # Other batches and a lower rate: a second fine-tune on the same data, and one that forgets
        # less.
        SECOND: (english, GENTLE, seed + 1000, None),
        ITALIAN: (italian(english), GENTLE, seed + 1000, None),
        LORA: (english, ADAPTER, seed, RANK),
    }
    for name, (items, phase, order, rank) in tunes.items():
        training.fine_tune(folder / PRETRAINED, folder / name, items, phase, order, rank=rank)
    return {
        PRETRAINED: _settings(recipe.pretraining),
        FINETUNED: _settings(recipe.finetuning),
        **{name: _settings(phase) | {"rank": rank} for name, (_, phase, _, rank) in tunes.items()},
    }


def _settings(phase: training.Phase) -> dict[str, Any]:
    return {"steps": phase.steps, "batch": phase.batch, "learning_rate": phase.learning_rate}


def merges(folder: Path) -> Iterator[tuple[str, Config]]:
    """Yield (name, configuration) of the suite `tiny`'s merges, but for the bfloat16 ones."""
    base, tuned = str(folder / PRETRAINED), str(folder / FINETUNED)
    yield from configs.grid(base, tuned, configs.KINDS, ENERGIES, ALPHAS)
    for rule in ABLATIONS:
        yield f"{rule}_R{R:g}", monosoup(base, [tuned], mode="variance", R=R, coefficients=rule)
        if rule != "uniform":  # which asks for no cut
            yield f"{rule}_free", monosoup(base, [tuned], coefficients=rule)
    for energy in TRUNCATIONS:
        truncated = monosoup(base, [tuned], mode="variance", R=energy, coefficients="high")
        yield f"high_R{energy:g}", truncated

    both = [tuned, str(folder / SECOND)]
    yield "average", configs.average(both)
    stock = [{"model": model} for model in both]
    yield "model_stock", {"merge_method": "model_stock", "base_model": base, "models": stock}
    ingredients = {SECOND: both[1:], LORA: [str(folder / LORA)], "average": both}
    for name, models in ingredients.items():
        for label, setting in SETTINGS.items():
            yield f"{name}_monosoup_{label}", monosoup(base, models, **setting)
            yield f"{name}_scalar_{label}", monosoup(base, models, **setting, coefficients="scalar")


def rounded(base: str, tuned: str) -> Iterator[tuple[str, Config]]:
    """Yield MonoSoup of a bfloat16 pair, written in bfloat16 and in float32."""
    for label, setting in SETTINGS.items():
        config = monosoup(base, [tuned], **setting)
        yield f"bf16_monosoup_{label}", config
        yield f"bf16_monosoup_{label}_float32", {**config, "dtype": "float32"}


def in_bfloat16(model: str) -> Config:
    """Return a copy of a model in bfloat16."""
    return {**configs.average([model]), "dtype": "bfloat16"}


def two_task_merges(folder: Path) -> Iterator[tuple[str, Config]]:
    """Yield merges of two fine-tunes on different tasks, for the suite `tiny-two`."""
    base, models = str(folder / PRETRAINED), [str(folder / SECOND), str(folder / ITALIAN)]
    weighted = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    plain = [{"model": model} for model in models]

    def merge(method: str, **parameters: Any) -> Config:
        listed = weighted if method == "task_arithmetic" else plain
        return {
            "merge_method": method,
            "base_model": base,
            "models": listed,
            "parameters": parameters,
        }

    yield "two_average", merge("task_arithmetic", normalize=True)
    yield "two_sum", merge("task_arithmetic")
    yield "two_svc_average", merge("svc", normalize=True)
    yield "two_svc_average_no_gain", merge("svc", normalize=True, alpha=1.0)
    yield "two_svc_sum", merge("svc")
    yield "two_monosoup_free", monosoup(base, models)
    yield f"two_monosoup_R{R:g}", monosoup(base, models, mode="variance", R=R)
