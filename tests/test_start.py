"""The start of the command line: what is imported, and what those read who have to wait."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergekit_monosoup import waiting
from mergekit_monosoup.report import Record

MODULES_AFTER = """
import json, sys
from mergekit_monosoup.cli import main
try:
    main(sys.argv[1:], prog_name="mergekit-monosoup")
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, str]:
    """The report of a merge and that of an inspection, by kind."""
    folder = tmp_path_factory.mktemp("reports")
    split = {"mode": "freevariance", "k": 2, "rank": 4, "effective_rank": 2.0, "lambda_high": 0.9}
    files = {}
    for action in ("edited", "inspected"):
        record = Record("layers.0.w", (8, 4), "bfloat16", action, lambda_low=0.1, **split)
        files[action] = str(folder / f"{action}.jsonl")
        Path(files[action]).write_text(record.to_json() + "\n")
    return files


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "report {edited}",
        "report {edited} --json",
        "report {inspected}",
        "report {edited}.missing",
        "plot {edited} {inspected} --out {edited}.png",
        "parameters",
        "parameters svc",
        "check --help",
        "inspect --help",
        "soup --help",
    ],
)
def test_commands_that_need_neither_torch_nor_mergekit_import_neither(reports, command):
    if command.startswith("plot"):
        pytest.importorskip("matplotlib")
    arguments = command.format(**reports).split()
    done = subprocess.run(
        [sys.executable, "-c", MODULES_AFTER, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == (2 if "missing" in command else 0), done.stderr
    assert "mergekit_monosoup.cli" in modules
    assert not {"torch", "mergekit", "transformers", "scipy"} & set(modules)


# -- the wait --------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(text: str, terminal: Terminal) -> None:
    deadline = time.monotonic() + 30
    while text not in terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_long_wait_is_announced_and_the_line_erased():
    terminal = Terminal()
    with waiting.announced("reading …", patience=0, stream=terminal):
        wait_for("reading …", terminal)
    assert terminal.getvalue() == "reading …" + waiting.ERASE_LINE


def test_the_line_is_erased_after_an_error_too():
    terminal = Terminal()

    def fail() -> None:
        wait_for("reading …", terminal)
        raise ImportError

    waiting_fail = waiting.announced("reading …", patience=0, stream=terminal)(fail)
    with pytest.raises(ImportError):
        waiting_fail()
    assert terminal.getvalue() == "reading …" + waiting.ERASE_LINE


def test_a_short_wait_is_silent():
    terminal = Terminal()
    with waiting.announced("reading …", patience=60, stream=terminal):
        pass
    assert terminal.getvalue() == ""


def test_a_file_is_told_nothing():
    file = io.StringIO()
    with waiting.announced("reading …", patience=0, stream=file):
        time.sleep(0.05)
    assert file.getvalue() == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "run"])
def test_commands_that_import_mergekit_say_so_on_a_terminal(command, tmp_path):
    pty = pytest.importorskip("pty")  # not on Windows
    (tmp_path / "merge.yml").write_text("merge_method: linear\nmodels: []\n")
    impatient = (
        "import sys; from mergekit_monosoup import cli, waiting\n"
        "waiting.announced.__wrapped__.__defaults__ = (0, None)\n"
        "cli.main(sys.argv[1:])"
    )
    arguments = [
        command,
        str(tmp_path / "merge.yml"),
        *[str(tmp_path / "out")] * (command == "run"),
    ]
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", impatient, *arguments], stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    text = os.read(ours, 2**16).decode()
    os.close(ours)
    assert done.returncode != 0  # the configuration is wrong: the import is all there is to see
    assert text.startswith("reading mergekit …") and waiting.ERASE_LINE in text
