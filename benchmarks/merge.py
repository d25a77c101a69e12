"""A whole merge on the CPU: monosoup, linear, and the loop of the reference.

linear is the floor of reading and writing.

    python benchmarks/merge.py [--threads 1] [--layers 2] [--folder DIR]

A pair of random checkpoints in the shapes of Qwen3-0.6B (hidden 1024, vocabulary 151936, tied),
with `--layers` of its 28 layers, in bf16; updates of 1 % of the weights, half of the tensors
random-like, half of rank 16 plus rounding noise. Each program is a process of its own; time and
peak memory are the operating system's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = """merge_method: {method}
{base}models:
  - model: {tuned}
    parameters: {{weight: 1.0}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="keep the checkpoints here (default: a temporary folder)"
    )
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--reference", nargs=3, metavar=("BASE", "TUNED", "OUT"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.make:
        make_pair(options.make, options.layers)
        return
    if options.reference:
        reference_loop(*map(Path, options.reference))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        # In a process of its own: a child's peak memory starts from its parent's.
        subprocess.run(
            [sys.executable, __file__, "--make", str(folder), "--layers", str(options.layers)],
            check=True,
        )
        base, tuned = folder / "base", folder / "tuned"
        (folder / "monosoup.yml").write_text(
            CONFIG.format(method="monosoup", base=f"base_model: {base}\n", tuned=tuned)
        )
        (folder / "linear.yml").write_text(CONFIG.format(method="linear", base="", tuned=tuned))
        yaml = str(Path(sys.executable).with_name("mergekit-yaml"))
        commands = {
            "linear": [yaml, folder / "linear.yml", folder / "linear", "--quiet"],
            "monosoup": [yaml, folder / "monosoup.yml", folder / "monosoup", "--quiet"],
            "reference": [
                sys.executable,
                __file__,
                "--reference",
                base,
                tuned,
                folder / "reference",
            ],
        }
        rows = {name: timed(command, options.threads) for name, command in commands.items()}
    print(
        f"{'program':>10} {'wall s':>8} {'cpu s':>8} {'peak GB':>8}   ({options.layers} layers, "
        f"{options.threads} threads)"
    )
    for name, row in rows.items():
        print(f"{name:>10} {row['wall']:>8.1f} {row['cpu']:>8.1f} {row['peak_gb']:>8.2f}")
    floor = rows["linear"]["wall"]
    edit = rows["monosoup"]["wall"] - floor
    print(
        f"the edit adds {edit:.1f} s to {floor:.1f} s of reading and writing; reference / "
        "monosoup, whole processes: "
        f"{rows['reference']['wall'] / rows['monosoup']['wall']:.1f}, less the floor: "
        f"{(rows['reference']['wall'] - floor) / edit:.1f}"
    )
    print(json.dumps({"layers": options.layers, "threads": options.threads, "rows": rows}))


def timed(command: list, threads: int) -> dict[str, float]:
    limits = {
        name: str(threads)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    }
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), env=os.environ | limits, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    wall = time.perf_counter() - started
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * rss_unit() / 1e9,
    }


def rss_unit() -> int:
    return 1 if sys.platform == "darwin" else 1024


def make_pair(folder: Path, layers: int) -> None:
    """Both checkpoints with config and tokenizer-free folders, as transformers saves them."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            update = torch.randn(weight.shape)
            if weight.ndim == 2 and number % 2:
                update = torch.randn(weight.shape[0], 16) @ torch.randn(16, weight.shape[1])
            weight.copy_(weight.float() + update * (0.01 * weight.float().norm() / update.norm()))
    model.save_pretrained(folder / "tuned")


def reference_loop(base: Path, tuned: Path, out: Path) -> None:
    """Both state dicts in memory, one SVD per matrix, as the reference's script does it."""
    sys.path[:0] = [str(HERE)]
    import reference
    from safetensors.torch import load_file, save_file

    W0 = {
        name: w
        for file in sorted(base.glob("*.safetensors"))
        for name, w in load_file(file).items()
    }
    W1 = {
        name: w
        for file in sorted(tuned.glob("*.safetensors"))
        for name, w in load_file(file).items()
    }
    merged = {name: reference.edit(W0[name], w)[0] if w.ndim >= 2 else w for name, w in W1.items()}
    out.mkdir()
    save_file({name: w.contiguous() for name, w in merged.items()}, out / "model.safetensors")


if __name__ == "__main__":
    main()
