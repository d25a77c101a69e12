"""Per layer on a GPU: the method against the loop of the reference on the same card.

    python benchmarks/gpu.py [--models Qwen3-0.6B ...] [--experts 16] [--repeat 3]
        [--skip-reference-above 3e7]

Seconds per layer are extrapolated to whole models.
For every distinct shape of a model: seconds of both programs (the faster of `--repeat` runs after
one to warm up), peak memory beside the inputs, and the share of the time that its matrix products
alone would take (XᵀX in float64, XQQᵀ in float32 for half of the vectors). Stacks of experts are
measured on `--experts` of them, in one call, and scaled up. The reference is `reference.py` with
torch's default SVD; above the limit it is left out, and then there is no ratio for that model.
Matrices are random bf16 pairs, as after a full fine-tune. `--device cpu --tiny` runs all of it at
1/64 of every size, as a test of the script. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference  # noqa: E402

from mergekit_monosoup import terminal  # noqa: E402
from mergekit_monosoup.kernel.batch import Job, edit_each  # noqa: E402


@dataclass(frozen=True)
class Model:
    """Return (out, rest) of each matrix in a layer and how many there are.

    Stacks hold ``experts`` matrices each.
    """

    layers: int
    dense: dict[tuple[int, int], int]
    outside: dict[tuple[int, int], int]
    experts: int = 0
    stacked: tuple[tuple[int, int], ...] = ()


def qwen3(layers: int, hidden: int, heads: int, inner: int, tied: bool = False) -> Model:
    """Heads of 128, eight for keys and values, a vocabulary of 151936."""
    dense: dict[tuple[int, int], int] = {}
    shapes = [(128 * heads, hidden), (1024, hidden), (1024, hidden), (hidden, 128 * heads)]
    for shape in [*shapes, (inner, hidden), (inner, hidden), (hidden, inner)]:
        dense[shape] = dense.get(shape, 0) + 1
    return Model(layers, dense, {(151936, hidden): 1 if tied else 2})


MODELS = {
    "Qwen3-0.6B": qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen3-8B": qwen3(36, 4096, 32, 12288),
    "Qwen3-14B": qwen3(40, 5120, 40, 17408),
    "Qwen3-32B": qwen3(64, 5120, 64, 25600),
    # Attention and embeddings of Qwen3-30B-A3B; 128 experts with gate, up (768 x 2048) and down
    # (2048 x 768).
    "Qwen3-30B-A3B": Model(
        48,
        {(4096, 2048): 1, (512, 2048): 2, (2048, 4096): 1},
        {(151936, 2048): 2},
        experts=128,
        stacked=((768, 2048), (768, 2048), (2048, 768)),
    ),
}


@terminal.output()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--experts", type=int, default=16, help="measured experts of a stack")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--skip-reference-above", type=float, default=3e7, metavar="ELEMENTS")
    options = parser.parse_args()
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{card}, torch {torch.__version__}, cuda {torch.version.cuda}")
    print(
        f"{'shape':>14} {'matrices':>8} {'ours s':>9} {'reference s':>11} {'ratio':>6} "
        f"{'peak GB':>8} {'products':>8}"
    )
    rows: dict[tuple, dict] = {}
    models = {}
    for name in options.models:
        models[name] = whole(MODELS[name], options, device, rows)
        print(f"{name}: {words(models[name])}", flush=True)
    print(
        json.dumps(
            {"card": card, "tiny": options.tiny, "rows": list(rows.values()), "models": models}
        )
    )


def whole(
    model: Model, options: argparse.Namespace, device: torch.device, rows: dict[tuple, dict]
) -> dict:
    """Seconds of a layer and of the model, by both programs."""

    def row(shape: tuple[int, int], count: int) -> dict:
        if (shape, count) not in rows:
            rows[shape, count] = measure(shape, count, options, device)
        return rows[shape, count]

    layer = [(row(shape, 1), n) for shape, n in model.dense.items()]
    measured = min(options.experts, model.experts)
    layer += [(row(shape, measured), model.experts / measured) for shape in model.stacked]
    outside = [(row(shape, 1), n) for shape, n in model.outside.items()]

    def total(key: str) -> dict[str, float] | None:
        if any(r[key] is None for r, _ in [*layer, *outside]):
            return None
        per_layer = sum(r[key] * n for r, n in layer)
        return {
            "layer": per_layer,
            "model": per_layer * model.layers + sum(r[key] * n for r, n in outside),
        }

    return {
        "ours": total("seconds"),
        "reference": total("reference_seconds"),
        "peak_gb": max(r["peak_gb"] for r, _ in [*layer, *outside]),
    }


def words(model: dict) -> str:
    ours, reference = model["ours"], model["reference"]
    text = f"{ours['layer']:.2f} s a layer, {ours['model']:.0f} s in all (extrapolated)"
    if reference:
        text += f"; reference {reference['layer']:.2f} s and {reference['model']:.0f} s"
    return text + f"; at most {model['peak_gb']:.2f} GB beside the inputs"


def measure(
    shape: tuple[int, int], count: int, options: argparse.Namespace, device: torch.device
) -> dict:
    """``count`` matrices of a shape: one call of ours, a loop of the reference's."""
    if options.tiny:
        shape = max(2, shape[0] // 64), max(2, shape[1] // 64)
    W0 = 0.02 * torch.randn(count, *shape, device=device)
    W1 = (W0 + 2e-4 * torch.randn(count, *shape, device=device)).bfloat16()
    W0 = W0.bfloat16()
    jobs = [Job(W0[i], [W1[i]], f"[{i}]") for i in range(count)]
    seconds, peak = timed(lambda: list(edit_each(jobs)), options.repeat, device)
    slow = None
    if math.prod(shape) <= options.skip_reference_above:
        slow, _ = timed(
            lambda: [reference.edit(a, b) for a, b in zip(W0, W1, strict=True)],
            options.repeat,
            device,
        )
    bound = count * timed(products(shape, device), options.repeat, device)[0]
    row = {
        "shape": list(shape),
        "matrices": count,
        "seconds": seconds,
        "reference_seconds": slow,
        "peak_gb": peak,
        "ratio": slow / seconds if slow else None,
        "products": bound / seconds,
    }
    left_out = "-"
    print(
        f"{'x'.join(map(str, shape)):>14} {count:>8} {seconds:>9.4f} "
        f"{f'{slow:.4f}' if slow else left_out:>11} "
        f"{f'{slow / seconds:.1f}' if slow else left_out:>6} {peak:>8.2f} {bound / seconds:>8.0%}",
        flush=True,
    )
    return row


def products(shape: tuple[int, int], device: torch.device) -> Callable[[], object]:
    """The matrix products of one edit and nothing else."""
    s, rows = min(shape), max(shape)
    step = min(rows, 2**14)  # an embedding at full size in float64 would be several GB
    x = torch.randn(step, s, device=device)
    wide, q = x.double(), torch.randn(s, s // 2, device=device)

    def run() -> None:
        for _ in range(math.ceil(rows / step)):
            wide.T @ wide
            torch.addmm(x, x @ q, q.T)

    return run


def timed(work: Callable[[], object], repeat: int, device: torch.device) -> tuple[float, float]:
    """(seconds of the fastest run, GB allocated beside what was there before)."""
    best, peak = math.inf, 0.0
    for attempt in range(repeat + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9
        if attempt:  # the first one loads libraries
            best = min(best, time.perf_counter() - started)
        del result
    return best, peak


if __name__ == "__main__":
    main()
