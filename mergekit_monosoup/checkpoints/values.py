"""The few numbers that are read besides headers: small tensors that are not floating point."""

from __future__ import annotations

import torch
from safetensors import safe_open

from mergekit_monosoup.checkpoints.pickles import named_tensors
from mergekit_monosoup.checkpoints.stored import Stored

SMALL = 4096  # bytes


def small_value(stored: Stored) -> torch.Tensor | None:
    """Return a tensor of at most :data:`SMALL` bytes of a local file; None of larger ones.

    Counters and positions decide whether mergekit gets past them, so they have to be compared.
    """
    if stored.size > SMALL:
        return None
    if stored.file.lower().endswith(".safetensors"):
        with safe_open(stored.file, framework="pt") as file:
            value: torch.Tensor = file.get_tensor(stored.name)
            return value
    return named_tensors(stored.file, "cpu").get(stored.name)
