"""Tensors that are not floating point stay as fine-tuned, in the merges of this package's methods.

mergekit merges no such tensor, and asks the method about none: it copies one that all models agree
about, and stops the merge at one that differs. Counters of batch normalisation differ after any
fine-tune, and positions are int64 in one checkpoint and float32 in the next. So :func:`keep` puts
what happens with these before mergekit's own; for other methods nothing changes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mergekit_monosoup.report.record import Record

# The last part of the names of codes, which are weights only together with scales (GPTQ's qweight
# and qzeros, weight_packed of compressed-tensors, gate_up_proj_blocks of MXFP4).
_CODES = re.compile(r"weight|blocks|zeros")
REASON = "not floating point"


def keep(task_adapter: ModuleType) -> None:
    """Make mergekit's tasks keep what is not floating point, where the method is one of ours."""
    task: Any = task_adapter.ExecuteMergeMethodTask
    mergekits = task.execute
    if hasattr(mergekits, "__wrapped__"):
        return

    @functools.wraps(mergekits)
    def execute(self: Any, tensors: Mapping[Any, Tensor], **rest: Any) -> Tensor | None:
        if _ours(self.method_name):
            there = {
                model: tensor
                for model in self.model_order
                if (tensor := tensors.get(model)) is not None
            }
            if any(not tensor.is_floating_point() for tensor in there.values()):
                return _kept(self, there)
        merged: Tensor | None = mergekits(self, tensors, **rest)
        return merged

    task.execute = execute


def _ours(name: str) -> bool:
    """Whether a merge method is this package's: mergekit's own of the same name wins."""
    # Not at the top: mergekit may be imported anew, and these modules with it.
    from mergekit import merge_methods

    from mergekit_monosoup.methods import EditingMethod

    return isinstance(merge_methods.get(name), EditingMethod)


def _kept(task: Any, tensors: Mapping[Any, Tensor]) -> Tensor:
    """Return what stays of a tensor that is not floating point in all models, with its record.

    That of the fine-tuned model with the largest weight, in `svc` of the one that is `merged`.

    Raises:
        ValueError: it differs, and has the name of a quantised weight.
    """
    name = task.output_weight.name
    tuned = [model for model in tensors if model != task.base_model] or list(tensors)
    alike = _alike(list(tensors.values()))
    if not alike and _CODES.search(name.rpartition(".")[2]):
        dtypes = ", ".join(f"{tensor.dtype} in {model}" for model, tensor in tensors.items())
        raise ValueError(
            f"{task.method_name}: {name} is not floating point ({dtypes}): codes of a quantised "
            "model mean a weight only with their scales; convert the checkpoint to bfloat16 first"
        )
    parameters = {model: task.input_parameters.get(model, {}) for model in tuned}
    model = max(tuned, key=lambda m: (_of(parameters[m], "merged"), _of(parameters[m], "weight")))
    tensor = tensors[model].clone()
    reason = REASON if alike else f"{REASON}, as in {model}"
    record = Record(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        action="copied",
        reason=reason,
    )
    from mergekit_monosoup.methods import JOURNAL

    JOURNAL.add([record], parameters[model].get("report"), task.method_name)
    return tensor


def _of(parameters: Mapping[str, Any], name: str) -> float:
    """Return a number that decides which model's tensor stays; the same for all without one."""
    return float(parameters.get(name, 0))


def _alike(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return all(other.dtype == first.dtype and torch.equal(other, first) for other in tensors[1:])
