"""Say which claims of the paper hold in small worlds, over seeds: `python -m evaluation.evidence`.

Offline, resumable: what is finished in --out is not done again. Under an hour on two idle cores for
sums and digits together; about three for tweets, which need the extra `evidence`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from evaluation.engines import EvaluationError
from evaluation.evidence import digits, experiment, models, tweets
from evaluation.options import exit_code, positive
from mergekit_monosoup import terminal

DOCS = Path("docs")


class World(NamedTuple):
    """What is run of one world; a seed has a folder and a JSON file of its own."""

    stem: str  # of their names
    seeds: int  # by default 0, 1, … so many
    models: int  # that a seed asks
    suites: tuple[str, ...]
    run_seed: Callable[[int, Path, Path, int | None], None]
    threaded: bool = False  # whether one seed alone may have several threads


WORLDS = {
    "sums": World(
        "seed", 8, experiment.model_count(), (models.SUITE, models.TWO_TASKS), experiment.run_seed
    ),
    "digits": World("digits", 6, digits.model_count(), (digits.SUITE,), digits.run_seed),
    "tweets": World("tweets", 5, tweets.model_count(), (tweets.SUITE,), tweets.run_seed, True),
}
MADE_UP = ("sums", "digits")  # need no package that has real weights and texts


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    options = _parser().parse_args(arguments)
    options.docs = options.docs or (options.out if options.limit is not None else DOCS)
    if options.only is not None:
        world, results = WORLDS[options.world[0]], options.docs / "evidence"
        folder = options.out / f"{world.stem}-{options.only}"
        return exit_code(lambda: world.run_seed(options.only, folder, results, options.limit))
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    failed = {} if options.tables else _run_all(options)
    if failed:
        ends = [f"{what} failed; the end of {log}:\n{_tail(log)}" for what, log in failed.items()]
        again = "Run the same command again: what is finished is not done again."
        raise EvaluationError("\n".join([*ends, again]))
    # matplotlib, which the seeds' processes do without
    from evaluation.evidence import digits_page, page, tweets_page, worlds_page

    pages = {"sums": page.PAGE, "digits": digits_page.PAGE, "tweets": tweets_page.PAGE}
    for world in options.world:
        stem = WORLDS[world].stem
        files = list((options.docs / "evidence").glob(f"{stem}-*.json"))
        if len(files) < 2:
            print(
                f"{world}: {len(files)} seed(s) so far, and intervals need two; the scores of one: "
                f"python -m evaluation.tables {options.out}/{stem}-SEED/results"
            )
            continue
        pages[world].write(options.docs)
    if (options.docs / worlds_page.PAGE).is_file():
        worlds_page.write(options.docs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.evidence", description=__doc__)
    parser.add_argument(
        "--world",
        choices=tuple(WORLDS),
        nargs="+",
        default=list(MADE_UP),
        help="default: " + " ".join(MADE_UP),
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="default: "
        + ", ".join(f"0 to {world.seeds - 1} of {name}" for name, world in WORLDS.items()),
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=2,
        help="seeds at a time, one thread each; threads of one seed of tweets (default: 2)",
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
        help="folder of evidence.md and evidence/ "
        "(default: docs; with --limit OUT, where it harms nothing)",
    )
    parser.add_argument(
        "--limit", type=positive, help="only N items of each task, for a quick look"
    )
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # one seed, in this process
    return parser


def _run_all(options: argparse.Namespace) -> dict[str, Path]:
    """Run every seed in a process of its own; return the logs of those that failed."""
    from tqdm import tqdm

    options.out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, Path] = {}
    lock = threading.Lock()
    jobs = [
        (name, seed)
        for name in options.world
        for seed in (range(WORLDS[name].seeds) if options.seeds is None else options.seeds)
    ]
    options.threads = max(1, options.processes // len(jobs))  # a seed alone has all of them
    total = sum(WORLDS[name].models for name, _ in jobs)
    with tqdm(total=total, unit="model", smoothing=0.05) as bar:

        def run(job: tuple[str, int]) -> None:
            name, seed = job

            def advance(model: str) -> None:
                with lock:
                    bar.update()
                    bar.set_postfix_str(f"{name}, seed {seed}: {model}")

            log = options.out / f"{WORLDS[name].stem}-{seed}.log"
            if _run_one(name, seed, options, log, advance) != 0:
                failed[f"{name}, seed {seed}"] = log

        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(run, jobs))
    return failed


def _run_one(
    world: str, seed: int, options: argparse.Namespace, log: Path, advance: Callable[[str], None]
) -> int:
    """Run one seed in a process of its own and return its exit code.

    `advance` is called with the name of each model that is done.
    """
    command = [sys.executable, "-m", "evaluation.evidence", "--world", world, "--only", str(seed)]
    command += ["--out", str(options.out), "--docs", str(options.docs)]
    if options.limit is not None:
        command += ["--limit", str(options.limit)]
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    threads = dict.fromkeys(variables, str(options.threads if WORLDS[world].threaded else 1))
    endings = tuple(f".{suite}.json" for suite in WORLDS[world].suites)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=os.environ | threads, stdout=subprocess.PIPE, stderr=file, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if any(ending in line for ending in endings):
                advance(line.split(":")[0])
    return process.returncode


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


if __name__ == "__main__":
    sys.exit(main())
