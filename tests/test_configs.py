"""Every file in configs/ is checked and executed, with small checkpoints for its hub names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import checkpoints, svc_oracle
from helpers.hub import local, run

from mergekit_monosoup import edit, report
from mergekit_monosoup.check import check

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 14


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_and_does_what_it_says(config, hub, tmp_path):
    path = local(config, hub, tmp_path)
    assert "Qwen/" not in path.read_text() and "suayptalha" not in path.read_text()
    assert [f for f in check(path) if f.level == "error"] == []
    merged = run(path, tmp_path)
    assert all(torch.isfinite(weight).all() for weight in merged.values())
    EXPECTED[config.stem](merged, hub, tmp_path)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_says_which_names_are_to_be_replaced(config):
    """Where a model of the hub stands first, as base or not."""
    lines = config.read_text().splitlines()
    named = [line for line in lines if re.match(r"(base_model| *- model): (\S+/|\S+\.)", line)]
    first = {re.split(r": *", line, maxsplit=1)[1].split()[0]: line for line in reversed(named)}
    assert first and all("  # your " in line for line in first.values())


UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def inputs(hub: Path, name: str) -> tuple[torch.Tensor, ...]:
    return tuple(
        checkpoints.state_dict(hub / model)[name] for model in ("base", "tuned0", "tuned1")
    )


KERNEL = "stages.0.conv.weight"


def files_of_weights(hub: Path) -> tuple[torch.Tensor, ...]:
    """One convolution of a base and two fine-tunes, each a single file."""
    return tuple(torch.load(hub / f"model_{number}.pt")[KERNEL] for number in (0, 31, 61))


def monosoup(merged, hub, folder):
    W0, W1, _ = inputs(hub, UP)
    assert torch.equal(merged[UP], edit(W0, W1)[0]) and not torch.equal(merged[UP], W1)
    assert {r.name for r in report.read(folder / "monosoup-report.jsonl")} == set(merged)


def variance(merged, hub, folder):
    W0, W1, _ = inputs(hub, UP)
    assert torch.equal(merged[UP], edit(W0, W1, mode="variance", R=0.8)[0])


def average(merged, hub, folder):
    W0, *tuned = inputs(hub, UP)
    assert torch.equal(merged[UP], edit(W0, tuned, weights=[2, 1])[0])


def wise_ft_of_monosoup(merged, hub, folder):
    W0, W1, _ = inputs(hub, UP)
    assert torch.equal(merged[UP], edit(W0, W1, alpha=0.5)[0])
    norm = "model.norm.weight"
    W0, W1, _ = inputs(hub, norm)
    assert torch.allclose(merged[norm].float(), (W0.float() + W1.float()) / 2, atol=1e-2)


def per_layer(merged, hub, folder):
    for name, R in ((QUERY, 0.9), (UP, 0.6), (UP.replace("1", "0"), 0.9), (EMBEDDING, 0.8)):
        W0, W1, _ = inputs(hub, name)
        assert torch.equal(merged[name], edit(W0, W1, mode="variance", R=R)[0]), name


def attention_only(merged, hub, folder):
    W0, W1, _ = inputs(hub, QUERY)
    assert torch.equal(merged[QUERY], edit(W0, W1)[0]) and not torch.equal(merged[QUERY], W1)
    assert all(
        torch.equal(merged[name], inputs(hub, name)[1])
        for name in merged
        if "self_attn" not in name
    )


def without_embeddings(merged, hub, folder):
    for name in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(merged[name], inputs(hub, name)[1])
    assert not torch.equal(merged[UP], inputs(hub, UP)[1])


def lora(merged, hub, folder):
    W0 = checkpoints.state_dict(hub / "base")
    assert not torch.equal(merged[QUERY], W0[QUERY].float()), (
        "the adapter's update is edited, not lost"
    )
    assert torch.equal(merged[UP], W0[UP].float()), "the adapter does not touch it"


def two_stage(merged, hub, folder):
    for number, stage in enumerate(("math", "code")):
        W0, *tuned = inputs(hub, UP)
        edited = checkpoints.state_dict(folder / "stages" / f"{stage}-edited")[UP]
        assert torch.equal(edited, edit(W0.float(), tuned[number].float())[0])
        assert len(report.read(folder / f"{stage}-report.jsonl")) == len(merged)
        assert not torch.equal(merged[UP].float(), edited)
    assert merged[UP].dtype == torch.bfloat16


def conv_pytorch(merged, hub, folder):
    from safetensors.torch import load_file

    name = "stages.0.conv.weight"
    W0 = load_file(hub / "convnext_small.in12k.safetensors")[name]
    W1 = load_file(hub / "convnext_small.in12k_ft_in1k.safetensors")[name]
    assert torch.equal(merged[name], edit(W0, W1, mode="variance", R=0.8)[0]) and not torch.equal(
        merged[name], W1
    )


def clip(merged, hub, folder):
    W0, W1, _ = files_of_weights(hub)
    assert torch.equal(merged[KERNEL], edit(W0, W1)[0]) and not torch.equal(merged[KERNEL], W1)


def clip_variance(merged, hub, folder):
    W0, W1, _ = files_of_weights(hub)
    assert torch.equal(merged[KERNEL], edit(W0, W1, mode="variance", R=0.8)[0])


def clip_pair(merged, hub, folder):
    W0, *tuned = files_of_weights(hub)
    assert torch.equal(merged[KERNEL], edit(W0, tuned)[0])


convnext = clip


def float32_out(merged, hub, folder):
    W0, W1, _ = inputs(hub, UP)
    assert torch.equal(merged[UP], edit(W0.float(), W1.float())[0])


def neighbour_wise_ft(merged, hub, folder):
    W0, W1, _ = (w.float() for w in inputs(hub, UP))
    assert torch.allclose(merged[UP].float(), (W0 + W1) / 2, atol=2e-3) and not torch.equal(
        merged[UP].float(), W1
    )


def neighbour_lines(merged, hub, folder):
    W0, W1, _ = inputs(hub, UP)  # the last layer gets the whole update, the first a tenth of it
    assert torch.allclose(merged[UP].float(), W1.float(), atol=2e-3)
    W0, W1, _ = (w.float() for w in inputs(hub, UP.replace("1", "0")))
    assert torch.allclose(merged[UP.replace("1", "0")].float(), W0 + 0.1 * (W1 - W0), atol=2e-3)


def neighbour_uniform_soup(merged, hub, folder):
    _, *tuned = (w.float() for w in inputs(hub, UP))
    assert torch.allclose(merged[UP].float(), sum(tuned) / 2, atol=2e-3)


def neighbour_model_stock(merged, hub, folder):
    W0, *tuned = (w.float() for w in inputs(hub, UP))
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


def svc_average(merged, hub, folder):
    W0, *tuned = inputs(hub, UP)
    assert calibrated(merged[UP], W0, tuned, normalize=True)
    assert all(
        r.gamma_min <= r.gamma_max <= 10
        for r in report.read(folder / "svc-average-report.jsonl")
        if r.rank
    )


def svc_task_arithmetic(merged, hub, folder):
    for name in (UP, EMBEDDING):
        W0, *tuned = inputs(hub, name)
        assert calibrated(merged[name], W0, tuned, weights=[1, 0.5], scaling=0.3)
    norm = "model.norm.weight"
    W0, *tuned = (w.double() for w in inputs(hub, norm))
    assert torch.equal(
        merged[norm], (W0 + 0.3 * (tuned[0] - W0) + 0.15 * (tuned[1] - W0)).bfloat16()
    )


def svc_after_ties(merged, hub, folder):
    W0, *tuned = inputs(hub, UP)
    ties = checkpoints.state_dict(folder / "stages" / "math-and-code")[UP]
    assert ties.dtype == torch.float32
    assert calibrated(merged[UP], W0, tuned, merged=ties.double())


def svc_after_monosoup(merged, hub, folder):
    W0, *tuned = inputs(hub, UP)
    edited = [
        checkpoints.state_dict(folder / "stages" / f"{stage}-edited")[UP]
        for stage in ("math", "code")
    ]
    assert not torch.equal(edited[0], tuned[0].float())
    assert calibrated(merged[UP], W0, edited, normalize=True)


EXPECTED = {
    name: function
    for name, function in globals().items()
    if name in {path.stem for path in CONFIGS}
}
