"""Train a pair of models, soup them with mergekit, compare: `python -m demo`."""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3ForCausalLM

from demo import merge, summary
from demo.score import Items, grade, mean_over_skills
from evaluation.engines import EvaluationError
from evaluation.sources import SourceError
from evaluation.statistics import Estimate, Values, paired
from evaluation.worlds import training
from evaluation.worlds.sums import OTHER_SKILLS, SKILLS, TUNED_SKILL, World, build_world
from mergekit_monosoup import terminal

MARK = ".monosoup-demo"
RESULTS = "results.json"
# fmt: off
PACKAGES = (
    "mergekit-monosoup", "mergekit", "torch", "transformers", "tokenizers", "numpy", "scipy",
)
# fmt: on
PLACES = {
    summary.PRETRAINED: Path(training.PRETRAINED),
    summary.FINETUNED: Path(training.FINETUNED),
    **{soup.title: soup.merged for soup in merge.SOUPS},
}
"""The folder of each model in the output folder."""


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--world",
        choices=("sums", "digits"),
        default="sums",
        help="sums: a small Qwen3; digits: a small ViT and a small ConvNeXt (extra vision)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of world and training (default: %(default)s)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="train anew even if the checkpoints are there"
    )
    options = parser.parse_args(arguments)
    # Rich takes a file or a pipe to be 80 columns wide, which folds the table. Paths may hold what
    # looks like markup.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        if options.world == "digits":
            _claim(options.out, f" --world digits --seed {options.seed}")
            _digits()(options.out, options.seed, options.fresh, console)
        else:
            run(options.out, options.seed, options.fresh, console)
    except (merge.CommandError, EvaluationError, SourceError) as error:
        console.print(str(error), style="red")
        return 1
    return 0


def _digits() -> Callable[[Path, int, bool, Console], None]:
    try:
        from demo import digits  # timm and torchvision, which sums do without
    except ImportError as error:
        raise EvaluationError(
            f"--world digits needs {error.name}: pip install --constraint constraints.txt "
            '--editable ".[eval,plots,vision]"'
        ) from error
    return digits.run


def run(folder: Path, seed: int, fresh: bool, console: Console) -> None:
    """Train, merge and ask in `folder`; print what is done and write the numbers."""
    started = time.perf_counter()
    # Fastest for a model this small, and the same sums in the same order every time.
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _claim(folder)
    for needed in ("mergekit-yaml", "mergekit-monosoup"):
        merge.tool(needed)  # found missing now, not after the training
    (folder / RESULTS).unlink(missing_ok=True)  # an earlier run's, should this one stop half-way

    world, recipe = build_world(seed), training.Recipe(seed=seed)
    _train(folder, world, recipe, fresh, console)
    _merge(folder, console)
    grades = _ask(folder, world, console)
    console.print(summary.table(grades, world.test))
    sentences = summary.sentences(grades, world.test)
    for sentence in sentences:
        console.print(f"* {sentence}")

    results = {
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "fingerprint": training.fingerprint(recipe, world),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "id": [TUNED_SKILL],
        "ood": list(OTHER_SKILLS),
        "models": {
            name: {"folder": place.as_posix(), "weights_sha256": _digest(folder / place)}
            | _numbers(grades[name], grades, world.test)
            for name, place in PLACES.items()
        },
        "notes": summary.NOTES,
        "sentences": sentences,
        "seconds": round(time.perf_counter() - started, 1),
    }
    _write(folder, results, world)
    console.print(f"\nAll numbers: {folder / RESULTS} ({results['seconds']:.0f} s)")


def _train(
    folder: Path, world: World, recipe: training.Recipe, fresh: bool, console: Console
) -> None:
    console.print(
        "1. Train a small Qwen3 on six skills, then fine-tune it on a seventh", style="bold"
    )
    console.print(summary.skills(world))
    if training.train_pair(recipe, world, folder, fresh=fresh):
        console.print(f"Checkpoints: {folder / training.PRETRAINED}, {folder / training.FINETUNED}")
    else:
        console.print(
            f"Finished checkpoints of the same settings found in {folder} (--fresh trains anew)"
        )


def _merge(folder: Path, console: Console) -> None:
    console.print(f"\n2. Soup the two checkpoints, without data (in {folder})", style="bold")
    for soup in merge.SOUPS:
        console.print(f"$ {merge.merge(soup, folder)}")
    console.print("\n3. See what MonoSoup did to each layer", style="bold")
    for soup in merge.SOUPS:
        if soup.reports:
            console.print(f"$ mergekit-monosoup report {soup.report.as_posix()}")
            merge.print_report(soup, folder)


def _ask(folder: Path, world: World, console: Console) -> dict[str, Values]:
    console.print("\n4. Ask every model every test question", style="bold")
    return {
        name: grade_checkpoint(folder / place, world.test)
        for name, place in tqdm(PLACES.items(), desc="models", unit="model")
    }


def _write(folder: Path, results: dict[str, Any], world: World) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")
    items = [dataclasses.asdict(item) for skill in SKILLS for item in world.test[skill]]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / "test-items.jsonl").write_text(lines, encoding="utf-8")


def _claim(folder: Path, world: str = "") -> None:
    """Refuse a folder with other people's files: this program deletes what is in its own.

    `world` is what a folder must be of; another one's images or results would pass for its own.
    """
    mark, own = folder / MARK, f"Written by `python -m demo{world}`, which may delete and rewrite "
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists():
            raise merge.CommandError(
                f"{folder} holds files that are not from this demo; name another folder with --out"
            )
        if not mark.read_text().startswith(own):
            raise merge.CommandError(
                f"{folder} is of another world or seed of this demo; name another folder with --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(f"{own}everything here.\n")


def grade_checkpoint(checkpoint: Path, items: Items) -> Values:
    """Load a checkpoint and return its grades, see `score.grade`."""
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return grade(model, AutoTokenizer.from_pretrained(checkpoint), items)


def _numbers(values: Values, grades: Mapping[str, Values], items: Items) -> dict[str, Any]:
    """Return one model's part of results.json.

    Accuracies are fractions; `right` has a digit per line of test-items.jsonl.
    """
    accuracy = summary.scores(values, items)
    gains = {
        f"minus {reference}": summary.scores(paired(values, grades[reference]), items)
        for reference in (summary.FINETUNED, merge.WISE.title)
    }
    return {
        "id": _estimate(accuracy.id),
        "ood": _estimate(accuracy.ood),
        **{
            name: {"id": _estimate(gain.id, True), "ood": _estimate(gain.ood, True)}
            for name, gain in gains.items()
        },
        "skills": {
            skill: _estimate(mean_over_skills(values, items, [skill]))
            | {
                "items": len(values[skill]),
                "right": "".join(str(int(value)) for value in values[skill]),
            }
            for skill in SKILLS
        },
    }


def _estimate(estimate: Estimate, interval: bool = False) -> dict[str, Any]:
    return dataclasses.asdict(estimate) | ({"interval_95": estimate.interval()} if interval else {})


def _digest(checkpoint: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
