"""torchvision made importable where its compiled operators do not load beside this torch.

The wheel of the package index is built for torch with CUDA. Beside a torch for the CPU alone its
operators do not load, and `import torchvision` then fails with "operator torchvision::nms does not
exist", as do timm, open_clip and transformers' image processors, which import it. Reading images
and classifying them needs none of these operators.
"""

from __future__ import annotations

import torch

from evaluation.engines import EvaluationError

INSTALL = 'pip install --constraint constraints.txt --editable ".[vision]"'
# What torchvision describes to torch.compile as it is imported, whether or not it is there.
_DESCRIBED = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # an operator lives as long as its library


def make_importable() -> None:
    """Import torchvision; to be called before anything imports it, timm and open_clip included.

    Raises:
        EvaluationError: it is not installed, or does not fit this torch.
    """
    try:
        try:
            import torchvision
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            _declare_operators()
            import torchvision  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"images need torchvision ({error}): {INSTALL}") from error
    except RuntimeError as error:
        raise EvaluationError(
            f"torchvision does not fit torch {torch.__version__} ({error}): {INSTALL}"
        ) from error


def _declare_operators() -> None:
    """Give the operators a signature without code; whoever calls one is told that it has none."""
    if _declared:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _DESCRIBED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
