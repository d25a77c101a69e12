"""How far the hidden states of every block moved from the pretrained model's, as linear CKA: `python -m evaluation.cka …`.

Hidden states are averaged over the tokens of a text. Models are loaded one at a time; their features go to a temporary
folder and are read back in pieces, so memory grows with the square of the hidden size, not with the number of texts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation import fingerprint, sources
from evaluation.run import PRETRAINED, model_argument, positive, problems
from evaluation.sweep import write_config

Matrix = NDArray[np.float64]
CHUNK = 4096  # texts read back at once


@dataclass
class LinearCKA:
    """Linear CKA of two sets of features of the same items, given piece by piece.

    With centred X (n, p) and Y (n, q): ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) (Kornblith et al., 2019). Kept are the p × q, p × p and
    q × q products of features centred at the first piece's mean; without that shift, features whose mean is large against
    their spread (those of language models) would lose their digits in the subtraction at the end.
    """

    count: int = 0
    origin: tuple[Matrix, Matrix] | None = None
    sums: tuple[Matrix, Matrix] | None = None
    products: list[Matrix] = field(default_factory=list)  # XᵀX, YᵀY, YᵀX

    def add(self, x: Matrix, y: Matrix) -> None:
        """x: (items, p), y: (items, q) of the same items."""
        if len(x) != len(y):
            raise ValueError(
                f"{len(x)} and {len(y)} items: CKA compares features of the same items"
            )
        if self.origin is None:
            self.origin = x.mean(axis=0), y.mean(axis=0)
            self.sums = np.zeros(x.shape[1]), np.zeros(y.shape[1])
            self.products = [np.zeros((a, b)) for a, b in _shapes(x.shape[1], y.shape[1])]
        assert self.sums is not None
        x, y = x - self.origin[0], y - self.origin[1]
        self.count += len(x)
        self.sums = self.sums[0] + x.sum(axis=0), self.sums[1] + y.sum(axis=0)
        for total, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True):
            total += left.T @ right

    def value(self) -> float | None:
        """None where it is not defined: fewer than two items, or features that do not vary."""
        if self.count < 2 or self.sums is None:
            return None
        x, y = self.sums
        xx, yy, yx = (
            np.linalg.norm(total - np.outer(a, b) / self.count)
            for total, (a, b) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True)
        )
        return float(yx**2 / (xx * yy)) if xx > 0 and yy > 0 else None


def _shapes(p: int, q: int) -> tuple[tuple[int, int], ...]:
    return (p, p), (q, q), (q, p)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = shlex.join(
        ["python", "-m", "evaluation.cka", *(sys.argv[1:] if arguments is None else arguments)]
    )
    return problems(lambda: run(options, command), kept="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.cka", description=__doc__)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        type=model_argument,
        metavar="NAME=PATH",
        help=f"as for evaluation.run; the one named {PRETRAINED} is what the others are compared with",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="add high_only and low_only, MonoSoup's two parts alone, made from the models named pretrained and finetuned",
    )
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        type=model_argument,
        metavar="NAME=FILE",
        help="texts, one per line; JSON lines with a field `text` or `prompt` if the file ends in .jsonl. Give one set that "
        "is in distribution and one that is not",
    )
    parser.add_argument(
        "--batches", type=positive, help="only the first N batches of each text set (default: all)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="default: %(default)s")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=512,
        help="of a text, the rest is cut off (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results", "cka"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--merge-cache", type=Path, default=Path("results", "merged"), help="default: %(default)s"
    )
    return parser


def run(options: argparse.Namespace, command: str) -> None:
    given = dict(options.model)
    if len(given) < len(options.model) or len(dict(options.text)) < len(options.text):
        raise sources.SourceError("two models, or two text sets, have the same name")
    if PRETRAINED not in given or len(given) + options.variants < 2:
        raise sources.SourceError(f"name one model {PRETRAINED} and at least one other")
    if options.variants:
        given |= _variants(given, options.out / "configs")
    found = [sources.find(name, place, options.merge_cache) for name, place in given.items()]
    found.sort(key=lambda source: source.name != PRETRAINED)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = {name: _texts(Path(file)) for name, file in options.text}
    kept = {
        name: lines[: options.batches * options.batch_size] if options.batches else lines
        for name, lines in texts.items()
    }
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        values = _compare(found, kept, Path(folder), options)
    result = {
        "command": command,
        "models": {source.name: source.record() for source in found},
        "texts": {
            name: {"file": file, "items": len(kept[name]), "sha256": fingerprint.digest(kept[name])}
            for name, file in options.text
        },
        "versions": fingerprint.versions(),
        "git": fingerprint.git_hash(),
        "max_tokens": options.max_tokens,
        "cka": values,
    }
    (options.out / "cka.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    heatmap(values).savefig(options.out / "cka.png", bbox_inches="tight", dpi=150)
    for name, models in values.items():
        for model, blocks in models.items():
            print(
                f"{name}, {model}: "
                + " ".join("-" if value is None else f"{value:.3f}" for value in blocks)
            )
    print(options.out / "cka.json")


def _variants(given: dict[str, str], folder: Path) -> dict[str, str]:
    """The two parts of MonoSoup's split alone (paper, appendix G), through mergekit."""
    if "finetuned" not in given:
        raise sources.SourceError("--variants needs a model named finetuned")
    pretrained, finetuned = (
        str(sources.local(given[name]).resolve()) for name in (PRETRAINED, "finetuned")
    )
    made = {}
    for rule in ("high", "low"):
        config = {
            "merge_method": "monosoup",
            "base_model": pretrained,
            "models": [{"model": finetuned}],
            "parameters": {"coefficients": rule},
        }
        made[f"{rule}_only"] = str(write_config(folder / f"{rule}_only.yml", config))
    return made


def _texts(path: Path) -> list[str]:
    try:
        # Not splitlines, which also splits at characters that a text, or JSON, may hold.
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise sources.SourceError(f"{path}: not UTF-8: {error}") from error
    if path.suffix == ".jsonl":
        rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
        if missing := [
            number
            for number, row in enumerate(rows, 1)
            if "text" not in row and "prompt" not in row
        ]:
            raise sources.SourceError(f"{path}: line {missing[0]} has neither `text` nor `prompt`")
        lines = [row["text"] if "text" in row else row["prompt"] for row in rows]
    if len(lines) < 2:
        raise sources.SourceError(f"{path}: CKA needs two texts at least")
    return lines


def _row(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row: dict[str, str] = dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise sources.SourceError(
            f"{path}: line {number} (empty ones left out) is not a JSON object: {error}"
        ) from error
    return row


def _compare(
    found: Sequence[sources.Source],
    texts: dict[str, list[str]],
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, dict[str, list[float | None]]]:
    """By text set and model: CKA with the pretrained model, block by block; block 0 is the embedding."""
    values: dict[str, dict[str, list[float | None]]] = {name: {} for name in texts}
    for number, source in enumerate(found, 1):
        print(f"[{number}/{len(found)}] {source.name}: {source.folder}", flush=True)
        _write_features(source, texts, folder / source.name, options)
        for name in texts:
            reference, own = (
                np.load(folder / who / f"{name}.npy", mmap_mode="r")
                for who in (PRETRAINED, source.name)
            )
            if reference.shape[:2] != own.shape[:2]:
                raise sources.SourceError(
                    f"{source.name} has {len(own) - 1} blocks, {PRETRAINED} has {len(reference) - 1}"
                )
            values[name][source.name] = [
                cka(_pieces(x), _pieces(y)) for x, y in zip(reference, own, strict=True)
            ]
        if source.name != PRETRAINED:
            shutil.rmtree(folder / source.name)
    return values


def cka(xs: Iterable[Matrix], ys: Iterable[Matrix]) -> float | None:
    """Linear CKA of features that come in pieces of the same items."""
    state = LinearCKA()
    for x, y in zip(xs, ys, strict=True):
        state.add(x, y)
    return state.value()


def _pieces(features: NDArray[np.float32]) -> Iterator[Matrix]:
    for start in range(0, len(features), CHUNK):
        yield np.asarray(features[start : start + CHUNK], dtype=np.float64)


@torch.inference_mode()
def _write_features(
    source: sources.Source, texts: dict[str, list[str]], folder: Path, options: argparse.Namespace
) -> None:
    """One file per text set, (blocks + 1, texts, hidden size), float32: hidden states averaged over a text's tokens."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it reports the head, which is not wanted here, as unexpected
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder)
    # The body without the head: the last hidden state is then the normalised one, as in the whole model.
    model = (
        transformers.AutoModel.from_pretrained(source.folder, dtype="auto")
        .to(options.device)
        .eval()
    )
    folder.mkdir()
    for name, lines in texts.items():
        out: Any = None
        for start in range(0, len(lines), options.batch_size):
            encoded = tokenizer(
                lines[start : start + options.batch_size],
                truncation=True,
                max_length=options.max_tokens,
            )["input_ids"]
            tokens, mask = (part.to(options.device) for part in _padded(encoded))
            states = model(
                input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
            ).hidden_states
            counted = mask.double()[..., None]
            # Padding must not count, and bfloat16 sums over hundreds of tokens would round.
            pooled = (
                torch.stack([(s.double() * counted).sum(1) / counted.sum(1) for s in states])
                .float()
                .cpu()
            )
            if out is None:
                shape = (len(states), len(lines), pooled.shape[-1])
                out = np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape
                )
            out[:, start : start + pooled.shape[1]] = pooled.numpy()
        out.flush()


def _padded(encoded: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask), both (texts, longest), int64, filled up on the right: not every tokenizer has a padding token, and
    which one it is makes no difference under the mask."""
    if not all(encoded):
        raise sources.SourceError("a text has no tokens")
    tokens = torch.zeros(len(encoded), max(map(len, encoded)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return tokens, mask


def heatmap(values: dict[str, dict[str, list[float | None]]]) -> Any:
    """Models × blocks, one panel per text set; one colour scale, from the smallest value to 1."""
    from matplotlib.figure import Figure

    grids = {
        name: np.array([[np.nan if v is None else v for v in blocks] for blocks in models.values()])
        for name, models in values.items()
    }
    low = min(float(np.nanmin(grid)) for grid in grids.values())
    figure = Figure(
        figsize=(7, 1 + 0.4 * sum(len(grid) + 2 for grid in grids.values())), layout="constrained"
    )
    panels = figure.subplots(len(grids), 1, squeeze=False)[:, 0]
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        image = axes.imshow(grid, vmin=min(low, 0.999), vmax=1.0, aspect="auto", cmap="viridis")
        axes.set_xticks(range(0, grid.shape[1], 1 + grid.shape[1] // 16))
        axes.set_yticks(range(len(values[name])), list(values[name]))
        axes.set(xlabel="block (0: embedding)", title=f"linear CKA with {PRETRAINED}, {name}")
        figure.colorbar(image, ax=axes)
    return figure


if __name__ == "__main__":
    sys.exit(main())
