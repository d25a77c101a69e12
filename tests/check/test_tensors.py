"""Tensors, from file headers: what cannot be read, shapes, dtypes, and what the merge reads."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from helpers import checkpoints
from helpers.findings import messages
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_monosoup.check import check
from mergekit_monosoup.checkpoints import headers

finds = pytest.mark.finds


@finds("TEN509")
def test_shapes_from_headers_alone(write, models, tmp_path, monkeypatch):
    _, (other,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "load_file", None)  # nothing may load a tensor
    found = messages(write(models=[{"model": str(other)}]))
    embedding = next(m for m in found if m.startswith("model.embed_tokens.weight"))
    assert (
        f"({checkpoints.VOCABULARY}, 32)" in embedding
        and f"({checkpoints.VOCABULARY + 8}, 32)" in embedding
    )
    assert "tokenizer: {source: base}" in embedding


def test_a_tokenizer_that_aligns_vocabularies(write, tmp_path):
    _, (other,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    assert messages(write(models=[{"model": str(other)}], tokenizer={"source": "base"})) == []


@finds("TEN502")
def test_a_hub_name_that_cannot_be_reached_is_a_warning(write, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", unreachable)
    path = write(models=[{"model": "Qwen/Qwen3-0.6B"}])
    assert messages(path) == []
    assert messages(path, "warning") == [
        "Qwen/Qwen3-0.6B: shapes not checked: ConnectionError: offline"
    ]


@finds("TEN506")
def test_filters_that_match_nothing(write):
    path = write(
        parameters={
            "alpha": [{"filter": "selfattn", "value": 0.1}, {"filter": "mlp", "value": 0.9}]
        }
    )
    assert [m for m in messages(path, "warning") if "filter" in m] == [
        "parameters.alpha: filter 'selfattn' is part of no tensor's name "
        "(it is plain text, not a pattern)"
    ]


@finds("TEN506")
def test_filters_go_by_the_names_of_mergekit(write, tmp_path):
    """It stacks the experts that the files hold one by one."""
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3moe")
    given = {"base_model": str(base), "models": [{"model": str(tuned)}]}
    stored = set(checkpoints.state_dict(base))
    planned = {"gate_up_proj": True, "experts.0": any("experts.0." in name for name in stored)}
    for wanted, there in (("gate_up_proj", True), ("experts.0", False)):
        path = write(
            **given, parameters={"alpha": [{"filter": wanted, "value": 0.1}, {"value": 0.9}]}
        )
        found = [m for m in messages(path, "warning") if "filter" in m]
        assert bool(found) is not there, found
        assert not found or ("mergekit has them" in found[0]) is planned[wanted]


@finds("TEN501", "TEN511")
def test_tensors_that_a_model_lacks_and_damaged_files(write, models, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    state = load_file(Path(models[0]) / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    assert "lacks 1 tensor(s)" in messages(write(models=[{"model": str(folder)}]), "warning")[0]
    (folder / "model.safetensors").write_bytes(b"\x10")
    (damaged,) = messages(write(models=[{"model": str(folder)}]))
    assert "cannot be read" in damaged and "cut off in its header" in damaged


@finds("TEN508")
def test_tensors_that_the_merge_needs(write, tmp_path, monkeypatch):
    """A part of a stack of experts is missing; tied heads and experts stored one by one are not."""
    monkeypatch.chdir(tmp_path)
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3_moe", tied=True)
    path = write(base_model=str(base), models=[{"model": str(tuned)}])
    assert messages(path) == []
    state = checkpoints.state_dict(tuned)
    for gone in (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
    ):
        del state[gone]
    broken = tmp_path / "broken"
    shutil.copytree(tuned, broken)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    path = write(base_model=str(base), models=[{"model": str(broken)}])
    (error,) = messages(path)
    assert (
        error.startswith(f"{broken}: lacks 2 tensor(s) that the merge needs, whole or in part: ")
        and "q_proj" in error
    )
    assert not any("q_proj" in warning for warning in messages(path, "warning"))
    with pytest.raises(RuntimeError, match=r"required but not present|must match"):
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(path.read_text())),
            "out",
            MergeOptions(quiet=True),
        )


@finds("TEN507")
def test_tensors_that_mergekit_passes_by(write, tmp_path):
    """mergekit knows no biases of Llama's attention; they would be gone, and load as zeros."""
    paths = []
    for name in ("base", "tuned"):
        config = checkpoints.config("llama")
        config.attention_bias = True
        torch.manual_seed(len(paths))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        paths.append(str(tmp_path / name))
    base, tuned = paths
    said = [
        m
        for m in messages(write(base_model=base, models=[{"model": tuned}]), "warning")
        if "not read" in m
    ]
    assert len(said) == 2 and said[0].startswith(f"{base}: 8 tensor(s) that mergekit does not read")
    assert "model.layers.0.self_attn.k_proj.bias" in said[0]
    layers = [{"sources": [{"model": path, "layer_range": [0, 1]} for path in paths]}]
    assert not [
        m
        for m in messages(write(base_model=base, models=None, slices=layers), "warning")
        if "not read" in m
    ]


def test_what_lies_beside_the_tensors_of_a_bin_file(write, models, tmp_path):
    shutil.copytree(models[1][0], tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "model.safetensors").unlink()
    torch.save({**state, "epoch": 3}, tmp_path / "other" / "pytorch_model.bin")
    assert messages(write(models=[{"model": str(tmp_path / "other")}])) == []


@finds("TEN504", "TEN505")
def test_adapters_and_codes_and_dtypes(write, models, tmp_path):
    assert (
        "the adapter ./no/lora: no such"
        in messages(write(models=[{"model": f"{models[1][0]}+./no/lora"}]))[0]
    )
    state = {"w": torch.randn(4, 4).to(torch.float8_e4m3fn), "b": torch.zeros(4)}
    save_file(state, tmp_path / "codes.safetensors")
    given = {
        "base_model": None,
        "models": [{"model": str(tmp_path / "codes.safetensors")}],
        "merge_method": "linear",
    }
    assert "is quantised: 1 tensor(s) hold F8_E4M3 codes, w for one" in messages(write(**given))[0]
    bf16 = checkpoints.pair(tmp_path / "bf16", dtype=torch.bfloat16)
    given = {"base_model": str(bf16[0]), "models": [{"model": str(bf16[1][0])}]}
    (message,) = messages(write(**given, out_dtype="float32"), "warning")
    assert "only stores wider what was rounded to BF16 before: add `dtype: float32`" in message
    (message,) = messages(write(out_dtype="bfloat16"), "warning")
    assert "is that of F32" in message
    assert (
        check(write(**given, out_dtype="bfloat16"))
        == []
        == check(write(**given, dtype="float32", out_dtype="float32"))
    )


@finds("TEN503")
def test_adapters_are_not_looked_into(write, models, tmp_path):
    (tmp_path / "adapter").mkdir()
    path = write(models=[{"model": f"{models[1][0]}+{tmp_path}/adapter"}])
    assert messages(path) == []
    (message,) = messages(path, "warning")
    assert message.endswith("adapter: the LoRA adapter's own shapes are not checked")


@finds("TEN510")
def test_another_architecture(write, tmp_path):
    files = []
    for name in ("left", "right"):
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_file({f"{name}.weight": torch.zeros(2, 2)}, files[-1])
    path = write(merge_method="linear", base_model=None, models=[{"model": f} for f in files])
    assert [m for m in messages(path) if "in common" in m] == [
        f"{files[1]}: has no tensor name in common with {files[0]}: another architecture?"
    ]
    assert messages(path, "warning") == [], "not also that each lacks the other's tensors"


@finds("TEN509")
def test_many_shapes_are_counted(write, tmp_path):
    files = []
    for size in (2, 3):
        files.append(str(tmp_path / f"{size}.safetensors"))
        save_file({f"{n}.weight": torch.zeros(size, 2) for n in range(7)}, files[-1])
    path = write(merge_method="linear", base_model=None, models=[{"model": f} for f in files])
    found = [m for m in messages(path) if "weight" not in m.split(":")[0]]
    assert f"{files[1]}: 2 more tensors differ in shape from {files[0]}" in found
    assert f"0.weight: (2, 2) in {files[0]} but (3, 2) in {files[1]}" in messages(path)


def test_shapes_on_the_hub(write, models, monkeypatch):
    """The hub is asked for headers only."""
    import huggingface_hub

    def metadata(repository, *, revision):
        assert (repository, revision) == ("org/model", "v1")
        tensor = SimpleNamespace(shape=[3, 5], dtype="F32", data_offsets=(0, 60))
        file = SimpleNamespace(tensors={"model.norm.weight": tensor})
        return SimpleNamespace(files_metadata={"model.safetensors": file})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    (message,) = messages(write(models=[{"model": "org/model@v1"}]))
    assert message == f"model.norm.weight: (32,) in {models[0]} but (3, 5) in org/model@v1"


@pytest.fixture
def reads(monkeypatch):
    """How often each header is read, from now on."""
    counter = Counter()
    read_header = headers.read_header

    def counting(file, **given):
        counter[file] += 1
        return read_header(file, **given)

    monkeypatch.setattr(headers, "read_header", counting)
    return counter


@pytest.mark.parametrize("kind", ["single", "sharded", "bin"])
def test_each_header_is_read_once(write, tmp_path, monkeypatch, reads, kind):
    """Also where the shapes, the plan's reads and several stages need it."""
    base, tuned = checkpoints.pair(tmp_path, tuned=2, sharded=kind == "sharded")
    if kind == "bin":
        for folder in (base, *tuned):
            torch.save(checkpoints.state_dict(folder), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
    monkeypatch.setattr(ShardedTensorIndex, "from_file", None)  # mergekit's reader
    stage = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in tuned],
    }
    assert check(write(yaml.safe_dump_all([{"name": "first"} | stage, stage]))) == []
    assert not LoaderCache.loaders.keys() & {
        ModelReference.parse(str(p)) for p in (base, *tuned)
    }, "mergekit would take what it opened for this check for what lies there later"
    pattern = "*.bin" if kind == "bin" else "*.safetensors"
    files = {str(file) for folder in (base, *tuned) for file in folder.glob(pattern)}
    assert reads == dict.fromkeys(files, 1) and (len(files) > 3) == (kind == "sharded")


@finds("TEN501")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_read_once_too(write, tmp_path, reads, sharded):
    base, (tuned,) = checkpoints.pair(tmp_path, sharded=sharded)
    damaged = sorted(tuned.glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    stage = {"merge_method": "monosoup", "base_model": str(base), "models": [{"model": str(tuned)}]}
    found = messages(write(yaml.safe_dump_all([{"name": "first"} | stage, stage])))
    size = damaged.stat().st_size
    for label in ("stage first", "document 2"):
        assert (
            f"{label}: {tuned}: cannot be read: {damaged} is cut off: {size} of {size + 1} bytes"
            " are there; download it again" in found
        )
    assert reads[str(damaged)] == 1 and set(reads.values()) == {1}
