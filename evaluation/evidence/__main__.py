"""Run the tiny world with several seeds and say which claims of the paper hold in it: `python -m evaluation.evidence`.

Offline, resumable: what is finished in --out is not done again. Half an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evaluation import fingerprint, sources
from evaluation.evidence import collect, models
from evaluation.run import problems, run
from evaluation.suite import load
from evaluation.sweep import Config, same_norm_weight, wise_ft, write_config

DOCS = Path("docs")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.evidence", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(8)), help="default: 0 1 2 3 4 5 6 7"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="seeds at a time, one thread each (default: 2)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("evidence-out"),
        help="checkpoints and results (default: %(default)s)",
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="run nothing: tables and figures of what is in DOCS/evidence",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        help="folder of evidence.md and evidence/ (default: docs; with --limit OUT, where it harms nothing)",
    )
    parser.add_argument(
        "--limit", type=int, help="only the first N items of each task, for a quick look"
    )
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # one seed, in this process
    options = parser.parse_args(arguments)
    options.docs = options.docs or (options.out if options.limit else DOCS)
    if options.only is not None:
        folder, results = options.out / f"seed-{options.only}", options.docs / "evidence"
        return problems(lambda: run_seed(options.only, folder, results, options.limit))
    failed = {} if options.tables else _run_all(options)
    for seed, log in failed.items():
        print(f"error: seed {seed} failed; the end of {log}:\n{_tail(log)}", file=sys.stderr)
    if failed:
        print("Run the same command again: what is finished is not done again.", file=sys.stderr)
        return 1
    from evaluation.evidence.report import (
        write,
    )  # matplotlib, which the seeds' processes do without

    return problems(lambda: write(options.docs))


def _run_all(options: argparse.Namespace) -> dict[int, Path]:
    """Every seed in a process of its own; the logs of those that failed."""
    from tqdm import tqdm

    options.out.mkdir(parents=True, exist_ok=True)
    failed: dict[int, Path] = {}
    lock = threading.Lock()
    with tqdm(total=len(options.seeds) * model_count(), unit="model", smoothing=0.05) as bar:

        def one(seed: int) -> None:
            log = options.out / f"seed-{seed}.log"
            command = [
                sys.executable,
                "-m",
                "evaluation.evidence",
                "--only",
                str(seed),
                "--out",
                str(options.out),
            ]
            command += ["--docs", str(options.docs)] + ["--limit", str(options.limit)] * (
                options.limit is not None
            )
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            with (
                log.open("w") as file,
                subprocess.Popen(
                    command,
                    env=os.environ | threads,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                ) as process,
            ):
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    if any(
                        f".{suite}.json" in line for suite in (models.SUITE, models.TWO_TASKS)
                    ):  # a model is done
                        with lock:
                            bar.update()
                            bar.set_postfix_str(f"seed {seed}: {line.split(':')[0]}")
            if process.returncode != 0:
                failed[seed] = log

        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(one, options.seeds))
    return failed


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


def model_count() -> int:
    """Models that one seed asks questions, in both suites."""
    folder = Path()
    made = [*models.merges(folder), *models.rounded("", ""), *models.two_task_merges(folder)]
    trained = len(models.TRAINED) + len(models.TWO_TASKS_TRAINED)
    return len(made) + trained + len(models.CONTROLLED) + len(models.IN_BFLOAT16)


def run_seed(seed: int, folder: Path, results: Path, limit: int | None = None) -> None:
    """Train, merge, ask, and write `results`/seed-N.json."""
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    trained = models.make_checkpoints(seed, folder)
    given = _models(folder)
    command = f"python -m evaluation.evidence --seeds {seed}"
    for suite, chosen in ((models.SUITE, given), (models.TWO_TASKS, _two_task_models(folder))):
        run(
            load(suite).model_copy(update={"world": seed}),
            chosen,
            folder / "results",
            command=command,
            # All in float32: bfloat16 arithmetic would add its own errors to those of bfloat16 weights.
            dtype="float32",
            device="cpu",
            merge_cache=folder / "merged",
            limit=limit,
        )
    found = {
        "seed": seed,
        "limit": limit,
        "trained": trained,
        "suites": {
            s: collect.suite_results(folder / "results", s, folder)
            for s in (models.SUITE, models.TWO_TASKS)
        },
        "cka": _cka(folder, given),
        "records": {
            name: _records(folder, name) for name in (models.FINETUNED, models.SECOND, models.LORA)
        },
        "git": fingerprint.git_hash(),
        "minutes": round(
            (time.perf_counter() - started) / 60, 1
        ),  # of this call: a resumed one says less
    }
    results.mkdir(parents=True, exist_ok=True)
    # One line per part: half the size of an indented file, and a changed part still shows as one.
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(part, separators=(',', ':'))}"
        for key, part in found.items()
    )
    (results / f"seed-{seed}.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def _models(folder: Path) -> dict[str, str]:
    """Paths of all models of the suite `tiny`: folders, and configurations that are merged when they are asked."""
    folder = folder.resolve()
    given = {name: str(folder / name) for name in models.TRAINED}
    given |= _written(folder, dict(models.merges(folder)))
    for label in models.CONTROLLED:
        merged = sources.find(label, given[f"monosoup_{label}"], folder / "merged")
        weight = same_norm_weight(
            merged.folder, folder / models.FINETUNED, folder / models.PRETRAINED
        )
        given |= _written(
            folder,
            {
                f"same_norm_{label}": wise_ft(
                    given[models.PRETRAINED], given[models.FINETUNED], weight
                )
            },
        )
    pair = {name: models.in_bfloat16(given[name]) for name in models.IN_BFLOAT16}
    narrow = _written(folder, {f"bf16_{name}": config for name, config in pair.items()})
    base, tuned = (
        str(sources.find(name, path, folder / "merged").folder.resolve())
        for name, path in narrow.items()
    )
    return given | narrow | _written(folder, dict(models.rounded(base, tuned)))


def _two_task_models(folder: Path) -> dict[str, str]:
    folder = folder.resolve()
    given = {name: str(folder / name) for name in models.TWO_TASKS_TRAINED}
    return given | _written(folder, dict(models.two_task_merges(folder)))


def _written(folder: Path, found: dict[str, Config]) -> dict[str, str]:
    return {
        name: str(write_config(folder / "configs" / f"{name}.yml", config))
        for name, config in found.items()
    }


def _records(folder: Path, tuned: str) -> list[dict[str, Any]]:
    """What both modes do to each matrix of a fine-tune, and what of it would survive bfloat16."""
    from mergekit_monosoup.checkpoints.reader import Checkpoints
    from mergekit_monosoup.inspection import inspect_tensor

    checkpoints = Checkpoints([str(folder / models.PRETRAINED), str(folder / tuned)])
    fields = (
        "name",
        "mode",
        "k",
        "rank",
        "effective_rank",
        "P_k",
        "lambda_high",
        "lambda_low",
        "rel_update",
        "realised",
    )
    return [
        {key: _short(getattr(record, key)) for key in fields}
        for name in checkpoints.names
        for record in inspect_tensor(checkpoints, name, R=models.R)
    ]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _cka(folder: Path, given: dict[str, str]) -> dict[str, Any]:
    """CKA with the pretrained model, block by block, on the questions asked in and out of distribution."""
    from evaluation import cka

    tasks = folder / "results" / f"{models.SUITE}.tasks"
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    groups = load(models.SUITE).grouped()
    skills = {group: [task.task.removeprefix("tiny_") for task in asked] for group, asked in groups}
    for group, names in skills.items():
        contents = [(tasks / f"{name}.jsonl").read_text(encoding="utf-8") for name in names]
        (texts / f"{group}.jsonl").write_text("".join(contents), encoding="utf-8")
    chosen = [models.PRETRAINED, models.FINETUNED]
    for label in models.SETTINGS:
        chosen += [f"monosoup_{label}", f"scalar_{label}", f"high_{label}", f"low_{label}"]
    arguments = [f"--model={name}={given[name]}" for name in chosen]
    arguments += [f"--text={group}={texts / f'{group}.jsonl'}" for group in skills]
    out = folder / "cka"
    if cka.main(
        [
            *arguments,
            "--out",
            str(out),
            "--merge-cache",
            str(folder / "merged"),
            "--batch-size",
            "256",
            "--device",
            "cpu",
        ]
    ):
        raise sources.SourceError("evaluation.cka failed")
    values = json.loads((out / "cka.json").read_text(encoding="utf-8"))["cka"]
    return {
        group: {model: [_short(value) for value in blocks] for model, blocks in by_model.items()}
        for group, by_model in values.items()
    }


if __name__ == "__main__":
    sys.exit(main())
