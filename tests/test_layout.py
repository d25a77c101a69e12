"""Which folder may import which: an arrow that points back up is the beginning of a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from evaluation.engines import ENGINES

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
    "mergekit_monosoup/ending.py": {"parameters", "report", "terminal"},
    "mergekit_monosoup/checkpoints": {"errors"},
    "mergekit_monosoup/report": {"checkpoints", "files", "terminal"},
    "mergekit_monosoup/kernel": {"errors", "parameters", "report"},
    "mergekit_monosoup/adapters": {
        "checkpoints",
        "distributed",  # which files belong to a model
        "errors",
        "files",
        "kernel",
        "parameters",
        "report",
        "soup",  # its decisions
        "waiting",
    },
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


@pytest.mark.parametrize("place", ["kernel/*.py", "pages/*.py", "report/*.py", "ending.py"])
def test_they_know_nothing_of_mergekit(place):
    files = list((ROOT / "mergekit_monosoup").glob(place))
    assert files
    for file in files:
        assert not {m for m in imported(file) if m.split(".")[0] == "mergekit"}, file


def test_evaluation_and_the_package_import_no_program_that_uses_them():
    for file in (ROOT / "evaluation").rglob("*.py"):
        assert not {m for m in imported(file) if m.split(".")[0] == "demo"}, file
    for file in (ROOT / "mergekit_monosoup").rglob("*.py"):
        assert not {m for m in imported(file) if m.split(".")[0] in PROGRAMS}, file


LIBRARIES = {
    "lm_eval": ["evaluation/engines/language.py"],
    "open_clip": ["evaluation/engines/image_classifiers.py"],
    "timm": [
        "evaluation/engines/image_classifiers.py",
        "evaluation/engines/image_sets.py",
        "evaluation/worlds/digits_training.py",
    ],
    "torchvision": ["evaluation/engines/image_sets.py"],
}
"""Libraries that ask models questions, and who may import them."""


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_file_knows_an_engine(library):
    users = [
        file.relative_to(ROOT).as_posix()
        for file in sorted((ROOT / "evaluation").rglob("*.py"))
        if any(module.split(".")[0] == library for module in imported(file))
    ]
    assert users == LIBRARIES[library]


def test_engines_are_imported_by_name_alone():
    """What asks, reads or compares knows the protocol: a suite decides whose module is loaded."""
    modules = {path.stem for path in (ROOT / "evaluation" / "engines").glob("*.py")} - {"__init__"}
    assert set(ENGINES) <= modules
    for file in (ROOT / "evaluation").rglob("*.py"):
        if file.parent.name != "engines":
            assert not {f"evaluation.engines.{name}" for name in ENGINES} & imported(file), file
