"""`monosoup` inside mergekit.

Real checkpoints through `run_merge`, parameters, filters, gradients, errors.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from helpers import checkpoints, oracle
from mergekit import multigpu_executor
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.merge_methods import get, merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mergekit_monosoup.methods as methods
from mergekit_monosoup import edit, report
from mergekit_monosoup.kernel import lapack


def merge(base, tuned, out, *, parameters=None, per_model=None, options=None, **top):
    """run_merge; returns the merged state dict."""
    models = [{"model": str(path)} for path in tuned]
    for model, own in zip(models, per_model or [], strict=False):
        model["parameters"] = own
    config = {"merge_method": "monosoup", "base_model": str(base), "models": models, **top}
    if parameters:
        config["parameters"] = parameters
    run_merge(
        MergeConfiguration.model_validate(config),
        str(out),
        MergeOptions(quiet=True, **(options or {})),
    )
    return checkpoints.state_dict(out)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return checkpoints.pair(tmp_path_factory.mktemp("qwen3"), tuned=2)


# -- whole checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "sharded"),
    [
        ("qwen3", torch.float32, False, False),
        ("qwen3", torch.bfloat16, True, True),
        ("qwen3", torch.float32, True, False),
        ("qwen3", torch.bfloat16, False, True),
        ("llama", torch.bfloat16, False, False),
    ],
)
def test_every_tensor_of_a_checkpoint(tmp_path, family, dtype, tied, sharded):
    base, (tuned,) = checkpoints.pair(tmp_path, family, dtype=dtype, tied=tied, sharded=sharded)
    merged = merge(
        base, [tuned], tmp_path / "out", parameters={"report": str(tmp_path / "r.jsonl")}
    )
    W0, W1 = checkpoints.state_dict(base), checkpoints.state_dict(tuned)
    records = {r.name: r for r in report.read(tmp_path / "r.jsonl")}
    assert set(merged) == set(W0) == set(W1) == set(records)
    assert ("lm_head.weight" in merged) == (not tied)
    for name, weight in merged.items():
        assert weight.dtype == dtype, name
        if weight.ndim < 2:
            assert torch.equal(weight, W1[name]) and records[name].action == "copied"
            continue
        mono, exact, numbers = oracle.monosoup(W0[name].double(), W1[name].double())
        assert records[name].k == numbers["k"], name
        assert not torch.equal(weight, W1[name]) and not torch.equal(weight, W0[name]), name
        if dtype == torch.float32:
            # 1e-5 of the update; what remains is the rounding of W0 + delta, 6e-8 of W0 against an
            # update of 2e-2 W0.
            assert (
                float((weight.double() - torch.tensor(exact)).norm())
                < 1e-5 * torch.tensor(mono).norm()
            ), name
        else:
            assert float((weight == torch.tensor(exact).bfloat16()).double().mean()) > 0.999, name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@contextmanager
def one_thread():
    """A stack has the bits of one thread (docs/methods.md).

    A single matrix has those of as many as there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with lapack.one_thread_each() as told:
            assert told
            yield
    finally:
        torch.set_num_threads(before)


def test_mixture_of_experts_is_edited_expert_by_expert(tmp_path):
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3_moe")
    merged = merge(
        base, [tuned], tmp_path / "out", parameters={"report": str(tmp_path / "r.jsonl")}
    )
    W0, W1 = (
        checkpoints.state_dict(base),
        checkpoints.state_dict(tuned),
    )  # stored as separate 2-D experts
    records = {r.name for r in report.read(tmp_path / "r.jsonl")}
    gate_up, down = (
        merged["model.layers.0.mlp.experts.gate_up_proj"],
        merged["model.layers.0.mlp.experts.down_proj"],
    )
    half = gate_up.shape[1] // 2
    for expert in range(4):
        for projection, found in (
            ("gate_proj", gate_up[expert, :half]),
            ("up_proj", gate_up[expert, half:]),
            ("down_proj", down[expert]),
        ):
            name = f"model.layers.0.mlp.experts.{expert}.{projection}.weight"
            with one_thread():
                alone, _ = edit(W0[name], W1[name])
            assert torch.equal(found, alone), name
            assert not torch.equal(found, W1[name])
        assert f"model.layers.0.mlp.experts.gate_up_proj[{expert}].up" in records
        assert f"model.layers.0.mlp.experts.down_proj[{expert}]" in records
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_expert_biases_and_llama4_layout():
    W0, W1 = torch.randn(3, 8), torch.randn(3, 8)
    kept = merge_tensors(
        [W0, W1], "monosoup", base_index=0, name="model.layers.0.mlp.experts.gate_up_proj_bias"
    )
    assert torch.equal(kept, W1)
    W0, W1 = torch.randn(2, 6, 10), torch.randn(2, 6, 10)  # [E, in, 2·out]
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    merged = merge_tensors([W0, W1], "monosoup", base_index=0, name=name)
    with one_thread():
        assert torch.equal(merged[1, :, 5:], edit(W0[1, :, 5:], W1[1, :, 5:])[0])


def raw_merge(folder, suffix, base, tuned, **parameters):
    """mergekit-pytorch --tensor-union on state dicts saved as .pt or .safetensors."""
    paths = []
    for number, state in enumerate([base, *tuned]):
        paths.append(str(folder / f"model{number}.{suffix}"))
        save_file(state, paths[-1]) if suffix == "safetensors" else torch.save(state, paths[-1])
    config = RawPyTorchMergeConfig.model_validate(
        {
            "merge_method": "monosoup",
            "base_model": paths[0],
            "models": [{"model": p} for p in paths[1:]],
            "parameters": parameters,
        }
    )
    Executor(plan_flat_merge(config, str(folder / "out"), True, False, MergeOptions())).execute()
    return checkpoints.state_dict(folder / "out")


def updated(state, seed):
    torch.manual_seed(seed)
    return {key: value + 0.1 * torch.randn_like(value) for key, value in state.items()}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_convolutions_through_mergekit_pytorch(tmp_path, suffix):
    base = {
        "stem.weight": torch.randn(8, 3, 4, 4),
        "norm.weight": torch.ones(8),
        "scale": torch.tensor(1.0),
    }
    tuned = updated(base, 1)
    merged = raw_merge(tmp_path, suffix, base, [tuned], mode="variance")
    assert torch.equal(
        merged["stem.weight"], edit(base["stem.weight"], tuned["stem.weight"], mode="variance")[0]
    )
    assert not torch.equal(merged["stem.weight"], tuned["stem.weight"])
    assert torch.equal(merged["norm.weight"], tuned["norm.weight"]) and torch.equal(
        merged["scale"], tuned["scale"]
    )


def test_tensors_that_the_base_lacks_are_kept(tmp_path):
    base, path = {"a.weight": torch.randn(8, 9)}, str(tmp_path / "r.jsonl")
    tuned = [
        updated(base, seed) | {"new.weight": torch.full((3, 4), value)}
        for seed, value in ((1, 1.0), (2, 3.0))
    ]
    (tmp_path / "one").mkdir()
    assert torch.equal(
        raw_merge(tmp_path / "one", "pt", base, tuned[:1])["new.weight"], torch.full((3, 4), 1.0)
    )
    merged = raw_merge(tmp_path, "pt", base, tuned, report=path)
    assert torch.equal(merged["new.weight"], torch.full((3, 4), 2.0)), (
        "averaged like the rest of the fine-tuned models"
    )
    assert {r.name: r.reason for r in report.read(path)}["new.weight"] == "not in the base model"


def test_several_models_equal_linear_then_monosoup(tmp_path, qwen3):
    base, tuned = qwen3
    both = merge(base, tuned, tmp_path / "both", per_model=[{"weight": 3}, {"weight": 1}])
    average = {
        "merge_method": "linear",
        "models": [
            {"model": str(p), "parameters": {"weight": w}}
            for p, w in zip(tuned, (3, 1), strict=True)
        ],
    }
    run_merge(
        MergeConfiguration.model_validate(average), str(tmp_path / "avg"), MergeOptions(quiet=True)
    )
    staged = merge(base, [tmp_path / "avg"], tmp_path / "staged")
    for name, weight in both.items():
        assert torch.allclose(weight, staged[name], atol=2e-7), (
            name
        )  # linear rounds its average to float32
        assert not torch.equal(weight, checkpoints.state_dict(tuned[0])[name])


def test_lora_reference(tmp_path):
    """base+adapter: mergekit merges it, ΔW has the adapter's rank plus float32 rounding."""
    import peft

    base, _ = checkpoints.pair(tmp_path)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged = merge(
        base,
        [f"{base}+{tmp_path / 'adapter'}"],
        tmp_path / "out",
        parameters={"report": str(tmp_path / "r.jsonl")},
        dtype="float32",
        options={"lora_merge_cache": str(tmp_path / "cache")},
    )
    records = {r.name: r for r in report.read(tmp_path / "r.jsonl")}
    W0 = checkpoints.state_dict(base)
    q = records["model.layers.0.self_attn.q_proj.weight"]
    assert q.action == "edited" and 3 < q.effective_rank < 4.5
    assert not torch.equal(merged[q.name], W0[q.name])
    k = records["model.layers.0.self_attn.k_proj.weight"]
    assert k.reason == "no update" and torch.equal(merged[k.name], W0[k.name])


def test_reports_of_two_merges_of_one_process(tmp_path):
    """Tied and untied: lm_head.weight comes first in one of them only."""
    path = str(tmp_path / "r.jsonl")
    for tied in (True, False):
        base, (tuned,) = checkpoints.pair(tmp_path / str(tied), tied=tied)
        merged = merge(base, [tuned], tmp_path / str(tied) / "out", parameters={"report": path})
    assert {r.name for r in report.read(path)} == set(merged) and "lm_head.weight" in merged
    assert "lm_head.weight" not in {r.name for r in report.read(f"{path}.old")}


def test_dtype_and_out_dtype(tmp_path):
    base, (tuned,) = checkpoints.pair(tmp_path, dtype=torch.bfloat16)
    path = str(tmp_path / "r.jsonl")
    merged = merge(
        base,
        [tuned],
        tmp_path / "out",
        dtype="float32",
        out_dtype="float32",
        parameters={"report": path},
    )
    assert all(weight.dtype == torch.float32 for weight in merged.values())
    assert all(r.realised > 0.999 for r in report.read(path) if r.action == "edited")


@pytest.mark.parametrize("options", [{}, {"low_cpu_memory": True}])
def test_a_thread_for_each_gpu(tmp_path, monkeypatch, qwen3, options):
    """mergekit's --multi-gpu.

    Its division of the work, its threads, its queues, on two "GPUs" that are the CPU.
    """
    base, (tuned, other) = qwen3
    expected = merge(base, [tuned, other], tmp_path / "alone")
    devices = []

    class Watched(multigpu_executor.MultiGPUExecutor):
        def _device_worker(self, **given):
            devices.append(str(given["device"]))
            super()._device_worker(**given)
            # mergekit loses what is still in the queue when the last device is done: see
            # dev/log.md.
            while not self.task_completion_queue.empty():
                time.sleep(0.01)

    monkeypatch.setattr("mergekit.merge.MultiGPUExecutor", Watched)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: torch.cpu.Stream())
    monkeypatch.setattr(torch.cuda, "stream", torch.cpu.stream)
    merged = merge(
        base,
        [tuned, other],
        tmp_path / "out",
        parameters={"report": str(tmp_path / "r.jsonl")},
        options={"multi_gpu": True, **options},
    )
    assert sorted(devices) == ["cpu:0", "cpu:1"]
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert {r.name for r in report.read(tmp_path / "r.jsonl")} == set(expected)


# -- parameters ------------------------------------------------------------------------------------


def test_filters_gradients_and_model_parameters(tmp_path, qwen3):
    base, tuned = qwen3
    path = str(tmp_path / "r.jsonl")
    filtered = {
        "R": [
            {"filter": "self_attn", "value": 0.5},
            {"filter": "mlp", "value": [0.6, 0.9]},
            {"value": 0.7},
        ]
    }
    filtered["min_rel_update"] = [{"filter": "embed_tokens", "value": 1e9}, {"value": "1e-6"}]
    merge(
        base,
        tuned[:1],
        tmp_path / "a",
        parameters={"mode": "variance", "report": path},
        per_model=[filtered],
    )
    found = {r.name: r for r in report.read(path)}
    assert found["model.layers.1.self_attn.q_proj.weight"].R == 0.5
    assert pytest.approx(0.6) == found["model.layers.0.mlp.up_proj.weight"].R
    assert pytest.approx(0.9) == found["model.layers.1.mlp.up_proj.weight"].R
    assert found["lm_head.weight"].R == 0.7
    assert found["model.embed_tokens.weight"].action == "copied"


def test_merge_wide_parameters_must_agree(tmp_path, qwen3):
    base, tuned = qwen3
    merge(base, tuned, tmp_path / "same", per_model=[{"alpha": 0.5}, {"alpha": 0.5}])
    with pytest.raises(ValueError, match=r"`R` holds for the whole merge.*top-level"):
        merge(base, tuned, tmp_path / "out", per_model=[{"R": 0.7}, {}])


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("R", 0, r"`R` must be a number in \(0, 1\], got 0"),
        ("R", "high", r"`R` must be a number in \(0, 1\], got 'high'"),
        ("alpha", 1.2, r"`alpha` must be a number in \[0, 1\]"),
        ("alpha", True, "`alpha` must be a number"),
        ("weight", -1, "`weight` must be a number >= 0"),
        ("mode", "vetterli", "`mode` must be one of freevariance, variance, got 'vetterli'"),
        ("coefficients", "half", "`coefficients` must be one of monosoup, rho"),
        ("min_rel_update", float("nan"), "`min_rel_update` must be a number >= 0"),
    ],
)
def test_wrong_values_fail_before_anything_is_written(tmp_path, qwen3, parameter, value, words):
    base, tuned = qwen3
    with pytest.raises(ValueError, match="merge method monosoup: " + words):
        merge(base, tuned[:1], tmp_path / "out", parameters={parameter: value})
    assert not (tmp_path / "out").exists()


def test_all_weights_zero(tmp_path, qwen3):
    base, tuned = qwen3
    with pytest.raises(ValueError, match="`weight` is 0 for every fine-tuned model"):
        merge(base, tuned, tmp_path / "out", parameters={"weight": 0})


# -- structure -------------------------------------------------------------------------------------


def test_missing_base_says_what_to_add(tmp_path, qwen3):
    _, tuned = qwen3
    config = MergeConfiguration.model_validate(
        {"merge_method": "monosoup", "models": [{"model": str(tuned[0])}]}
    )
    with pytest.raises(ValueError, match="add `base_model: <pretrained model>` to the YAML"):
        run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    with pytest.raises(ValueError, match="base_index="):
        merge_tensors([torch.zeros(2, 2), torch.ones(2, 2)], "monosoup")
    with pytest.raises(ValueError, match="base="):
        merge_state_dicts([{"a": torch.zeros(2, 2)}, {"a": torch.ones(2, 2)}], "monosoup")


def test_base_alone_is_not_a_merge(tmp_path, qwen3):
    base, _ = qwen3
    with pytest.raises(ValueError, match="needs a fine-tuned model"):
        merge(base, [base], tmp_path / "out")


def test_slices_without_the_base(tmp_path, qwen3):
    base, tuned = qwen3
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "monosoup",
            "base_model": str(base),
            "slices": [{"sources": [{"model": str(tuned[0]), "layer_range": [0, 2]}]}],
        }
    )
    with pytest.raises(ValueError, match="list it in every slice"):
        run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))


def test_vocabularies_that_differ(tmp_path):
    """mergekit's hint must reach the user, and following it must work."""
    base, (tuned,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    with pytest.raises(ValueError, match=r"tokenizer: \{source: base\}"):
        merge(base, [tuned], tmp_path / "out")
    merged = merge(base, [tuned], tmp_path / "aligned", tokenizer={"source": "base"})
    assert merged["model.embed_tokens.weight"].shape[0] == checkpoints.VOCABULARY


@pytest.mark.parametrize("where", ["base", "tuned", "norm"])
def test_non_finite_names_tensor_model_and_count(tmp_path, where):
    base, (tuned,) = checkpoints.pair(tmp_path)
    folder = base if where == "base" else tuned
    name = "model.norm.weight" if where == "norm" else "model.layers.1.mlp.up_proj.weight"
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[:3] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not finite") as caught:
        merge(base, [tuned], tmp_path / "out")
    message = str(caught.value)
    assert f"{name} is not finite: 3 of {state[name].numel()} entries in {folder}" in message
    assert ("(base_model)" in message) == (where == "base")
    assert not (tmp_path / "out" / "config.json").exists()


# -- warnings, threads -----------------------------------------------------------------------------


def test_lost_edits_warn_once_per_merge(tmp_path, caplog):
    base, (tuned,) = checkpoints.pair(tmp_path, dtype=torch.bfloat16, size=1e-3)
    for number in (1, 2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mergekit_monosoup"):
            merge(base, [tuned], tmp_path / f"out{number}")
        lines = [r.getMessage() for r in caplog.records if r.name == "mergekit_monosoup"]
        assert len(lines) == 1
        assert "rounding to bfloat16 keeps only" in lines[0] and "out_dtype: float32" in lines[0]


def test_threads_give_the_same_bits():
    """mergekit's multi-GPU executor calls the method from several threads at once."""
    torch.manual_seed(0)
    pairs = [(W0, W0 + 0.01 * torch.randn_like(W0)) for W0 in torch.randn(8, 96, 128)]
    alone = [
        merge_tensors(list(pair), "monosoup", base_index=0, name=f"t{i}")
        for i, pair in enumerate(pairs)
    ]
    found: dict[int, torch.Tensor] = {}

    def work(i):
        found[i] = merge_tensors(list(pairs[i]), "monosoup", base_index=0, name=f"thread{i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(len(pairs)))


def test_registered_once():
    methods.register()
    assert get("monosoup") is methods.monosoup
