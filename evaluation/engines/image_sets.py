"""Image data sets in folders: which are there, their classes by name, and how logits are read.

torchvision numbers folders in the order of their names as texts, in which "10" comes before "2" and
a folder that is missing shifts all after it. Here a folder is a class by its name alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from evaluation import fingerprint
from evaluation.engines import EvaluationError, spread
from evaluation.suite import ImageSet
from mergekit_monosoup.checkpoints.reader import listed

_LISTS = {
    "imagenet-1k": "imagenet_synsets.txt",
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
}
"""Lists of classes that timm brings: synsets, in the order of the columns of logits."""


class ImagesError(EvaluationError):
    """A folder of images is not the data set that a suite names; the message names it."""


@dataclass(frozen=True)
class Classes:
    """The classes that compete in a data set: folders, and the columns of logits of each."""

    folders: tuple[str, ...]
    columns: tuple[tuple[int, ...], ...]  # of each folder; the highest of them counts

    def scores(self, logits: Tensor) -> Tensor:
        """Return (n, folders) of logits (n, columns); no other column has a say."""
        longest = max(map(len, self.columns))
        # Filled up with columns that are there already, which changes no maximum.
        index = torch.tensor([(*c, *c[:1] * (longest - len(c))) for c in self.columns])
        return logits[:, index.to(logits.device)].amax(dim=-1)


@dataclass(frozen=True)
class Item:
    """One image: its place in the whole data set, its file, and its class in `Classes`."""

    number: int
    file: Path
    target: int


@dataclass(frozen=True)
class ImageFolders:
    """A data set that is there."""

    root: Path
    classes: Classes
    items: tuple[Item, ...]  # all of them, by folder and name
    border: int = 0  # pixels that are cropped off each side first

    def some(self, limit: int | None) -> Sequence[Item]:
        """Return `limit` items, spread evenly over all; the first so many would be of one class."""
        return spread(self.items, limit)

    def digest(self, limit: int | None = None) -> str:
        """Return a digest of the names and sizes of the files, whose contents are gigabytes."""
        return fingerprint.digest(
            [
                (item.file.relative_to(self.root).as_posix(), item.file.stat().st_size)
                for item in self.some(limit)
            ]
        )


@functools.cache
def named_classes(name: str) -> tuple[str, ...]:
    """Return a list of classes that timm brings, see above.

    Raises:
        ImagesError: it has none of this name.
    """
    if name not in _LISTS:
        raise ImagesError(f"no classes are named {name}; there are {', '.join(_LISTS)}")
    file = importlib.resources.files(timm.data) / "_info" / _LISTS[name]
    return tuple(file.read_text(encoding="utf-8").split())


def listed_classes(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Return classes that are named, or listed."""
    return named_classes(classes) if isinstance(classes, str) else tuple(classes)


def folder(root: Path) -> Path:
    """Return the folder that classes lie in: `val` inside of ImageNet's."""
    return root / "val" if (root / "val").is_dir() else root


def open_set(root: Path, spec: ImageSet, columns: Sequence[str]) -> ImageFolders:
    """Return the data set in a folder, after checking that it holds every class and no other.

    Args:
        root: the folder, `data / spec.folder`.
        spec: how its folders are named, and which classes compete.
        columns: the classes of logits, in order.

    Raises:
        ImagesError: classes are missing, folders are unknown, or a class has no image.
    """
    place = folder(root)
    there = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    classes = _classes(place, spec, columns)
    missing = [name for name in classes.folders if name not in there]
    others = [name for name in there if name not in classes.folders]
    if not there:
        raise ImagesError(f"{place}: no folders, of which each class needs one")
    if others and spec.folders != "objectnet":  # two thirds of ObjectNet's are not in ImageNet
        raise ImagesError(
            f"{place}: {len(others)} of its folders are none of the {len(classes.folders)} classes "
            f"({listed(others)}): is it another data set?"
        )
    if missing:
        raise ImagesError(
            f"{place}: {len(missing)} of {len(classes.folders)} classes have no folder "
            f"({listed(missing)}): is it whole?"
        )
    try:
        found = make_dataset(
            str(place),
            {name: number for number, name in enumerate(classes.folders)},
            extensions=IMG_EXTENSIONS,
        )
    except FileNotFoundError as error:  # a class without an image
        raise ImagesError(f"{place}: {' '.join(str(error).split())}") from error
    files = sorted((Path(file), target) for file, target in found)
    items = tuple(Item(number, *pair) for number, pair in enumerate(files))
    return ImageFolders(place, classes, items, spec.border)


def _classes(place: Path, spec: ImageSet, columns: Sequence[str]) -> Classes:
    """Return which folders a data set has, and the columns of each."""
    position = {name: number for number, name in enumerate(columns)}
    if spec.folders == "objectnet":
        return _objectnet(place, position)
    chosen = columns if spec.classes is None else listed_classes(spec.classes)
    if unknown := [name for name in chosen if name not in position]:
        raise ImagesError(f"{spec.folder}: no classes of the suite: {listed(unknown)}")
    numbers = [position[name] for name in chosen]
    names = map(str, numbers) if spec.folders == "numbers" else chosen
    return Classes(tuple(names), tuple((number,) for number in numbers))


def _objectnet(place: Path, position: dict[str, int]) -> Classes:
    """Return ObjectNet's classes that ImageNet has, by the tables that its download brings.

    They lie in `mappings`, beside `images`: folder → ObjectNet's class → ImageNet's classes in
    words, "; " between them → ImageNet's own order → the order of synsets.
    """
    mappings = place.parent / "mappings"
    try:
        labels = _json(mappings / "folder_to_objectnet_label.json")
        words = _json(mappings / "objectnet_to_imagenet_1k.json")
        own = _json(mappings / "pytorch_to_imagenet_2012_id.json")
        lines = (mappings / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
        ours = {int(number): int(column) for column, number in own.items()}
        column = {line.strip(): ours[number] for number, line in enumerate(lines) if line.strip()}
        found = {
            name: tuple(column[word] for word in words[label].split("; "))
            for name, label in sorted(labels.items())
            if label in words
        }
    except OSError as error:
        raise ImagesError(
            f"{error.filename}: {error.strerror}: ObjectNet's download has this file, which tells "
            "its classes apart; unpack it whole"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ImagesError(
            f"{mappings}: not the tables of ObjectNet's download ({type(error).__name__}: {error})"
        ) from error
    if not found or any(number >= len(position) for group in found.values() for number in group):
        raise ImagesError(f"{mappings}: its tables do not lead to classes of the suite")
    return Classes(tuple(found), tuple(found.values()))


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read(item: Item, border: int) -> tuple[Image.Image, str]:
    """Return an image as RGB, and the digest of its file.

    Raises:
        ImagesError: it cannot be decoded.
    """
    content = item.file.read_bytes()
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImagesError(f"{item.file}: cannot be decoded ({error}): download it again") from error
    if border:
        width, height = image.size
        image = image.crop((border, border, width - border, height - border))
    return image, hashlib.sha256(content).hexdigest()
