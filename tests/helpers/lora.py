"""Factors of adapters whose spectra fall as those of trained ones do."""

from __future__ import annotations

import math

import torch


def fallen(state: dict[str, torch.Tensor], seed: int, last: float) -> dict[str, torch.Tensor]:
    """Random factors in the place of those of a state dict, with σ from about 1 to ``last``."""
    torch.manual_seed(seed)
    new = {}
    for name, tensor in state.items():
        new[name] = tensor
        if ".lora_" in name:
            new[name] = torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5
            if "_B" in name and tensor.ndim > 1:
                falls = torch.logspace(0, math.log10(last), tensor.shape[1])
                new[name] = new[name] * falls.view(1, -1, *[1] * (tensor.ndim - 2))
    return new
