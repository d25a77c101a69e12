"""Result files: what is finished, what an interrupted run left, what is damaged."""

from __future__ import annotations

import json

import pytest
from helpers import evaluations

from evaluation import store
from evaluation.formatting import file_name

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


def test_samples_of_another_folder_are_not_read(tmp_path):
    evaluations.write(tmp_path / "in", "m", {"a": [1], "b": [1], "c": [1]})
    file = tmp_path / "in" / "m.made.json"
    data = json.loads(file.read_text())
    samples = tmp_path / "in" / data["samples"]["file"]
    samples.rename(tmp_path / samples.name)
    data["samples"]["file"] = f"../{samples.name}"
    file.write_text(json.dumps(data))
    with pytest.raises(store.DamagedError, match="names samples in another folder"):
        store.read(tmp_path / "in")


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
