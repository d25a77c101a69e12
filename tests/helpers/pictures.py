"""Generated images, in folders as data sets have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("ant", "bee", "cat")
"""Classes whose images are red, green and blue noise."""


def write(folder: Path, classes: Sequence[str], per_class: int = 1, seed: int = 0) -> Path:
    """Write noise images, 20 by 24 pixels, `per_class` in a folder of each class."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(per_class):
            pixels = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            pixels[..., number % 3] += np.uint8(100)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")
    return folder
