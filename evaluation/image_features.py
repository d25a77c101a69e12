"""Hidden states of image classifiers, block by block, for CKA.

Blocks are the residual blocks of a vision transformer (`blocks`, `resblocks`, `layers`) or of a
ConvNeXt, whatever library it is of. A transformer's tokens are averaged, a convolutional block's
output over its places (paper, appendix G). Block 0 is what goes into the first block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation import features, fingerprint
from evaluation.engines import EvaluationError
from evaluation.features import Pooled, Reading, Similarities
from evaluation.sources import Source, SourceError

BLOCK = re.compile(r"(?:.+\.)?(?:(?:res)?blocks|layers?)\.[0-9]+")
"""Names of residual blocks: blocks.3 of timm, resblocks.3 of CLIP, layers.1 of transformers."""


def similarities(
    models: Iterable[Source], images: Mapping[str, Sequence[Path]], folder: Path, reading: Reading
) -> Similarities:
    """Return how similar the features of images are to those of the model named pretrained.

    Args:
        models: image classifiers, as the engine `vision` loads them; one named pretrained.
        images: files by the name of their set; CKA needs two at least.
        folder: see :func:`features.compare`.

    Raises:
        SourceError: a model has another number of blocks than the pretrained one, or none that are
            known; an image cannot be read.
    """
    return features.compare(models, list(images), folder, partial(_reader, images, reading))


def image_files(folder: Path, limit: int | None = None) -> list[Path]:
    """Return the images in a folder and the folders in it, in the order of their names.

    With a limit so many of them, spread evenly: the first would be of one class.

    Raises:
        SourceError: there are fewer than two.
    """
    from PIL import Image

    known = set(Image.registered_extensions())
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known)
    count = min(limit or len(found), len(found))
    chosen = [found[number * len(found) // count] for number in range(count)]
    if len(chosen) < 2:
        raise SourceError(f"{folder}: CKA needs two images at least, and finds {len(chosen)}")
    return chosen


def digests(images: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    """Return the digest of each image's file, by set."""
    return {name: [fingerprint.of_file(file) for file in files] for name, files in images.items()}


def _reader(
    images: Mapping[str, Sequence[Path]], reading: Reading, source: Source
) -> Callable[[str], Pooled]:
    from evaluation.engines import image_classifiers

    try:
        classifier = image_classifiers.load(source.folder, None, reading.architecture)
    except EvaluationError as error:
        raise SourceError(str(error)) from error
    module = classifier.module.to(reading.device)
    wanted = blocks(module)
    if not wanted:
        raise SourceError(
            f"{source.folder}: none of its modules is a block of a vision transformer or ConvNeXt"
        )

    def read(name: str) -> Pooled:
        files = images[name]
        for start in range(0, len(files), reading.batch_size):
            batch = [
                classifier.transform(_opened(file))
                for file in files[start : start + reading.batch_size]
            ]
            yield pooled(module, wanted, torch.stack(batch).to(reading.device))

    return read


def _opened(file: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{file}: cannot be decoded ({error})") from error


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the residual blocks of a model, in order; of nested ones the outermost."""
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if BLOCK.fullmatch(name) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    return list(found.values())


@torch.inference_mode()
def pooled(module: nn.Module, wanted: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """Return for each block (images, width): its output's mean; the first block's input first.

    Args:
        module: called on the images.
        wanted: blocks of it, each called once, in this order.
        images: (images, channels, height, width).
    """
    states: list[Tensor] = []

    def enters(_module: nn.Module, given: tuple[Any, ...]) -> None:
        states.append(_mean(given[0]))

    def leaves(_module: nn.Module, _given: Any, output: Any) -> None:
        states.append(_mean(output[0] if isinstance(output, tuple) else output))

    hooks = [wanted[0].register_forward_pre_hook(enters)]
    hooks += [block.register_forward_hook(leaves) for block in wanted]
    try:
        module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _mean(state: Tensor) -> Tensor:
    """Return (images, width) of tokens (images, tokens, width) or a map (images, width, h, w)."""
    return state.double().mean(dim=1 if state.ndim == 3 else (2, 3)).float()
