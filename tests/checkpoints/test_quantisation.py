"""Quantised checkpoints: known by dtypes and names, or by the files beside them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import checkpoints
from helpers.findings import messages
from mergekit.config import MergeConfiguration
from safetensors.torch import save_file

from mergekit_monosoup.checkpoints import quantisation
from mergekit_monosoup.checkpoints.beside import Beside
from mergekit_monosoup.checkpoints.headers import Stored
from mergekit_monosoup.checkpoints.reader import Checkpoints
from mergekit_monosoup.distributed.preconditions import check_places

# What each format stores for one matrix: name → (dtype, shape), the codes first.
FORMATS = {
    "gptq": {
        "a.qweight": ("I32", (4, 8)),
        "a.qzeros": ("I32", (1, 4)),
        "a.scales": ("F16", (1, 8)),
        "a.g_idx": ("I32", (8,)),
    },
    "bitsandbytes": {"a.weight": ("U8", (32, 1)), "a.weight.absmax": ("F32", (8,))},
    "8-bit bitsandbytes": {"a.weight": ("I8", (8, 8)), "a.SCB": ("F32", (8,))},
    "compressed-tensors": {
        "a.weight_packed": ("I32", (8, 1)),
        "a.weight_scale": ("BF16", (8, 1)),
        "a.weight_shape": ("I64", (2,)),
    },
    "fp8": {"a.weight": ("F8_E4M3", (8, 8)), "a.weight_scale_inv": ("F32", (1, 1))},
    "fp8 without scales": {"a.weight": ("torch.float8_e5m2", (8, 8))},
    "mxfp4": {
        "mlp.experts.down_proj_blocks": ("U8", (2, 8, 4, 16)),
        "mlp.experts.down_proj_scales": ("U8", (2, 8, 4)),
    },
    "quanto": {"a.weight._data": ("I8", (8, 8)), "a.weight._scale": ("F32", (8, 1))},
    "hqq": {"a.W_q": ("U8", (8, 4)), "a.scale": ("F16", (8, 1))},
    "aqlm": {"a.codes": ("I16", (8, 4, 1)), "a.scales": ("F16", (8, 1, 1, 1))},
}
PLAIN = {
    "a.weight": ("BF16", (8, 8)),
    "a.mask": ("BOOL", (8, 8)),
    "b.mask.weight": ("I8", (8, 8)),
    "c.mask": ("U8", (8, 8)),
    "c.logit_scale": ("F32", (1,)),
    "c.relative_position_index": ("I64", (8, 8)),
    "norm.num_batches_tracked": ("I64", ()),
}


def stored(entries) -> dict[str, Stored]:
    return {n: Stored("file", n, shape, 0, dtype) for n, (dtype, shape) in entries.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_known_without_a_configuration(name):
    first = next(iter(FORMATS[name]))
    found = quantisation.codes(stored(PLAIN | FORMATS[name]))
    assert first in {tensor.name for tensor in found}
    fault = quantisation.fault(stored(FORMATS[name]), name)
    assert fault.startswith(f"is quantised ({name}): ") and "bfloat16 checkpoint" in fault
    assert quantisation.hints_at_codes(FORMATS[name]) or name == "fp8 without scales"


def test_masks_and_counters_are_none():
    assert quantisation.codes(stored(PLAIN)) == []
    named = quantisation.codes(stored({"a.new_format": ("I16", (4, 4))}), "unheard of")
    assert [tensor.name for tensor in named] == ["a.new_format"]


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("config.json", {"text_config": {"quantization_config": {"bits": 4}}}, "?"),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ("quantize_config.json", {"bits": 4, "quant_method": "gptq"}, "gptq"),
        ("config.json", {"hidden_size": 8}, ""),
    ],
)
def test_the_method_is_read_off_the_files_beside(tmp_path, file, content, method):
    (tmp_path / file).write_text(json.dumps(content))
    assert quantisation.method(Beside(str(tmp_path))) == method


def test_check_inspect_and_run_say_so(tmp_path):
    """One finding, not one for each name and shape that is not that of the base."""
    base, (tuned,) = checkpoints.pair(tmp_path)
    state = checkpoints.state_dict(tuned)
    for name in [name for name in state if "proj" in name]:
        weight, stem = state.pop(name), name.removesuffix("weight")
        state[f"{stem}qweight"] = torch.zeros(weight.shape[1] // 8, len(weight), dtype=torch.int32)
        state[f"{stem}scales"] = torch.rand(1, len(weight)).half()
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tuned / "config.json").write_text(json.dumps(config))
    given = {"merge_method": "monosoup", "base_model": str(base), "models": [{"model": str(tuned)}]}
    (tmp_path / "merge.yml").write_text(json.dumps(given))
    (found,) = messages(tmp_path / "merge.yml") + messages(tmp_path / "merge.yml", "warning")
    assert found.startswith(f"{tuned}: is quantised (awq): 14 tensor(s) hold I32 codes, ")
    with pytest.raises(ValueError, match=r"tuned0 is quantised \(awq\)"):
        Checkpoints([str(base), str(tuned)])
    with pytest.raises(ValueError, match=r"tuned0 is quantised \(awq\)"):
        check_places("out", MergeConfiguration.model_validate(given).referenced_models())
