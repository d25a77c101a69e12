"""Whether a planned merge reads everything that the models hold, from names and headers alone.

mergekit merges the tensors that its definition of an architecture names, or that it infers from
the first model. What neither names is missing from the merged model, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from mergekit.common import ModelReference, get_auto_cls
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoadTensor, SaveTensor
from transformers.initialization import no_init_weights

from mergekit_monosoup.checkpoints.headers import LackingError, Stored
from mergekit_monosoup.checkpoints.inputs import Inputs, loads
from mergekit_monosoup.checkpoints.names import block

Shape = tuple[int, ...]

# Buffers that a model computes from its configuration: nothing was learned in them. Masks are
# matrices of floating point in GPT-2's files ([1, 1, n, n], by the name of a bias).
_COMPUTED = re.compile(
    r"(^|[._])(inv_freq|cos_cached|sin_cached|freqs_cis|cos_sin_cache|masked_bias|position_ids"
    r"|token_type_ids|causal_mask|attention_mask|relative_position_index|relative_coords_table"
    r"|rotary_emb|rotary_pos_emb|rope)([._]|$)"
)
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


def is_computed(tensor: Stored) -> bool:
    """Whether a tensor is a buffer that a model computes from its configuration."""
    mask = _MASK.search(tensor.name) and len(tensor.shape) == 4
    return bool(mask or _COMPUTED.search(tensor.name))


def is_matrix(tensor: Stored) -> bool:
    """Whether a tensor holds learned weights in two or more dimensions."""
    return tensor.floating and len(tensor.shape) >= 2 and not is_computed(tensor)


@dataclass(frozen=True)
class Reads:
    """What a planned merge reads, compared with what the models hold.

    Attributes:
        models: all of them.
        merged: the number of tensors that are planned.
        lacking: model → tensors (by mergekit's names) without which mergekit would stop.
        unread: model → tensors (by the files' names) that mergekit passes by.
        absent: model → tensors (by mergekit's names) that it need not have, and other models do.
        shapes: merged tensor → model → shape, where some model's is put together from parts and
            they differ.
    """

    models: tuple[str, ...] = ()
    merged: int = 0
    lacking: Mapping[str, set[str]] = field(default_factory=dict)
    unread: Mapping[str, dict[str, Stored]] = field(default_factory=dict)
    absent: Mapping[str, set[str]] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)

    @property
    def lacking_everywhere(self) -> set[str]:
        """Tensors that every one of several models lacks: then not the models are at fault."""
        lacking = [self.lacking.get(model, set()) for model in self.models]
        return set.intersection(*lacking) if len(lacking) > 1 else set()

    @property
    def unread_together(self) -> dict[tuple[str, ...], dict[str, Stored]]:
        """Models → the tensors that all of these have, and mergekit passes by.

        What it does not read of one, it reads of no other.
        """
        groups: dict[tuple[str, ...], dict[str, Stored]] = {}
        for name in dict.fromkeys(name for rest in self.unread.values() for name in rest):
            holders = tuple(model for model, rest in self.unread.items() if name in rest)
            # A fine-tune's shape and dtype are those of the merged tensor.
            groups.setdefault(holders, {})[name] = self.unread[holders[-1]][name]
        return groups


def is_sliced(config: MergeConfiguration) -> bool:
    """Whether layers are chosen, so that others are left out on purpose.

    To be asked before mergekit's planner has rewritten the configuration.
    """
    modules = (config.modules or {}).values()
    return bool(config.slices) or any(module.slices for module in modules)


def compare(tasks: Sequence[SaveTensor], inputs: Inputs, *, sliced: bool) -> Reads:
    """Compare what the planned tensors read with what the models hold.

    ``sliced``: layers of which nothing is read are left out on purpose.
    """
    return _Comparison(inputs, sliced).of(tasks)


@dataclass
class _Comparison:
    """What was read so far, by the names in the files."""

    inputs: Inputs
    sliced: bool
    read: set[str] = field(default_factory=set)
    lacking: dict[str, set[str]] = field(default_factory=dict)
    absent: dict[str, set[str]] = field(default_factory=dict)
    shapes: dict[str, dict[str, Shape]] = field(default_factory=dict)

    def of(self, tasks: Sequence[SaveTensor]) -> Reads:
        for task in tasks:
            self._look_at(task.tensor_name, list(dict.fromkeys(loads(task.tensor_task))))
        blocks = {block(name) for name in self.read}
        # What is read of any model is in the merged one: modules may take their tensors from
        # different models.
        unread = {str(model): self._left_of(model, blocks) for model in self.inputs.loaders}
        return Reads(tuple(unread), len(tasks), self.lacking, unread, self.absent, self.shapes)

    def _look_at(self, merged: str, every: list[LoadTensor]) -> None:
        """Note what one merged tensor reads of each model."""
        found = [load for load in every if self._is_whole(load) or self._has_parts(load)]
        stacked = [load for load in found if not self._is_whole(load) and not self._lacks(load)]
        if found:
            for load in every:
                if load not in found:
                    self.absent.setdefault(str(load.model), set()).add(load.tensor)
        if stacked:  # only these need the headers: whole tensors are compared by name
            shapes = {
                str(load.model): self.inputs.sources(load)[1]
                for load in found
                if not self._lacks(load)
            }
            if len(set(shapes.values())) > 1:
                self.shapes[merged] = shapes

    def _is_whole(self, load: LoadTensor) -> bool:
        """Whether the model has the tensor as mergekit wants it, under one of its names."""
        # Tied weights are stored under several names, and any of them will do.
        names = (load.tensor, *(load.aliases or ()), *(load.tied_names or ()))
        self.read.update(names)
        return any(name in self.inputs.loaders[load.model].index.tensor_paths for name in names)

    def _has_parts(self, load: LoadTensor) -> bool:
        """Whether mergekit puts the tensor together from others, or stops because it cannot."""
        try:
            parts, _ = self.inputs.sources(load)
        except LackingError:
            self.lacking.setdefault(str(load.model), set()).add(load.tensor)
            return True
        self.read.update(part.name for part in parts)
        return bool(parts)

    def _lacks(self, load: LoadTensor) -> bool:
        return load.tensor in self.lacking.get(str(load.model), ())

    def _left_of(self, model: ModelReference, blocks: set[str]) -> dict[str, Stored]:
        if str(model) in self.lacking:
            return {}  # what it holds instead may well be what is missed, by another name
        names = [
            name
            for name in self.inputs.loaders[model].index.tensor_paths
            if name not in self.read and not (self.sliced and block(name) not in blocks)
        ]
        tensors = {name: self.inputs.stored(model, name) for name in names}
        if any(map(is_matrix, tensors.values())):
            for name in _copies(model, self.read):
                tensors.pop(name, None)
        return tensors


def _copies(model: ModelReference, read: set[str]) -> set[str]:
    """Return the names that a model's class ties to one of those that are read.

    Trainers often store the head of a model whose head is its embedding; on loading it is
    overwritten. No code of the model's own is run; without its class nothing is known.
    """
    try:
        config = model.config()
        name = next(iter(config.architectures or ()))
        with torch.device("meta"), no_init_weights():
            built = get_auto_cls(name).from_config(config)
        built.tie_weights()  # which `no_init_weights` has kept from happening
    except Exception:
        return set()
    names: dict[int, set[str]] = {}
    for name, parameter in built.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name for tied in names.values() if tied & read for name in tied - read}
