"""`mergekit-monosoup run` of several stages: the models of mergekit-multi, whatever happens."""

from __future__ import annotations

import copy
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.merges import (
    SMALL,
    Killed,
    assert_same,
    interrupted_after,
    killed_at,
    run,
    stored,
    without_time,
)
from mergekit.scripts import multimerge

from mergekit_monosoup.distributed.folder import NAME, WorkFolder
from mergekit_monosoup.distributed.publication import RECORD

NAMES = ("edited", "averaged")
STEP = int(os.environ.get("STEP", 29))
BATCHES = ("--workers", "1", "--seed-per-tensor", *SMALL)  # in this thread, as batches


def documents(world: Path, folder: Path) -> list[dict]:
    """Two stages, the second made from the first, and a last one made from both."""
    base, tuned0, tuned1 = (f"{world}/qwen3/{name}" for name in ("base", "tuned0", "tuned1"))
    return [
        {
            "name": "averaged",
            "merge_method": "linear",
            "models": [{"model": "edited"}, {"model": tuned1}],
            "parameters": {"weight": 0.5},
            "dtype": "float32",
        },
        {
            "merge_method": "monosoup",
            "base_model": base,
            "models": [{"model": "averaged"}, {"model": "edited"}],
            "parameters": {"report": f"{folder}/last.jsonl"},
            "out_dtype": "bfloat16",
        },
        {
            "name": "edited",
            "merge_method": "monosoup",
            "base_model": base,
            "models": [{"model": tuned0}],
            "parameters": {"report": f"{folder}/edited.jsonl"},
            "dtype": "float32",
        },
    ]


def write(path: Path, stages: list[dict]) -> Path:
    path.write_text(yaml.safe_dump_all(stages, sort_keys=False))
    return path


def quick(world: Path, folder: Path) -> list[dict]:
    """Two stages that take little time."""
    models = [{"model": f"{world}/qwen3/tuned0", "parameters": {"weight": 1.0}}]
    report = {"merge_method": "linear", "models": models, "dtype": "float32"}
    last = {"models": [{"model": "edited", "parameters": {"weight": 2.0}}]}
    return [{"name": "edited", **report}, {**report, **last}]


@pytest.fixture(scope="module")
def home(world, tmp_path_factory) -> Path:
    """A folder with multi.yml and, in `reference`, what mergekit-multi made of it there."""
    home = tmp_path_factory.mktemp("home")
    multi, made = write(home / "multi.yml", documents(world, home)), home / "reference"
    mergekit_multi(multi, home)
    made.mkdir()
    for path in [home / "out", home / "stages", *home.glob("*.jsonl")]:
        shutil.move(path, made)
    return home


@pytest.fixture
def multi(home) -> Iterator[Path]:
    """Its file, in a folder where nothing is merged yet."""
    yield home / "multi.yml"
    for path in [home / "out", home / "stages"]:
        shutil.rmtree(path, ignore_errors=True)
    for path in home.glob("*.jsonl*"):
        path.unlink()


def mergekit_multi(multi: Path, home: Path, *options: str) -> Path:
    arguments = [multi, "-I", home / "stages", "--out-path", home / "out", "--quiet", *options]
    CliRunner().invoke(multimerge.main, list(map(str, arguments)), catch_exceptions=False)
    return home / "out"


def assert_stages(home: Path) -> None:
    """All models and reports are those of mergekit-multi."""
    reference = home / "reference"
    assert_same(home / "out", reference / "out")
    for name in NAMES:
        record = home / "stages" / name / RECORD
        record.rename(home / f"{name}.json")
        assert_same(record.parent, reference / "stages" / name)
        (home / f"{name}.json").rename(record)
    for name in ("edited.jsonl", "last.jsonl"):
        assert without_time(home / name) == without_time(reference / name)


def assert_equal(out: Path, theirs: Path) -> None:
    ours, expected = stored(out), stored(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


# -- the same result -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--workers", "3", *SMALL), ("--workers", "1")])
def test_every_model_is_that_of_mergekit_multi(options, multi, home):
    output = run(multi, home / "out", "-I", home / "stages", *options)
    said = [line for line in output.splitlines() if line.startswith("stage ")]
    assert said == ["stage 1 of 3, edited", "stage 2 of 3, averaged", "stage 3 of 3"]
    assert_stages(home)
    assert not (home / "out" / NAME).exists()


def test_without_a_folder_for_them_the_stages_are_removed(multi, home, tmp_path):
    out = tmp_path / "out"
    run(multi, out, *SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (out / NAME).exists()
    assert_equal(out, home / "reference" / "out")
    # The model card shows all that it takes to make the model again.
    card = (out / "README.md").read_text()
    assert "* edited\n" in card and NAME not in card and multi.read_text() in card
    assert (out / "mergekit_config.yml").read_text() == multi.read_text()


def test_a_space_in_a_path_does_no_harm(world, tmp_path):
    """mergekit cannot quote such a configuration, and mergekit-multi stops at it."""
    shutil.copytree(world / "qwen3" / "tuned0", tmp_path / "fine tuned")
    stages = quick(world, tmp_path)
    stages[0]["models"][0]["model"] = f"{tmp_path}/fine tuned"
    path, folder = write(tmp_path / "multi.yml", stages), tmp_path / "stages"
    run(path, tmp_path / "out", "-I", folder, "--quiet")
    written = (folder / "edited" / "mergekit_config.yml").read_text()
    assert "fine tuned" in " ".join(written.split())


def test_random_numbers_as_mergekit_draws_them(world, tmp_path):
    """Several threads refuse; what the message advises goes on with the finished stage."""
    stages = quick(world, tmp_path)
    stages[1]["merge_method"] = "dice"
    path, out = write(tmp_path / "multi.yml", stages), tmp_path / "b" / "out"
    refused = run(path, out, "--workers", "2", "--random-seed", "3", code=1)
    assert "Merge with --workers 1" in refused and "1 finished stage(s) are kept" in refused
    output = run(path, out, "--workers", "1", "--resume", "--random-seed", "3")
    assert "edited: is merged already" in output
    assert_equal(out, mergekit_multi(path, tmp_path / "a", "--random-seed", "3"))


# -- interrupted, and gone on with -----------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_ctrl_c_in_the_second_stage(kept, multi, home):
    out, more = home / "out", ["-I", home / "stages"] if kept else []
    with interrupted_after(7):
        output = run(multi, out, *BATCHES, *more, code=130)
    assert re.search(r"1 finished stage\(s\) and 2 finished batch\(es\), .*, are kept in", output)
    assert [p.name for p in out.iterdir()] == [NAME]
    refused = run(multi, out, *BATCHES, *more, code=1)
    assert "unfinished merge (1 stages, 2 batches done): --resume continues it" in refused
    output = run(multi, out, *BATCHES, *more, "--resume")
    assert "stage 1 of 3, edited: is merged already\nstage 2 of 3, averaged\n" in output
    assert "resuming: 2 of" in output and not (out / NAME).exists()
    if kept:
        assert_stages(home)
    else:
        assert_equal(out, home / "reference" / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "first"), [(True, 11), (False, 25)])
def test_killed_at_any_moment_it_can_be_resumed(kept, first, world, tmp_path):
    """Some renames and removals in turn are the first that do not happen, like all after them.

    With STEP = 1 it is each of them; then this takes minutes.
    """
    path, theirs = write(tmp_path / "multi.yml", quick(world, tmp_path)), {}
    for moment in itertools.count(first, STEP):
        folder = tmp_path / f"b{moment}"
        out, more = folder / "out", ["-I", folder / "stages"] if kept else []
        options = ["--workers", "1", "--seed-per-tensor", "--no-copy-tokenizer", *more]
        try:
            with killed_at(moment, str(folder)):
                run(path, out, *options)
            break
        except Killed:
            pass
        if not (out / "config.json").exists() or WorkFolder(out).resumable:
            run(path, out, *options, "--resume")
        theirs = theirs or stored(out)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in stored(out).items())
        assert (folder / "stages" / "edited" / "config.json").exists() == kept
        assert not WorkFolder(out).resumable
        shutil.rmtree(folder)
    ours = stored(out)
    assert moment > 60 and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_stage_is_taken_only_if_it_is_the_same(world, tmp_path):
    stages = quick(world, tmp_path)
    path = write(tmp_path / "multi.yml", stages)
    out, folder = tmp_path / "out", tmp_path / "stages"
    more, edited = ("-I", folder), folder / "edited"
    run(path, out, *more)
    shutil.rmtree(out)
    assert "edited holds a model: --resume takes it if" in run(path, out, *more, code=1)
    (edited / RECORD).rename(tmp_path / RECORD)
    assert "nothing says what it is made from" in run(path, out, *more, "--resume", code=1)
    (tmp_path / RECORD).rename(edited / RECORD)

    changed = copy.deepcopy(stages)
    changed[0]["models"][0]["parameters"]["weight"] = 3.0
    other = write(tmp_path / "other.yml", changed)
    refused = run(other, out, *more, "--resume", code=1)
    assert "stages/edited: cannot resume" in refused and "3.0" in refused
    weights = edited / "model.safetensors"
    state, before = weights.stat(), stored(edited)
    os.utime(weights, (state.st_atime, state.st_mtime + 5))
    refused = run(path, out, *more, "--resume", code=1)
    assert "edited: the model of this stage was changed" in refused and str(weights) in refused
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not out.exists()

    changed[0] = stages[0]
    changed[1]["models"][0]["parameters"]["weight"] = 4.0
    last = write(tmp_path / "last.yml", changed)
    output = run(last, out, *more, "--resume", "--workers", "1")  # whatever it was merged by
    assert "stage 1 of 2, edited: is merged already" in output
    run(other, out, *more, "--force", "--quiet")
    name = "lm_head.weight"
    assert weights.stat().st_mtime_ns != state.st_mtime_ns and before[name].dtype == torch.float32


def test_a_changed_stage_is_noticed_when_only_renaming_is_left(world, tmp_path, monkeypatch):
    stages, out, replace = quick(world, tmp_path), tmp_path / "out", os.replace
    path = write(tmp_path / "multi.yml", stages)

    def full(source, target):
        if target == out / "config.json":
            raise OSError(28, "No space left on device", str(target))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left" in run(path, out, code=1)
    stages[0]["dtype"] = "bfloat16"
    other = write(tmp_path / "other.yml", stages)
    assert "earlier stages: edited was" in run(other, out, "--resume", code=1)
    run(path, out, "--resume")
    assert (out / "config.json").exists() and not (out / NAME).exists()


def test_another_merge_does_not_take_over_what_stages_left(world, tmp_path):
    stages, out = quick(world, tmp_path), tmp_path / "out"
    path = write(tmp_path / "multi.yml", stages)
    with interrupted_after(3):
        run(path, out, *BATCHES, code=130)
    resumed = (out, *BATCHES, "--resume")
    single = write(tmp_path / "single.yml", [{k: v for k, v in stages[0].items() if k != "name"}])
    assert "has other stages: edited, not none" in run(single, *resumed, code=1)
    stages[0]["name"] = stages[1]["models"][0]["model"] = "mean"
    renamed = write(tmp_path / "renamed.yml", stages)
    assert "edited, not mean" in run(renamed, *resumed, code=1)
    edited, elsewhere = out / NAME / "stages" / "edited", tmp_path / "elsewhere"
    edited.rename(elsewhere)
    edited.symlink_to(elsewhere)
    assert "is a symbolic link, which no merge makes" in run(path, *resumed, code=1)
    run(single, out, "--force")
    assert not (out / NAME).exists() and elsewhere.exists()


# -- what cannot be merged -------------------------------------------------------------------------


def changed(world: Path, folder: Path, number: int, **values: object) -> list[dict]:
    stages = documents(world, folder)
    stages[number] |= values
    return [{k: v for k, v in stage.items() if v is not None} for stage in stages]


@pytest.mark.parametrize(
    ("number", "values", "words"),
    [
        (0, {"models": [{"model": "averaged"}]}, "a circle: averaged needs averaged"),
        (2, {"models": [{"model": "averaged"}]}, "averaged needs edited needs averaged"),
        (2, {"name": "edit"}, "stage averaged: edited is no folder here, and no stage of this"),
        (1, {"name": "last"}, "no stage(s) have no `name`: one must have none"),
        (0, {"name": None}, "2 stage(s) have no `name`"),
        (0, {"name": "Edited"}, "2 stages are called edited"),
        (0, {"name": "../out"}, "`name` must be good for a folder"),
        (0, {"name": 7}, "`name` must be good for a folder"),
        (2, {"name": "monosoup"}, "stage monosoup: mergekit-multi also replaces"),
        (1, {"models": [{"model": "edited"}]}, "nothing is made from the stage averaged"),
        (2, {"models": 3}, "stage edited: models: "),
        (2, {"models": [{"model": "{world}/qwen3/none"}]}, "qwen3/none: no such file or folder"),
        (2, {"models": [{"model": "{tmp}/out"}]}, "out is an input of this merge"),
    ],
)
def test_what_cannot_be_merged_is_said_before_anything_is(number, values, words, world, tmp_path):
    out = tmp_path / "out"
    for model in values.get("models") or () if isinstance(values.get("models"), list) else ():
        model["model"] = model["model"].format(world=world, tmp=tmp_path)
    path = write(tmp_path / "multi.yml", changed(world, tmp_path, number, **values))
    output = run(path, out, code=1)
    assert words in output and "Traceback" not in output and "stage 1 of" not in output
    assert not out.exists()


def test_folders_of_stages_that_cannot_be(world, tmp_path):
    stages = quick(world, tmp_path)
    path, out, folder = tmp_path / "stages.yml", tmp_path / "out", tmp_path / "models"
    assert "--intermediate-dir is for files of several stages" in run(
        write(path, stages[:1]), out, "-I", folder, code=1
    )
    shutil.copytree(world / "qwen3" / "tuned0", folder / "edited")
    stages[0]["models"][0]["model"] = f"{folder}/edited"
    output = run(write(path, stages), out, "-I", folder, "--force", code=1)
    assert f"{folder}/edited is an input of this merge" in output and not out.exists()
