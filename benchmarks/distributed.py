"""Two workers with a thread each against mergekit-yaml with one thread and with two, on a model of many medium matrices.

    python benchmarks/distributed.py [--layers 28] [--hidden 1024] [--workers 2] [--folder DIR]

A pair of random checkpoints shaped as Qwen3-0.6B (three matrices of 1024 x 3072 and four of attention per layer) with a small
vocabulary, bf16, updates of 2 % of the weights; method monosoup. Every program is a process of its own, measured from outside:
wall time, processor time, and the peak memory of each of its processes. The tensors are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BIN = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here (default: a temporary folder)")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_pair(options.make, options.layers, options.hidden)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "tuned" / "config.json").exists():
            shape = ["--layers", str(options.layers), "--hidden", str(options.hidden)]
            subprocess.run([sys.executable, __file__, "--make", str(folder), *shape], check=True)
        config = folder / "merge.yml"
        config.write_text(f"merge_method: monosoup\nbase_model: {folder}/base\nmodels:\n  - model: {folder}/tuned\n")
        ours = [BIN / "mergekit-monosoup", "run", config]
        runs = {
            "mergekit-yaml, 1 thread": (1, [BIN / "mergekit-yaml", config, folder / "one", "--quiet"]),
            f"mergekit-yaml, {options.workers} threads": (
                options.workers,
                [BIN / "mergekit-yaml", config, folder / "threads", "--quiet"],
            ),
            f"run, {options.workers} workers": (
                1,
                [*ours, folder / "workers", "--workers", options.workers, "--force"],
            ),
            "run --resume, in process": (1, [*ours, folder / "here", "--seed-per-tensor", "--force"]),
        }
        rows = {name: measured(command, threads) for name, (threads, command) in runs.items()}
        same = {name: equal(folder / "one", folder / name) for name in ("threads", "workers", "here")}
    print(f"{'program':>28} {'wall s':>8} {'cpu s':>8}   peak GB of each process")
    for name, row in rows.items():
        peaks = ", ".join(f"{label} {peak:.2f}" for label, peak in row["peaks_gb"])
        print(f"{name:>28} {row['wall']:>8.1f} {row['cpu']:>8.1f}   {peaks}")
    first, *_ = rows.values()
    for name, row in rows.items():
        print(f"{name:>28} {first['wall'] / row['wall']:>7.2f}x")
    print(f"tensors that differ from those of one thread: {same}")
    print(json.dumps({"layers": options.layers, "hidden": options.hidden, "rows": rows, "different": same}))


def measured(command: list, threads: int) -> dict:
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), env=os.environ | limits, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peaks: dict[int, tuple[str, float]] = {}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    said = process.communicate()[1]
    wall = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{said}")
    cpu = os.times()
    large = sorted((peak for peak in peaks.values() if peak[1] > 0.2), key=lambda peak: -peak[1])
    total = cpu.children_user + cpu.children_system
    measured.before, spent = total, total - getattr(measured, "before", 0.0)
    return {"wall": wall, "cpu": spent, "peaks_gb": large}


def watch(process: subprocess.Popen, peaks: dict[int, tuple[str, float]]) -> None:
    """Notes the peak memory of the process and of all its descendants, twice a second."""
    while process.poll() is None:
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    continue
        for pid in parents:
            above = pid
            while above not in (0, process.pid):
                above = parents.get(above, 0)
            if above == process.pid:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
                if "VmHWM:" in status:
                    label = "driver" if pid == process.pid else "worker" if title.startswith("ray::") else "Ray"
                    old = peaks.get(pid, ("", 0.0))
                    label = "worker" if old[0] == "worker" else label  # an idle worker has another title
                    peaks[pid] = (label, int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)
        time.sleep(0.5)


def equal(one: Path, other: Path) -> int:
    """How many tensors differ in a bit."""
    import torch
    from safetensors.torch import load_file

    states = [
        {n: t for file in sorted(f.glob("*.safetensors")) for n, t in load_file(file).items()} for f in (one, other)
    ]
    assert states[0].keys() == states[1].keys()
    return sum(not torch.equal(t.view(torch.uint8), states[1][name].view(torch.uint8)) for name, t in states[0].items())


def make_pair(folder: Path, layers: int, hidden: int) -> None:
    """Both checkpoints, as transformers saves them."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="200MB")
    with torch.no_grad():
        for weight in model.parameters():
            update = torch.randn(weight.shape)
            weight.copy_(weight.float() + update * (0.02 * weight.float().norm() / update.norm()))
    model.save_pretrained(folder / "tuned", max_shard_size="200MB")


if __name__ == "__main__":
    main()
