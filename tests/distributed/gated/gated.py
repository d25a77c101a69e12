"""A merge method that waits, and three more for the tests of `run`.

A merge can be killed at a registered place with it, without sleeping in the code under test.

`gated` is the mean of the models. Tensors of layer 1 and the head leave a mark TENSOR@PID in the
folder $GATE and then wait until the file `open` is there. `dice` draws random numbers, `deadly`
ends its process as a lack of memory does, `leaving` asks Python to end it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.registry import register, registered_methods

PATIENCE = 120  # seconds; a test that forgot to open the gate must fail, not hang


@merge_method(name="gated", pretty_name="Gated mean")
def gated(group: TensorGroup) -> torch.Tensor:
    name = group.metadata.name or ""
    if "GATE" in os.environ and (".layers.1." in name or "lm_head" in name):
        gate = Path(os.environ["GATE"])
        (gate / f"{name}@{os.getpid()}").touch()
        until = time.monotonic() + PATIENCE
        while not (gate / "open").exists():
            if time.monotonic() > until:
                raise TimeoutError(f"nobody opened the gate for {name}")
            time.sleep(0.02)
    tensors = [entry.tensor for entry in group.entries]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)


@merge_method(name="dice", pretty_name="Dice")
def dice(group: TensorGroup) -> torch.Tensor:
    first = group.entries[0].tensor
    return first + torch.rand_like(first)


@merge_method(name="deadly", pretty_name="Deadly")
def deadly(group: TensorGroup) -> torch.Tensor:
    os._exit(1)


@merge_method(name="leaving", pretty_name="Leaving")
def leaving(group: TensorGroup) -> torch.Tensor:
    raise SystemExit("gone")


registered = {method.spec.name for method in registered_methods()}
for method in (gated, dice, deadly, leaving):
    if method.spec.name not in registered:
        register(method)
