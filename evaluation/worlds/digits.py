"""Images of a world of digits: drawn in many styles, in one hard style, and written by hand.

Pretraining sees digits in many fonts, turned, blurred, light on dark and dark on light. Fine-tuning
sees one other font alone, faint, among scraps of other digits and noise. That style is "in
distribution" (ID); five others are out of it (OOD), of which handwriting is new to both trainings.

The font files are matplotlib's, the handwritten digits scikit-learn's (`load_digits`, 8 × 8).
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 32  # pixels of an image
CLASSES = 10

_DEJAVU = ("", "-Bold", "-Oblique", "-BoldOblique")
_DEJAVU_SERIF = ("", "-Bold", "-Italic", "-BoldItalic")
_STIX = ("", "Bol", "Italic", "BolIta")
# Those of matplotlib that have all ten digits.
FONTS = (
    *(f"DejaVuSans{cut}" for cut in _DEJAVU),
    *(f"DejaVuSansMono{cut}" for cut in _DEJAVU),
    *(f"DejaVuSerif{cut}" for cut in _DEJAVU_SERIF),
    *(f"STIXGeneral{cut}" for cut in _STIX),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)

TUNED_STYLE = "one_font"
"""The style that fine-tuning teaches. Measured on it is "in distribution" (ID)."""

HANDWRITTEN = "handwritten"
SHIFTS = ("fonts", HANDWRITTEN, "inverted", "blurred", "rotated")
"""What fine-tuning never shows: out of distribution (OOD)."""

TEST_IMAGES = 500  # of each drawn style; all 1797 of the handwritten ones

Range = tuple[float, float]


class Images(NamedTuple):
    """Images with what they show: (n, 3, 32, 32) float32 in [0, 1], and (n,) int64 in 0 … 9."""

    pixels: Tensor
    digits: Tensor


@dataclass(frozen=True)
class Style:
    """How digits are drawn; of a range each image takes a number at random.

    Lengths are shares of half an image, but for `blur`, the standard deviation in pixels.
    """

    fonts: tuple[str, ...]
    turn: Range = (0.0, 10.0)  # degrees, to either side
    shear: float = 0.1
    scale: Range = (0.85, 1.05)
    shift: float = 0.1
    blur: Range = (0.0, 0.3)
    contrast: Range = (0.6, 1.0)
    inverted: bool = False  # dark on light
    negatives: bool = False  # every image comes with its negative, which teaches both in a tenth of
    # the time that images of either kind would take
    scraps: float = 0.0  # brightness of pieces of other digits, 1: as bright as the digit
    noise: float = 0.02  # standard deviation


class World(NamedTuple):
    """The styles of a seed: what pretraining sees, and the drawn test sets by name."""

    seed: int
    pretraining: Style
    tests: dict[str, Style]

    @property
    def finetuning(self) -> Style:
        """The one style that fine-tuning sees."""
        return self.tests[TUNED_STYLE]


def build_world(seed: int) -> World:
    """Return the world of this seed, which decides the font that pretraining does not see."""
    tuned = random.Random(seed).choice(FONTS)
    others = tuple(font for font in FONTS if font != tuned)
    clean = Style(others)
    tests = {
        TUNED_STYLE: Style((tuned,), contrast=(0.4, 0.6), scraps=0.6, noise=0.15),
        "fonts": clean,
        "inverted": replace(clean, inverted=True),
        "blurred": replace(clean, blur=(1.0, 2.0)),
        "rotated": replace(clean, turn=(15.0, 35.0)),
    }
    many = Style(
        others,
        turn=(0.0, 35.0),
        shear=0.2,
        blur=(0.0, 1.6),
        contrast=(0.5, 1.0),
        negatives=True,
        noise=0.03,
    )
    return World(seed, many, tests)


def test_sets(world: World) -> dict[str, Images]:
    """Return the test images by set, the same for the same world: ID first, then the shifts."""
    drawn = {
        name: draw(style, TEST_IMAGES, _generator(f"{world.seed} {name}"))
        for name, style in world.tests.items()
    }
    return {name: handwritten() if name == HANDWRITTEN else drawn[name] for name in SETS}


SETS = (TUNED_STYLE, *SHIFTS)


def _generator(text: str) -> torch.Generator:
    """Return a generator that the text decides, far from those that training counts up from 0."""
    return torch.Generator().manual_seed(random.Random(text).getrandbits(60))


# -- drawing ---------------------------------------------------------------------------------------


def draw(style: Style, count: int, generator: torch.Generator) -> Images:
    """Return images of a style, drawn with the next numbers of the generator.

    Args:
        count: of images; even for a style with negatives.
    """
    if style.negatives:
        pixels, digits = draw(replace(style, negatives=False), count // 2, generator)
        return Images(torch.cat([pixels, 1 - pixels]), digits.repeat(2))
    glyphs = torch.stack([_glyphs(font) for font in style.fonts])
    font = torch.randint(len(style.fonts), (count,), generator=generator)
    # As many of each digit, whichever comes first: a test set lacks none.
    first = torch.randint(CLASSES, (1,), generator=generator)
    digits = (torch.arange(count) + first) % CLASSES
    ink = _blurred(_placed(glyphs[font, digits], style, generator), style.blur, generator)
    if style.scraps:
        ink = torch.maximum(ink, style.scraps * _scraps(glyphs[font], digits, generator))
    return Images(_painted(ink, style, generator), digits)


@cache
def _glyphs(font: str) -> Tensor:
    """Return the ten digits of a font, each as high as the others: (10, 64, 64) in [0, 1]."""
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    side, height = 2 * SIDE, 40
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    letters = ImageFont.truetype(os.fspath(file), 72)
    drawn = []
    for digit in range(CLASSES):
        page = Image.new("L", (128, 128))
        ImageDraw.Draw(page).text((64, 64), str(digit), font=letters, fill=255, anchor="mm")
        cut = page.crop(page.getbbox())
        width = max(1, round(cut.width * height / cut.height))
        scaled = cut.resize((width, height), Image.Resampling.LANCZOS)
        page = Image.new("L", (side, side))
        page.paste(scaled, ((side - width) // 2, (side - height) // 2))
        drawn.append(np.asarray(page, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(drawn))


def _placed(glyphs: Tensor, style: Style, generator: torch.Generator) -> Tensor:
    """Return glyphs turned, sheared, scaled and shifted: (n, 32, 32)."""
    count = len(glyphs)
    angles = _uniform(count, style.turn, generator) * math.pi / 180
    angles *= 1 - 2 * torch.randint(2, (count,), generator=generator)
    shear = _uniform(count, (-style.shear, style.shear), generator)
    scale = _uniform(count, style.scale, generator)[:, None]
    shift = _uniform(2 * count, (-style.shift, style.shift), generator).reshape(count, 2, 1)
    first = torch.stack([angles.cos(), shear - angles.sin()], dim=1) / scale
    second = torch.stack([angles.sin(), angles.cos()], dim=1) / scale
    maps = torch.cat([torch.stack([first, second], dim=1), shift], dim=2)  # (n, 2, 3)
    grid = functional.affine_grid(maps, [count, 1, SIDE, SIDE], align_corners=False)
    return functional.grid_sample(glyphs[:, None], grid, align_corners=False)[:, 0]


def _scraps(glyphs: Tensor, digits: Tensor, generator: torch.Generator) -> Tensor:
    """Return two small digits somewhere in each image, any way up, neither of them its own."""
    style = Style((), turn=(0.0, 180.0), shear=0.3, scale=(0.3, 0.6), shift=1.0)
    images = torch.arange(len(digits))
    parts = []
    for _ in range(2):
        others = digits + torch.randint(1, CLASSES, (len(digits),), generator=generator)
        parts.append(_placed(glyphs[images, others % CLASSES], style, generator))
    return torch.maximum(*parts)


def _blurred(ink: Tensor, blur: Range, generator: torch.Generator) -> Tensor:
    """Return images, each under a Gaussian of its own width."""
    count, reach = len(ink), 4
    width = _uniform(count, blur, generator).clamp(min=1e-3)[:, None]
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * width**2))
    kernel /= kernel.sum(dim=1, keepdim=True)
    rows = functional.conv2d(ink[None], kernel[:, None, None, :], groups=count, padding=(0, reach))
    return functional.conv2d(rows, kernel[:, None, :, None], groups=count, padding=(reach, 0))[0]


def _painted(ink: Tensor, style: Style, generator: torch.Generator) -> Tensor:
    """Return ink on paper, faintly tinted, with noise, rounded as an image file rounds it."""
    count = len(ink)
    contrast = _uniform(count, style.contrast, generator)[:, None, None]
    paper = (1 - contrast) * torch.rand((count, 1, 1), generator=generator)
    grey = paper + contrast * (1 - ink if style.inverted else ink)
    tint = 0.2 * torch.rand((count, 3, 1, 1), generator=generator) - 0.1
    pixels = grey[:, None] + tint * ink[:, None]
    pixels = pixels + style.noise * torch.randn(pixels.shape, generator=generator)
    return (pixels.clamp(0, 1) * 255).round() / 255


def _uniform(count: int, between: Range, generator: torch.Generator) -> Tensor:
    low, high = between
    return low + (high - low) * torch.rand(count, generator=generator)


def handwritten() -> Images:
    """Return scikit-learn's handwritten digits, enlarged, light on dark."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    small = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    large = functional.interpolate(small, 24, mode="bilinear", align_corners=False)
    framed = functional.pad(large, [(SIDE - 24) // 2] * 4).expand(-1, 3, -1, -1)
    return Images((framed * 255).round() / 255, torch.tensor(digits, dtype=torch.int64))


# -- files -----------------------------------------------------------------------------------------


def write_sets(sets: Mapping[str, Images], folder: Path, *, fresh: bool = False) -> None:
    """Write images as `folder`/SET/DIGIT/NUMBER.png; a set that is there stays, unless `fresh`.

    The folder of a set gets its name last, so that an interrupted run leaves no half of one.
    """
    import shutil

    from PIL import Image

    for name, (pixels, digits) in sets.items():
        if (folder / name).is_dir():
            if not fresh:
                continue
            shutil.rmtree(folder / name)
        unfinished = folder / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        for digit in range(CLASSES):
            (unfinished / str(digit)).mkdir(parents=True)
        rows = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        for number, (row, digit) in enumerate(zip(rows, digits.tolist(), strict=True)):
            Image.fromarray(row).save(unfinished / str(digit) / f"{number:04}.png")
        unfinished.rename(folder / name)
