"""An accelerator on any machine.

Tensors that claim to lie on a device of its own and compute in main memory.

Code for GPUs runs on it as it stands. As on a GPU, operations on tensors of two devices fail, NumPy
cannot read them, and :class:`Accelerator` counts how often the host had to wait for the device.
What it cannot show: the kernels of vendor libraries, their rounding, speed, memory, streams. It
claims torch's one place for foreign devices, so it needs a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Module(
    backend_registration._DummyBackendModule
):  # what torch and mergekit ask of `torch.pretend`
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
DEVICE = torch.device("pretend", 0)


class OnDevice(Tensor):
    """``held``: the numbers, a CPU tensor that shares its storage with those of its views."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(
            cls, held.size(), dtype=held.dtype, device=DEVICE, **layout
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    # torch answers these three without asking the dispatcher.

    def tolist(self) -> Any:
        Accelerator.waits += 1
        return self.held.tolist()

    def new_tensor(self, data: Any) -> Tensor:
        return OnDevice(torch.tensor(data, dtype=self.dtype))

    def numpy(self, **given: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")


class Accelerator(TorchDispatchMode):
    """While it is entered, tensors can be made on :data:`DEVICE` and brought there.

    ``waits``: transfers to the host since it was entered, and operations whose result has a size
        that depends on the data.
    """

    waits = 0

    def __enter__(self) -> Accelerator:
        Accelerator.waits = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select"}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, OnDevice)]
    here = [x for x in given if not isinstance(x, OnDevice)]
    if there and name not in ("copy_", "_to_copy") and any(x.ndim for x in here):
        raise RuntimeError(
            f"{name}: expected all tensors to be on one device, found {DEVICE} and cpu"
        )
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if target is None:
        # In-place operations stay where their first argument is, others go where one of them is.
        target = (
            DEVICE
            if (isinstance(args[0], OnDevice) if name == "copy_" else there)
            else torch.device("cpu")
        )
    of_a_mask = name == "index" and any(x.dtype == torch.bool for x in there)
    if there and (target.type == "cpu" or name in WAITING or of_a_mask):
        Accelerator.waits += 1
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(OnDevice, lambda x: x.held, (args, kwargs))
    result = func(*args, **kwargs)
    if target.type == "cpu":
        return result
    same = {id(x.held): x for x in there}  # in-place operations return their argument
    return tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else OnDevice(x), result)
