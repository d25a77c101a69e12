"""Quantised checkpoints: which tensors are codes instead of numbers, and what made them.

Codes are integers, or floating-point numbers of 8 bits and fewer, that mean a weight only with the
scales beside them. Names and dtypes tell them apart from masks and counters, and config.json says
which program made them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from mergekit_monosoup.checkpoints.beside import Beside, printable
from mergekit_monosoup.checkpoints.headers import Headers, Stored

# Last parts of names of codes: GPTQ and AWQ, EXL2, compressed-tensors, HQQ, QuIP#, quanto, torchao,
# AQLM and VPTQ, in this order.
_CODES = re.compile(r"qweight|q_weight|weight_packed|W_q|Qidxs\w*|_data|\w*_qdata|codes|indices")
# Last parts that codes share with plain weights, so that only a scale beside them tells:
# bitsandbytes, 8-bit floats, EETQ, BitNet; MXFP4 ends in _blocks.
_WEIGHT = re.compile(r"weight|\w+_proj|\w*blocks")
_SCALE = re.compile(r"absmax|SCB|\w*scales?(_inv|_\d)?|q?zeros|codebooks?")
# Where converters write what they did, beside or instead of config.json.
_OTHER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_KEYS = ("quantization_config", "compression_config")
# Methods whose codes transformers turns back into numbers, and how (transformers 5.24).
_WAYS_BACK = {
    "bitsandbytes": "load it with transformers and save what `model.dequantize()` returns",
    "fp8": "load it with transformers and `FineGrainedFP8Config(dequantize=True)`, then save it",
    "mxfp4": "load it with transformers and `Mxfp4Config(dequantize=True)`, then save it",
    "compressed-tensors": "load it with transformers and "
    "`CompressedTensorsConfig(run_compressed=False)`, then save it",
}
WAY_OUT = "merge the bfloat16 checkpoint that it was made from, which its model card names"


def declared(beside: Beside) -> dict[str, Any]:
    """Return what config.json says about a quantisation; {} where it says nothing."""
    places: list[Any] = [beside.config, *beside.config.values()]  # a part may have its own
    for place in places:
        for key in _KEYS:
            found = place.get(key) if isinstance(place, dict) else None
            if isinstance(found, dict) and found:
                return found
    return {}


def method(beside: Beside) -> str:
    """Return the name of the method that the files beside the weights name; empty without one."""
    settings = declared(beside) or next(filter(None, map(beside.json, _OTHER_FILES)), {})
    if not settings:
        return ""
    inner = settings.get("quantization")  # as hf_quant_config.json nests it
    places = [settings, inner] if isinstance(inner, dict) else [settings]
    for place in places:
        for key in ("quant_method", "quant_algo", "format"):
            if isinstance(place.get(key), str):
                return str(place[key])
    return "bitsandbytes" if any(str(k).startswith(("load_in_", "bnb_")) for k in settings) else "?"


def hints_at_codes(names: Iterable[str]) -> bool:
    """Whether one of these names is that of codes or of their scales."""
    leaves = {name.rpartition(".")[2] for name in names}
    return any(_CODES.fullmatch(leaf) or _SCALE.fullmatch(leaf) for leaf in leaves)


def codes(tensors: Mapping[str, Stored], named: str = "") -> list[Stored]:
    """Return the tensors that hold codes, by name.

    Args:
        tensors: of one checkpoint, from its headers.
        named: the method that the files beside it name; then every matrix of short integers is
            taken for codes, whatever its name.
    """
    parts = (name.rpartition(".") for name in tensors)
    scaled = {module for module, _, leaf in parts if _SCALE.fullmatch(leaf)}
    return [
        tensor for _, tensor in sorted(tensors.items()) if _is_code(tensor, scaled, bool(named))
    ]


def _is_code(tensor: Stored, scaled: set[str], named: bool) -> bool:
    """Whether a tensor holds codes; ``scaled`` are the modules and weights that have a scale."""
    kind = tensor.dtype.removeprefix("torch.").upper()
    if len(tensor.shape) < 2 or kind == "BOOL":
        return False
    if kind.startswith(("F", "BF", "Q")):  # the last are torch's own quantised tensors
        return tensor.bits <= 8
    if tensor.bits > 32:  # indices and counters
        return False
    module, _, leaf = tensor.name.rpartition(".")
    scale = bool({module, tensor.name} & scaled)
    if leaf in ("qweight", "W_q"):
        return True
    return named or (scale and bool(_CODES.fullmatch(leaf) or _WEIGHT.fullmatch(leaf)))


def fault(tensors: Mapping[str, Stored], named: str = "") -> str:
    """Return what is wrong with a quantised checkpoint, and the way out; empty if it is not one."""
    found = codes(tensors, named)
    if not found:
        return ""
    label = f" ({printable(named)})" if named.strip("?") else ""
    back = _WAYS_BACK.get(named.lower())
    return (
        f"is quantised{label}: {len(found)} tensor(s) hold {found[0].dtype} codes, "
        f"{found[0].name} for one, and mergekit would merge the codes or stop; "
        f"{WAY_OUT}{f', or {back}' if back else ''}"
    )


def fault_of(path: str, names: Iterable[str]) -> str:
    """Return what :func:`fault` says of a local model, whose headers are read where names hint.

    Args:
        path: a file, or the folder of the files.
        names: of its tensors.
    """
    named = method(Beside(path)) if os.path.isdir(path) else ""
    if named or hints_at_codes(names):
        with suppress(Exception):  # whoever reads the tensors says what is wrong with the file
            return fault(Headers().of_model(path), named)
    return ""
