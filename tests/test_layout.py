"""Which folder may import which: an arrow that points back up is the beginning of a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each folder (or module) and what it may import of this repository, beside itself. TYPE_CHECKING
# and imports within functions count, too.
ALLOWED = {
    "mergekit_monosoup/parameters.py": set(),
    "mergekit_monosoup/errors.py": set(),
    "mergekit_monosoup/files.py": set(),
    "mergekit_monosoup/terminal.py": set(),
    "mergekit_monosoup/waiting.py": set(),
    "mergekit_monosoup/memory.py": set(),
    "mergekit_monosoup/checkpoints": {"errors"},
    "mergekit_monosoup/report": {"checkpoints", "files", "terminal"},
    "mergekit_monosoup/kernel": {"errors", "parameters", "report"},
    "mergekit_monosoup/check": {"checkpoints", "parameters", "report"},
    "mergekit_monosoup/pages": {"__version__", "checkpoints", "files", "report", "terminal"},
}
# Run from a checkout, and not installed.
PROGRAMS = ("benchmarks", "demo", "evaluation", "website")


def imported(path: Path) -> set[str]:
    """Modules that a file names in an import, at any place."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("place", ALLOWED)
def test_no_arrow_points_back_up(place):
    path = ROOT / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    for file in files:
        parts = {m.split(".")[1] for m in imported(file) if m.startswith("mergekit_monosoup.")}
        assert parts - {path.stem} <= ALLOWED[place], file


@pytest.mark.parametrize("folder", ["kernel", "pages", "report"])
def test_they_know_nothing_of_mergekit(folder):
    for file in (ROOT / "mergekit_monosoup" / folder).rglob("*.py"):
        assert not {m for m in imported(file) if m.split(".")[0] == "mergekit"}, file


def test_evaluation_and_the_package_import_no_program_that_uses_them():
    for file in (ROOT / "evaluation").rglob("*.py"):
        assert not {m for m in imported(file) if m.split(".")[0] == "demo"}, file
    for file in (ROOT / "mergekit_monosoup").rglob("*.py"):
        assert not {m for m in imported(file) if m.split(".")[0] in PROGRAMS}, file


def test_one_file_knows_an_engine():
    files = [file for file in (ROOT / "evaluation").rglob("*.py") if file.name != "language.py"]
    users = [f.name for f in files if any(m.split(".")[0] == "lm_eval" for m in imported(f))]
    assert users == ["evaluator.py"], "for the type of its task manager, under TYPE_CHECKING"
