"""Hidden states of models on the same texts, and their similarity as linear CKA.

Hidden states are averaged over the tokens of a text. Models are loaded one at a time; their
features go to a temporary folder and are read back in pieces, so memory grows with the square of
the hidden size, not with the number of texts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.formatting import file_name
from evaluation.sources import PRETRAINED, Source, SourceError
from mergekit_monosoup.plots.text import figure_labels, figure_text

Matrix = NDArray[np.float64]
CHUNK = 4096  # texts read back at once
NAME_LIMIT = 36  # characters of a model or text set in a figure

Similarities = dict[str, dict[str, list[float | None]]]
"""CKA with the pretrained model: by text set and model, block by block; block 0 is the embedding.

None where it is not defined.
"""


@dataclass(frozen=True)
class Reading:
    """How texts are read by the models."""

    device: str
    batch_size: int = 32
    max_tokens: int = 512  # of a text, the rest is cut off


@dataclass
class LinearCKA:
    """Linear CKA of two sets of features of the same items, given piece by piece.

    With centred X (n, p) and Y (n, q): ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) (Kornblith et al., 2019). Kept
    are the p × q, p × p and q × q products of features centred at the first piece's mean; without
    that shift, features whose mean is large against their spread (those of language models) would
    lose their digits in the subtraction at the end.
    """

    count: int = 0
    origin: tuple[Matrix, Matrix] | None = None
    sums: tuple[Matrix, Matrix] | None = None
    products: list[Matrix] = field(default_factory=list)  # XᵀX, YᵀY, YᵀX

    def add(self, x: Matrix, y: Matrix) -> None:
        """Add x: (items, p) and y: (items, q) of the same items."""
        if len(x) != len(y):
            raise ValueError(
                f"{len(x)} and {len(y)} items: CKA compares features of the same items"
            )
        if self.origin is None:
            p, q = x.shape[1], y.shape[1]
            self.origin = x.mean(axis=0), y.mean(axis=0)
            self.sums = np.zeros(p), np.zeros(q)
            self.products = [np.zeros(shape) for shape in ((p, p), (q, q), (q, p))]
        assert self.sums is not None
        x, y = x - self.origin[0], y - self.origin[1]
        self.count += len(x)
        self.sums = self.sums[0] + x.sum(axis=0), self.sums[1] + y.sum(axis=0)
        for total, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True):
            total += left.T @ right

    def value(self) -> float | None:
        """Return CKA; None where it is not defined: fewer than two items, or constant features."""
        if self.count < 2 or self.sums is None:
            return None
        x, y = self.sums
        xx, yy, yx = (
            np.linalg.norm(total - np.outer(a, b) / self.count)
            for total, (a, b) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True)
        )
        return float(yx**2 / (xx * yy)) if xx > 0 and yy > 0 else None


def linear_cka(xs: Iterable[Matrix], ys: Iterable[Matrix]) -> float | None:
    """Return linear CKA of features that come in pieces of the same items."""
    cka = LinearCKA()
    for x, y in zip(xs, ys, strict=True):
        cka.add(x, y)
    return cka.value()


def similarities(
    models: Iterable[Source], texts: Mapping[str, Sequence[str]], folder: Path, reading: Reading
) -> Similarities:
    """Return how similar the features of every model are to those of the one named pretrained.

    Args:
        models: one of them named pretrained.
        texts: sets of texts by name; CKA needs two texts at least.
        folder: where features lie for a while, (blocks + 1)·(hidden size)·4 bytes per text and
            model, of two models at a time.

    Raises:
        SourceError: a model has another number of blocks, a text has no tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(models, key=lambda source: source.name != PRETRAINED)
    values: Similarities = {name: {} for name in texts}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for number, source in enumerate(ordered, 1):
            print(f"[{number}/{len(ordered)}] {source.name}: {source.folder}", flush=True)
            own = Path(temporary, file_name(source.name))
            _write_features(source, texts, own, reading)
            for name in texts:
                reference = Path(temporary, PRETRAINED, f"{file_name(name)}.npy")
                values[name][source.name] = _by_block(
                    reference, own / f"{file_name(name)}.npy", source.name
                )
            if source.name != PRETRAINED:
                shutil.rmtree(own)
    return values


def _by_block(reference: Path, own: Path, model: str) -> list[float | None]:
    expected, features = (np.load(file, mmap_mode="r") for file in (reference, own))
    if expected.shape[:2] != features.shape[:2]:
        raise SourceError(
            f"{model} has {len(features) - 1} blocks, {PRETRAINED} has {len(expected) - 1}"
        )
    return [linear_cka(_pieces(x), _pieces(y)) for x, y in zip(expected, features, strict=True)]


def _pieces(features: NDArray[np.float32]) -> Iterator[Matrix]:
    for start in range(0, len(features), CHUNK):
        yield np.asarray(features[start : start + CHUNK], dtype=np.float64)


@torch.inference_mode()
def _write_features(
    source: Source, texts: Mapping[str, Sequence[str]], folder: Path, reading: Reading
) -> None:
    """Write features, one file per text set: (blocks + 1, texts, hidden size), float32."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # It reports the head, which is not wanted here, as unexpected.
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder)
    # The body without the head: the last hidden state is then the normalised one, as in the whole
    # model.
    model = transformers.AutoModel.from_pretrained(source.folder, dtype="auto")
    model = model.to(reading.device).eval()
    folder.mkdir()
    for name, lines in texts.items():
        out: Any = None
        for start in range(0, len(lines), reading.batch_size):
            encoded = tokenizer(
                list(lines[start : start + reading.batch_size]),
                truncation=True,
                max_length=reading.max_tokens,
            )["input_ids"]
            pooled = _pooled(model, encoded, reading.device)
            if out is None:
                shape = (len(pooled), len(lines), pooled.shape[-1])
                out = np.lib.format.open_memmap(
                    folder / f"{file_name(name)}.npy", mode="w+", dtype=np.float32, shape=shape
                )
            out[:, start : start + pooled.shape[1]] = pooled.numpy()
        out.flush()


def _pooled(model: Any, encoded: list[list[int]], device: str) -> torch.Tensor:
    """Return hidden states averaged over tokens: (blocks + 1, texts, hidden size), float32."""
    tokens, mask = (part.to(device) for part in _padded(encoded))
    states = model(
        input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    # Padding must not count, and bfloat16 sums over hundreds of tokens would round.
    counted = mask.double()[..., None]
    means = [(state.double() * counted).sum(1) / counted.sum(1) for state in states]
    return torch.stack(means).float().cpu()


def _padded(encoded: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and mask, both (texts, longest), int64, filled up on the right.

    Not every tokenizer has a padding token, and which one it is makes no difference under the mask.
    """
    if not all(encoded):
        raise SourceError("a text has no tokens")
    tokens = torch.zeros(len(encoded), max(map(len, encoded)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return tokens, mask


def heatmap(values: Similarities) -> Any:
    """Return models × blocks, one panel per text set; one colour scale, from the smallest to 1."""
    from matplotlib.figure import Figure

    grids = {
        name: np.array([[np.nan if v is None else v for v in blocks] for blocks in models.values()])
        for name, models in values.items()
    }
    known = [
        v
        for models in values.values()
        for blocks in models.values()
        for v in blocks
        if v is not None
    ]
    low = min(known, default=1.0)
    figure = Figure(
        figsize=(7, 1 + 0.4 * sum(len(grid) + 2 for grid in grids.values())), layout="constrained"
    )
    panels = figure.subplots(len(grids), 1, squeeze=False)[:, 0]
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        image = axes.imshow(grid, vmin=min(low, 0.999), vmax=1.0, aspect="auto", cmap="viridis")
        axes.set_xticks(range(0, grid.shape[1], 1 + grid.shape[1] // 16))
        axes.set_yticks(range(len(grid)), figure_labels(list(values[name]), NAME_LIMIT))
        axes.set(xlabel="block (0: embedding)")
        axes.set_title(f"linear CKA with {PRETRAINED}, {figure_text(name, NAME_LIMIT)}")
        figure.colorbar(image, ax=axes)
    return figure
