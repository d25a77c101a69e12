"""The experiment of one seed of the world of tweets: real weights, real text, seven fine-tunes.

As `experiment` does for sums: train, merge, ask, and write what claims and figures need. One recipe
gets all merges, the others the main ones.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation import configs, features, fingerprint, sources
from evaluation.configs import Config, monosoup, same_norm_weight, wise_ft
from evaluation.engines import Options, spread
from evaluation.evaluator import evaluate
from evaluation.evidence import collect
from evaluation.evidence.experiment import matrix_records, shortened, written
from evaluation.evidence.models import (
    ABLATIONS,
    FINETUNED,
    IN_BFLOAT16,
    LORA,
    PRETRAINED,
    SECOND,
    SETTINGS,
    R,
    in_bfloat16,
    rounded,
)
from evaluation.options import numbers, without_tokenizer_threads
from evaluation.suite import load
from evaluation.worlds import tweets
from evaluation.worlds.tweets_training import Recipe, fine_tune, make_pretrained

SUITE = "tweets"
ENERGIES, ALPHAS = numbers("0.5:0.9:0.1"), numbers("0.1:0.9:0.2")
TRUNCATIONS = (0.9, 0.95, 0.99)  # energies at which the tail is cut off (paper, Figure 3b)

HARSH, ZERO, WIDE, WIDE_HARSH = "harsh", "zero", "wide", "wide_harsh"
ZERO_PRETRAINED, WIDE_PRETRAINED = "zero_pretrained", "wide_pretrained"
BASES = {  # what these start from: a head of zeros, and a model that knows the other topics
    ZERO: ZERO_PRETRAINED,
    WIDE: WIDE_PRETRAINED,
    WIDE_HARSH: WIDE_PRETRAINED,
}
USUAL, HARD = Recipe(learning_rate=2e-4, epochs=2), Recipe(learning_rate=1e-3, epochs=3)
RECIPES = {
    FINETUNED: USUAL,
    SECOND: Recipe(learning_rate=5e-5, epochs=2),  # gentle
    HARSH: HARD,
    ZERO: USUAL,
    LORA: Recipe(learning_rate=1e-3, epochs=2, rank=8),
    WIDE: USUAL,
    WIDE_HARSH: HARD,
}
PARTS = {  # which tensors get the split where the others get its scalar: first filter that fits
    "embeddings": (("embeddings", "monosoup"),),
    "attention": (("attention", "monosoup"),),
    "mlp": (("attention", "scalar"), ("encoder", "monosoup")),
}
COMPARED = (  # by CKA: the paper's five (appendix G), the control, and the harsh fine-tune
    PRETRAINED, FINETUNED, "monosoup_free", f"monosoup_R{R:g}", f"scalar_R{R:g}", f"high_R{R:g}",
    f"low_R{R:g}", HARSH, f"{HARSH}_monosoup_R{R:g}",
)  # fmt: skip


def base_of(recipe: str) -> str:
    """Return the name of the model that a fine-tune started from."""
    return BASES.get(recipe, PRETRAINED)


def merges(folder: Path) -> Iterator[tuple[str, Config]]:
    """Yield (name, configuration) of the merges, but for those of the same norm and of bfloat16."""
    base, tuned = str(folder / PRETRAINED), str(folder / FINETUNED)
    yield from configs.grid(base, tuned, configs.KINDS, ENERGIES, ALPHAS)
    fixed: dict[str, Any] = {"mode": "variance", "R": R}
    for rule in ABLATIONS:
        yield f"{rule}_R{R:g}", monosoup(base, [tuned], **fixed, coefficients=rule)
    for energy in TRUNCATIONS:
        truncated = monosoup(base, [tuned], mode="variance", R=energy, coefficients="high")
        yield f"high_R{energy:g}", truncated
    for part, filters in PARTS.items():
        rules = [{"filter": name, "value": rule} for name, rule in filters]
        coefficients = [*rules, {"value": "scalar"}]
        yield f"split_{part}", monosoup(base, [tuned], **fixed, coefficients=coefficients)

    both = [tuned, str(folder / SECOND)]
    yield "average", configs.average(both)
    stock = [{"model": model} for model in both]
    yield "model_stock", {"merge_method": "model_stock", "base_model": base, "models": stock}
    ingredients = {name: [str(folder / name)] for name in RECIPES if name != FINETUNED}
    ingredients["average"] = both
    for name, models in ingredients.items():
        own_base = str(folder / base_of(name))
        for label, setting in SETTINGS.items():
            yield f"{name}_monosoup_{label}", monosoup(own_base, models, **setting)
            scalar = monosoup(own_base, models, **setting, coefficients="scalar")
            yield f"{name}_scalar_{label}", scalar


# Fine-tunes that also get Wise-FT of equal norm, by the prefix of their merges.
CONTROLLED = {"": FINETUNED, f"{HARSH}_": HARSH, f"{WIDE}_": WIDE}


def model_count() -> int:
    """Return how many models one seed asks."""
    bfloat16 = len(list(rounded("", "")))
    controls = len(CONTROLLED) * len(SETTINGS)
    bases = len({PRETRAINED, *BASES.values()})
    return bases + len(RECIPES) + len(list(merges(Path()))) + bfloat16 + controls


def run_seed(seed: int, folder: Path, results: Path, limit: int | None = None) -> None:
    """Train, merge and ask in `folder`, and write `results`/tweets-N.json.

    `limit`: only so many items of each topic. What is finished is not done again, but for
    the merges of a finished seed, which are not kept: they are 90 MB each.
    """
    without_tokenizer_threads()
    started = time.perf_counter()
    folder = folder.resolve()
    world = tweets.build_world(seed)
    tweets.write_texts(world, folder / "texts")
    _make_checkpoints(world, folder, seed)
    paths = _models(folder)
    evaluate(
        load(SUITE),
        paths,
        folder / "results",
        # All in float32: bfloat16 arithmetic would add its own errors to those of bfloat16 weights.
        Options(device="cpu", dtype="float32", limit=limit, data=folder / "texts"),
        command=f"python -m evaluation.evidence --world tweets --seeds {seed}",
        merge_cache=folder / "merged",
    )
    content = collect.SeedFile(
        seed=seed,
        limit=limit,
        trained={name: dataclasses.asdict(recipe) for name, recipe in RECIPES.items()},
        suites={SUITE: collect.suite_results(folder / "results", SUITE, folder)},
        cka=_similarities(folder, paths, world, limit),
        records={name: matrix_records(paths[base_of(name)], paths[name]) for name in RECIPES},
        git=fingerprint.git_hash(),
        minutes=round((time.perf_counter() - started) / 60, 1),
    )
    content.write(results / f"tweets-{seed}.json")
    shutil.rmtree(folder / "merged")


def _make_checkpoints(world: tweets.World, folder: Path, seed: int) -> None:
    make_pretrained(world.train, folder / PRETRAINED, "probe")
    make_pretrained(world.train, folder / ZERO_PRETRAINED, "zero")
    fine_tune(folder / PRETRAINED, folder / WIDE_PRETRAINED, world.others, USUAL, seed)
    for number, (name, recipe) in enumerate(RECIPES.items()):
        # A seed of its own: the average of two is to be one of different batches, too.
        own = seed + 1000 * number
        fine_tune(folder / base_of(name), folder / name, world.train, recipe, own)


def _models(folder: Path) -> dict[str, str]:
    """Return the paths of all models: folders, and configurations that are merged when asked."""
    cache = folder / "merged"
    paths = {name: str(folder / name) for name in (PRETRAINED, *RECIPES, *BASES.values())}
    paths |= written(folder, dict(merges(folder)))
    for prefix, tuned in CONTROLLED.items():
        for label in SETTINGS:
            merged = sources.find(label, paths[f"{prefix}monosoup_{label}"], cache)
            base, own = paths[base_of(tuned)], paths[tuned]
            weight = same_norm_weight(merged.folder, Path(own), Path(base))
            control = wise_ft(base, own, weight)
            paths |= written(folder, {f"{prefix}same_norm_{label}": control})
    narrow = written(folder, {f"bf16_{name}": in_bfloat16(paths[name]) for name in IN_BFLOAT16})
    made = [sources.find(name, path, cache).folder.resolve() for name, path in narrow.items()]
    return paths | written(folder, dict(rounded(*map(str, made))))


def _similarities(
    folder: Path, paths: dict[str, str], world: tweets.World, limit: int | None
) -> features.Similarities:
    """Return CKA with the pretrained model, block by block, on the texts of ID and of OOD."""
    compared = [sources.find(name, paths[name], folder / "merged") for name in COMPARED]
    texts: dict[str, list[str]] = {}
    for group, tasks in load(SUITE).grouped():
        chosen = [tweet.text for task in tasks for tweet in spread(world.test[task.task], limit)]
        texts[group] = sorted(chosen, key=len)  # or most of a batch would be padding
    reading = features.Reading(device="cpu", batch_size=64)
    return shortened(features.similarities(compared, texts, folder / "cka", reading))
