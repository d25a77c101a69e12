"""MonoSoup (arXiv 2602.09689) for mergekit: repairs a fine-tuned checkpoint, without data.

In YAML: `merge_method: monosoup`, and `svc` for its neighbour, Singular Value Calibration. In
Python: :func:`edit` and :func:`calibrate` for one weight matrix, :func:`edit_each` for many.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import _mergekit_monosoup_autoload

if TYPE_CHECKING:
    from mergekit_monosoup.kernel.batch import Job, edit_each
    from mergekit_monosoup.kernel.monosoup import edit
    from mergekit_monosoup.kernel.svc import calibrate
    from mergekit_monosoup.report import Record

__version__ = "0.1.0"
__all__ = ["Job", "Record", "__version__", "calibrate", "edit", "edit_each"]

# Looked up on first use: importing the package must not import torch, which takes seconds.
_HOMES = {
    "Job": "mergekit_monosoup.kernel.batch",
    "Record": "mergekit_monosoup.report",
    "calibrate": "mergekit_monosoup.kernel.svc",
    "edit": "mergekit_monosoup.kernel.monosoup",
    "edit_each": "mergekit_monosoup.kernel.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_mergekit_monosoup_autoload.install()
