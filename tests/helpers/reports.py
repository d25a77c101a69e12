"""Reports without models: records of random matrices with known spectra, and of foreign names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mergekit_monosoup.kernel.monosoup import edit, preview
from mergekit_monosoup.report import Record

KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
# A name or a reason from a file may be anything.
HOSTILE = (
    "</script><script>window.broken = 1</script>",
    '"><img src=x onerror="window.broken = 2">',
    "{{ 7 * 7 }} {% raw %} <!-- ' -->",
    "\u202eturned\u0000\x1b[31m\ud800",
    "constructor",
    "__proto__",
    "x" * 4000,
)
# Of the singular values of an update: i from 0 to n - 1.
SPECTRA = {
    "flat": lambda i: 1 - 0.5 * i / len(i),
    "power law": lambda i: (i + 1.0) ** -0.7,
    "exponential": lambda i: np.exp(-6 * i / len(i)),
    "a few strong directions": lambda i: np.where(i < 5, 20.0 - i, 1 - 0.9 * i / len(i)),
    "low rank": lambda i: np.where(i < 9, 1.0 / (i + 1), 0.0),
}


def matrix(sigma: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
    """A square float64 matrix with these singular values."""
    size = len(sigma)
    left, right = (np.linalg.qr(generator.standard_normal((size, size)))[0] for _ in range(2))
    return torch.from_numpy(left * sigma @ right)


def updates(size: int = 96) -> dict[str, torch.Tensor]:
    """An update of each spectrum, by the name of a tensor."""
    generator = np.random.default_rng(0)
    places = np.arange(size, dtype=float)
    return {
        f"model.layers.{number}.mlp.up_proj.weight": matrix(sigma(places), generator)
        for number, sigma in enumerate(SPECTRA.values())
    }


def inspection(size: int = 96, R: float = 0.8) -> list[Record]:
    """Both records of each update."""
    return [
        record
        for name, delta in updates(size).items()
        for record in preview(torch.zeros_like(delta), delta, R=R, name=name, points=33)
    ]


def merge(layers: int = 3, **settings) -> list[Record]:
    """What a merge of a small model says: edited matrices, and a norm that was copied."""
    torch.manual_seed(0)
    records = []
    for layer in range(layers):
        for kind in (*KINDS, "input_layernorm"):
            W0 = torch.randn(12) if "norm" in kind else torch.randn(24, 16)
            W1 = W0 + 0.1 * torch.randn_like(W0)
            name = f"model.layers.{layer}.{kind}.weight"
            records.append(edit(W0, W1, name=name, **settings)[1])
    return records


def many(count: int, experts: int, template: Record) -> list[Record]:
    """A mixture of experts: ``count`` matrices, ``experts`` in each layer."""
    return [
        replace(
            template,
            name=f"model.layers.{n // experts}.mlp.experts.{n % experts}.up_proj.weight",
            lambda_low=n / count,
            lambda_high=1 - n / count,
        )
        for n in range(count)
    ]


def written(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(record.to_json() + "\n" for record in records))
    return path
