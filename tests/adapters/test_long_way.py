"""Edited adapters merged by peft are what mergekit-yaml makes of BASE+ADAPTER."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import checkpoints
from mergekit.scripts import run_yaml

from mergekit_monosoup.cli import main

# Of ‖ΔW‖. Measured: at most 2.1e-7, from the rounding of W0 + ΔW to float32.
TOLERANCE = 1e-6

pytestmark = pytest.mark.filterwarnings("ignore")


def long_way(base: Path, adapters: list[Path], folder: Path, **parameters) -> dict:
    """The state dict that mergekit-yaml writes."""
    document = {
        "merge_method": parameters.pop("method", "monosoup"),
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}"} for adapter in adapters],
        "parameters": parameters,
        "dtype": "float32",
    }
    config = folder / "merge.yml"
    config.write_text(yaml.safe_dump(document))
    cache = base.parent / "cache"
    arguments = [config, folder / "out", "--lora-merge-cache", cache, "--quiet"]
    CliRunner().invoke(run_yaml.main, list(map(str, arguments)), catch_exceptions=False)
    return checkpoints.state_dict(folder / "out")


def edited(adapters: list[Path], out: Path, *options: str) -> Path:
    done = CliRunner().invoke(main, ["adapter", *map(str, adapters), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    return out


def merged_by_peft(base: Path, adapter: Path):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


def check_equal(base: Path, adapters: list[Path], expected: dict, out: Path) -> None:
    start = checkpoints.state_dict(base)
    model = merged_by_peft(base, out)
    got, changed = model.state_dict(), 0
    for name, weight in expected.items():
        update = (weight.double() - start[name].double()).norm()
        error = (got[name].double() - weight.double()).norm()
        assert error <= TOLERANCE * update, (name, float(error / update))
        changed += bool(update)
    assert changed, "the merge changed nothing"
    tokens = torch.arange(12)[None]
    ours = model(tokens).logits
    model.load_state_dict(expected)
    torch.testing.assert_close(ours, model(tokens).logits, rtol=0, atol=2e-5)
    # The edit is in it: the adapter as it was gives other logits.
    assert (merged_by_peft(base, adapters[0])(tokens).logits - ours).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("plain", {}, {"mode": "freevariance"}),
        ("plain", {}, {"mode": "variance", "R": 0.7, "alpha": 0.5, "coefficients": "rho"}),
        (
            "patterns",
            {
                "use_rslora": True,
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 9, "layers.1.mlp.down_proj": 3},
                "alpha_pattern": {"o_proj": 2},
            },
            {"mode": "variance"},
        ),
        ("embedding", {"target_modules": ["embed_tokens", "v_proj"]}, {"mode": "variance"}),
    ],
)
def test_one_adapter(name, settings, options, base, make, tmp_path):
    adapter = make(name, **settings)
    expected = long_way(base, [adapter], tmp_path, **options)
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    check_equal(base, [adapter], expected, edited([adapter], tmp_path / "adapter", *words))


@pytest.mark.parametrize("method", ["monosoup", "svc"])
def test_two_adapters_of_different_ranks(method, base, make, tmp_path):
    # Directions of 0.01·σ_1 are amplified by svc, and with them the long way's rounding of
    # W0 + ΔW: there it is 1.7e-6 off a float64 SVD, the adapter 4e-8.
    adapters = [make("flat", last=0.1), make("flatter", 1, last=0.1, r=3, lora_alpha=5)]
    expected = long_way(base, adapters, tmp_path, method=method)
    out = edited(adapters, tmp_path / "adapter", "--method", method)
    check_equal(base, adapters, expected, out)


def test_what_is_stored_whole_is_edited_with_the_base(base, make, tmp_path):
    import peft  # noqa: F401 # its first import takes seconds
    from safetensors.torch import load_file, save_file

    adapter = make("whole", modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    name = "base_model.model.lm_head.weight"
    update = 0.01 * torch.randn(96, 3) @ torch.randn(3, 32) + 0.001 * torch.randn(96, 32)
    save_file(state | {name: state[name] + update}, file)
    expected = long_way(base, [adapter], tmp_path)
    out = edited([adapter], tmp_path / "adapter", "--base", str(base))
    check_equal(base, [adapter], expected, out)
    plain = edited([adapter], tmp_path / "without")
    assert load_file(plain / file.name)[name].equal(load_file(file)[name])
    assert not load_file(out / file.name)[name].equal(load_file(file)[name])
