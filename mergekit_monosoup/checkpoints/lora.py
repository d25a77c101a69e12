"""LoRA adapters as peft saves them: which tensors are the factors of which weight.

An adapter is a folder with adapter_config.json and the tensors beside it, safetensors or .bin, in
one file or in shards, or a repository on the hub. Nothing is read but headers until a tensor is
asked for. This knows nothing of mergekit, whose import takes longer than the edit of an adapter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.index import INDEX, read_index
from mergekit_monosoup.checkpoints.lora_config import CONFIG, WAY_OUT, LoraConfig, LoraError
from mergekit_monosoup.checkpoints.one_file import read_header
from mergekit_monosoup.checkpoints.paths import NotThereError, check_model_path
from mergekit_monosoup.checkpoints.pickles import named_tensors
from mergekit_monosoup.checkpoints.stored import LackingError, Stored

PREFIX = "base_model.model."  # of peft's names, before the module's own
# What is downloaded beside the weights: the configuration, and a tokenizer if there is one.
BESIDE = ["*.json", "*.model", "*.jinja", "*.txt"]
_KINDS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
_UNTRAINED = ".base_layer."  # in names of the base's own weights, which peft saves with embeddings
_MARK = ".lora_"  # in the names of all tensors that belong to an update


@dataclass(frozen=True)
class Module:
    """The update of one weight.

    Attributes:
        name: of the module in the model, `model.layers.0.self_attn.q_proj`.
        A, B: the two factors in the files; (r, in, k...) and (out, r, 1...) of a convolution.
        bias: the bias that B has of its own (`lora_bias`), if any.
        scale: the factor of B·A.
        flipped: whether the model stores Wᵀ.
    """

    name: str
    A: Stored
    B: Stored
    bias: Stored | None
    scale: float
    flipped: bool

    @property
    def weight(self) -> str:
        """The name of the weight in the model's files."""
        return f"{self.name.replace('.base_layer', '')}.weight"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, as the model stores it."""
        shape = (self.B.shape[0], *self.A.shape[1:])
        return shape[::-1] if self.flipped else shape


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter.

    Attributes:
        name: as given.
        folder: where it lies.
        config: its settings.
        tensors: all of its tensors by name, in the order of the files.
    """

    name: str
    folder: Path
    config: LoraConfig
    tensors: Mapping[str, Stored]
    _pickled: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def modules(self) -> dict[str, Module]:
        """The updates by the name of the module, in the order of the files."""
        found = {}
        for name in self.tensors:
            path, mark, part = name.removeprefix(PREFIX).partition(_MARK)
            if mark and f"lora_{part}" in _KINDS:
                found[path] = self._module(path, f"lora_{part}")
        return found

    @cached_property
    def whole(self) -> list[str]:
        """The names of tensors that were trained whole: `modules_to_save`, and biases."""
        return [n for n in self.tensors if _MARK not in n and _UNTRAINED not in n]

    @cached_property
    def untrained(self) -> list[str]:
        """The names of weights of the base that are saved beside their updates."""
        return [n for n in self.tensors if _MARK not in n and _UNTRAINED in n]

    def _module(self, path: str, of_A: str) -> Module:
        A = self.tensors[f"{PREFIX}{path}.{of_A}"]
        B = self.tensors.get(f"{PREFIX}{path}.{_KINDS[of_A]}")
        if B is None:
            raise LoraError(f"{A.file} has {A.name}, but no {_KINDS[of_A]} beside it")
        rank = self.config.rank(path)
        if len(A.shape) < 2 or len(B.shape) < 2 or 0 in (*A.shape, *B.shape):
            raise LoraError(
                f"{A.name} is {A.shape} and its B {B.shape}, no matrices: save the adapter again "
                "from gathered weights, if it was trained with DeepSpeed or FSDP"
            )
        if A.shape[0] != rank or B.shape[1] != rank or set(B.shape[2:]) > {1}:
            raise LoraError(
                f"{A.name} is {A.shape} and its B {B.shape}, but {CONFIG} gives the rank {rank}: "
                f"it was changed, or it is a grouped convolution; {WAY_OUT}"
            )
        embedding = of_A == "lora_embedding_A"
        bias = self.tensors.get(f"{PREFIX}{path}.lora_B.bias")
        flipped = embedding or (self.config.flipped and len(A.shape) == 2)
        return Module(path, A, B, bias, self.config.scaling(path), flipped)

    def load(self, stored: Stored) -> Tensor:
        """Return a tensor as it is stored.

        A file is closed again at once: pages of it that were read would count as memory in use.

        Raises:
            LoraError: it cannot be read.
        """
        try:
            if stored.file.lower().endswith(".safetensors"):
                with safe_open(stored.file, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(stored.name)
                    return tensor
            with self._lock:  # while a file is opened warnings are off for the whole process
                if stored.file not in self._pickled:
                    self._pickled[stored.file] = named_tensors(stored.file, "cpu")
            return self._pickled[stored.file][stored.name]
        except LackingError:
            raise
        except Exception as error:  # of safetensors and zip, which name neither file nor tensor
            kind = type(error).__name__
            raise LoraError(
                f"{stored.name} cannot be read from {stored.file} ({kind}: {error})"
            ) from error

    def _check(self) -> None:
        """Raise LoraError if a tensor is of a kind that is not known here, or quantised."""
        for name, stored in self.tensors.items():
            if not name.startswith(PREFIX):
                raise LoraError(
                    f"{stored.file} has {name[:100]!r}, and names of peft begin with {PREFIX}: "
                    "convert it to peft's format, as diffusers and its trainers can"
                )
            part = name.partition(_MARK)[2]
            if part and f"lora_{part}" not in (*_KINDS, *_KINDS.values(), "lora_B.bias"):
                raise LoraError(f"{stored.file} has {name[:100]!r}, no part of a LoRA; {WAY_OUT}")
            if part and not (stored.floating and stored.bits >= 16):
                raise LoraError(
                    f"{name} is {stored.dtype}: quantised factors are codes; save the adapter in "
                    "bfloat16 or float32 first"
                )
        if not self.modules:
            raise LoraError("holds no factors of a LoRA (lora_A and lora_B): nothing can be edited")
        used = {m.B.name for m in self.modules.values()}
        for name in self.tensors:
            if name.endswith(tuple(_KINDS.values())) and name not in used:
                raise LoraError(f"has {name}, but no A beside it: download it again")


def is_adapter(name: str) -> bool:
    """Whether a model is an adapter alone: a folder with its configuration, or such a repository.

    A folder that holds a whole model beside it is a model.

    Raises:
        HubError: it is no folder, and cannot be had from the hub.
    """
    if os.path.exists(name):
        there = set(os.listdir(name)) if os.path.isdir(name) else set()
        weights = [file + end for file in hub.WEIGHTS for end in ("", INDEX)]
        return CONFIG in there and not there.intersection(weights)
    if "+" in name or "@" in name.partition("/")[0]:
        return False
    try:
        check_model_path(name.partition("@")[0])
    except NotThereError:
        return False
    path, _, revision = name.partition("@")
    try:
        repository = hub.ask(path, revision or None)
    except hub.UnreachableError:
        return _cached(path, revision or None) is not None
    except hub.HubError:
        return False  # whoever opens it says why
    return CONFIG in repository.files and not repository.first(hub.WEIGHTS)


def open_adapter(name: str) -> Adapter:
    """Open an adapter by its folder, or its name on the hub.

    Raises:
        LoraError: it cannot be edited as an adapter; names it, and says what to do.
    """
    try:
        folder = _folder(name)
        config = LoraConfig.read(os.path.join(folder, CONFIG))
        adapter = Adapter(name, Path(folder), config, _tensors(folder))
        adapter._check()
    except (LoraError, LackingError, NotThereError, hub.HubError) as error:
        raise LoraError(f"{name}: {error}") from error
    return adapter


def _folder(name: str) -> str:
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise LoraError(f"is a file: name the folder that holds it, with {CONFIG} beside it")
    if "+" in name:
        raise LoraError("name the adapter alone, and its base with --base if it is needed")
    path, _, revision = name.partition("@")
    check_model_path(path)
    try:
        repository = hub.ask(path, revision or None)
        hub.check_holds_adapter(repository)
    except hub.UnreachableError:
        if folder := _cached(path, revision or None):
            return folder
        raise
    return hub.download(path, revision or None, hub.ADAPTER, BESIDE)


def _cached(name: str, revision: str | None) -> str | None:
    return hub.cached(name, revision, weights=hub.ADAPTER, beside=BESIDE)


def _tensors(folder: str) -> dict[str, Stored]:
    """Return the tensors of the files in a folder, from their headers.

    Raises:
        LackingError: there are none, or a file is damaged.
    """
    for name in hub.ADAPTER:
        whole = os.path.join(folder, name)
        if os.path.exists(whole + INDEX):
            shards = sorted(set(read_index(whole + INDEX).values()))
            files = [os.path.join(folder, shard) for shard in shards]
        elif os.path.exists(whole):
            files = [whole]
        else:
            continue
        return {n: stored for file in files for n, stored in read_header(file).items()}
    raise LackingError(
        f"{folder} is no adapter: peft looks for {CONFIG} and {' or '.join(hub.ADAPTER)}"
    )
