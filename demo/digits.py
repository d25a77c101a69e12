"""The demo of images: `python -m demo --world digits`, with a small ViT and a small ConvNeXt.

Everything after training is what a user would run: merge configurations, `evaluation.run` on them,
`evaluation.tables` on the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from demo.merge import CONTROL, FREE, VARIED, WISE
from evaluation import configs, tables
from evaluation.comparison import compare
from evaluation.configs import monosoup, wise_ft
from evaluation.engines import Options
from evaluation.evaluator import evaluate
from evaluation.sources import FINETUNED, PRETRAINED
from evaluation.suite import load
from evaluation.worlds import digits, digits_training
from mergekit_monosoup.report import read, table

SUITE = "digits"
TITLES = {"vit": "ViT", "convnext": "ConvNeXt"}
# A word for each name of a model in files and tables.
SOUPS = {
    "wise_ft": WISE.title,
    "monosoup_free": FREE.title,
    "scalar_free": CONTROL,
    "monosoup_R0.8": VARIED.title,
    "scalar_R0.8": CONTROL,
}


def run(folder: Path, seed: int, fresh: bool, console: Console) -> None:
    """Train, merge and ask in `folder`; print what is done and how the models compare."""
    torch.set_num_threads(1)  # fastest for models this small
    folder = folder.resolve()
    world = digits.build_world(seed)
    console.print("1. Draw digits in many styles, and read handwritten ones", style="bold")
    console.print(_styles(world))
    digits.write_sets(digits.test_sets(world), folder / "images", fresh=fresh)
    for name, architecture in digits_training.ARCHITECTURES.items():
        place, title = folder / name, TITLES[name]
        console.print(f"\n2. {title}: train on many styles, fine-tune on one", style="bold")
        digits_training.train_pair(name, architecture, world, place, fresh=fresh)
        console.print(f"\n3. {title}: merge without data, and ask all models", style="bold")
        paths = _models(place)
        console.print(f"Configurations: {place / 'configs'} (of mergekit-pytorch)")
        evaluate(
            load(SUITE),
            paths,
            place / "results",
            Options(device="cpu", data=folder / "images", workers=0),
            command=f"python -m demo --world digits --seed {seed}",
            merge_cache=place / "merged",
            fresh=fresh,
        )
        report = place / "reports" / "monosoup_free.jsonl"
        if report.is_file():  # not of a merge that was found in the cache
            console.print(f"\n4. {title}: what freevariance did to each layer", style="bold")
            console.print(table(read(report), console.width))
    for name, title in TITLES.items():
        console.print(f"\n5. {title}: accuracy, and differences from fine-tuned", style="bold")
        for comparison in compare([folder / name / "results"]):
            console.print(tables.as_markdown(comparison, {}))
    console.print(f"\nAll answers: {', '.join(str(folder / name / 'results') for name in TITLES)}")


def _styles(world: digits.World) -> Table:
    """Return one row per set of images: what is in it, how many, and who sees such images."""
    tuned = world.finetuning.fonts[0]
    rows = {
        digits.TUNED_STYLE: (f"{tuned}, faint, among scraps and noise", "fine-tuning (ID)"),
        "fonts": (f"{len(world.pretraining.fonts)} other fonts", "pretraining (OOD)"),
        digits.HANDWRITTEN: ("by hand (scikit-learn's)", "nothing (OOD)"),
        "inverted": ("other fonts, dark on light", "pretraining (OOD)"),
        "blurred": ("other fonts, blurred", "pretraining (OOD)"),
        "rotated": ("other fonts, turned by 15 to 35 degrees", "pretraining (OOD)"),
    }
    shown = Table(title="Sets of images", title_justify="left")
    for header in ("set", "digits", "taught by"):
        shown.add_column(header)
    for name, (what, taught) in rows.items():
        shown.add_row(name, what, taught)
    return shown


def _models(place: Path) -> dict[str, str]:
    """Write the merge configurations of one architecture; return the paths of all its models."""
    base, tuned = (str(place / name / digits_training.WEIGHTS) for name in (PRETRAINED, FINETUNED))
    settings: dict[str, dict[str, Any]] = {"free": {}, "R0.8": {"mode": "variance", "R": 0.8}}
    made = {"wise_ft": wise_ft(base, tuned, 0.5)}
    (place / "reports").mkdir(exist_ok=True)
    for label, setting in settings.items():
        report = str(place / "reports" / f"monosoup_{label}.jsonl")
        made[f"monosoup_{label}"] = monosoup(base, [tuned], **setting, report=report)
        made[f"scalar_{label}"] = monosoup(base, [tuned], **setting, coefficients="scalar")
    files = {
        name: str(configs.write_config(place / "configs" / f"{name}.yml", made[name]))
        for name in SOUPS
    }
    return {PRETRAINED: base, FINETUNED: tuned, **files}
