"""The experiment of one seed of the world of digits, for a ViT and a ConvNeXt.

As `experiment` does for sums: train, merge, ask, and write what claims and figures need. The merges
are those of mergekit-pytorch, which takes single files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from evaluation import configs, features, fingerprint, sources
from evaluation.configs import Config, monosoup, same_norm_weight, wise_ft
from evaluation.engines import Options
from evaluation.evaluator import evaluate
from evaluation.evidence import collect
from evaluation.evidence.experiment import matrix_records, shortened, written
from evaluation.options import numbers, without_tokenizer_threads
from evaluation.sources import FINETUNED, PRETRAINED
from evaluation.suite import load

SUITE = "digits"
ARCHITECTURES = {"vit": "ViT", "convnext": "ConvNeXt"}  # as tables call them

ENERGIES, ALPHAS = numbers("0.5:0.9:0.1"), numbers("0.1:0.9:0.2")
R = 0.8  # the paper's fixed threshold
TRUNCATIONS = (0.5, 0.9, 0.95, 0.99)  # energies at which the tail is cut off (paper, Figure 3b)
CONTROLLED = ("free", f"R{R:g}")  # settings that also get Wise-FT of the same norm
COMPARED = (  # by CKA: the paper's five (appendix G), and the control
    PRETRAINED, FINETUNED, "monosoup_free", f"monosoup_R{R:g}", f"scalar_R{R:g}", f"high_R{R:g}",
    f"low_R{R:g}",
)  # fmt: skip
WORKERS = 0  # images this small are read faster than processes start


def merges(base: str, tuned: str) -> Iterator[tuple[str, Config]]:
    """Yield (name, configuration) of the merges of one architecture, but for `same_norm`."""
    yield from configs.grid(base, tuned, ("monosoup", "wise_ft"), ENERGIES, ALPHAS)
    for rule in ("high", "low"):
        yield f"{rule}_R{R:g}", monosoup(base, [tuned], mode="variance", R=R, coefficients=rule)
    for energy in TRUNCATIONS:
        truncated = monosoup(base, [tuned], mode="variance", R=energy, coefficients="high")
        yield f"high_R{energy:g}", truncated


def model_count() -> int:
    """Return how many models one seed asks."""
    each = len((PRETRAINED, FINETUNED)) + len(list(merges("", ""))) + len(CONTROLLED)
    return each * len(ARCHITECTURES)


def run_seed(seed: int, folder: Path, results: Path, limit: int | None = None) -> None:
    """Train, merge and ask in `folder`, and write `results`/digits-N.json.

    `limit`: only so many images of each set. What is finished is not done again.
    """
    import torch

    from evaluation.worlds import digits, digits_training

    torch.set_num_threads(1)
    without_tokenizer_threads()
    started = time.perf_counter()
    folder = folder.resolve()
    world = digits.build_world(seed)
    digits.write_sets(digits.test_sets(world), folder / "images")
    content = collect.SeedFile(seed=seed, limit=limit, suites={}, git=fingerprint.git_hash())
    for name, architecture in digits_training.ARCHITECTURES.items():
        place = folder / name
        digits_training.train_pair(name, architecture, world, place)
        paths = _models(place)
        evaluate(
            load(SUITE),
            paths,
            place / "results",
            Options(device="cpu", limit=limit, data=folder / "images", workers=WORKERS),
            command=f"python -m evaluation.evidence --world digits --seeds {seed}",
            merge_cache=place / "merged",
        )
        content.suites[name] = collect.suite_results(place / "results", SUITE, place)
        for group, values in _similarities(place, paths, folder / "images").items():
            content.cka[f"{name} {group}"] = values
        content.records[name] = matrix_records(paths[PRETRAINED], paths[FINETUNED])
    content.minutes = round((time.perf_counter() - started) / 60, 1)
    content.write(results / f"digits-{seed}.json")


def _models(place: Path) -> dict[str, str]:
    """Return the paths of all models of one architecture: files, and configurations."""
    from evaluation.worlds.digits_training import WEIGHTS

    base, tuned = (place / name / WEIGHTS for name in (PRETRAINED, FINETUNED))
    paths = {PRETRAINED: str(base), FINETUNED: str(tuned)}
    paths |= written(place, dict(merges(str(base), str(tuned))))
    for label in CONTROLLED:
        merged = sources.find(label, paths[f"monosoup_{label}"], place / "merged")
        weight = same_norm_weight(merged.folder, tuned, base)
        paths |= written(place, {f"same_norm_{label}": wise_ft(str(base), str(tuned), weight)})
    return paths


def _similarities(place: Path, paths: dict[str, str], images: Path) -> features.Similarities:
    """Return CKA with the pretrained model, block by block, on the images of ID and of OOD."""
    from evaluation import image_features

    compared = [sources.find(name, paths[name], place / "merged") for name in COMPARED]
    sets: dict[str, list[Path]] = {
        group: [
            file
            for task in tasks
            if task.images
            for file in image_features.image_files(images / task.images.folder)
        ]
        for group, tasks in load(SUITE).grouped()
    }
    reading = features.Reading("cpu", batch_size=256)
    return shortened(image_features.similarities(compared, sets, place / "cka", reading))
