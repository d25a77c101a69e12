"""Print how similar hidden states are to the pretrained model's: `python -m evaluation.cka …`.

Linear CKA, block by block, on texts or images in distribution and out of it; `features` computes
it, and `image_features` reads what image classifiers make of images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evaluation import (
    configs,
    features,
    file_merges,
    fingerprint,
    image_features,
    options,
    sources,
)
from evaluation.sources import FINETUNED, PRETRAINED, Source, SourceError
from mergekit_monosoup import terminal
from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text
from mergekit_monosoup.files import write_text

MOST_TEXT = 2**30  # bytes; all of it is in memory


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    given = _parser().parse_args(arguments)
    options.without_tokenizer_threads()
    command = options.command_line("evaluation.cka", arguments)
    return options.exit_code(lambda: _run(given, command), interruption="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.cka", description=__doc__)
    options.add_models(
        parser,
        f"as for evaluation.run; the one named {PRETRAINED} is what the others are compared with",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="add high_only and low_only, MonoSoup's two parts alone, made from the models named "
        "pretrained and finetuned",
    )
    sets = parser.add_mutually_exclusive_group(required=True)
    sets.add_argument(
        "--images",
        action="append",
        type=options.named_path,
        metavar="NAME=FOLDER",
        help="images, in the folder or in folders in it; models are image classifiers then, as "
        "suites of images take them",
    )
    sets.add_argument(
        "--text",
        action="append",
        type=options.named_path,
        metavar="NAME=FILE",
        help="texts, one per line; JSON lines with a field `text` or `prompt` if the file ends in "
        ".jsonl. Give one set that is in distribution and one that is not",
    )
    parser.add_argument(
        "--batches",
        type=options.positive,
        help="only N batches of each set (default: all): of texts the first, of images spread "
        "over all",
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=32, help="default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens",
        type=options.positive,
        default=512,
        help="of a text, the rest is cut off (default: %(default)s)",
    )
    parser.add_argument(
        "--architecture", help="of files of weights that do not say it, as for evaluation.run"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results", "cka"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    options.add_merge_cache(parser, "default: %(default)s")
    return parser


def _run(given: argparse.Namespace, command: str) -> None:
    models = _models(given)
    given.out.mkdir(parents=True, exist_ok=True)
    used = given.batches * given.batch_size if given.batches else None
    reading = features.Reading(given.device, given.batch_size, given.max_tokens, given.architecture)
    if given.images:
        images = {
            name: image_features.image_files(Path(place), used) for name, place in given.images
        }
        values = image_features.similarities(models, images, given.out, reading)
        described = {"images": _described(given.images, image_features.digests(images))}
    else:
        texts = {name: read_texts(Path(file))[:used] for name, file in given.text}
        values = features.similarities(models, texts, given.out, reading)
        described = {"texts": _described(given.text, texts), "max_tokens": given.max_tokens}
    result = {
        "command": command,
        "models": {source.name: asdict(source.origin) for source in models},
        **described,
        "versions": fingerprint.versions(),
        "git": fingerprint.git_hash(),
        "cka": values,
    }
    file = given.out / "cka.json"
    write_text(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    features.heatmap(values).savefig(given.out / "cka.png", bbox_inches="tight", dpi=150)
    for name, by_model in values.items():
        for model, blocks in by_model.items():
            shown = " ".join("-" if value is None else f"{value:.3f}" for value in blocks)
            print(f"{name}, {model}: {shown}")
    print(file)


def _described(
    sets: Sequence[tuple[str, str]], items: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Return where each set of items came from, how many they are, and their digest."""
    return {
        name: {
            "file": place,
            "items": len(items[name]),
            "sha256": fingerprint.digest(list(items[name])),
        }
        for name, place in sets
    }


def _models(given: argparse.Namespace) -> list[Source]:
    """Return the models, the pretrained one first."""
    named = dict(given.model)
    sets = given.images or given.text
    if len(named) < len(given.model) or len(dict(sets)) < len(sets):
        raise SourceError("two models, or two sets of items, have the same name")
    if PRETRAINED not in named or len(named) + given.variants < 2:
        raise SourceError(f"name one model {PRETRAINED} and at least one other")
    if given.variants:
        named |= _variants(named, given.out / "configs")
    models = [sources.find(name, path, given.merge_cache) for name, path in named.items()]
    return sorted(models, key=lambda source: source.name != PRETRAINED)


def _variants(named: dict[str, str], folder: Path) -> dict[str, str]:
    """Return configurations of the two parts of MonoSoup's split alone (paper, appendix G)."""
    if FINETUNED not in named:
        raise SourceError("--variants needs a model named finetuned")
    pretrained, finetuned = (
        str(file_merges.mergeable(sources.local(named[name]).resolve()))
        for name in (PRETRAINED, FINETUNED)
    )
    variants = {}
    for rule in ("high", "low"):
        config = configs.monosoup(pretrained, [finetuned], coefficients=rule)
        variants[f"{rule}_only"] = str(configs.write_config(folder / f"{rule}_only.yml", config))
    return variants


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file, one per line or JSON object; empty lines are left out.

    Raises:
        SourceError: the file does not hold two texts at least.
    """
    try:
        # Not splitlines, which also splits at characters that a text, or JSON, may hold.
        lines = [line for line in read_text(path, MOST_TEXT).split("\n") if line.strip()]
    except UnreadableError as error:
        raise SourceError(f"{path}: {error}") from error
    if path.suffix == ".jsonl":
        lines = [_json_text(path, number, line) for number, line in enumerate(lines, 1)]
    if len(lines) < 2:
        raise SourceError(f"{path}: CKA needs two texts at least")
    return lines


def _json_text(path: Path, number: int, line: str) -> str:
    """Return the text of a line of JSON."""
    try:
        fields: dict[str, Any] = dict(json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{path}: line {number} (empty ones left out) is not a JSON object: {error}"
        ) from error
    if "text" not in fields and "prompt" not in fields:
        raise SourceError(f"{path}: line {number} has neither `text` nor `prompt`")
    text = fields["text"] if "text" in fields else fields["prompt"]
    if not isinstance(text, str):
        raise SourceError(f"{path}: line {number}: its text is a {type(text).__name__}")
    return text


if __name__ == "__main__":
    sys.exit(main())
