"""LoRA adapters: the command on an adapter of Qwen3-8B's shapes, and single matrices side by side.

    python benchmarks/adapter.py [--ranks 16 64] [--threads 2] [--shapes 1024x4096 4096x4096]

Claims: an adapter of rank 16 of all linear layers of Qwen3-8B takes at most 5 s and 1 GB on two
cores, as a process that starts anew (its start is shown beside it); and a matrix is done 100 times
faster than by peft's `add_weighted_adapter(combination_type="svd")`, or than by editing the merged
weight.
Times are those of the wall and of the processor, ratios those of the processor. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LAYERS, HIDDEN, KEYS, MLP = 36, 4096, 1024, 12288
LINEAR = {  # (out, in) of Qwen3-8B
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
START = "import mergekit_monosoup.adapters.command"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--shapes", nargs="*", default=["1024x4096", "4096x4096"])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write, options.ranks[0], options.layers)
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    rows = [command(rank, options) for rank in options.ranks]
    matrices = [matrix(*map(int, shape.split("x")), options) for shape in options.shapes]
    print(json.dumps({"threads": options.threads, "adapters": rows, "matrices": matrices}))


# -- the command -----------------------------------------------------------------------------------


def command(rank: int, options: argparse.Namespace) -> dict:
    """Time the command on an adapter, and its start alone; the fastest of some runs."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder, "adapter")
        # In a process of its own: a child's peak begins with its parent's.
        words = [__file__, "--write", adapter, "--ranks", rank, "--layers", options.layers]
        subprocess.run([sys.executable, *map(str, words)], check=True)
        size = (adapter / "adapter_model.safetensors").stat().st_size
        edit = ["-m", "mergekit_monosoup.cli", "adapter", adapter, "--force", "--out"]
        runs = []
        for _ in range(options.repeat):
            start = process(["-c", START])
            runs.append((process([*edit, Path(folder, "out")]), start))
    done, start = min(runs, key=lambda run: run[0]["seconds"])
    row = {"rank": rank, "file_mb": round(size / 1e6), **done, "start": start}
    print(
        f"adapter of Qwen3-8B, rank {rank} ({row['file_mb']} MB): {done['seconds']} s of the wall, "
        f"{done['processor']} s of the processor, {done['peak_mb']} MB; "
        f"of these the start {start['seconds']} s, {start['processor']} s, {start['peak_mb']} MB",
        flush=True,
    )
    return row


def write(folder: Path, rank: int, layers: int) -> None:
    """Write an adapter as peft does, float32, with a spectrum that falls by a power law."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    falls = torch.arange(1, rank + 1) ** -0.7
    state = {}
    for layer in range(layers):
        for name, (out, rest) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}.lora_"
            state[f"{prefix}A.weight"] = torch.randn(rank, rest) / rest**0.5
            state[f"{prefix}B.weight"] = torch.randn(out, rank) * falls / out**0.5
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def process(arguments: list) -> dict:
    """Run a new Python, and return what it took."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(child.returncode)
    processor = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss / (1 if sys.platform != "darwin" else 1024) / 1024
    return {"seconds": round(seconds, 2), "processor": round(processor, 2), "peak_mb": round(peak)}


# -- single matrices -------------------------------------------------------------------------------


def matrix(out: int, rest: int, options: argparse.Namespace) -> dict:
    """Time one matrix of two adapters of rank 16, by three programs."""
    import torch

    from mergekit_monosoup import edit
    from mergekit_monosoup.kernel import low_rank
    from mergekit_monosoup.kernel.monosoup import Settings
    from mergekit_monosoup.kernel.threads import restored_threads

    torch.set_num_threads(options.threads)
    peer, tasks = peft_model(out, rest)
    average = Settings(mode="variance", R=1.0)  # no edit, as peft
    with restored_threads():
        torch.set_num_threads(1)  # as in the command, where each core has a matrix of its own
        ours = timed(lambda: low_rank.edit(tasks, average, rank=16), options.repeat)
        one = timed(lambda: low_rank.edit(tasks[:1]), options.repeat)
    theirs = timed(peer, 1)
    W0 = 0.02 * torch.randn(out, rest)
    W1 = W0 + tasks[0].dense().float()
    whole = timed(lambda: edit(W0, W1), options.repeat)
    expected = peer()
    got = low_rank.edit(tasks, average, rank=16).factors.dense()
    row = {
        "shape": f"{out}x{rest}",
        "combine": ours,
        "peft_svd": theirs,
        "edit": one,
        "edit_of_merged_weight": whole,
        "ratio_to_peft": ratio(theirs, ours),
        "ratio_to_merged": ratio(whole, one),
        "differs_from_peft": float((got - expected).norm() / got.norm()),
    }
    print(
        f"{row['shape']}, ms of the processor: two adapters combined at rank 16 "
        f"{ours['processor'] * 1e3:.1f}, peft {theirs['processor'] * 1e3:.0f} "
        f"({row['ratio_to_peft']}x); one edited {one['processor'] * 1e3:.1f}, merged and edited "
        f"{whole['processor'] * 1e3:.0f} ({row['ratio_to_merged']}x)",
        flush=True,
    )
    return row


def peft_model(out: int, rest: int):
    """Return peft's combination of two adapters as a call, and the adapters' factors."""
    import peft
    import torch

    from mergekit_monosoup.kernel.low_rank import Factors

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(rest, out, bias=False))
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"])
    adapted = peft.get_peft_model(model, config, adapter_name="a")
    adapted.add_adapter("b", config)
    layer = adapted.base_model.model[0]
    falls = torch.arange(1, 17) ** -0.7
    for name in "ab":
        layer.lora_A[name].weight.data = torch.randn(16, rest) / rest**0.5
        layer.lora_B[name].weight.data = torch.randn(out, 16) * falls / out**0.5

    def combine() -> torch.Tensor:
        if "both" in adapted.peft_config:
            adapted.delete_adapter("both")
        adapted.add_weighted_adapter(
            ["a", "b"], [0.5, 0.5], "both", "svd", svd_rank=16, svd_full_matrices=False
        )
        return layer.get_delta_weight("both").detach().double()

    factors = [
        Factors(layer.lora_B[n].weight.detach(), layer.lora_A[n].weight.detach(), layer.scaling[n])
        for n in "ab"
    ]
    return combine, factors


def timed(call: Callable[[], object], repeat: int) -> dict:
    """Return the least times of some runs, after one more where there are several."""
    best = {"seconds": float("inf"), "processor": float("inf")}
    for _ in range(repeat + (repeat > 1)):
        wall, processor = time.perf_counter(), time.process_time()
        call()
        best["seconds"] = min(best["seconds"], time.perf_counter() - wall)
        best["processor"] = min(best["processor"], time.process_time() - processor)
    return best


def ratio(slow: dict, fast: dict) -> float:
    """Return the ratio of the processor's times, which other programs disturb less."""
    return round(slow["processor"] / fast["processor"], 1)


if __name__ == "__main__":
    main()
