"""Every file in configs/ is checked and executed, with its hub names replaced by small checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import checkpoints
import peft
import pytest
import svc_oracle
import torch
from click.testing import CliRunner
from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mergekit_monosoup import edit, report
from mergekit_monosoup.check import check

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yml"))
HUB = {
    "Qwen/Qwen3-0.6B": "base",
    "suayptalha/Qwen3-0.6B-Math-Expert": "tuned0",
    "suayptalha/Qwen3-0.6B-Code-Expert": "tuned1",
    "my-org/Qwen3-0.6B-lora-adapter": "adapter",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Stands in for the hub: a base, two fine-tunes, a LoRA adapter, a ConvNeXt-like pair of state dicts."""
    folder = tmp_path_factory.mktemp("hub")
    checkpoints.pair(folder, tuned=2, dtype=torch.bfloat16)
    torch.manual_seed(7)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora).save_pretrained(folder / "adapter")
    base = {"stages.0.conv.weight": torch.randn(12, 4, 3, 3), "stages.0.norm.weight": torch.randn(12)}
    tuned = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in base.items()}
    save_file(base, folder / "convnext_small.in12k.safetensors")
    save_file(tuned, folder / "convnext_small.in12k_ft_in1k.safetensors")
    return folder


def local(config: Path, world: Path, folder: Path) -> Path:
    """The configuration with local paths and a report, in ``folder``."""
    text = config.read_text()
    for name, place in HUB.items():
        text = re.sub(rf"{re.escape(name)}(?![-\w])", str(world / place), text)
    text = text.replace("convnext_small", str(world / "convnext_small"))
    text = re.sub(r"(\S+-report\.jsonl)", rf"{folder}/\1", text)
    path = folder / config.name
    path.write_text(text)
    return path


def run(config: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Merge with the command that the file names (mergekit-yaml when it names none).

    In this process: a fresh one per file would spend two minutes on imports; test_install.py starts real ones.
    """
    text, out = config.read_text(), folder / "out"
    command, arguments = run_yaml.main, [config, out]
    if "mergekit-multi " in text:
        command, arguments = multimerge.main, [config, "--intermediate-dir", folder / "stages", "--out-path", out]
    elif "mergekit-pytorch " in text:
        command = merge_raw_pytorch.main
    if "--lora-merge-cache" in text:
        arguments += ["--lora-merge-cache", folder / "cache"]
    CliRunner().invoke(command, [*map(str, arguments), "--quiet"], catch_exceptions=False)
    return checkpoints.state_dict(out)


def test_there_are_configs():
    assert len(CONFIGS) >= 14


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_and_does_what_it_says(config, world, tmp_path):
    path = local(config, world, tmp_path)
    assert "Qwen/" not in path.read_text() and "suayptalha" not in path.read_text()
    assert [f for f in check(path) if f.level == "error"] == []
    merged = run(path, tmp_path)
    assert all(torch.isfinite(weight).all() for weight in merged.values())
    EXPECTED[config.stem](merged, world, tmp_path)


UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def inputs(world: Path, name: str) -> tuple[torch.Tensor, ...]:
    return tuple(checkpoints.state_dict(world / model)[name] for model in ("base", "tuned0", "tuned1"))


def monosoup(merged, world, folder):
    W0, W1, _ = inputs(world, UP)
    assert torch.equal(merged[UP], edit(W0, W1)[0]) and not torch.equal(merged[UP], W1)
    assert {r.name for r in report.read(folder / "monosoup-report.jsonl")} == set(merged)


def variance(merged, world, folder):
    W0, W1, _ = inputs(world, UP)
    assert torch.equal(merged[UP], edit(W0, W1, mode="variance", R=0.8)[0])


def average(merged, world, folder):
    W0, *tuned = inputs(world, UP)
    assert torch.equal(merged[UP], edit(W0, tuned, weights=[2, 1])[0])


def wise_ft_of_monosoup(merged, world, folder):
    W0, W1, _ = inputs(world, UP)
    assert torch.equal(merged[UP], edit(W0, W1, alpha=0.5)[0])
    norm = "model.norm.weight"
    W0, W1, _ = inputs(world, norm)
    assert torch.allclose(merged[norm].float(), (W0.float() + W1.float()) / 2, atol=1e-2)


def per_layer(merged, world, folder):
    for name, R in ((QUERY, 0.9), (UP, 0.6), (UP.replace("1", "0"), 0.9), (EMBEDDING, 0.8)):
        W0, W1, _ = inputs(world, name)
        assert torch.equal(merged[name], edit(W0, W1, mode="variance", R=R)[0]), name


def attention_only(merged, world, folder):
    W0, W1, _ = inputs(world, QUERY)
    assert torch.equal(merged[QUERY], edit(W0, W1)[0]) and not torch.equal(merged[QUERY], W1)
    assert all(torch.equal(merged[name], inputs(world, name)[1]) for name in merged if "self_attn" not in name)


def without_embeddings(merged, world, folder):
    for name in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(merged[name], inputs(world, name)[1])
    assert not torch.equal(merged[UP], inputs(world, UP)[1])


def lora(merged, world, folder):
    W0 = checkpoints.state_dict(world / "base")
    assert not torch.equal(merged[QUERY], W0[QUERY].float()), "the adapter's update is edited, not lost"
    assert torch.equal(merged[UP], W0[UP].float()), "the adapter does not touch it"


def two_stage(merged, world, folder):
    for number, stage in enumerate(("math", "code")):
        W0, *tuned = inputs(world, UP)
        edited = checkpoints.state_dict(folder / "stages" / f"{stage}-edited")[UP]
        assert torch.equal(edited, edit(W0.float(), tuned[number].float())[0])
        assert len(report.read(folder / f"{stage}-report.jsonl")) == len(merged)
        assert not torch.equal(merged[UP].float(), edited)
    assert merged[UP].dtype == torch.bfloat16


def conv_pytorch(merged, world, folder):
    from safetensors.torch import load_file

    name = "stages.0.conv.weight"
    W0 = load_file(world / "convnext_small.in12k.safetensors")[name]
    W1 = load_file(world / "convnext_small.in12k_ft_in1k.safetensors")[name]
    assert torch.equal(merged[name], edit(W0, W1, mode="variance", R=0.8)[0]) and not torch.equal(merged[name], W1)


def float32_out(merged, world, folder):
    W0, W1, _ = inputs(world, UP)
    assert torch.equal(merged[UP], edit(W0.float(), W1.float())[0])


def neighbour_wise_ft(merged, world, folder):
    W0, W1, _ = (w.float() for w in inputs(world, UP))
    assert torch.allclose(merged[UP].float(), (W0 + W1) / 2, atol=2e-3) and not torch.equal(merged[UP].float(), W1)


def neighbour_lines(merged, world, folder):
    W0, W1, _ = inputs(world, UP)  # the last layer gets the whole update, the first a tenth of it
    assert torch.allclose(merged[UP].float(), W1.float(), atol=2e-3)
    W0, W1, _ = (w.float() for w in inputs(world, UP.replace("1", "0")))
    assert torch.allclose(merged[UP.replace("1", "0")].float(), W0 + 0.1 * (W1 - W0), atol=2e-3)


def neighbour_uniform_soup(merged, world, folder):
    _, *tuned = (w.float() for w in inputs(world, UP))
    assert torch.allclose(merged[UP].float(), sum(tuned) / 2, atol=2e-3)


def neighbour_model_stock(merged, world, folder):
    W0, *tuned = (w.float() for w in inputs(world, UP))
    a, b = (w - W0 for w in tuned)
    cos = float((a * b).sum() / (a.norm() * b.norm()))
    t = 2 * cos / (1 + cos)
    assert torch.allclose(merged[UP].float(), W0 + t * (a + b) / 2, atol=2e-3)


def calibrated(found: torch.Tensor, base: torch.Tensor, tasks, **settings) -> bool:
    """The tensor is the oracle's, rounded once, in all but the few entries that lie at a tie."""
    W0, *others = (w.double() for w in (base, *tasks))
    update, _, gamma = svc_oracle.svc(W0, others, **settings)
    expected = (W0 + torch.tensor(update)).to(found.dtype)
    return abs(gamma - 1).max() > 0.1 and float((found == expected).double().mean()) > 0.999


def svc_average(merged, world, folder):
    W0, *tuned = inputs(world, UP)
    assert calibrated(merged[UP], W0, tuned, normalize=True)
    assert all(r.gamma_min <= r.gamma_max <= 10 for r in report.read(folder / "svc-average-report.jsonl") if r.rank)


def svc_task_arithmetic(merged, world, folder):
    for name in (UP, EMBEDDING):
        W0, *tuned = inputs(world, name)
        assert calibrated(merged[name], W0, tuned, weights=[1, 0.5], scaling=0.3)
    norm = "model.norm.weight"
    W0, *tuned = (w.double() for w in inputs(world, norm))
    assert torch.equal(merged[norm], (W0 + 0.3 * (tuned[0] - W0) + 0.15 * (tuned[1] - W0)).bfloat16())


def svc_after_ties(merged, world, folder):
    W0, *tuned = inputs(world, UP)
    ties = checkpoints.state_dict(folder / "stages" / "math-and-code")[UP]
    assert ties.dtype == torch.float32
    assert calibrated(merged[UP], W0, tuned, merged=ties.double())


def svc_after_monosoup(merged, world, folder):
    W0, *tuned = inputs(world, UP)
    edited = [checkpoints.state_dict(folder / "stages" / f"{stage}-edited")[UP] for stage in ("math", "code")]
    assert not torch.equal(edited[0], tuned[0].float())
    assert calibrated(merged[UP], W0, edited, normalize=True)


EXPECTED = {name: function for name, function in globals().items() if name in {path.stem for path in CONFIGS}}
