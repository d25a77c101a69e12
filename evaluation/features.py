"""Hidden states of models on the same items, and their similarity as linear CKA.

Of texts they are averaged over tokens; `image_features` reads those of images. Models are loaded
one at a time; their features go to a temporary folder and are read back in pieces, so memory grows
with the square of the hidden size, not with the number of items.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.formatting import file_name
from evaluation.sources import PRETRAINED, Source, SourceError
from mergekit_monosoup.plots.text import figure_labels, figure_text

Matrix = NDArray[np.float64]
CHUNK = 4096  # items read back at once
NAME_LIMIT = 36  # characters of a model or set of items in a figure

Similarities = dict[str, dict[str, list[float | None]]]
"""CKA with the pretrained model: by set of items and model, block by block.

Block 0 is the embedding. None where it is not defined.
"""

Pooled = Iterator[Sequence[torch.Tensor]]
"""Features of a set, batch by batch: for each block (items, its width), of the embedding first."""

Reader = Callable[[Source], Callable[[str], Pooled]]
"""Loads a model and returns what reads a set, by its name, with it."""


@dataclass(frozen=True)
class Reading:
    """How texts or images are read by the models."""

    device: str
    batch_size: int = 32
    max_tokens: int = 512  # of a text, the rest is cut off
    architecture: str | None = None  # of files of images that do not say it


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
    """Return how similar the features of texts are to those of the model named pretrained.

    Args:
        models: folders of transformers, one of them named pretrained.
        texts: sets of texts by name; CKA needs two texts at least.
        folder: see :func:`compare`.

    Raises:
        SourceError: a model has another number of blocks, a text has no tokens.
    """
    return compare(models, list(texts), folder, partial(_text_reader, texts, reading))


def compare(
    models: Iterable[Source], sets: Sequence[str], folder: Path, reader: Reader
) -> Similarities:
    """Return how similar every model's features are to those of the one named pretrained.

    Args:
        models: one of them named pretrained.
        sets: the names of sets of items.
        folder: where features lie for a while, (widths of all blocks)·4 bytes per item and model,
            of two models at a time.
        reader: gives the features.

    Raises:
        SourceError: a model has another number of blocks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(models, key=lambda source: source.name != PRETRAINED)
    values: Similarities = {name: {} for name in sets}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for number, source in enumerate(ordered, 1):
            print(f"[{number}/{len(ordered)}] {source.name}: {source.folder}", flush=True)
            own = Path(temporary, file_name(source.name))
            read = reader(source)
            for name in sets:
                _write_features(read(name), own / file_name(name))
            for name in sets:
                reference = Path(temporary, PRETRAINED, file_name(name))
                values[name][source.name] = _by_block(reference, own / file_name(name), source.name)
            if source.name != PRETRAINED:
                shutil.rmtree(own)
    return values


def _write_features(batches: Pooled, folder: Path) -> None:
    """Write features, one file per block: (items, its width), float32, batch after batch."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files: list[BinaryIO] = []
        for batch in batches:
            if not files:
                for block, features in enumerate(batch):
                    place = folder / f"{block}-{features.shape[1]}"
                    files.append(stack.enter_context(place.open("wb")))
            for file, features in zip(files, batch, strict=True):
                file.write(features.float().cpu().numpy().tobytes())


def _read_features(folder: Path) -> list[NDArray[np.float32]]:
    """Return the features of each block, mapped from the files."""
    files = sorted(folder.iterdir(), key=lambda file: int(file.name.split("-")[0]))
    return [
        np.memmap(file, dtype=np.float32, mode="r").reshape(-1, int(file.name.split("-")[1]))
        for file in files
    ]


def _by_block(reference: Path, own: Path, model: str) -> list[float | None]:
    expected, features = _read_features(reference), _read_features(own)
    if len(expected) != len(features):
        raise SourceError(
            f"{model} has {len(features) - 1} blocks, {PRETRAINED} has {len(expected) - 1}"
        )
    return [linear_cka(_pieces(x), _pieces(y)) for x, y in zip(expected, features, strict=True)]


def _pieces(features: NDArray[np.float32]) -> Iterator[Matrix]:
    for start in range(0, len(features), CHUNK):
        yield np.asarray(features[start : start + CHUNK], dtype=np.float64)


# -- texts -----------------------------------------------------------------------------------------


def _text_reader(
    texts: Mapping[str, Sequence[str]], reading: Reading, source: Source
) -> Callable[[str], Pooled]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # It reports the head, which is not wanted here, as unexpected.
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder)
    # The body without the head: the last hidden state is then the normalised one, as in the whole
    # model.
    model = transformers.AutoModel.from_pretrained(source.folder, dtype="auto")
    model = model.to(reading.device).eval()

    def read(name: str) -> Pooled:
        lines = texts[name]
        for start in range(0, len(lines), reading.batch_size):
            encoded = tokenizer(
                list(lines[start : start + reading.batch_size]),
                truncation=True,
                max_length=reading.max_tokens,
            )["input_ids"]
            yield list(_pooled(model, encoded, reading.device))

    return read


@torch.inference_mode()
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
