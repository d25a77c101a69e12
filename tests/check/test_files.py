"""What the models' files are, and how their tensors are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.findings import messages
from safetensors.torch import load_file, save_file

from mergekit_monosoup.checkpoints.reader import Checkpoints

finds = pytest.mark.finds
WRAPPERS = ("_orig_mod.", "module.", "student.", "model.", "base_model.model.")


@pytest.fixture(scope="module")
def state(models):
    return load_file(Path(models[1][0]) / "model.safetensors")


@pytest.fixture
def folder(models, tmp_path) -> Path:
    shutil.copytree(models[1][0], tmp_path / "other")
    return tmp_path / "other"


def within(name: str) -> str:
    return name.replace("layers.", "_fsdp_wrapped_module.layers.")


@finds("TEN520")
@pytest.mark.parametrize("wrapper", [*WRAPPERS, within])
def test_names_that_a_wrapper_changed(write, models, state, folder, wrapper):
    """The prefix is found by comparing; one mistake is one finding, whichever model has it."""
    changed = wrapper if callable(wrapper) else lambda name: wrapper + name
    save_file({changed(n): t for n, t in state.items()}, folder / "model.safetensors")
    (message,) = messages(write(models=[{"model": str(folder)}]))
    count = sum(changed(name) != name for name in state)
    what = "have within `_fsdp_wrapped_module`"
    if wrapper is not within:
        what = f"begin with `{wrapper}`"
        assert f"name.removeprefix({wrapper!r})" in message
    assert message.startswith(f"{folder}: its names {what}, those of {models[0]} do not ({count} ")
    with pytest.raises(ValueError, match=f"{folder}: its names") as found:
        Checkpoints([models[0], str(folder)])
    assert str(found.value) == message
    (message,) = messages(
        write(base_model=str(folder), models=[{"model": path} for path in models[1]])
    )
    assert message.startswith(f"{models[1][0]}: the names of {folder} {what}, its own do not")


def test_prefixes_that_mergekit_knows(write, tmp_path):
    """GPT-2 lies on the hub without `transformer.`, and is saved with it; merges are healthy."""
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "base" / "model.safetensors"
    state = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    path = write(base_model=str(tmp_path / "base"), models=[{"model": str(tmp_path / "tuned")}])
    assert messages(path) == []


@finds("MOD306")
def test_what_is_no_model(write, folder):
    """A format, a pointer, a tokenizer: one finding, also without config.json."""
    path = write(models=[{"model": str(folder)}])
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (message,) = messages(path)
    assert message.startswith(f"{folder}: {folder}/model.safetensors is a Git LFS pointer")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    (folder / "config.json").unlink()
    (message,) = messages(path)
    assert message.startswith(f"{folder}: has model.gguf: GGUF, which mergekit does not read")
    (message,) = messages(write(models=[{"model": str(folder / "model.gguf")}]))
    assert message.startswith(f"{folder}/model.gguf: is a Git LFS pointer")


def raw(write, tmp_path, base, tuned, **more):
    files = [str(tmp_path / name) for name in ("base.pt", "tuned.pt")]
    for content, file in zip((base, tuned), files, strict=True):
        torch.save(content, file)
    return write(**{"base_model": files[0], "models": [{"model": files[1]}], **more})


@finds("MOD307")
def test_a_trainers_file(write, tmp_path, state):
    trainer = {"model": state, "optimizer": {"state": {}}, "iter_num": 3}
    (message,) = messages(raw(write, tmp_path, state, trainer))
    assert message.startswith(
        f"{tmp_path}/tuned.pt: holds its tensors under ['model'] (beside 'optimizer', 'iter_num')"
    )
    (tmp_path / "tuned.pt").rename(tmp_path / "tuned.ckpt")
    found = messages(
        write(base_model=str(tmp_path / "base.pt"), models=[{"model": f"{tmp_path}/tuned.ckpt"}])
    )
    assert len(found) == 1 and "['model']" in found[0]


@finds("TEN523")
def test_what_lies_beside_the_tensors(write, tmp_path, state):
    (message,) = messages(raw(write, tmp_path, state, {**state, "epoch": 3}))
    assert "holds 1 entries that are no tensors, epoch: mergekit-pytorch stops" in message


@pytest.mark.parametrize(
    ("ours", "theirs", "differ"),
    [
        pytest.param(torch.tensor(0), torch.tensor(7), True, marks=finds("TEN522")),
        (torch.arange(4), torch.arange(4.0), True),
        (torch.arange(4), torch.arange(4).int(), True),
        (torch.arange(4), torch.arange(4), False),
        (torch.zeros(9, 999).long(), torch.zeros(9, 999).long(), False),
    ],
)
def test_counters_and_positions(write, tmp_path, ours, theirs, differ):
    """mergekit's own methods stop at them; ours keep them as fine-tuned."""
    w = torch.randn(4, 4)
    states = {"w": w, "steps": ours}, {"w": w, "steps": theirs}
    assert messages(raw(write, tmp_path, *states)) == []
    found = messages(raw(write, tmp_path, *states, merge_method="linear", parameters={"weight": 1}))
    assert len(found) == differ
    assert not found or "1 tensor(s) that are not floating point differ from those" in found[0]
