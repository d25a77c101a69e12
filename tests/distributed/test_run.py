"""`mergekit-monosoup run` in one process: the model of mergekit-yaml, whatever happens."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.merges import (
    ALONE,
    SMALL,
    Killed,
    assert_same,
    config,
    interrupted_after,
    killed_at,
    mergekit,
    run,
    stop,
    stored,
    without_time,
)
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_monosoup import report
from mergekit_monosoup.cli import main
from mergekit_monosoup.distributed import command, dependencies, engines, plan, worker
from mergekit_monosoup.distributed import folder as folders
from mergekit_monosoup.distributed.folder import WorkFolder
from mergekit_monosoup.kernel import batch

# -- the same result -------------------------------------------------------------------------------


def test_alone_it_is_mergekit_yaml(world, tmp_path):
    path = config(world, tmp_path)
    reference = mergekit(path, tmp_path / "a" / "out", *SMALL)
    run(path, tmp_path / "b" / "out", *SMALL, "--workers", "1", "--quiet")
    files = {p.name for p in reference.iterdir()}
    assert files == {p.name for p in (tmp_path / "b" / "out").iterdir()} and len(files) > 6
    assert all(
        (reference / f).read_bytes() == (tmp_path / "b" / "out" / f).read_bytes() for f in files
    )


CASES = {
    "monosoup": dict(),
    "float32": dict(dtype="float32", out_dtype="float32"),
    "rounded by mergekit": dict(dtype="float32", out_dtype="bfloat16"),
    "experts": dict(family="qwen3_moe"),
    "tied": dict(family="tied"),
    "svc": dict(method="svc", tuned=2),
    "linear": dict(method="linear", tuned=2, parameters={"weight": 0.5}),
    "ties": dict(method="ties", tuned=2, parameters={"weight": 0.5, "density": 0.5}),
    "filters": dict(
        parameters={
            "R": [{"filter": "mlp", "value": 0.9}, {"value": [0.3, 0.7]}],
            "mode": "variance",
        }
    ),
    "tokenizer": dict(tokenizer={"source": "base"}, chat_template="chatml"),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_add_up_to_the_merge(case, world, tmp_path):
    path = config(world, tmp_path, **CASES[case])
    reference = mergekit(path, tmp_path / "a" / "out")
    output = run(path, tmp_path / "b" / "out", *SMALL, *ALONE)
    assert len(list((tmp_path / "b" / "out").glob("model-*.safetensors"))) > 1
    assert_same(tmp_path / "b" / "out", reference)
    assert "in 1 file" not in output and "1 worker" in output


def test_one_batch_is_one_file_without_an_index(world, tmp_path):
    path = config(world, tmp_path)
    run(path, tmp_path / "b" / "out", "--resume")
    assert [p.name for p in (tmp_path / "b" / "out").glob("*model*")] == ["model.safetensors"]
    assert_same(tmp_path / "b" / "out", mergekit(path, tmp_path / "a" / "out"))


def test_slices_of_a_passthrough(world, tmp_path):
    base, tuned = world / "llama" / "base", world / "llama" / "tuned0"
    layers = [(base, [0, 2]), (tuned, [0, 2]), (base, [1, 2])]
    path = tmp_path / "merge.yml"
    slices = [{"sources": [{"model": str(model), "layer_range": span}]} for model, span in layers]
    path.write_text(yaml.dump({"merge_method": "passthrough", "slices": slices}))
    reference = mergekit(path, tmp_path / "a" / "out")
    run(path, tmp_path / "b" / "out", *SMALL, "--resume")
    assert_same(tmp_path / "b" / "out", reference)
    assert json.loads((reference / "config.json").read_text())["num_hidden_layers"] == 5


def test_pickles(world, tmp_path):
    path = config(world, tmp_path)
    reference = mergekit(path, tmp_path / "a" / "out", "--no-safe-serialization")
    run(
        path,
        tmp_path / "b" / "out",
        *SMALL,
        "--resume",
        "--no-safe-serialization",
        "--async-write",
        "--clone-tensors",
    )
    assert (tmp_path / "b" / "out" / "pytorch_model.bin.index.json").exists()
    assert_same(tmp_path / "b" / "out", reference)


def test_vocabularies_of_two_sizes(world, tmp_path):
    """The tokenizer is built once, and kept: mergekit orders unions differently each time."""
    models = [{"model": f"{world}/qwen3/tuned0"}, {"model": f"{world}/wide/base"}]
    path = config(
        world,
        tmp_path,
        "linear",
        models=models,
        tokenizer={"source": "union"},
        parameters={"weight": 0.5},
    )
    outs = [tmp_path / "b" / "out", mergekit(path, tmp_path / "a" / "out")]
    run(path, outs[0], *SMALL, "--resume")
    by_token = []
    for out in outs:
        words = AutoTokenizer.from_pretrained(out).get_vocab()
        state = stored(out)
        vocabulary = {
            name: state.pop(name) for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        by_token.append(
            (
                state,
                {
                    (name, w): tensor[i]
                    for name, tensor in vocabulary.items()
                    for w, i in words.items()
                },
            )
        )
    for ours, theirs in zip(*by_token, strict=True):
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        )
    assert ("lm_head.weight", "w100") in by_token[0][1]


def test_adapter_and_bare_output(world, tmp_path):
    path = config(world, tmp_path, models=[{"model": f"{world}/qwen3/base+{world}/adapter"}])
    options = (
        "--lora-merge-cache",
        str(tmp_path / "cache"),
        "--no-write-model-card",
        "--no-copy-tokenizer",
    )
    reference = mergekit(path, tmp_path / "a" / "out", *options)
    run(path, tmp_path / "b" / "out", *SMALL, *options, "--resume")
    assert_same(tmp_path / "b" / "out", reference)
    assert not (reference / "README.md").exists()


# -- random numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"), [("dice", {}), ("dare_linear", {"weight": 1.0, "density": 0.5})]
)
def test_random_methods_are_refused(method, parameters, world, tmp_path):
    path = config(world, tmp_path, method, parameters=parameters)
    output = run(path, tmp_path / "out", *SMALL, "--resume", code=1)
    assert f"merge method {method} draws random numbers" in output and "--seed-per-tensor" in output
    assert not (tmp_path / "out").exists()


def test_drawing_none_is_fine(world, tmp_path):
    path = config(world, tmp_path, "dare_linear", parameters={"weight": 1.0, "density": 1.0})
    run(path, tmp_path / "b" / "out", *SMALL, "--resume")
    assert_same(tmp_path / "b" / "out", mergekit(path, tmp_path / "a" / "out"))


def test_a_stream_per_tensor_does_not_depend_on_the_batches(world, tmp_path):
    path = config(world, tmp_path, "dice")
    for name, *options in (("a", *SMALL), ("b",), ("c", "--random-seed", "1")):
        run(path, tmp_path / name / "out", "--seed-per-tensor", *options)
    assert_same(tmp_path / "a" / "out", tmp_path / "b" / "out")
    a, c = stored(tmp_path / "a" / "out"), stored(tmp_path / "c" / "out")
    assert not any(torch.equal(a[name], c[name]) for name in a)
    norms = [t.float() for n, t in a.items() if n.endswith("layernorm.weight")]
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(norms, 2)), (
        "tensors share a stream"
    )


# -- reports and errors ----------------------------------------------------------------------------


def test_report_is_whole_and_in_order(world, tmp_path, caplog):
    path = config(world, tmp_path, family="faint", parameters={"report": f"{tmp_path}/r.jsonl"})
    mergekit(path, tmp_path / "a" / "out")
    shutil.move(tmp_path / "r.jsonl", tmp_path / "reference.jsonl")
    (tmp_path / "r.jsonl").write_text(report.Record("earlier", (1,), "float32").to_json() + "\n")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mergekit_monosoup"):
        run(path, tmp_path / "b" / "out", *SMALL, "--resume")
    assert without_time(tmp_path / "r.jsonl") == without_time(tmp_path / "reference.jsonl")
    assert [record.name for record in report.read(tmp_path / "r.jsonl.old")] == ["earlier"]
    assert len([r for r in caplog.records if "rounding to" in r.getMessage()]) == 1, (
        "once per merge, not per batch"
    )
    names = list(stored(tmp_path / "b" / "out"))
    places = [
        names.index(record.name.split("[")[0]) for record in report.read(tmp_path / "r.jsonl")
    ]
    batches = [file for file in sorted((tmp_path / "b" / "out").glob("model-*"))]
    assert len(batches) > 2 and places == sorted(
        places, key=lambda place: where(batches, names[place])
    )


def where(files: list[Path], name: str) -> int:
    from safetensors import safe_open

    return next(n for n, file in enumerate(files) if name in set(safe_open(file, "pt").keys()))


def test_error_is_one_line_with_the_tensor(world, tmp_path):
    shutil.copytree(world / "qwen3" / "tuned0", tmp_path / "tuned0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned0", dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "tuned0", max_shard_size="20KB")
    path = config(world, tmp_path, models=[{"model": f"{tmp_path}/tuned0"}])
    with pytest.raises(ValueError, match="is not finite") as theirs:
        mergekit(path, tmp_path / "a" / "out")
    output = run(path, tmp_path / "b" / "out", *SMALL, *ALONE, code=1)
    assert f"Error: {theirs.value}\n" in output and "layers.1.mlp.up_proj" in str(theirs.value)
    assert "Traceback" not in output and "1 finished batch(es), " in output
    assert not (tmp_path / "b" / "out" / "config.json").exists()

    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 0.0
    model.save_pretrained(tmp_path / "tuned0", max_shard_size="20KB")
    output = run(path, tmp_path / "b" / "out", *SMALL, "--resume", code=1)
    assert (
        "cannot resume" in output and f"{tmp_path}/tuned0/model-" in output and "--force" in output
    )
    run(path, tmp_path / "b" / "out", *SMALL, "--seed-per-tensor", "--force")
    assert_same(tmp_path / "b" / "out", mergekit(path, tmp_path / "c" / "out"))


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("monosoup", {"R": 7}, "`R` must be a number in (0, 1]"),
        ("linear", {"weight": "x"}, "a number: 'x' (`mergekit-monosoup check` says where)\n"),
    ],
)
def test_errors_of_planning_leave_no_trace(method, parameters, words, world, tmp_path):
    path = config(world, tmp_path, method, parameters=parameters)
    for options in (["--resume"], []):
        output = run(path, tmp_path / "deep" / "out", *options, code=1)
        assert words in output
        assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "dictionary"), ("a: [b\n", "cannot be read as YAML")],
)
def test_a_file_that_is_no_merge_is_named(text, message, tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text(text)
    output = run(path, tmp_path / "out", "--resume", code=1)
    assert message in output and str(path) in output and not (tmp_path / "out").exists()


# -- options ---------------------------------------------------------------------------------------


def test_every_option_of_mergekit_has_been_looked_at():
    assert set(MergeOptions.model_fields) == command.SUPPORTED_OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--multi-gpu", "--resume"], "--ray local --workers N --gpus"),
        (["--gpu-rich", "--workers", "2"], "--ray local --workers N --gpus"),
        (["--gpus"], "add --ray local --workers N"),
        (["--gpus", "--resume"], "add --ray local --workers N"),
        (["--workers", "2", "--cuda"], "add --ray local --gpus"),
        (["--ray", "local", "--device", "cuda:1", "--gpus"], "leave out --device cuda:1"),
        (["--workers", "2", "--resume", "--force"], "choose one"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message, world, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "import_ray", lambda: None)  # there is none for the newest Python
    assert message in run(config(world, tmp_path), tmp_path / "out", *options, code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("indexed", [False, True])
def test_an_incomplete_model_is_noticed_before_anything_is_merged(indexed, world, tmp_path):
    gone = "model.layers.0.mlp.up_proj.weight"
    path, broken = config(world, tmp_path, family="wide"), tmp_path / "broken"
    shutil.copytree(world / "wide" / "tuned0", broken)
    state = load_file(broken / "model.safetensors")
    if indexed:
        index = {"weight_map": dict.fromkeys(state, "model.safetensors")}
        (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {n: t for n, t in state.items() if n != gone},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    path.write_text(path.read_text().replace(f"{world}/wide/tuned0", str(broken)))
    output = run(path, tmp_path / "b" / "out", "--resume", code=1)
    assert (
        "lacks" in output
        and gone in output
        and "broken" in output
        and "is the checkpoint complete?" in output
    )
    assert not (tmp_path / "b" / "out").exists()


@pytest.mark.parametrize("bytes_left", [0, 4, 500, -10])
def test_a_file_that_was_cut_off_is_named(bytes_left, world, tmp_path):
    path, broken = config(world, tmp_path, family="wide"), tmp_path / "broken"
    shutil.copytree(world / "wide" / "tuned0", broken)
    file = broken / "model.safetensors"
    os.truncate(file, bytes_left if bytes_left >= 0 else file.stat().st_size + bytes_left)
    path.write_text(path.read_text().replace(f"{world}/wide/tuned0", str(broken)))
    output = run(path, tmp_path / "b" / "out", "--resume", code=1)
    assert str(broken) in output and not (tmp_path / "b" / "out").exists()


def test_paths_with_spaces(world, tmp_path):
    """mergekit cannot dump such a configuration as JSON."""
    shutil.copytree(world / "qwen3" / "tuned0", tmp_path / "fine tuned")
    path, out = config(world, tmp_path), tmp_path / "b" / "out"
    path.write_text(path.read_text().replace(f"{world}/qwen3/tuned0", f"{tmp_path}/fine tuned"))
    run(path, out, *SMALL, "--resume")
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


def test_what_lies_beside_the_weights_is_no_matter(world, tmp_path):
    path, tuned = config(world, tmp_path), tmp_path / "tuned"
    shutil.copytree(world / "qwen3" / "tuned0", tuned)
    (tuned / "._model.safetensors").write_bytes(b"of a file manager")
    (tuned / "optimizer.safetensors").mkdir()
    path.write_text(path.read_text().replace(f"{world}/qwen3/tuned0", str(tuned)))
    run(path, tmp_path / "b" / "out", "--resume")


def test_a_tokenizer_without_a_model_is_nobodys_leftover(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "chat_template.jinja").write_text("mine")
    run(config(world, tmp_path), out, "--resume", "--no-copy-tokenizer")
    assert (out / "chat_template.jinja").read_text() == "mine" and (out / "config.json").exists()


def test_nothing_of_the_old_model_is_left_beside_the_new_one(world, tmp_path):
    path, out = config(world, tmp_path), tmp_path / "out"
    for options in ([], ["--seed-per-tensor"]):
        run(path, out, "--force", *options)
        for name in ("tokenizer.json", "vocab.txt", "generation_config.json", "notes.txt"):
            (out / name).write_text("of another model")
        run(path, out, "--force", *options)
        left = [
            p.name for p in out.iterdir() if p.is_file() and p.read_bytes() == b"of another model"
        ]
        assert left == ["notes.txt"]


def test_an_option_of_a_later_mergekit_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SUPPORTED_OPTIONS", command.SUPPORTED_OPTIONS - {"clone_tensors"})
    output = run(config(world, tmp_path), tmp_path / "out", "--resume", "--clone-tensors", code=1)
    assert "--clone-tensors is newer than this mergekit-monosoup" in output


@pytest.mark.parametrize("options", [["--ray", "local"], ["--ray", "auto"]])
def test_without_ray_the_extra_is_named(options, world, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "ray" else find(name, *rest),
    )
    output = run(config(world, tmp_path), tmp_path / "out", *options, code=1)
    assert "pip install 'mergekit-monosoup[ray]'" in output


def test_help_is_that_of_the_command_with_mergekits_options():
    result = CliRunner().invoke(main, ["run", "--help"])
    assert (
        result.exit_code == 0
        and "--workers" in result.output
        and "--lora-merge-cache" in result.output
    )
    assert "mergekit-monosoup" not in result.output.split("Usage:")[0]


# -- interrupted, and gone on with -----------------------------------------------------------------


def test_resume_does_the_rest(interrupted, tmp_path, monkeypatch):
    path, out = interrupted
    begun = []
    monkeypatch.setattr(
        engines,
        "execute",
        lambda context, batch: begun.append(batch) or worker.execute(context, batch),
    )
    output = run(path, out, *SMALL, *ALONE)
    assert "resuming: 2 of 3 batches are done" in output and len(begun) == 1
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


def test_unfinished_is_not_taken_for_new(interrupted):
    path, out = interrupted
    assert "holds an unfinished merge (2 batches done): --resume" in run(
        path, out, *SMALL, "--seed-per-tensor", code=1
    )
    assert "holds an unfinished merge" in run(path, out, code=1)  # nor by mergekit-yaml itself
    run(path, out, "--force")
    assert not (out / folders.NAME).exists() and (out / "config.json").exists()


def test_a_changed_configuration_is_refused(interrupted, world, tmp_path):
    _, out = interrupted
    path = config(world, tmp_path, parameters={"mode": "variance"})
    output = run(path, out, *SMALL, "--resume", code=1)
    assert "configuration: parameters was absent, is {'mode': 'variance'}" in output


def test_a_changed_shard_size_or_thread_count_is_refused(interrupted):
    path, out = interrupted
    assert "out_shard_size was 20000, is 5000000000" in run(path, out, "--resume", code=1)
    assert "threads per worker (-j) was" in run(path, out, *SMALL, "--resume", "-j", "7", code=1)


def test_changed_versions_are_refused(interrupted, monkeypatch):
    path, out = interrupted
    monkeypatch.setattr(dependencies, "version", lambda package: "0.0")
    assert "versions: mergekit was 0.1.5, is 0.0" in run(path, out, *SMALL, "--resume", code=1)


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1] + b"!")]
)
def test_a_damaged_shard_is_merged_again(damage, interrupted, tmp_path):
    path, out = interrupted
    damage(out / folders.NAME / "done" / "00001-1.safetensors")
    assert "merged again" in run(path, out, *SMALL, "--resume")
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


def test_one_driver_at_a_time(interrupted):
    path, out = interrupted
    with WorkFolder(out).claimed(resume=True, force=False):
        assert "another `mergekit-monosoup run` is merging into it" in run(
            path, out, *SMALL, "--resume", code=1
        )
        assert "another `mergekit-monosoup run` is merging into it" in run(
            path, out, "--force", code=1
        )


def test_what_a_driver_left_before_its_first_batch_is_not_used(world, tmp_path):
    path, out = config(world, tmp_path, tokenizer={"source": "base"}), tmp_path / "b" / "out"
    work = WorkFolder(out)
    work.done.mkdir(parents=True)
    work.vocabulary.write_bytes(b"of another merge")
    (work.path / "merge.json").write_text("{}")
    run(path, out, *SMALL, "--resume")
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))

    work.done.mkdir(parents=True)
    with work.claimed(resume=False, force=True):
        assert "merging into it right now" in run(path, out, "--force", code=1)
    run(path, out, "--force")
    assert not work.path.exists() and (out / "config.json").exists()


def test_a_finished_model_is_left_alone(world, tmp_path, monkeypatch):
    path, out = config(world, tmp_path), tmp_path / "b" / "out"
    run(path, out, *SMALL, "--resume")
    before = stored(out)
    monkeypatch.setattr(command, "import_ray", lambda: None)  # there is none for the newest Python
    for options in ([], ["--workers", "2"]):
        assert "holds a finished model; --force replaces it" in run(path, out, *options, code=1)
    assert len(list(out.glob("model-*.safetensors"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(engines, "execute", lambda *a: stop())
        assert "No batch was finished" in run(path, out, "--force", "--seed-per-tensor", code=130)
    assert_same(
        out, mergekit(path, tmp_path / "d" / "out")
    )  # the old model, until the new one is complete
    other = config(world, tmp_path, "linear", tuned=2, parameters={"weight": 0.5})
    run(other, out, "--force", "--seed-per-tensor")  # one file instead of three and an index
    assert_same(out, mergekit(other, tmp_path / "a" / "out"))
    assert stored(out).keys() == before.keys() and not torch.equal(
        *(s["lm_head.weight"] for s in (before, stored(out)))
    )
    run(path, out, *SMALL, "--force")  # in process
    assert_same(out, mergekit(path, tmp_path / "c" / "out", *SMALL))


def test_to_resume_a_finished_model_is_nothing_to_do(world, tmp_path):
    path, out = config(world, tmp_path), tmp_path / "out"
    run(path, out)
    before = stored(out)
    for _ in range(2):
        assert run(path, out, "--resume") == f"{out}: the model is finished, nothing to do\n"
    path.write_text(f"{path.read_text()}dtype: float32\n")
    assert "a finished model of another configuration" in run(path, out, "--resume", code=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(out).items())


def test_the_command_that_goes_on_is_printed(world, tmp_path):
    path, out = config(world, tmp_path), tmp_path / "my out"
    with interrupted_after(1):
        output = run(path, out, *SMALL, "--seed-per-tensor", "--force", code=130)
    *_, kept, command = output.splitlines()
    assert re.fullmatch(r"Interrupted\. 1 finished batch\(es\), [\d.]+ kB, are kept in .*:", kept)
    program, *words = shlex.split(command)
    assert program == "mergekit-monosoup" and words[-1] == "--resume" and "--force" not in words
    result = CliRunner().invoke(main, words)
    assert "resuming: 1 of 3 batches are done" in result.output
    assert_same(out, mergekit(path, tmp_path / "a" / "my out"))


def test_force_removes_weights_and_nothing_else(world, tmp_path):
    weights = [
        "model.safetensors",
        "model-1.safetensors",
        "model-00001-of-00003.safetensors",
        "pytorch_model.bin",
    ]
    weights += ["model.safetensors.index.json", "pytorch_model.bin.index.json", "config.json"]
    others = ["notes.md", "model_notes.bin", "my-model.safetensors", "adapter_model.safetensors"]
    path, out = config(world, tmp_path), tmp_path / "out"
    out.mkdir()
    for name in weights + others:
        (out / name).touch()
    run(path, out, "--force")
    for name in others:
        (out / name).unlink()
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


def test_what_fails_with_force_leaves_the_old_model_alone(world, tmp_path, monkeypatch):
    """A misspelt path, a wrong method, Ctrl-C; and a model that is an input of the merge itself."""
    path, out = config(world, tmp_path), tmp_path / "out"
    run(path, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    run(tmp_path / "nope.yml", out, "--force", code=1)
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(path.read_text().replace("monosoup", "monosuop"))
    assert "monosuop" in run(wrong, out, "--force", code=1)

    def interrupted(**given):
        (Path(given["out_path"]) / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.run_yaml.main, "callback", interrupted)
        run(path, out, "--force", "--workers", "1", code=130)
    own = tmp_path / "own.yml"
    own.write_text(path.read_text().replace(f"{world}/qwen3/tuned0", str(out)))
    for more in ([], ["--seed-per-tensor"]):
        assert f"{out} is an input of this merge, which would replace it" in run(
            own, out, "--force", *more, code=1
        )
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.fixture
def spoilt(world, tmp_path):
    """A model to spoil, and the configuration that merges it."""
    shutil.copytree(world / "qwen3" / "tuned0", tmp_path / "spoilt")
    path = config(world, tmp_path)
    path.write_text(path.read_text().replace(f"{world}/qwen3/tuned0", str(tmp_path / "spoilt")))
    return tmp_path / "spoilt", path


@pytest.mark.parametrize("more", [[], ["--seed-per-tensor"]])
def test_models_that_cannot_be_merged_are_named_in_a_line(spoilt, tmp_path, more):
    """A damaged shard or index, another format; nothing is written."""
    folder, path = spoilt
    out = tmp_path / "out"
    index = folder / "model.safetensors.index.json"
    text, shard = index.read_text(), min(folder.glob("*.safetensors"))
    for content, words in (
        (text.replace(shard.name, f"../{shard.name}"), "which is outside of its folder"),
        (text.replace(shard.name, "gone.safetensors"), "not there ('gone.safetensors')"),
        ("[]", "has no `weight_map`"),
    ):
        index.write_text(content)
        (line,) = run(path, out, *more, code=1).splitlines()
        assert words in line and str(index) in line
    index.write_text(text)
    shard.write_bytes(b"<!DOCTYPE html>" + bytes(20))
    (line,) = run(path, out, *more, code=1).splitlines()
    assert f"{shard} is a web page" in line
    for file in [*folder.glob("model*")]:
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")
    (line,) = run(path, out, *more, code=1).splitlines()
    assert f"{folder} has model.gguf: GGUF, which mergekit does not read" in line
    path.write_text(path.read_text().replace(str(folder), str(folder / "model.gguf")))
    (line,) = run(path, out, *more, code=1).splitlines()
    assert f"{folder}/model.gguf is GGUF, which mergekit does not read" in line
    torch.save({"w": torch.zeros(2, 2)}, folder / "model.gguf")
    (line,) = run(path, out, *more, code=1).splitlines()
    assert "model.gguf is GGUF" in line
    (folder / "model.gguf").rename(folder / "model.pt")
    path.write_text(path.read_text().replace(".gguf", ".pt"))
    (line,) = run(path, out, *more, code=1).splitlines()
    assert "model.pt is a single file, and `run` merges folders" in line
    assert "mergekit-pytorch CONFIG OUT" in line and not out.exists()


@pytest.mark.parametrize("more", [[], ["--seed-per-tensor"]])
def test_names_with_a_wrappers_prefix(world, spoilt, tmp_path, more):
    folder, path = spoilt
    state = {f"_orig_mod.{name}": tensor for name, tensor in stored(folder).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    said = run(path, tmp_path / "out", *more, code=1)
    assert f"{folder}: its names begin with `_orig_mod.`, those of {world}" in said


def test_little_room_on_the_disk_is_said_before(world, tmp_path, monkeypatch, caplog):
    path, usage = config(world, tmp_path), shutil.disk_usage(tmp_path)
    run(path, tmp_path / "a")
    assert "free" not in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=12_300))
    run(path, tmp_path / "b")
    (line,) = (r.getMessage() for r in caplog.records if "free" in r.getMessage())
    weights = sum(tensor.nbytes for tensor in stored(tmp_path / "b").values())
    assert f"{tmp_path / 'b'}: weights of {weights / 1000:.3g} kB are still to be" in line
    assert "the disk has 12.3 kB free" in line and "--resume" in line


def test_a_new_model_on_its_way_into_place_is_not_lost(world, tmp_path, monkeypatch):
    path, out = config(world, tmp_path), tmp_path / "out"
    run(path, out)
    other = config(world, tmp_path, "linear", parameters={"weight": 0.5})
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == "config.json" and Path(target).parent == out:
            raise OSError(28, "No space left on device", str(target))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left" in run(other, out, "--force", code=1)
    assert not (out / "config.json").exists()
    assert "--resume continues it" in run(other, out, code=1)
    third = config(world, tmp_path, "linear", parameters={"weight": 0.25})
    assert "weight" in run(third, out, "--resume", code=1)  # it would get the other's model
    header = out / folders.NAME / "merge.json"
    header.rename(tmp_path / "merge.json")
    assert "nothing says what the unfinished merge" in run(other, out, "--resume", code=1)
    (tmp_path / "merge.json").rename(header)
    other = config(world, tmp_path, "linear", parameters={"weight": 0.5})
    run(other, out, "--resume")
    assert_same(out, mergekit(other, tmp_path / "a" / "out"))


@pytest.mark.slow
def test_killed_at_any_moment_it_can_be_resumed(world, tmp_path):
    """A rename or removal is the first that does not happen, like all after it.

    Each in turn with STEP=1; else every third.
    """
    path = config(world, tmp_path, parameters={"report": f"{tmp_path}/r.jsonl"})
    reference = mergekit(path, tmp_path / "a" / "out")
    for last in itertools.count(step=int(os.environ.get("STEP", "3"))):
        out = tmp_path / f"b{last}" / "out"
        try:
            with killed_at(last, rf"{out}|/\.?r\.jsonl"):
                run(path, out, "--out-shard-size", "40K", *ALONE)
            break
        except Killed:
            pass
        complete = (out / "config.json").exists()
        if complete:  # the last file: only cleaning up was left
            assert_same_but_for_the_folder(out, reference)
        if not complete or WorkFolder(out).begun:
            run(path, out, "--out-shard-size", "40K", *ALONE)
        assert without_time(tmp_path / "r.jsonl")
        shutil.rmtree(out / folders.NAME, ignore_errors=True)
        assert_same(out, reference)
    assert last > 25, "so many operations were cut off"


def assert_same_but_for_the_folder(out: Path, reference: Path) -> None:
    shutil.copytree(out, out.parent / "copy" / "out", ignore=shutil.ignore_patterns(folders.NAME))
    assert_same(out.parent / "copy" / "out", reference)


# -- a worker elsewhere ----------------------------------------------------------------------------


@pytest.fixture
def assigned(world, tmp_path, monkeypatch):
    """The context of a merge and a batch, as a worker gets them."""
    caught = []
    monkeypatch.setattr(engines, "execute", lambda *a: caught.append(a) or stop())
    run(config(world, tmp_path), tmp_path / "out", *ALONE, code=130)
    ((context, batch),) = caught
    out = WorkFolder(tmp_path / "out")
    out.making.mkdir(parents=True)
    out.done.mkdir()
    out.token.write_text(context.token)
    return replace(context, own_process=True, node="driver"), batch


def failure(context, batch) -> str:
    result = worker.execute(context, batch)
    assert isinstance(result, worker.Failed)
    return result.message


def test_a_worker_that_does_not_see_out(assigned):
    context, batch = assigned
    message = failure(replace(context, out="/nonexistent/out"), batch)
    assert "cannot read /nonexistent/out" in message and "storage that all nodes share" in message


def test_a_worker_that_a_killed_driver_left_behind(assigned):
    context, batch = assigned
    WorkFolder(context.out).token.write_text("a later driver's")
    assert "another driver has taken over" in failure(context, batch)


def test_a_worker_with_other_versions(assigned):
    context, batch = assigned
    other = {**context.versions, "torch": "1.0"}
    assert f"torch {context.versions['torch']} (driver: 1.0). Install the same" in failure(
        replace(context, versions=other), batch
    )


def test_a_worker_without_the_method(assigned):
    context, batch = assigned
    context = replace(context, methods=frozenset({"monosoup", "from_elsewhere"}))
    assert "does not know the merge method from_elsewhere: install what brings it" in failure(
        context, batch
    )


def test_a_worker_that_does_not_see_an_input(assigned):
    context, batch = assigned
    sources = dict.fromkeys(context.sources, "/nonexistent/model")
    assert "has no folder /nonexistent/model, where driver has" in failure(
        replace(context, sources=sources), batch
    )


def test_a_worker_elsewhere_sends_its_log(assigned, monkeypatch):
    context, batch = assigned
    monkeypatch.setattr(worker, "_joined", "")
    monkeypatch.setattr(
        worker,
        "_merge_tensor",
        lambda *a: logging.getLogger("mergekit").warning("no embedding for %r", "w1"),
    )
    assert worker.execute(context, batch).logs[0] == (
        "mergekit",
        logging.WARNING,
        "no embedding for 'w1'",
    )


# -- the division ----------------------------------------------------------------------------------


class Named:
    def __init__(self, name: str):
        self.tensor_name = name


def footprints(*sizes: tuple[str, int]) -> list[plan.Footprint]:
    return [plan.Footprint((file,), size, size, 2 * size) for file, size in sizes]


def test_division_keeps_to_the_limit_and_to_the_files():
    sizes = footprints(("b", 4), ("a", 3), ("b", 20), ("a", 3), ("a", 3), ("b", 4), ("b", 4))
    tensors = [Named(str(number)) for number in range(len(sizes))]
    batches = plan.divide(tensors, sizes, limit=8)
    assert [[t.tensor_name for t in batch.tensors] for batch in batches] == [
        ["1", "3"],
        ["4", "0"],
        ["2"],
        ["5", "6"],
    ]
    assert [batch.number for batch in plan.start_order(batches, 8)] == [2, 0, 1, 3], (
        "the large one first"
    )
    assert batches[0].memory == plan.PROCESS + 6 + 6


def test_norms_between_large_matrices_share_a_batch():
    sizes = footprints(*(("a", size) for size in (1, 90, 1, 90, 1)))
    batches = plan.divide([Named(str(number)) for number in range(5)], sizes, limit=8)
    assert [[t.tensor_name for t in b.tensors] for b in batches] == [["0", "2", "4"], ["1"], ["3"]]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0,), (2, 0, 3)])
def test_tensors_without_entries_need_no_memory(shape):
    name = "layers.0.mlp.experts.down_proj"
    assert plan._kernel_buffers(name, shape, models=2, threads=2) <= 2


def test_batches_are_of_a_decent_size():
    gigabyte = 10**9
    assert plan.batch_bytes(470 * gigabyte, 64, 5 * gigabyte) == pytest.approx(
        0.92 * gigabyte, rel=0.01
    )
    assert plan.batch_bytes(470 * gigabyte, 2, 5 * gigabyte) == 5 * gigabyte
    assert plan.batch_bytes(gigabyte, 64, 5 * gigabyte) == plan.SMALLEST_BATCH
    assert plan.batch_bytes(gigabyte, 64, 10**6) == 10**6
    # Eight layers of 4096 x 4096 in bfloat16 take minutes each, of 512 x 512 next to nothing.
    assert plan.batch_bytes(8 * 2 * 4096**2, 2, 0, 8 * plan._seconds("w", (4096, 4096))) < 4096**2
    assert plan.batch_bytes(gigabyte, 2, 0, 10.0) == plan.SMALLEST_BATCH


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_sizes_are_read_from_headers(family, world, tmp_path, monkeypatch):
    """Written sizes come out exact, for stacks of experts too; all that is there is read once."""
    sizes_of_tensors = []
    divide = plan.divide

    def recording(tensors, sizes, limit):
        sizes_of_tensors.extend(zip((t.tensor_name for t in tensors), sizes, strict=True))
        return divide(tensors, sizes, limit)

    monkeypatch.setattr("mergekit_monosoup.distributed.driver.divide", recording)
    run(config(world, tmp_path, family=family), tmp_path / "out", *SMALL, "--resume")
    result = stored(tmp_path / "out")
    assert {name: size.written for name, size in sizes_of_tensors} == {
        name: tensor.nbytes for name, tensor in result.items()
    }
    assert sum(size.read for _, size in sizes_of_tensors) == 2 * sum(
        tensor.nbytes for tensor in result.values()
    )
    assert all(size.memory >= 2 * size.read for _, size in sizes_of_tensors)


def test_memory_of_a_stack_grows_with_the_threads():
    """128 experts of 3072 x 4096 are 256 matrices of 1536 x 4096, one per thread."""
    stack = ("model.layers.0.mlp.experts.gate_up_proj", (128, 3072, 4096))
    matrix = torch.empty(1536, 4096)
    one = batch.buffers(batch.Job(matrix, [matrix], ""))
    needed = {count: plan._kernel_buffers(*stack, 2, count) for count in (1, 3, 32, 256)}
    assert needed == {1: one, 3: 3 * one, 32: 32 * one, 256: needed[256]}
    assert batch.MEMORY - one < needed[256] <= batch.MEMORY
    assert 40 * 4096**2 < plan._kernel_buffers("lm_head.weight", (151936, 4096), 2, 64) < 10**9
    assert plan._kernel_buffers("model.norm.weight", (4096,), 2, 1) == 0


def test_an_unknown_kind_of_plan_is_refused():
    with pytest.raises(plan.PlanError, match=r"not made as in 0\.1\.5"):
        plan.split_plan([])


def test_a_report_that_cannot_be_written_costs_no_merge(world, tmp_path, monkeypatch, caplog):
    path, out = (
        config(world, tmp_path, parameters={"report": f"{tmp_path}/r.jsonl"}),
        tmp_path / "out",
    )

    def full(place, lines):
        raise OSError(28, "No space left on device", place)

    monkeypatch.setattr(report, "replace", full)
    run(path, out, "--resume")
    expected = stored(mergekit(config(world, tmp_path), tmp_path / "a" / "out"))
    assert all(torch.equal(stored(out)[name], tensor) for name, tensor in expected.items())
    assert {r.name for r in report.read(out / "monosoup-report.jsonl")} == set(expected)
    assert "No space left" in caplog.text and str(out / "monosoup-report.jsonl") in caplog.text
