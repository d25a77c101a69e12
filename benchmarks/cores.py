"""One merge on all cores of this machine, by every program that can do it.

    python benchmarks/cores.py [--layers 28] [--hidden 1024] [--vocabulary 151936] [--workers 2]
                               [--repeat 1] [--folder DIR]

A pair of random checkpoints shaped as Qwen3-0.6B (three matrices of 1024 x 3072 and four of
attention per layer, an embedding), bf16, updates of 2 % of the weights; method monosoup, and
`linear` as the floor of reading and writing. Programs take turns, and the least of `--repeat`
rounds counts. Each is measured from outside: wall time, processor time of all its processes, the
peak memory of each, and for `run` how long the busiest worker merged (the rest is starting). The
tensors are compared bit for bit. The last line is JSON. Linux only; Ray is left out where it is not
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
SHOWN = 0.2  # GB; Ray's helpers are many and small
TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="keep the checkpoints here (default: a temporary folder)"
    )
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_pair(options.make, options.layers, options.hidden, options.vocabulary)
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows, different = compare(options, options.folder or Path(temporary))
    print(
        f"{'program':>24} {'wall s':>8} {'ratio':>6} {'merging s':>10} {'cpu s':>8}   peak GB of "
        "each process"
    )
    for name, row in rows.items():
        peaks = ", ".join(f"{label} {peak:.2f}" for label, peak in row["peaks_gb"])
        ratio = next(iter(rows.values()))["wall"] / row["wall"]
        print(
            f"{name:>24} {row['wall']:>8.1f} {ratio:>6.2f} {row['merging'] or '':>10} "
            f"{row['cpu']:>8.1f}   {peaks}"
        )
    print(f"tensors that differ from those of one thread: {different}")
    shape = {n: getattr(options, n) for n in ("layers", "hidden", "vocabulary", "workers")}
    print(json.dumps({**shape, "rows": rows, "different": different}))


def compare(options: argparse.Namespace, folder: Path) -> tuple[dict[str, dict], dict[str, int]]:
    if not (folder / "tuned" / "config.json").exists():
        values = {name: getattr(options, name) for name in ("layers", "hidden", "vocabulary")}
        shape = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, __file__, "--make", str(folder), *shape], check=True)
    models = f"models:\n  - model: {folder}/tuned\n"
    config, linear = folder / "merge.yml", folder / "linear.yml"
    config.write_text(f"merge_method: monosoup\nbase_model: {folder}/base\n{models}")
    linear.write_text(f"merge_method: linear\n{models}    parameters: {{weight: 1.0}}\n")
    yaml, run = BIN / "mergekit-yaml", [BIN / "mergekit-monosoup", "run"]
    count = options.workers
    commands: dict[str, tuple[int, list]] = {
        "mergekit-yaml, 1 thread": (1, [yaml, config]),
        f"mergekit-yaml, {count} threads": (count, [yaml, config]),
        f"run, {count} threads": (count, [*run, "--workers", count, "-v", config]),
        "linear, 1 thread": (1, [yaml, linear]),
    }
    if importlib.util.find_spec("ray"):
        commands[f"run, {count} processes"] = (
            1,
            [*run, "--ray", "local", "--workers", count, "-v", config],
        )
    rows: dict[str, dict] = {}
    for _ in range(options.repeat):
        for name, (threads, command) in commands.items():
            shutil.rmtree(out_of(folder, name), ignore_errors=True)
            row = measured([*command, out_of(folder, name)], threads)
            if name not in rows or row["wall"] < rows[name]["wall"]:
                rows[name] = row
    first = out_of(folder, next(iter(commands)))
    return rows, {n: differing(first, out_of(folder, n)) for n in rows if "linear" not in n}


def out_of(folder: Path, name: str) -> Path:
    """The folder that a program writes."""
    return folder / re.sub(r"\W+", "-", name)


@dataclass
class Seen:
    """What a process has been seen to use: peak memory (GB), processor time (s)."""

    label: str
    peak: float
    cpu: float


def measured(command: list, threads: int) -> dict:
    limits = {
        name: str(threads)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    }
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), env=os.environ | limits, **pipes)
    seen: dict[int, Seen] = {}
    watcher = threading.Thread(target=watch, args=(process, seen))
    watcher.start()
    output = process.communicate()[1]
    wall = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{output}")
    merging = [
        float(seconds)
        for seconds in re.findall(r"@[\d-]+: \d+ batches, \d+ tensors, ([\d.]+) s", output)
    ]
    large = sorted((s for s in seen.values() if s.peak > SHOWN), key=lambda s: -s.peak)
    return {
        "wall": wall,
        "merging": max(merging, default=None),
        "cpu": sum(s.cpu for s in seen.values()),
        "peaks_gb": [(s.label, s.peak) for s in large],
    }


def watch(process: subprocess.Popen, seen: dict[int, Seen]) -> None:
    """Looks at the process and all its descendants, twice a second."""
    while process.poll() is None:
        stats = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stats[int(entry.name)] = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
        for pid, stat in stats.items():
            above = pid
            while above in stats and above != process.pid:
                above = int(stats[above][1])
            if above == process.pid:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    title = Path(f"/proc/{pid}/cmdline").read_text()
                except OSError:
                    continue
                if "VmHWM:" in status:
                    label = (
                        "driver"
                        if pid == process.pid
                        else "worker"
                        if title.startswith("ray::")
                        else "Ray"
                    )
                    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
                    seen[pid] = Seen(label, peak, (int(stat[11]) + int(stat[12])) / TICK)
        time.sleep(0.5)


def differing(first: Path, second: Path) -> int:
    """How many tensors differ in a bit."""
    import torch
    from safetensors.torch import load_file

    states = [
        {n: t for file in sorted(f.glob("*.safetensors")) for n, t in load_file(file).items()}
        for f in (first, second)
    ]
    assert states[0].keys() == states[1].keys()
    return sum(
        not torch.equal(t.view(torch.uint8), states[1][name].view(torch.uint8))
        for name, t in states[0].items()
    )


def make_pair(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """Both checkpoints, as transformers saves them."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
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
