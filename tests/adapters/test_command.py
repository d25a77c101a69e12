"""`mergekit-monosoup adapter`, `inspect` and `soup` on adapters, as users call them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_monosoup import report
from mergekit_monosoup.adapters import editing
from mergekit_monosoup.cli import main

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def call(*words, code: int = 0) -> str:
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == code, done.output
    return done.output


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    """An adapter to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def spoil(folder: Path, **settings) -> Path:
    config = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_a_new_process_needs_neither_mergekit_nor_the_base(plain, tmp_path):
    line = "import sys; from mergekit_monosoup.cli import main; sys.argv[0] = 'm'; main()"
    words = ["adapter", plain, "--out", tmp_path / "out", "--report", tmp_path / "r.jsonl"]
    blocked = f"import sys; sys.modules['mergekit.common'] = None; {line}"
    done = subprocess.run(
        [sys.executable, "-c", blocked, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "out: an adapter of rank 6, 4 of 4 tensors edited (monosoup), in " in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["out", "r.jsonl"]


def test_one_adapter_keeps_rank_a_and_configuration(plain, tmp_path):
    call("adapter", plain, "--out", tmp_path / "out", "--report", tmp_path / "r.jsonl")
    assert (tmp_path / "out" / CONFIG).read_bytes() == (plain / CONFIG).read_bytes()
    before, after = load_file(plain / FILE), load_file(tmp_path / "out" / FILE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        assert tensor.equal(after[name]) == (".lora_A." in name), name
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    records = report.read(tmp_path / "r.jsonl")
    assert {r.action for r in records} == {"edited"} and {r.rank for r in records} == {6}
    assert {r.name for r in records} == {
        f"model.layers.{layer}.{kind}.weight"
        for layer in (0, 1)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert "layers.*.mlp.down_proj" in call("report", tmp_path / "r.jsonl")
    call("plot", tmp_path / "r.jsonl", "--out", tmp_path / "r.png")


def test_several_are_in_the_sum_of_their_ranks_or_compressed(plain, other, tmp_path):
    call("adapter", plain, other, "--out", tmp_path / "sum", "--weight", 1, "--weight", 3)
    settings = json.loads((tmp_path / "sum" / CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (9, 9, {})
    out = call("adapter", plain, other, "--out", tmp_path / "two", "--rank", 2, "--method", "svc")
    assert "compressed to rank 2: dropped " in out and "2 of the energy" not in out
    assert load_file(tmp_path / "two" / FILE)[Q].shape == (32, 2)
    assert json.loads((tmp_path / "two" / CONFIG).read_text())["r"] == 2


def test_ranks_that_differ_are_in_the_patterns(make, tmp_path):
    patterned = make("ranks", rank_pattern={"layers.1.self_attn.q_proj": 2}, use_rslora=True)
    call("adapter", patterned, patterned, "--out", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    expected = {"model.layers.1.self_attn.q_proj": 4}
    assert settings["rank_pattern"] == settings["alpha_pattern"] == expected
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (12, 12, False)
    # The mean of two is one of them.
    call("adapter", patterned, "--out", tmp_path / "one")
    from mergekit_monosoup.adapters.group import Group

    one, two = (Group.open([str(tmp_path / name)]) for name in ("one", "out"))
    for name in one.modules:
        expected = one.factors(name)[0].dense()
        torch.testing.assert_close(two.factors(name)[0].dense(), expected, rtol=0, atol=1e-6)


def test_bfloat16_and_half_are_rounded_once(plain, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        folder = Path(shutil.copytree(plain, tmp_path / str(dtype)))
        state = {name: tensor.to(dtype) for name, tensor in load_file(plain / FILE).items()}
        save_file(state, folder / FILE)
        call("adapter", folder, "--out", tmp_path / "out", "--force")
        exact = {name: tensor.float() for name, tensor in state.items()}
        save_file(exact, folder / FILE)
        call("adapter", folder, "--out", tmp_path / "exact", "--force")
        got, expected = (load_file(tmp_path / name / FILE) for name in ("out", "exact"))
        assert all(got[name].equal(expected[name].to(dtype)) for name in got)


def test_a_bias_of_b_is_scaled_and_averaged(make, tmp_path):
    adapter = make("bias", target_modules=["q_proj"], lora_bias=True)
    name = Q.replace("weight", "bias")
    bias = load_file(adapter / FILE)[name]
    out = call("adapter", adapter, "--out", tmp_path / "out", "--alpha", 0.5)
    assert "not edited, fewer than two dimensions: " in out
    torch.testing.assert_close(load_file(tmp_path / "out" / FILE)[name], bias / 2)
    call("adapter", adapter, adapter, "--out", tmp_path / "two")
    torch.testing.assert_close(load_file(tmp_path / "two" / FILE)[name], bias * 9 / 6)


def test_what_is_stored_whole_is_copied_and_said(make, tmp_path):
    adapter = make("head", modules_to_save=["lm_head"])
    out = call("adapter", adapter, "--out", tmp_path / "out", "--report", tmp_path / "r.jsonl")
    assert "an edit needs the base (--base): lm_head.weight" in out
    name = "base_model.model.lm_head.weight"
    assert load_file(tmp_path / "out" / FILE)[name].equal(load_file(adapter / FILE)[name])
    record = next(r for r in report.read(tmp_path / "r.jsonl") if r.name == "lm_head.weight")
    assert record.action == "copied"
    words = ["adapter", adapter, adapter, "--method", "svc", "--out", tmp_path / "svc"]
    assert "lm_head.weight whole: svc of it needs --base BASE" in call(*words, code=1)


def test_with_the_base_the_report_says_what_rounding_would_leave(base, plain, tmp_path):
    words = ["adapter", plain, "--base", base, "--out", tmp_path / "out"]
    call(*words, "--report", tmp_path / "r.jsonl")
    for record in report.read(tmp_path / "r.jsonl"):
        assert record.realised == pytest.approx(1, abs=1e-3) and record.dtype == "float32"
        assert record.rel_update > 0


def test_a_flat_spectrum_gets_a_hint(plain, copy, tmp_path):
    state = load_file(plain / FILE)
    torch.manual_seed(0)
    orthogonal = torch.nn.init.orthogonal_
    save_file({n: orthogonal(torch.empty_like(t)) for n, t in state.items()}, copy / FILE)
    out = call("adapter", copy, "--out", tmp_path / "out")
    assert "0 of 4 tensors edited" in out and "--mode variance cuts at a share" in out
    assert load_file(tmp_path / "out" / FILE)[Q].equal(load_file(copy / FILE)[Q])


# -- what goes wrong -------------------------------------------------------------------------------

WRONG = [
    (["--method", "svc"], "--method svc needs at least 2 adapters"),
    (["--scaling", "2"], "--scaling is read by --method svc only, and it is monosoup"),
    (["--R", "0.5"], "--R is read by `mode: variance` only"),
    (["--mode", "variance", "--R", "1.5"], r"--R must be a number in (0, 1], got 1.5"),
    (["--weight", "1", "--weight", "2"], "--weight is given 2 times for 1 adapters"),
    (["--weight", "-1"], "--weight must be a number >= 0"),
    (["--weight", "0"], "--weight is 0 for every fine-tuned model"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_options_that_do_not_belong_together(options, words, plain, tmp_path):
    assert words in call("adapter", plain, "--out", tmp_path / "out", *options, code=1)
    assert os.listdir(tmp_path) == []


def test_adapters_that_do_not_belong_together(plain, copy, base, make, tmp_path):
    words = ["adapter", plain, spoil(copy, base_model_name_or_path="Qwen/Qwen3-8B"), "--out"]
    out = call(*words, tmp_path / "out", code=1)
    assert f"{plain} was trained on {base}, but {copy} on Qwen/Qwen3-8B" in out and "--base" in out
    third = make("targets", target_modules=["q_proj"])
    out = call("adapter", plain, third, "--out", tmp_path / "out", code=1)
    assert "changes model.layers.0.mlp.down_proj and 1 more modules, which" in out
    assert not (tmp_path / "out").exists()


def test_entries_that_are_not_finite_are_named_and_nothing_is_left(copy, tmp_path):
    state = load_file(copy / FILE)
    state[Q][3, 1] = float("nan")
    save_file(state, copy / FILE)
    before = listing(tmp_path)
    out = call("adapter", copy, "--out", tmp_path / "new" / "out", code=1)
    assert f"layers.0.self_attn.q_proj is not finite: 1 entries of {Q} in {copy}" in out
    assert listing(tmp_path) == before and not (tmp_path / "new").exists()


def test_an_overflow_of_half_is_named(copy, tmp_path):
    state = load_file(copy / FILE)
    state[Q] *= 6e4 / state[Q].abs().max()
    save_file({n: t.half() for n, t in state.items()}, copy / FILE)
    words = ["adapter", copy, copy, "--method", "svc", "--out", tmp_path / "out"]
    out = call(*words, "--scaling", 9, code=1)
    assert "q_proj: its edited entries leave the range of float16" in out


def test_an_existing_folder_is_not_touched(plain, other, tmp_path, monkeypatch):
    out = tmp_path / "out"
    call("adapter", other, "--out", out)
    (out / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    assert f"{out} exists; --force replaces it" in call("adapter", plain, "--out", out, code=1)
    assert listing(tmp_path) == before
    with monkeypatch.context() as patch:  # the disk is full at the end
        patch.setattr(editing, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        call("adapter", plain, "--out", out, "--force", code=1)
    assert listing(tmp_path) == before
    call("adapter", plain, "--out", out, "--force")
    assert load_file(out / FILE)[Q].shape == (32, 6) and os.listdir(tmp_path) == ["out"]
    words = ["--force", "--out", tmp_path]
    assert "exists and is no adapter" in call("adapter", plain, *words, code=1)


def test_an_adapter_may_take_its_own_place(copy):
    before = load_file(copy / FILE)[Q]
    call("adapter", copy, "--out", copy, "--force")
    assert not load_file(copy / FILE)[Q].equal(before)


def test_a_report_inside_of_the_folder_is_refused(plain, tmp_path):
    words = ["--out", tmp_path / "out", "--report", tmp_path / "out" / "r.jsonl"]
    assert "is written as a whole; name a file beside" in call("adapter", plain, *words, code=1)


def test_a_tokenizer_beside_the_adapter_goes_with_it(copy, tmp_path):
    (copy / "tokenizer_config.json").write_text("{}")
    (copy / "optimizer.pt").write_bytes(b"0")
    call("adapter", copy, "--out", tmp_path / "out")
    expected = [CONFIG, FILE, "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "out")) == expected


# -- the other commands ----------------------------------------------------------------------------


def test_inspect_needs_no_base(plain, other, tmp_path):
    file = tmp_path / "i.jsonl"
    out = call("inspect", plain, "--cosine", other, "--spectra", "--out", file)
    assert "freevariance: in " in out and f"cosine of the updates, {plain} ~ {other}: mean" in out
    records = report.read(file)
    assert {r.action for r in records} == {"inspected"} and len(records) == 8
    assert {r.realised for r in records} == {r.rel_update for r in records} == {None}
    assert {len(r.spectrum) for r in records} == {33}
    call("plot", file, "--out", tmp_path / "i.png")


def test_inspect_with_the_base_is_inspect_of_the_merged_model(base, plain, tmp_path):
    for name, words in {
        "short": [base, plain],
        "long": [base, f"{base}+{plain}", "--lora-merge-cache", tmp_path],
    }.items():
        call("inspect", *words, "--out", tmp_path / f"{name}.jsonl")
    short, long = (report.read(tmp_path / f"{n}.jsonl") for n in ("short", "long"))
    long = {(r.name, r.mode): r for r in long}
    assert len(short) == 8
    for record in short:
        expected = long[record.name, record.mode]
        assert (record.k, record.shape) == (expected.k, expected.shape)
        for field in ("rel_update", "realised", "lambda_low"):
            got, wanted = getattr(record, field), getattr(expected, field)
            assert got == pytest.approx(wanted, rel=1e-3), field


def test_inspect_of_one_thing_that_is_no_adapter(base):
    assert f"{base} is no LoRA adapter: name the fine-tune" in call("inspect", base, code=1)


def test_soup_of_adapters_is_that_of_the_merged_models(base, plain, other, make, tmp_path):
    third = make("near", 5)
    state, near = load_file(plain / FILE), load_file(third / FILE)
    save_file({n: t + 0.2 * near[n] for n, t in state.items()}, third / FILE)
    shared = ["--base", base, "--threshold", 0.5]
    out = call("soup", plain, other, third, *shared, "--out", tmp_path / "soup.yml")
    assert f"as an adapter: `mergekit-monosoup adapter {plain} {third} --mode variance" in out
    merged = [f"{base}+{adapter}" for adapter in (plain, other, third)]
    cache = ["--lora-merge-cache", tmp_path / "cache"]
    call("soup", *merged, *shared, *cache, "--out", tmp_path / "long.yml")
    text = (tmp_path / "soup.yml").read_text()
    assert text == (tmp_path / "long.yml").read_text()
    assert f"{base}+{third}: similarity 0." in text
    mixed = call("soup", plain, merged[1], *shared, "--out", tmp_path / "x.yml", code=1)
    assert f"{plain} is an adapter, but {merged[1]} is not" in mixed
