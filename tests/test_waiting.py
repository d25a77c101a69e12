"""Lines for who waits where no bar can be shown."""

from __future__ import annotations

import io
import re
import time
from functools import partial

from click.testing import CliRunner
from helpers.merges import config, run

from mergekit_monosoup import cli, inspection, waiting
from mergekit_monosoup.distributed import progress


def test_a_line_now_and_then_and_none_afterwards():
    stream, lines = io.StringIO(), iter("abcdefgh")
    with waiting.repeated(lambda: next(lines), every=0.02, stream=stream):
        while stream.getvalue().count("\n") < 3:
            time.sleep(0.005)
    written = stream.getvalue()
    time.sleep(0.05)
    assert written.startswith("a\nb\nc\n") and stream.getvalue() == written


def test_short_work_is_silent():
    stream = io.StringIO()
    with waiting.repeated(lambda: "late", stream=stream):
        pass
    assert stream.getvalue() == ""


def test_nobody_listens_any_more():
    closed = io.StringIO()
    closed.close()
    with waiting.repeated(lambda: "a", every=0.001, stream=closed):
        time.sleep(0.02)


def slowly(function, *arguments, **named):
    time.sleep(0.05)
    return function(*arguments, **named)


def test_inspect_in_a_pipe(hub, monkeypatch):
    monkeypatch.setattr(cli, "repeated", partial(waiting.repeated, every=0.02))
    slow = partial(slowly, inspection.inspect_tensor)
    monkeypatch.setattr(inspection, "inspect_tensor", slow)
    result = CliRunner().invoke(cli.main, ["inspect", str(hub / "base"), str(hub / "tuned0")])
    counts = re.findall(r"^inspecting: (\d+) of 25 tensors$", result.output, flags=re.M)
    assert len(counts) > 3 and counts == sorted(counts, key=int)


def test_run_in_a_pipe(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.005)
    output = run(config(hub, tmp_path, family="."), tmp_path / "out", "--out-shard-size", "20K")
    line = r"^\d+/25 tensors, [\d.]+ k?B of [\d.]+ kB, (an unknown time|[\d:]+) left$"
    assert re.search(line, output, flags=re.M)
    assert " left" not in run(config(hub, tmp_path, family="."), tmp_path / "quiet", "--quiet")
