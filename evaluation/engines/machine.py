"""What this machine has of what the settings name, looked at before any model is loaded."""

from __future__ import annotations

import torch

from evaluation.engines import EvaluationError


def default_device() -> str:
    """Return cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Check that there is a device.

    Raises:
        EvaluationError: there is none of that name.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"--device {device}: {str(error).partition(chr(10))[0]}") from error


def check_dtype(dtype: str, *, auto: bool) -> None:
    """Check that a name is that of a floating dtype; ``auto``: or the checkpoint's own.

    Raises:
        EvaluationError: it is not.
    """
    known = getattr(torch, dtype, None)
    if auto and dtype == "auto":
        return
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        others = " or auto" if auto else ""
        raise EvaluationError(
            f"--dtype {dtype}: not one of torch's; take float32, bfloat16, float16{others}"
        )
