"""`inspect`: two checkpoints streamed, both modes off one spectrum, errors by name.

What is predicted is what the merge does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from helpers import checkpoints, oracle
from mergekit.io import LazyTensorLoader
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mergekit_monosoup import edit, inspection, report
from mergekit_monosoup.checkpoints.names import layer, projection
from mergekit_monosoup.checkpoints.reader import Checkpoints, Storage
from mergekit_monosoup.cli import main
from mergekit_monosoup.errors import SolverError
from mergekit_monosoup.kernel import monosoup as kernel
from mergekit_monosoup.kernel.monosoup import preview
from mergekit_monosoup.kernel.spectrum import quantile_curve
from mergekit_monosoup.report import Record, advice, inspected

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A bf16 base with two fine-tunes and an adapter; base and first fine-tune also as .bin."""
    folder = tmp_path_factory.mktemp("inspect")
    checkpoints.pair(folder, tuned=2, dtype=torch.bfloat16, sharded=True)
    torch.manual_seed(7)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), lora
    ).save_pretrained(folder / "adapter")
    for name in ("base", "tuned0"):
        (folder / f"{name}-bin").mkdir()
        torch.save(
            checkpoints.state_dict(folder / name), folder / f"{name}-bin" / "pytorch_model.bin"
        )
    return folder


def inspect(*models, **options) -> list[Record]:
    opened = Checkpoints([str(model) for model in models])
    return [
        record
        for name in opened.names
        for record in inspection.inspect_tensor(opened, name, **options)
    ]


def numbers(records) -> list[dict]:
    return sorted(
        (json.loads(r.to_json()) | {"seconds": 0} for r in records),
        key=lambda r: (r["name"], r["mode"]),
    )


# -- one matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_is_what_the_oracle_and_the_merge_say(dtype):
    W0 = (0.02 * torch.randn(48, 80)).to(dtype)
    W1 = (W0.float() + 2e-4 * torch.randn(48, 80)).to(dtype)
    for record, mode in zip(
        preview(W0, W1, R=0.7, dtype=dtype), ("freevariance", "variance"), strict=True
    ):
        _, merged = edit(W0, W1, mode=mode, R=0.7)
        _, _, expected = oracle.monosoup(W0.double().numpy(), W1.double().numpy(), mode=mode, R=0.7)
        assert (record.action, record.mode, record.k) == ("inspected", mode, expected["k"])
        for key in ("effective_rank", "P_k", "rho", "lambda_high", "lambda_low"):
            assert getattr(record, key) == pytest.approx(expected[key], rel=1e-6), key
        ignored = {"action": "edited", "seconds": 0}
        assert json.loads(record.to_json()) | ignored == json.loads(merged.to_json()) | ignored


def test_float32_is_compared_with_its_own_rounding():
    """Of a float32 pair, ‖W − W1‖ and `realised` are those of the two as stored in bfloat16."""
    W0 = 0.02 * torch.randn(64, 96)
    W1 = W0 + 2e-3 * torch.randn(64, 96)
    for record in preview(W0, W1):
        exact = edit(W0.double(), W1.double(), mode=record.mode)[0]
        stored = exact.bfloat16().double() - W1.bfloat16().double()
        intended = exact - W1.double()
        assert record.edit_norm == pytest.approx(float(stored.norm()), rel=1e-2)
        assert record.realised == pytest.approx(
            float((stored * intended).sum() / intended.square().sum()), rel=1e-2
        )
        assert record.dtype == "float32"


def test_one_spectrum_serves_both_modes(monkeypatch):
    calls = []
    spectrum = kernel.Spectrum
    monkeypatch.setattr(kernel, "Spectrum", lambda *args: calls.append(args) or spectrum(*args))
    first, second = preview(torch.zeros(9, 6), torch.randn(9, 6))
    assert len(calls) == 1 and first.k != second.k


def test_matrices_that_monosoup_would_leave_alone():
    W0 = torch.randn(12, 8)
    cases = {
        "no update": preview(W0, W0.clone()),
        "tiny update": preview(W0, W0 * (1 + 1e-5), min_rel_update=1e-3),
        "k = rank": preview(W0 * 0, torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 9))),
    }
    for word, records in cases.items():
        assert [record.mode for record in records] == ["freevariance", "variance"]
        assert {inspected.flag(record) for record in records} == {word}
        assert all(record.edit_norm == 0 and record.realised is None for record in records)
    W0 = torch.randn(64, 64).bfloat16()
    eaten = preview(W0, (W0.float() + 1e-3 * torch.randn(64, 64)).bfloat16())
    assert eaten[0].realised < 0.5 and inspected.flag(eaten[0]) == "rounds away"


def test_quantile_curve_of_a_known_spectrum():
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    assert quantile_curve(sigma, 5) == [1, 0.5, 0.25, 0.125, 0.0625]
    assert quantile_curve(sigma, 3) == [1, 0.25, 0.0625]
    assert quantile_curve(sigma, 9)[1] == 0.75
    assert quantile_curve(sigma[:1], 4) == [1, 1, 1, 1]


# -- checkpoints -----------------------------------------------------------------------------------


def test_every_matrix_once_per_mode_equal_to_edit(world):
    records = inspect(world / "base", world / "tuned0")
    base, tuned = (checkpoints.state_dict(world / m) for m in ("base", "tuned0"))
    matrices = {name for name in base if base[name].ndim == 2}
    assert sorted(r.name for r in records) == sorted([*matrices, *matrices]) and len(matrices) > 10
    record = next(r for r in records if r.name == UP and r.mode == "variance")
    expected = edit(base[UP], tuned[UP], mode="variance")[1]
    assert (record.k, record.lambda_low, record.realised) == (
        expected.k,
        expected.lambda_low,
        expected.realised,
    )
    assert not any(
        "spectrum" in json.loads(r.to_json()) or "cosine" in json.loads(r.to_json())
        for r in records
    )


def test_bin_and_mixed_layouts_give_the_same_numbers(world):
    expected = numbers(inspect(world / "base", world / "tuned0"))
    assert numbers(inspect(world / "base-bin", world / "tuned0-bin")) == expected
    assert numbers(inspect(world / "base", world / "tuned0-bin" / "pytorch_model.bin")) == expected


def test_one_tensor_name_in_memory_and_each_shard_opened_once(world, monkeypatch):
    """Also with three models, and for a .bin file, which a plain loader would read whole."""
    alive: dict[int, str] = {}
    opened, most = [], []
    get_tensor = LazyTensorLoader.get_tensor

    def watched(self, key, *args, **kwargs):
        before = self.current_shard
        tensor = get_tensor(self, key, *args, **kwargs)
        if self.current_shard is not before:
            opened.append((self.index.base_path, self.index.tensor_paths[key]))
        alive[id(tensor)] = key
        weakref.finalize(tensor, alive.pop, id(tensor))
        most.append(set(alive.values()))
        return tensor

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", watched)
    inspect(world / "base", world / "tuned0", world / "tuned1")
    assert max(map(len, most)) == 1 and len(most) > 30
    assert len(opened) == len(set(opened)) > 6, "shards were opened again"
    loaded = []
    original = torch.load
    monkeypatch.setattr(
        torch, "load", lambda file, **given: loaded.append(given) or original(file, **given)
    )
    inspect(world / "base-bin", world / "tuned0-bin")
    assert [given["map_location"] for given in loaded] == ["meta"] * 2 + ["cpu"] * 2
    assert all(given["mmap"] for given in loaded[2:])


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_that_a_lazy_unpickler_cannot_read(tmp_path, zipped):
    """Renamed files, scalars, views with gaps, and a state dict in a state dict."""
    big = torch.randn(40, 60)
    state = {"w": big[:, 5:25], "logit_scale": torch.tensor(2.0)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "a.pt").rename(tmp_path / "my.model.v2.pt")
    tuned = {
        "w": (state["w"] + 0.1 * torch.randn(40, 20)).T.contiguous().T,
        "logit_scale": torch.tensor(3.0),
    }
    torch.save({"state_dict": tuned}, tmp_path / "b.bin", _use_new_zipfile_serialization=zipped)
    (record, _) = inspect(tmp_path / "my.model.v2.pt", tmp_path / "b.bin")
    expected = float((tuned["w"] - state["w"]).norm() / state["w"].norm())
    assert record.name == "w" and record.rel_update == pytest.approx(expected, rel=1e-6)


def test_what_is_no_tensor_is_left_alone(tmp_path):
    for name, seed in (("a.pt", 0), ("b.pt", 1)):
        torch.manual_seed(seed)
        torch.save({"w": torch.randn(4, 4), "epoch": 3}, tmp_path / name)
    assert {record.name for record in inspect(tmp_path / "a.pt", tmp_path / "b.pt")} == {"w"}


def test_float8_is_refused_by_name(tmp_path):
    W0 = torch.randn(8, 6)
    save_file({"w": W0.bfloat16()}, tmp_path / "a.safetensors")
    save_file({"w": W0.to(torch.float8_e4m3fn)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"w is torch.float8_e4m3fn in .*b\.safetensors: 8-bit .* convert"
    ):
        inspect(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.w: torch\.float8_e4m3fn: 8-bit"):
        edit(W0.to(torch.float8_e4m3fn), W0.to(torch.float8_e4m3fn), name="layers.0.w")


def test_adapter_references(world, tmp_path):
    reference = f"{world / 'base'}+{world / 'adapter'}"
    with pytest.raises(ValueError, match=r"adapter.*--lora-merge-cache DIR"):
        Checkpoints([str(world / "base"), reference])
    opened = Checkpoints([str(world / "base"), reference], Storage(lora_merge_cache=str(tmp_path)))
    records = [r for name in opened.names for r in inspection.inspect_tensor(opened, name)]
    changed = {projection(r.name) for r in records if r.lambda_high is not None}
    assert changed == {"self_attn.q_proj"}
    assert {inspected.flag(r) for r in records if projection(r.name) == "mlp.up_proj"} == {
        "no update"
    }


def test_expert_stacks_and_mixed_dtypes(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    W0 = torch.randn(3, 8, 6)
    save_file({name: W0.bfloat16(), "steps": torch.ones(2, 2).long()}, tmp_path / "a.safetensors")
    save_file(
        {name: W0 + 0.1 * torch.randn(3, 8, 6), "steps": torch.ones(2, 2).long()},
        tmp_path / "b.safetensors",
    )
    records = inspect(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert {r.name for r in records} == {
        f"{name}[{e}].{part}" for e in range(3) for part in ("gate", "up")
    }
    assert {r.dtype for r in records} == {"float32"} and {layer(r.name) for r in records} == {(0,)}


def test_cosines_are_those_of_numpy(world):
    models = [str(world / m) for m in ("base", "tuned0", "tuned1")]
    records = inspect(*models)
    W0, W1, W2 = (
        checkpoints.state_dict(world / m)[UP].double().numpy() for m in ("base", "tuned0", "tuned1")
    )
    a, b = (W1 - W0).ravel(), (W2 - W0).ravel()
    for record in records:
        assert list(record.cosine) == [f"{models[1]} ~ {models[2]}"]
        if record.name == UP:
            expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert record.cosine[f"{models[1]} ~ {models[2]}"] == pytest.approx(expected, rel=1e-12)
    same = inspect(models[0], models[1], models[1], models[0])
    assert same[0].cosine[f"{models[1]} ~ {models[1]}"] == pytest.approx(1)
    assert same[0].cosine[f"{models[1]} ~ {models[0]}"] is None, "the base has no direction"


def test_a_spectrum_that_fails_is_named(world, monkeypatch):
    def fails(*args):
        raise SolverError("nothing converged")

    monkeypatch.setattr(kernel, "Spectrum", fails)
    opened = Checkpoints([str(world / "base"), str(world / "tuned0")])
    with pytest.raises(
        ValueError, match=f"{UP}: its spectrum could not be computed .nothing converged"
    ):
        inspection.inspect_tensor(opened, UP)


def test_wrong_inputs_are_named(world, tmp_path):
    base, tuned = str(world / "base"), str(world / "tuned0")
    with pytest.raises(ValueError, match=r"\./nowhere: no such file or folder"):
        Checkpoints([base, "./nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is an empty folder"):
        Checkpoints([base, str(tmp_path / "empty")])
    state = checkpoints.state_dict(world / "tuned0")

    def changed(**tensors):
        save_file(state | tensors, tmp_path / "model.safetensors")
        return inspect(base, tmp_path)

    with pytest.raises(
        ValueError, match=rf"{UP} is \(48, 32\) in .*base but \(40, 32\) in {tmp_path}"
    ):
        changed(**{UP: state[UP][:40].clone()})
    bad = state[UP].clone()
    bad[3, 4:6] = float("nan")
    with pytest.raises(ValueError, match=rf"{UP} is not finite: 2 entries in {tmp_path}"):
        changed(**{UP: bad})
    save_file({"something.else": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor name in common .*something\.else"):
        Checkpoints([base, str(tmp_path)])
    short = tmp_path / "short"
    short.mkdir()
    save_file({n: t for n, t in state.items() if n != UP}, short / "model.safetensors")
    opened = Checkpoints([base, tuned, str(short)])
    assert UP not in opened.names and opened.remarks == [f"left out, only in {base}, {tuned}: {UP}"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    index = {"weight_map": {name: "model-1.safetensors" for name in state}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names 1 file.*model-1\.safetensors"):
        inspect(base, damaged)


# -- what people read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "numbers", "kind"),
    [
        ("model.layers.12.mlp.up_proj.weight", (12,), "mlp.up_proj"),
        ("stages.2.blocks.5.mlp.fc1.weight", (2, 5), "mlp.fc1"),
        ("stages.1.downsample.1.weight", (1,), "downsample.*"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", (3,), "mlp.experts.*.up_proj"),
        ("model.layers.3.mlp.experts.gate_up_proj[3].up", (3,), "mlp.experts.gate_up_proj[*].up"),
        ("model.embed_tokens.weight", (), "embed_tokens"),
        ("lm_head.weight", (), "lm_head"),
        ("", (), "(unnamed)"),
    ],
)
def test_layers_and_types(name, numbers, kind):
    assert (layer(name), projection(name)) == (numbers, kind)


def made(name: str, high: float = 0.9, **values) -> Record:
    fields = dict(
        mode="freevariance",
        k=2,
        rank=4,
        effective_rank=2.0,
        delta_norm=1.0,
        edit_norm=0.2,
        realised=1.0,
    )
    return Record(
        name,
        (8, 4),
        "bfloat16",
        "inspected",
        lambda_high=high,
        lambda_low=1 - high,
        **(fields | values),
    )


def test_reading_by_hand():
    names = [
        f"model.layers.{n}.{kind}.weight"
        for n in (0, 1)
        for kind in ("mlp.up_proj", "mlp.down_proj", "attn.q")
    ]
    records = [made(n, high=0.52 if "mlp" in n else 0.8) for n in names]
    assert inspected.reading(records) == [
        "freevariance: in attn.q MonoSoup scales the head by 0.80 and the tail by 0.20.",
        "freevariance: the update is nearly flat in mlp.*, MonoSoup ≈ uniform scaling by 0.50 "
        "there.",
    ]
    (eaten,) = [
        s
        for s in inspected.reading([made(n, high=0.95, realised=0.1) for n in names])
        if "eats" in s
    ]
    assert eaten.startswith(
        "freevariance: rounding to bfloat16 eats the edit in all matrices, 10% survives"
    )
    assert (
        "keeps the head (0.95) and drops the tail (0.05), an edit of 20%"
        in inspected.reading([made("a.b", 0.95)])[0]
    )
    assert "tail weighs more" in inspected.reading([made("a.b", 0.3)])[0]
    assert "cut is at the rank" in inspected.reading([made("a.b", 1.0, k=4)])[0]
    untouched = Record(
        "a.b", (8, 4), "bfloat16", "inspected", "no update", mode="variance", R=0.8, delta_norm=0.0
    )
    assert inspected.reading([untouched]) == [
        "variance, R = 0.8: no update in a.b: nothing to edit there."
    ]


def test_which_mode_by_hand():
    """What is advised depends on the models where it can: nothing to edit, or one factor."""
    flat = [made(f"a{n}.b", 0.52, mode="variance", R=0.8) for n in range(3)]
    split = [made(f"c{n}.d", 0.9, mode="variance", R=0.8) for n in range(2)]
    free = [made(f"a{n}.b", 0.52) for n in range(9)]
    said = "\n".join(advice.which_mode(flat + split + free))
    assert "R = 0.8, scales 3 of 5 matrices by nearly one factor each, on average 0.50" in said
    assert "Ask BASE and TUNED your own OOD questions first" in said
    assert said.index("freevariance") < said.index("R = 0.9") < said.index("R = 0.8")
    assert "nearly one factor" not in "\n".join(advice.which_mode(flat[:2] + split))
    untouched = Record("a.b", (8, 4), "bfloat16", "inspected", "no update", mode="variance", R=0.8)
    (line,) = advice.which_mode([untouched])
    assert "which mode: none" in line and "right two models" in line
    assert len(list(advice.which_mode([untouched, *free]))) == 10


def test_a_mean_of_unlike_matrices_is_no_verdict():
    """One that keeps its head and one that drops it are not flat, though their mean is."""
    unlike = [made(f"layers.{n}.a", high) for n, high in enumerate((0.95, 0.05))]
    alike = [made(f"layers.{n}.b", high) for n, high in enumerate((0.5, 0.55))]
    (first, second) = inspected.reading([*unlike, *alike])
    assert "nearly flat in b," in second
    assert first == (
        "freevariance: the matrices of a differ: the share of the head is from 0.05 in layers.1.a "
        "to 0.95 in layers.0.a; --layers shows each."
    )
    table = printed([*unlike, *alike], 100)
    assert next(s for s in table.splitlines() if "λ free .05–.95" in s).split()[1] == "a"
    assert table.count("–") == 1 and "–" not in printed(unlike, 100, every_layer=True)


def printed(records, width, **options) -> str:
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(inspected.table(records, width, **options))
    return capture.get()


def test_table_by_type_and_by_layer():
    records = [
        made(f"model.layers.{n}.self_attn.q_proj.weight", realised=0.3 if n == 10 else 1.0)
        for n in (10, 9, 2)
    ]
    records += [made("lm_head.weight"), made("model.embed_tokens.weight")]
    text = printed(records, 80)
    (row,) = [line for line in text.splitlines() if "q_proj" in line]
    assert (
        row.split()[:4] == ["3", "self_attn.q_proj", "0.50", ".90/.10"] and "rounds away (1)" in row
    )
    assert text.index("embed_tokens") < text.index("q_proj") < text.index("lm_head")
    lines = printed(records, 80, every_layer=True).splitlines()
    assert [line.split()[0] for line in lines if "q_proj" in line] == ["2", "9", "10"]
    assert all(len(line) <= 80 for line in [*text.splitlines(), *lines]) and "P_k" not in text
    assert "P_k" in printed(records, 120)


@pytest.mark.slow
def test_command(world, tmp_path):
    """The installed script: a table, a reading, and records that `report` and `plot` read."""
    out = tmp_path / "r.jsonl"
    arguments = [
        world / "base",
        world / "tuned0",
        "--cosine",
        world / "tuned1",
        "--spectra",
        "--R",
        "0.7",
        "--out",
        out,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mergekit_monosoup.cli", "inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "mlp.up_proj" in done.stdout and "variance, R = 0.7: " in done.stdout
    assert (
        "9 tensors hold no matrix of floating point (norms, biases, integers): they are not edited."
        in done.stdout
    )
    records = report.read(out)
    assert len({r.name for r in records}) * 2 == len(records)
    assert {len(r.spectrum) for r in records} == {inspection.POINTS} and all(
        r.cosine for r in records
    )
    assert {r.R for r in records} == {None, 0.7}
    again = CliRunner().invoke(main, ["report", str(out)])
    assert again.exit_code == 0 and "self_attn.q_proj" in again.output
    refused = CliRunner().invoke(main, ["report", str(out), "--json"])
    assert refused.exit_code == 1 and "holds an inspection" in refused.output


def test_numbers_beyond_float64_name_their_tensor(tmp_path):
    for name in ("a", "b"):
        save_file(
            {"w.weight": 1e160 * torch.randn(8, 8, dtype=torch.float64)},
            tmp_path / f"{name}.safetensors",
        )
    result = CliRunner().invoke(
        main, ["inspect", *(str(tmp_path / f"{name}.safetensors") for name in ("a", "b"))]
    )
    assert result.exit_code == 1 and "w.weight: its entries are so large" in result.output


def test_command_refuses_by_name(world):
    result = CliRunner().invoke(main, ["inspect", str(world / "base"), "./nowhere"])
    assert result.exit_code == 1 and result.output.startswith("Error: ./nowhere: no such file")
    result = CliRunner().invoke(
        main, ["inspect", str(world / "base"), str(world / "tuned0"), "--R", "2"]
    )
    assert result.exit_code == 1 and "R must be a number in (0, 1], got 2" in result.output
