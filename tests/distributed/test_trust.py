"""What lies in OUT may be somebody else's: it runs no code, and leads to no other file.

And what is merged may be replaced meanwhile.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.merges import ALONE, SMALL, assert_same, config, interrupted_after, mergekit, run

from mergekit_monosoup import files
from mergekit_monosoup.distributed import command, engines, records, vocabulary, worker
from mergekit_monosoup.distributed import folder as folders
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.distributed.publication import FolderError

# -- code ------------------------------------------------------------------------------------------


class Opened:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_nothing_in_the_folder_is_unpickled(world, tmp_path):
    path, out = config(world, tmp_path, tokenizer={"source": "base"}), tmp_path / "b" / "out"
    with interrupted_after(1):
        run(path, out, *SMALL, *ALONE, code=130)
    work, mark = out / folders.NAME, tmp_path / "opened"
    assert not [file for file in work.rglob("*") if "pickle" in file.name]
    trap = pickle.dumps(Opened(mark))
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    for name in ("merge.json", "vocabulary.json", "done/00000.json"):
        (work / name).write_bytes(trap)
        run(path, out, *SMALL, *ALONE, code=0 if "done" in name else 1)
        assert not mark.exists()
        shutil.rmtree(out)
        shutil.copytree(whole, out)
    for name in ("tokenizer.pickle", "tokenizer.pkl", "done/00000.pickle"):
        (work / name).write_bytes(trap)
    run(path, out, *SMALL, *ALONE)
    assert not mark.exists()
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


def test_the_order_of_a_union_is_kept(world, tmp_path):
    """mergekit orders it differently in each process; here two tokens have changed places."""
    from mergekit.common import ModelReference
    from mergekit.tokenizer import BuildTokenizer

    models = [ModelReference.parse(str(world / name)) for name in ("qwen3/tuned0", "wide/base")]
    task = BuildTokenizer(
        base_model=models[0],
        referenced_models=tuple(models),
        tokenizer_source="union",
        add_tokens=(),
    )
    kept = tmp_path / "vocabulary.json"
    first = vocabulary.build(task, kept, resuming=False)
    before = json.loads(kept.read_text())
    tokens, fast = before["tokens"], json.loads(before["fast"])
    places = {entry["content"]: entry for entry in fast["added_tokens"]}
    one, two = places["w100"], places["w101"]
    one["content"], two["content"] = "w101", "w100"
    tokens["w100"], tokens["w101"] = tokens["w101"], tokens["w100"]
    kept.write_text(json.dumps({"tokens": tokens, "fast": json.dumps(fast)}))
    info = vocabulary.build(task, kept, resuming=True)
    assert info.tokenizer.get_vocab() == tokens != first.tokenizer.get_vocab()
    own = {model: info.original_vocabs[model] for model in models}
    for model in models:
        assert info.permutations[model] == {
            number: own[model].get(token, -1) for token, number in tokens.items()
        }
    kept.write_text(json.dumps({"tokens": {"other": 0}, "fast": json.dumps(fast)}))
    with pytest.raises(FolderError, match="no longer give the vocabulary"):
        vocabulary.build(task, kept, resuming=True)


# -- names and links -------------------------------------------------------------------------------


@pytest.fixture
def publishing(tmp_path):
    """A model that only has to be put into place, and somebody's file outside of OUT."""
    victim = tmp_path / "outside" / "victim.json"
    victim.parent.mkdir()
    victim.write_text("precious")
    work = WorkFolder(tmp_path / "out")
    work.files.mkdir(parents=True)
    work.done.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (work.files / name).write_text("new")
    work.record({"configuration": {}})
    work.prepare({})
    return work, victim


STEPS = {
    "remove": [
        "../outside/victim.json",
        "{victim}",
        "sentencepiece/../../outside/victim.model",
        "notes.txt",
    ],
    "move to": [
        "../outside/victim.json",
        "{victim}",
        "link/victim.json",
        "deep/../../outside/victim.json",
        ".mergekit-monosoup/merge.json",
        "C:\\victim.json",
        "..\\victim.json",
        "",
    ],
    "move from": [
        "../../outside/victim.json",
        "{victim}",
        "files/../../../outside/victim.json",
        "done/link/victim.json",
        "done/straight",
        "merge.json",
    ],
}


@pytest.mark.parametrize(("step", "name"), [(s, name) for s in STEPS for name in STEPS[s]])
def test_no_name_leads_out_of_the_folder(step, name, publishing):
    work, victim = publishing
    (work.out / "link").symlink_to(victim.parent)
    (work.done / "link").symlink_to(victim.parent)
    (work.done / "straight").symlink_to(victim)
    (work.out / "notes.txt").write_text("mine")
    list_ = work.path / "publish.json"
    steps, name = json.loads(list_.read_text()), name.format(victim=victim)
    if step == "remove":
        steps["remove"].append(name)
    elif step == "move to":
        steps["move"] = {name: "files/out/tokenizer.json", **steps["move"]}
    else:
        steps["move"] = {"tokenizer.json": name, **steps["move"]}
        steps["move"]["tokenizer.json"] = name
    list_.write_text(json.dumps(steps))
    with pytest.raises(FolderError, match="which is no file of this merge"):
        work.publish()
    assert victim.read_text() == "precious" and (work.out / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in work.out.iterdir()) == [folders.NAME, "link", "notes.txt"]


def test_a_healthy_list_is_followed(publishing):
    work, _ = publishing
    work.publish()
    assert sorted(p.name for p in work.out.iterdir()) == [
        folders.NAME,
        "config.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"move": {}, "remove": []}', '{"move": 3}', "\ud800"])
def test_a_damaged_list_is_named(text, publishing):
    work, _ = publishing
    (work.path / "publish.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FolderError, match=r"publish\.json: damaged"):
        work.publish()


@pytest.mark.parametrize("entry", ["", "done", "files", "making", "lock", "merge.json"])
@pytest.mark.parametrize("options", [["--force"], ["--resume"]])
def test_links_in_the_folder_are_refused(entry, options, world, tmp_path):
    """Through them a merge would empty, fill or truncate what is somebody else's."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    (outside / "files").mkdir(parents=True)
    (outside / "precious").write_text("precious")
    link = out / folders.NAME / entry if entry else out / folders.NAME
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "precious" if entry in ("lock", "merge.json") else outside)
    output = run(config(world, tmp_path), out, *options, code=1)
    assert f"{link} is a symbolic link" in output
    assert (outside / "precious").read_text() == "precious" and (outside / "files").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"file": "../../../victim", "bytes": 1, "sha256": "", "tensors": []}]},
        {"shards": [{"file": "/etc/hostname", "bytes": 1, "sha256": "", "tensors": []}]},
        {"shards": [{"file": "00001-1.bin", "bytes": 1, "sha256": "", "tensors": []}]},
        {"batch": 1},
        {"reports": [[None, "monosoup", "{}"]]},
        {"logs": [[1, 2, 3]]},
        {"seconds": "long"},
        {"more": 1, "tensors": None},
    ],
)
def test_a_record_that_no_worker_writes_is_none(change, tmp_path):
    record = records.Done(0, 1, [records.Shard("00000-1.bin", 1, "", ["a"])], 1, "n@1", 1.0, 1)
    path = tmp_path / "00000.json"
    path.write_text(json.dumps(asdict(record)))
    assert records.read_done(path) == record
    path.write_text(json.dumps({**asdict(record), **change}))
    with pytest.raises(ValueError):  # noqa: PT011 - pydantic's words, or ours
        records.read_done(path)


def test_a_record_names_no_report_of_its_own(interrupted):
    path, out = interrupted
    file = out / folders.NAME / "done" / "00000.json"
    record = json.loads(file.read_text())
    target = out.parent / "autostart"
    record["reports"] = [[str(target), *rest] for _, *rest in record["reports"]]
    assert record["reports"]
    file.write_text(json.dumps(record))
    output = run(path, out, *SMALL, *ALONE, code=1)
    assert "names a report that the configuration does not" in output and not target.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', "null"])
def test_a_damaged_header_is_named(text, interrupted):
    path, out = interrupted
    (out / folders.NAME / "merge.json").write_text(text)
    assert "merge.json: damaged; --force starts over" in run(path, out, *SMALL, *ALONE, code=1)


# -- inputs that are replaced ----------------------------------------------------------------------


@pytest.fixture
def own(world, tmp_path):
    """A merge of a model that may be overwritten, and its first file."""
    tuned = tmp_path / "tuned"
    shutil.copytree(world / "qwen3" / "tuned0", tuned)
    path = config(world, tmp_path)
    path.write_text(path.read_text().replace(f"{world}/qwen3/tuned0", str(tuned)))
    return path, min(tuned.glob("*.safetensors"))


def rewrite(file: Path, unnoticed: bool) -> None:
    """Change the last weight of a file; ``unnoticed``: with the size and the time that it had."""
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-2] + b"\x00\x3c")
    if unnoticed:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.mark.parametrize("one_process", [False, True])
@pytest.mark.parametrize("unnoticed", [False, True])
def test_inputs_replaced_meanwhile_are_noticed(one_process, unnoticed, own, tmp_path, monkeypatch):
    path, file = own
    out = tmp_path / "out"
    more = ["--hash-inputs"] if unnoticed else []
    if one_process:
        more += ["--workers", "1"]
        merge = command.run_yaml.main.callback
        monkeypatch.setattr(
            command.run_yaml.main,
            "callback",
            lambda **given: (merge(**given), rewrite(file, unnoticed)),
        )
    else:
        more += [*ALONE, *SMALL]
        monkeypatch.setattr(
            engines, "execute", lambda *a: (worker.execute(*a), rewrite(file, unnoticed))[0]
        )
    output = run(path, out, *more, code=1)
    assert "inputs were changed while they were merged" in output and str(file) in output
    assert not (out / "config.json").exists() and out.exists() != one_process


def test_hashed_inputs_are_known_by_their_content(own, tmp_path):
    """A copy with new times is the same; without the option it counts as another."""
    path, file = own
    for options, code in ([], 1), (["--hash-inputs"], 0):
        out = tmp_path / f"out{code}"
        with interrupted_after(1):
            run(path, out, *SMALL, *ALONE, *options, code=130)
        os.utime(file, (0, 0))
        output = run(path, out, *SMALL, *ALONE, *options, code=code)
        assert ("cannot resume" in output) == bool(code)


# -- what is left over -----------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_of_a_batch(interrupted, monkeypatch):
    path, out = interrupted
    done = out / folders.NAME / "done"
    before = sorted(p.name for p in done.iterdir())

    def full(target, content):
        raise OSError(28, "No space left on device", str(target))

    write = files.write_text
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", lambda p, c: (full if p.parent == done else write)(p, c))
        output = run(path, out, *SMALL, *ALONE, code=1)
    assert "No space left" in output and "2 finished batch(es), " in output
    assert sorted(p.name for p in done.iterdir()) == before
    (done / "00002-1.safetensors").write_bytes(b"of a killed worker")
    (done / ".00002.json.abcd").write_bytes(b"half")
    with WorkFolder(out).claimed(resume=True, force=False):
        assert sorted(p.name for p in done.iterdir()) == before


def test_the_folder_is_removed_before_it_is_released(tmp_path, monkeypatch):
    """Else the next driver may have begun in it."""
    work, held = WorkFolder(tmp_path / "out"), []
    clear = WorkFolder.clear
    monkeypatch.setattr(
        WorkFolder, "clear", lambda self: (held.append(files.is_locked(self._lock)), clear(self))
    )
    with work.claimed(resume=False, force=False):
        pass
    assert held == [True, True] and not work.out.exists()


def test_why_fewer_workers_took_part_is_said():
    assert command._fewer(2, 2, 5) == ""
    assert "divided into 1 part(s) only" in command._fewer(1, 2, 1)
    assert "had not started yet" in command._fewer(1, 2, 5)


def test_ctrl_c_is_raised_where_it_can_be_passed_on():
    before = signal.getsignal(signal.SIGINT)
    with engines.ctrl_c_noted() as check:
        check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_is_said_with_what_is_left(world, tmp_path, monkeypatch):
    def full(**given):
        (Path(given["out_path"]) / "model-1.safetensors").write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(command.run_yaml.main, "callback", full)
    output = run(config(world, tmp_path), tmp_path / "out", "--workers", "1", code=1)
    assert "Nothing of this merge is left in" in output and not (tmp_path / "out").exists()
