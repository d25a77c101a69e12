"""The soups, made as a user makes them: a YAML file and the unmodified `mergekit-yaml` command."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Paths are relative to the output folder, in which mergekit runs: the folder can be moved and the
# files still hold. Without the "./", mergekit takes a name for a possible repository and asks the
# hub about it, which fails offline.
WISE_FT = """\
merge_method: task_arithmetic
base_model: ./pretrained
models:
  - model: ./finetuned
    parameters:
      weight: 0.5
dtype: float32
"""
FREEVARIANCE = """\
merge_method: monosoup
base_model: ./pretrained
models:
  - model: ./finetuned
parameters:
  mode: freevariance
  report: reports/freevariance.jsonl
dtype: float32
"""
VARIANCE = """\
merge_method: monosoup
base_model: ./pretrained
models:
  - model: ./finetuned
parameters:
  mode: variance
  R: 0.8
  report: reports/variance.jsonl
dtype: float32
"""


# What each MonoSoup is worth beyond shrinking: the same norm per tensor, without a spectral split.
FREE_SCALAR = FREEVARIANCE.replace("report: reports/freevariance.jsonl", "coefficients: scalar")
VARIED_SCALAR = VARIANCE.replace("report: reports/variance.jsonl", "coefficients: scalar")


@dataclass(frozen=True)
class Soup:
    """One merge: `title` in tables, `file` in the names of YAML file, folder and report."""

    title: str
    file: str
    yaml: str
    reports: bool

    @property
    def merged(self) -> Path:
        """Where it is merged to, in the output folder."""
        return Path("merged", self.file)

    @property
    def report(self) -> Path:
        """Where its report is written, in the output folder."""
        return Path("reports", f"{self.file}.jsonl")


WISE = Soup("Wise-FT 0.5", "wise-ft", WISE_FT, reports=False)
FREE = Soup("MonoSoup freevariance", "freevariance", FREEVARIANCE, reports=True)
VARIED = Soup("MonoSoup variance R=0.8", "variance", VARIANCE, reports=True)
CONTROL = "norm-matched control"  # of the soup in front of it
SOUPS = (
    WISE,
    FREE,
    Soup(f"{FREE.title}, {CONTROL}", "freevariance-control", FREE_SCALAR, reports=False),
    VARIED,
    Soup(f"{VARIED.title}, {CONTROL}", "variance-control", VARIED_SCALAR, reports=False),
)


class CommandError(Exception):
    """A command line tool is missing or failed; the message holds what it said."""


def merge(soup: Soup, folder: Path) -> str:
    """Write the YAML file, run mergekit-yaml in `folder`, and return the command line.

    What mergekit printed is kept in logs/.

    Raises:
        CommandError: mergekit-yaml is missing or failed.
    """
    config = Path("configs", f"{soup.file}.yml")
    for file in (config, soup.merged, soup.report, log := Path("logs", f"{soup.file}.log")):
        (folder / file).parent.mkdir(exist_ok=True)
    (folder / config).write_text(soup.yaml, encoding="utf-8")
    # An earlier run's weights and report must not pass for this one's.
    shutil.rmtree(folder / soup.merged, ignore_errors=True)
    (folder / soup.report).unlink(missing_ok=True)

    command = [tool("mergekit-yaml"), config.as_posix(), soup.merged.as_posix()]
    done = subprocess.run(
        command,
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (folder / log).write_text(done.stdout, encoding="utf-8")
    shown = " ".join(["mergekit-yaml", *command[1:]])
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-5:])  # of a traceback, these say what was wrong
        raise CommandError(
            f"`{shown}` failed with exit code {done.returncode}, see {folder / log}:\n{last}"
        )
    return shown


def print_report(soup: Soup, folder: Path) -> None:
    """Let `mergekit-monosoup report` print its table.

    Raises:
        CommandError: it is missing or failed.
    """
    sys.stdout.flush()  # or the table of the other process lands above what was printed before
    done = subprocess.run(
        [tool("mergekit-monosoup"), "report", soup.report.as_posix()],
        cwd=folder,
        env=_environment(),
    )
    if done.returncode != 0:
        raise CommandError(
            f"`mergekit-monosoup report {soup.report}` failed with exit code {done.returncode}"
        )


def tool(name: str) -> str:
    """Return the path of the console script beside this Python.

    Another one on the PATH could belong to another environment.

    Raises:
        CommandError: there is none.
    """
    folder = str(Path(sys.executable).parent)
    script = shutil.which(name, path=folder)
    if script is None:
        raise CommandError(
            f"{name} is not in {folder}; install this package: {sys.executable} -m pip install ."
        )
    return script


def _environment() -> dict[str, str]:
    # Matrices this small lose time to threads. A user's own setting wins.
    return {"OMP_NUM_THREADS": "1", **os.environ}
