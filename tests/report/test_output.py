"""The file of a report: two merges never share it, and a full disk loses none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_monosoup import files, report
from mergekit_monosoup.report import Journal, Record, output, read


def record(name: str, **values) -> Record:
    return Record(name=name, shape=(4, 3), dtype="float32", action="edited", **values)


def names(path: Path | str) -> list[str]:
    return [each.name for each in read(path)]


def merge(path: Path, *tensors: str, **values) -> None:
    """Write a report as one merge of one process does."""
    journal = Journal()
    for tensor in tensors:
        journal.add([record(tensor, **values)], str(path))
    output.release()


# -- two merges ------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, time
from mergekit_monosoup.report import Journal, Record
Journal().add([Record("theirs", (1,), "float32", "edited")], sys.argv[1])
print("writing", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="reports are not locked there")
def test_a_report_has_one_merge_at_a_time(tmp_path):
    """The lock of a merge that was killed is gone with it, and no file of it stays."""
    path = tmp_path / "r.jsonl"
    pipes = {"stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(path)], **pipes)
    try:
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(ValueError, match=r"r\.jsonl is being written by another merge"):
            report.check_path(str(path))
        with pytest.raises(ValueError, match=r"the report cannot be written: .* another merge"):
            Journal().add([record("ours")], str(path))
        (tmp_path / "link").symlink_to(path)
        with pytest.raises(ValueError, match="is being written by another merge"):
            report.check_path(str(tmp_path / "link"))
        assert names(path) == ["theirs"]
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    (tmp_path / "link").unlink()
    merge(path, "ours")
    assert names(path) == ["ours"] and names(f"{path}.old") == ["theirs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "r.jsonl.old"]


def test_a_file_that_takes_the_place_of_a_report_is_left_alone(tmp_path):
    journal, path = Journal(), tmp_path / "r.jsonl"
    journal.add([record("a")], str(path))
    path.rename(tmp_path / "moved")
    journal.add([record("b")], str(path))  # written anew
    assert names(path) == ["b"]
    (tmp_path / "mine").write_text("precious\n")
    (tmp_path / "mine").rename(path)
    with pytest.raises(ValueError, match="was replaced by another file"):
        journal.add([record("c")], str(path))
    assert path.read_text() == "precious\n"


def test_a_lock_on_a_file_that_was_replaced_is_none(tmp_path, monkeypatch):
    path, take = tmp_path / "lock", files._take

    def late(descriptor, place):
        monkeypatch.setattr(files, "_take", take)
        (tmp_path / "new").touch()
        os.replace(tmp_path / "new", path)
        take(descriptor, place)

    monkeypatch.setattr(files, "_take", late)
    descriptor = files.lock(path)
    try:
        assert files.is_at(descriptor, path)
        with pytest.raises(files.LockedError):
            files.lock(path)
    finally:
        os.close(descriptor)


# -- full disks ------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """A disk with room for so many bytes: `disk(100)`; `disk(None)` has room again."""
    write = os.write

    def with_room(room: int | None):
        left = [room]

        def limited(descriptor, content):
            if left[0] is None:
                return write(descriptor, content)
            if not left[0]:
                raise OSError(28, "No space left on device")
            written = write(descriptor, bytes(content)[: left[0]])
            left[0] -= written
            return written

        monkeypatch.setattr(os, "write", limited)

    return with_room


@pytest.mark.parametrize("room", [0, 10, 10**3])
@pytest.mark.parametrize("other", ["", "other."])
def test_failures_on_a_full_disk_lose_no_report(room, other, tmp_path, disk):
    """The good one stays, and the one before it unless the new one had begun."""
    path = tmp_path / "r.jsonl"
    merge(path, "a", "b", "c", k=1)
    merge(path, "a", "b", "c", k=2)
    for _ in range(3):
        disk(room)
        with pytest.raises(ValueError, match=r"the report cannot be written: .*No space left"):
            merge(path, *(f"{other}{name}" for name in "abc"), k=3)
        output.release()
        disk(None)
    found = [read(p) for p in tmp_path.iterdir()]
    assert any([(r.name, r.k) for r in records] == [(n, 2) for n in "abc"] for records in found)
    assert {p.name for p in tmp_path.iterdir()} <= {"r.jsonl", "r.jsonl.old"}


def test_a_full_disk_leaves_no_file(tmp_path, disk):
    disk(20)
    with pytest.raises(ValueError, match="No space left"):
        merge(tmp_path / "deep" / "er" / "r.jsonl", "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        files.write_bytes(tmp_path / "x", 3)
    assert list(tmp_path.iterdir()) == []


def test_what_was_cut_off_does_not_drive_out_what_is_whole(tmp_path):
    """A merge that failed elsewhere, or was killed, has left the first of its tensors."""
    path = tmp_path / "r.jsonl"
    merge(path, "a", "b", "c", k=1)
    merge(path, "a", k=2)
    with path.open("a") as file:
        file.write('{"name": "b", "sha')
    merge(path, "a", "b", k=3)
    assert [r.k for r in read(path)] == [3, 3]
    assert names(f"{path}.old") == ["a", "b", "c"]
    merge(path, "a", "b", "c", k=4)
    assert [r.k for r in read(f"{path}.old")] == [1, 1, 1]
    merge(path, "z")
    assert [r.k for r in read(f"{path}.old")] == [4, 4, 4]


def test_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    path = tmp_path / "r.jsonl"
    merge(path, "a", k=1)
    merge(path, "a", k=2)
    assert [r.k for file in (path, f"{path}.old") for r in read(file)] == [2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "r.jsonl.old"]
