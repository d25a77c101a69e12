"""Result files: what is finished, what an interrupted run left, what is damaged."""

from __future__ import annotations

import gzip
import hashlib
import json
import os

import pytest
from helpers import evaluations

from evaluation import run, store, tables
from evaluation.formatting import file_name
from mergekit_monosoup import terminal

# A result as it has been written since the first version, but for its samples.
ESTIMATE = {"mean": 0.5, "standard_error": 0.25}
DIGESTS = {"weights": "w", "config": "c", "tokenizer": "t"}
TASK = {"task": "a", "label": "", "metric": "acc", "filter": "none", "num_fewshot": None}
TASK |= {"generation": {"until": ["\n"], "temperature": 0.7, "do_sample": True}, "cluster": None}
WRITTEN = {
    "format": 1,
    "key": "k",
    "model": "m",
    "source": {
        "given": "m.yml",
        "fingerprint": DIGESTS,
        "merge": {"config": {"merge_method": "monosoup"}, "inputs": {"a/b": "d"}},
    },
    "w0": {"given": "a/b", "fingerprint": DIGESTS},
    "command": "python -m evaluation.run s",
    "suite": {
        **{"name": "s", "title": "S", "version": 1, "public": True, "seed": 1234},
        **{"chat_template": False, "enable_thinking": None, "batch_size": 16, "world": 0},
        **{"ID": [TASK], "OOD": [{**TASK, "task": "b"}]},
    },
    "suite_digest": "d",
    "settings": {"backend": "hf", "device": "cpu", "dtype": "auto", "limit": None},
    "versions": {"torch": "2.13.0"},
    "git": None,
    "date": "2026-01-01T00:00:00+00:00",
    "seconds": 1.5,
    "groups": {"ID": ESTIMATE, "OOD": ESTIMATE},
    "tasks": {
        "a": {"items": 1, "scores": {"acc,none": ESTIMATE}, "num_fewshot": {"a": 0}},
        "b": {"items": 1, "scores": {"acc,none": ESTIMATE}, "num_fewshot": {"b": 0}},
    },
}


def test_a_result_is_the_same_file_after_reading_and_writing(tmp_path):
    files = store.ResultFiles(tmp_path, "m", "s")
    data = {**WRITTEN, "samples": files.write_samples([]).model_dump()}
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    files.result.write_text(text, encoding="utf-8")
    [evaluation] = store.read(tmp_path)
    assert evaluation.result.source.merge.inputs == {"a/b": "d"}
    files.rewrite(evaluation.result)
    assert files.result.read_text(encoding="utf-8") == text
    assert files.finished("k") == evaluation.result and files.finished("other") is None


@pytest.mark.parametrize("change", [{"format": 2}, {"w0": "a/b"}, {"samples": None}])
def test_what_is_no_result_is_named(tmp_path, change):
    evaluations.write(tmp_path, "m", {"a": [1], "b": [1], "c": [1]})
    file = tmp_path / "m.made.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(store.DamagedError, match=r"m\.made\.json: not a result of this version"):
        store.read(tmp_path)
    assert store.ResultFiles(tmp_path, "m", "made").finished("k") is None


def test_parts_of_another_key_or_half_written_are_not_used(tmp_path):
    files = store.ResultFiles(tmp_path, "m", "s")

    def finish(key: str) -> None:
        files.finish(evaluations.result(files.write_samples([]), key=key))

    files.keep("old", store.TaskResult("a", []))
    assert files.resume("new") == {}
    files.keep("key", store.TaskResult("a", []))
    files.keep("key", store.TaskResult("b", []))
    part = files.partial / "key" / "b.json.gz"
    part.write_bytes(part.read_bytes()[:-9])
    assert set(files.resume("key")) == {"a"}
    finish("key")  # a quick look between costs nothing
    assert set(files.resume("old")) == {"a"} and files.resume("key") == {}
    finish("old")
    assert not files.partial.exists()


# -- names that come out of files ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m-1.2+x,y_z", "größe"])
def test_plain_names_stay(name):
    assert file_name(name) == name


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "..", ".", "", "a\\b", "C:x", "a\nb", "a\0b", "x" * 300, "\ud800"]
)
def test_any_name_is_one_file_of_the_folder(name, tmp_path):
    made = tmp_path / f"{file_name(name)}.json"
    made.write_text("")
    assert list(tmp_path.rglob("*")) == [made] and not made.name.startswith(".")
    assert file_name(name) != file_name(name + "_")


def test_results_of_any_names_stay_in_the_folder(tmp_path):
    folder = tmp_path / "a" / "b" / "results"
    files = store.ResultFiles(folder, "../../m", "../../s")
    files.keep("../../../key", store.TaskResult("../../../task", []))
    files.rewrite(evaluations.result(files.write_samples([])))
    assert {p.parent for p in tmp_path.rglob("*.json*")} <= {folder, *files.partial.iterdir()}
    assert files.partial.parent == folder


def test_a_full_disk_loses_no_earlier_result(tmp_path):
    """The samples that were written last, and no result, do not drive out those of the old one."""
    evaluations.write(tmp_path, "m", {"a": [1], "b": [1], "c": [1]})
    files = store.ResultFiles(tmp_path, "m", "made")
    good = files.samples.read_bytes()
    for _ in range(2):
        files.keep_old()
        files.write_samples([])  # and then the disk is full
    assert (tmp_path / f"{files.samples.name}.old").read_bytes() == good
    assert (tmp_path / f"{files.result.name}.old").exists()


# -- damaged ---------------------------------------------------------------------------------------


def damage(folder, kind):
    """Damage the result of the model m in one way."""
    result, samples = folder / "m.made.json", folder / "m.made.samples.jsonl.gz"
    data, lines = json.loads(result.read_text()), gzip.decompress(samples.read_bytes()).splitlines()
    answer = json.loads(lines[0])

    def put(changes=(), rows=lines, content=None):
        samples.write_bytes(gzip.compress(b"\n".join(rows)) if content is None else content)
        data["samples"]["sha256"] = hashlib.sha256(samples.read_bytes()).hexdigest()
        result.write_text(json.dumps({**data, **dict(changes)}))

    def answered(**changes):
        put(rows=[json.dumps({**answer, **changes}).encode(), *lines[1:]])

    kinds = {
        "cut off": lambda: result.write_bytes(result.read_bytes()[:-99]),
        "empty": lambda: result.write_bytes(b""),
        "binary": lambda: result.write_bytes(bytes(range(256))),
        "utf-16": lambda: result.write_text(result.read_text(), encoding="utf-16"),
        "a list": lambda: result.write_text("[]"),
        "deep": lambda: result.write_text("[" * 100_000),
        "a number of 5000 digits": lambda: result.write_text('{"seconds": ' + "9" * 5000 + "}"),
        "a folder": lambda: (result.unlink(), result.mkdir()),
        "a pipe": lambda: (result.unlink(), os.mkfifo(result)),
        "another version": lambda: put({"format": 2}),
        "a list for a mapping": lambda: put({"tasks": []}),
        "a number for a mapping": lambda: put({"suite": 3}),
        "null": lambda: put({"suite": None}),
        "a path for a suite": lambda: put({"suite": {**data["suite"], "name": "../../x"}}),
        "a path for a model": lambda: put({"model": "../x"}),
        "a path for samples": lambda: put({"samples": {**data["samples"], "file": "../x"}}),
        "not finite": lambda: put({"seconds": float("inf")}),
        "samples missing": samples.unlink,
        "samples of a folder": lambda: (samples.unlink(), samples.mkdir()),
        "samples changed": lambda: samples.write_bytes(gzip.compress(b"")),
        "samples not zipped": lambda: put(content=b"text"),
        "samples cut off": lambda: put(content=samples.read_bytes()[:-9]),
        "samples torn": lambda: put(content=samples.read_bytes()[:30] + bytes(60)),
        "samples not text": lambda: put(rows=[b"\xff\xfe"]),
        "samples not JSON": lambda: put(rows=[b"{", *lines]),
        "samples a list": lambda: put(rows=[b"[]", *lines]),
        "an answer without a field": lambda: put(rows=[b'{"task": "a"}', *lines]),
        "an answer of no number": lambda: answered(values={"exact_match,none": "x"}),
        "an answer not finite": lambda: answered(values={"exact_match,none": float("nan")}),
        "an answer without its metric": lambda: answered(values={}),
        "a task not answered": lambda: put(rows=lines[:1]),
    }
    if kind is None:
        return list(kinds)
    return kinds[kind]()


def test_damaged_results_are_named_in_one_line(tmp_path, capsys):
    evaluations.write(tmp_path, "m", {"a": [1], "b": [1], "c": [1]})
    for number, kind in enumerate(damage(tmp_path, None)):
        folder = tmp_path / str(number)
        for model in ("finetuned", "m"):
            evaluations.write(folder, model, {"a": [1], "b": [1], "c": [1]})
        assert tables.main([str(folder)]) == 0
        capsys.readouterr()
        damage(folder, kind)
        assert tables.main([str(folder)]) == 1, kind
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"error: {folder}/m.made." in lines[0], (kind, lines)
        store.ResultFiles(folder, "m", "made").finished("k")  # is asked again, or whole


def test_damaged_parts_are_asked_again(tmp_path):
    files = store.ResultFiles(tmp_path, "m", "s")
    for content in (b"", b"x", gzip.compress(b"[]"), gzip.compress(b"{}"), gzip.compress(b"\xff")):
        files.keep("key", store.TaskResult("a", []))
        assert set(files.resume("key")) == {"a"}
        (files.partial / "key" / "a.json.gz").write_bytes(content)
        assert files.resume("key") == {}


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_asked(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "sub", tmp_path / ("x" * 300), tmp_path / "not utf-8 \udce9"):
        assert run.main(["tiny", "--model", "a=none", "--out", str(out)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {terminal.plain(out)}: ")


def test_what_cannot_be_written_is_named(tmp_path):
    files = store.ResultFiles(tmp_path / "file" / "below", "m", "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        files.write_samples([])
