"""Per matrix on the CPU: the kernel against a float32 SVD with reconstruction, side by side.

    python benchmarks/kernel.py [--threads 1 2] [--shapes 1024x3072 ...] [--repeat 3]

Claim: at least 5x faster as a geometric mean, and closer to a float64 SVD. Every shape is measured
on two kinds of bf16 pairs: `random` (a full fine-tune looks like it) and `lora` (rank 16, plus the
rounding noise of bf16). The two programs take turns; the best of `--repeat` counts for each.
Threads are set before anything is imported, in a process of their own. The last line is JSON.
Errors are relative to a float64 SVD and are left out above `--oracle` elements (minutes each).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = [
    "1024x3072",
    "2048x1024",
    "1024x1024",
    "2048x2048",
    "1536x4096",
    "4096x4096",
    "151936x1024",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs of each program, of which the fastest counts"
    )
    parser.add_argument(
        "--oracle",
        type=int,
        default=4_500_000,
        help="largest matrix, in elements, to compare with float64",
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        for shape in options.shapes:
            for kind in ("random", "lora"):
                print(json.dumps(measure(shape, kind, options)), flush=True)
        return
    rows = []
    for threads in options.threads:
        rows += run(threads, options)
    summary = {
        "geometric_mean": {
            t: mean([r for r in rows if r["threads"] == t]) for t in options.threads
        },
        "rows": rows,
    }
    print(f"geometric mean of the speed-ups: {summary['geometric_mean']}")
    print(json.dumps(summary))


def run(threads: int, options: argparse.Namespace) -> list[dict]:
    limits = {
        name: str(threads)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    }
    arguments = [
        "--worker",
        threads,
        "--shapes",
        *options.shapes,
        "--repeat",
        options.repeat,
        "--oracle",
        options.oracle,
    ]
    command = [sys.executable, __file__, *map(str, arguments)]
    print(
        f"{'threads':>7} {'shape':>12} {'kind':>7} {'k':>5} {'SVD s':>8} {'ours s':>8} "
        f"{'ratio':>6}  error of SVD / ours",
        flush=True,
    )
    rows = []
    with subprocess.Popen(
        command, env=os.environ | limits, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            row = json.loads(line)
            rows.append(row)
            errors = (
                "not measured"
                if row["error"] is None
                else f"{row['reference_error']:.0e} / {row['error']:.0e}"
            )
            print(
                f"{row['threads']:>7} {row['shape']:>12} {row['kind']:>7} {row['k']:>5} "
                f"{row['reference_seconds']:>8.2f} "
                f"{row['seconds']:>8.2f} {row['ratio']:>6.1f}  {errors}",
                flush=True,
            )
    if worker.returncode:
        raise SystemExit(worker.returncode)
    return rows


def mean(rows: list[dict]) -> float:
    return round(math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows)), 2)


def measure(shape: str, kind: str, options: argparse.Namespace) -> dict:
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
    import reference
    import torch

    from mergekit_monosoup import edit

    torch.set_num_threads(options.worker)
    W0, W1 = pair(*map(int, shape.split("x")), kind)
    best = {"ours": math.inf, "reference": math.inf}
    repeat = options.repeat if W0.numel() < 5e7 else 1  # the SVD of an embedding takes minutes
    for _ in range(repeat):
        started = time.perf_counter()
        _, record = edit(W0, W1)
        best["ours"] = min(best["ours"], time.perf_counter() - started)
        started = time.perf_counter()
        _, k = reference.edit(W0, W1)
        best["reference"] = min(best["reference"], time.perf_counter() - started)
    row = {
        "threads": options.worker,
        "shape": shape,
        "kind": kind,
        "k": record.k,
        "reference_k": k,
        "seconds": round(best["ours"], 3),
        "reference_seconds": round(best["reference"], 3),
        "ratio": round(best["reference"] / best["ours"], 2),
        "error": None,
        "reference_error": None,
    }
    if W0.numel() <= options.oracle:
        row |= errors(W0, W1)
    return row


def errors(W0, W1) -> dict:
    """Return relative errors of the edited update against float64, on float32 inputs with W0 = 0.

    So no output rounding hides them.
    """
    import numpy as np
    import reference
    import torch
    from helpers import oracle

    from mergekit_monosoup import edit

    delta = W1.float() - W0.float()
    zero = torch.zeros_like(delta)
    mono, _, numbers = oracle.monosoup(zero, delta)
    edited, record = edit(zero, delta)
    assert record.k == numbers["k"], "not the oracle's cut"
    size = np.linalg.norm(mono)
    return {
        "error": float(np.linalg.norm(edited.numpy() - mono) / size),
        "reference_error": float(
            np.linalg.norm(reference.edit(zero, delta)[0].numpy() - mono) / size
        ),
    }


def pair(out: int, rest: int, kind: str):
    """bf16 (W0, W1), the update 1 % of W0."""
    import torch

    torch.manual_seed(0)
    W0 = (0.02 * torch.randn(out, rest)).bfloat16()
    update = (
        torch.randn(out, rest) if kind == "random" else torch.randn(out, 16) @ torch.randn(16, rest)
    )
    return W0, (W0.float() + update * (0.01 * W0.float().norm() / update.norm())).bfloat16()


if __name__ == "__main__":
    main()
