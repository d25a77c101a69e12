"""The startup hook where something is wrong: no start of Python and no program may notice.

Each check is a bare interpreter, without site-packages, that finds stand-ins for mergekit and for
this package; what an installed wheel does is in test_install.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[1] / "_mergekit_monosoup_autoload"
PTH = "mergekit_monosoup_autoload.pth"


def python(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    command = [sys.executable, "-I", "-S", "-c", start + textwrap.dedent(source)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)


@pytest.mark.parametrize(
    ("left", "works"),
    [
        (None, False),
        ("", False),
        ("def install(:", False),
        ("raise OSError('stale file handle')", False),
        ("def install(): raise RuntimeError", False),
        ("import nowhere_to_be_found", False),
        ("def install(): print('hooked')", True),
    ],
)
def test_a_hook_that_is_gone_or_broken_is_silent(left, works, tmp_path):
    """Half an uninstallation leaves the .pth file, which Python runs at every start."""
    shutil.copy(HOOK / PTH, tmp_path)
    if left is not None:
        (tmp_path / HOOK.name).mkdir()
        (tmp_path / HOOK.name / "__init__.py").write_text(left)
    done = python(tmp_path, f"import site; site.addsitedir({str(tmp_path)!r}); print('started')")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["hooked"] if works else []) + ["started"]


@pytest.fixture
def fake(tmp_path) -> Path:
    """mergekit and this package as far as the hook sees them; the methods do not import."""
    shutil.copytree(HOOK, tmp_path / HOOK.name, ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("mergekit/merge_methods", "mergekit_monosoup"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
    return tmp_path


IMPORT = "import _mergekit_monosoup_autoload as hook; hook.install()\nimport mergekit.merge_methods"


@pytest.mark.parametrize(
    ("methods", "named"),
    [
        ("import sys; sys.exit('this package needs a newer machine')", "SystemExit"),
        ("class Panic(BaseException): pass\nraise Panic('of another language')", "Panic"),
        ("import scipy_that_is_gone", "ModuleNotFoundError"),
        ("raise ValueError('in\\nthree\\nlines')", "ValueError: in three lines"),
        ("def deep(): deep()\ndeep()", "RecursionError"),
    ],
)
def test_nothing_in_our_import_ends_the_program(methods, named, fake):
    (fake / "mergekit_monosoup" / "methods.py").write_text(methods)
    done = python(fake, f"{IMPORT}\nprint('survived')")
    assert (done.returncode, done.stdout) == (0, "survived\n")
    (line,) = done.stderr.splitlines()
    assert named in line and "MERGEKIT_MONOSOUP_AUTOLOAD=0" in line


def test_a_program_with_a_log_handler_that_raises(fake):
    (fake / "mergekit_monosoup" / "methods.py").write_text("1 / 0")
    handler = """
        import logging
        class Broken(logging.Handler):
            def emit(self, record): raise RuntimeError("no space left for logs")
        logging.getLogger().addHandler(Broken())
    """
    done = python(fake, textwrap.dedent(handler) + f"{IMPORT}\nprint('survived')")
    assert (done.returncode, done.stdout) == (0, "survived\n")


@pytest.mark.parametrize(
    ("number", "handler", "code"),
    [("SIGINT", "signal.default_int_handler", 1), ("SIGTERM", "lambda *_: sys.exit(7)", 7)],
)
def test_what_ends_the_program_meanwhile_ends_it(number, handler, code, fake):
    """Ctrl-C, or the end that a batch system asks for, in the middle of our import."""
    methods = (
        f"import os, signal; os.kill(os.getpid(), signal.{number}); import time; time.sleep(9)"
    )
    (fake / "mergekit_monosoup" / "methods.py").write_text(methods)
    set_up = f"import signal, sys; signal.signal(signal.{number}, {handler})\n"
    done = python(fake, f"{set_up}{IMPORT}\nprint('went on')")
    assert done.stdout == "" and "hook into" not in done.stderr
    assert done.returncode == code or (number == "SIGINT" and "KeyboardInterrupt" in done.stderr)


def test_a_warning_names_what_is_missed(fake):
    """Not the methods, where only the planner or the buffers could not be hooked into."""
    (fake / "mergekit_monosoup" / "methods.py").write_text("")
    (fake / "mergekit_monosoup" / "planner.py").write_text("1 / 0")
    (fake / "mergekit" / "plan.py").write_text("")
    done = python(fake, f"{IMPORT}, mergekit.plan")
    lines = [line for line in done.stderr.splitlines() if "mergekit.plan" in line]
    assert len(lines) == 1 and "does not know the methods" not in lines[0]
    assert "what a merge leaves out" in lines[0] and "import mergekit_monosoup.planner" in lines[0]
