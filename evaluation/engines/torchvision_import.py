"""torchvision made importable where its compiled operators do not load beside this torch.

The wheel of the package index is built for torch with CUDA. Beside a torch for the CPU alone its
operators do not load, and `import torchvision` then fails with "operator torchvision::nms does not
exist". timm, open_clip and, where torchvision is installed at all, transformers import it: without
this file nothing here would run in such an environment. Reading and classifying images needs none
of these operators.

`import evaluation` calls `install`, which costs nothing: it acts when torchvision is imported, and
only if that fails for this reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# What torchvision describes to torch.compile as it is imported, whether or not it is there.
_DESCRIBED = ("nms", "qnms")
_declared: list[Any] = []  # an operator lives as long as its library


def install() -> None:
    """Watch for the import of torchvision. Calling it again does no harm."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision where Python does, with a loader that tries twice."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes torchvision, and once more with the operators declared if they are missing."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:  # get_source, is_package, … for who looks at the spec
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._real.exec_module(module)
        except RuntimeError as error:
            if "operator torchvision::nms does not exist" not in str(error) or _declared:
                raise
            _declare_operators()
            self._real.exec_module(module)


def _declare_operators() -> None:
    """Give the operators a signature without code; whoever calls one is told that it has none."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in _DESCRIBED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
