"""A stack of experts on the CPU: one expert per thread against all threads on one expert.

    python benchmarks/stack.py [--threads 2] [--experts 16] [--shape 2048x768] [--repeat 3]

Claim: nearly `--threads` times as fast as one thread, where all threads on one matrix gain little.
The three ways take turns; the best of `--repeat` counts for each. BLAS is told the number of
threads before anything is imported. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--shape", default="2048x768")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure(options)
        return
    limits = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads)
    )
    subprocess.run(
        [sys.executable, __file__, "--worker", *sys.argv[1:]], env=os.environ | limits, check=True
    )


def measure(options: argparse.Namespace) -> None:
    import torch

    from mergekit_monosoup import edit
    from mergekit_monosoup.kernel.batch import Job, edit_each
    from mergekit_monosoup.kernel.lapack import one_thread_each

    torch.manual_seed(0)
    W0 = 0.02 * torch.randn(options.experts, *map(int, options.shape.split("x")))
    W1 = (W0 + 2e-4 * torch.randn(W0.shape)).bfloat16()
    jobs = [Job(a, [b], "") for a, b in zip(W0.bfloat16(), W1, strict=True)]

    def loop():
        return [edit(job.pretrained, job.tuned)[0] for job in jobs]

    def one_thread():
        torch.set_num_threads(1)
        with one_thread_each():
            return loop()

    ways = {
        "one thread": one_thread,
        "all threads, one expert": loop,
        "one expert per thread": lambda: [w for w, _ in edit_each(jobs)],
    }
    best, results = dict.fromkeys(ways, math.inf), {}
    for _ in range(options.repeat):
        for name, way in ways.items():
            torch.set_num_threads(options.threads)
            started = time.perf_counter()
            results[name] = way()
            best[name] = min(best[name], time.perf_counter() - started)
    same = all(map(torch.equal, results["one thread"], results["one expert per thread"]))
    print(
        f"{options.experts} experts of {options.shape}, {options.threads} threads; same bits as "
        f"one thread: {same}"
    )
    for name, seconds in best.items():
        print(f"{name:>24} {seconds:>8.2f} s {best['one thread'] / seconds:>6.2f}x")
    print(
        json.dumps(
            {
                "threads": options.threads,
                "experts": options.experts,
                "shape": options.shape,
                "seconds": best,
                "same_bits": same,
            }
        )
    )


if __name__ == "__main__":
    main()
