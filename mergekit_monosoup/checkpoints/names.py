"""What a tensor's name means: the matrices that it holds, its layer, its type.

Mixture-of-experts checkpoints stack E experts in one tensor, and the fused gate_up projection is
two matrices glued together; a convolution of the same number of dimensions is one matrix. Only the
name tells them apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

Index = tuple[int | slice, ...]

# Granite's MoE has no ".experts." in its names but the same layout as Qwen3-MoE.
EXPERTS = re.compile(r"\.experts\.(?!\d)|\.block_sparse_moe\.(input|output)_linear\b")
GATE_UP = re.compile(r"\.gate_up_proj\b|\.block_sparse_moe\.input_linear\b")
# Llama 4 stores experts as [E, in, 2·out]; everything else that mergekit knows as [E, 2·out, in].
TRANSPOSED = re.compile(r"\.feed_forward\.experts\.")


def matrices(name: str, shape: Sequence[int]) -> list[tuple[str, Index]]:
    """Return (suffix for the record's name, index into the tensor) of each matrix of a tensor.

    A plain weight, a convolution [out, in, k...] and fused attention are one matrix with an empty
    suffix; a stack of experts [E, a, b] is E, or 2E for the fused gate_up projection. Vectors and
    stacks of expert biases [E, a] hold none.
    """
    if len(shape) < 2:
        return []
    if not EXPERTS.search(name):
        return [("", ())]
    if len(shape) == 2 and name.endswith("bias"):
        return []
    if len(shape) != 3:
        return [("", ())]
    experts = range(shape[0])
    axis = 2 if TRANSPOSED.search(name) else 1
    if not GATE_UP.search(name) or shape[axis] % 2:
        return [(f"[{e}]", (e,)) for e in experts]
    half = shape[axis] // 2
    halves = (("gate", slice(0, half)), ("up", slice(half, 2 * half)))
    return [
        (f"[{e}].{part}", (e, *[slice(None)] * (axis - 1), rows))
        for e in experts
        for part, rows in halves
    ]


# `layers.12`, `stages.2.blocks.5`; an expert is a matrix of its layer, not a layer, and
# `downsample.1.weight` is a matrix.
# More than nine digits count no layers: they are a hash, and Python may refuse to read them.
_NUMBER = r"\.[0-9]{1,9}"
_LAYER = re.compile(
    rf"(?:^|\.)(?!experts\.)\w+{_NUMBER}(?:\.(?!experts\.)\w+{_NUMBER})*(?=\.(?!weight$|bias$))"
)


def layer(name: str) -> tuple[int, ...]:
    """Return the numbers of the layer that a tensor belongs to, (12,) or (2, 5).

    Embeddings and heads belong to none: ().
    """
    match = _LAYER.search(name)
    return (
        tuple(int(number) for number in re.findall(r"\.([0-9]+)(?![^.])", match[0]))
        if match
        else ()
    )


def block(name: str) -> str:
    """Return a tensor's name up to the number of its layer; empty outside of layers."""
    match = _LAYER.search(name)
    return name[: match.end()] if match else ""


def projection(name: str) -> str:
    """Return what a matrix does within its layer, ``mlp.up_proj``.

    For tensors outside of layers it is their name without `model.`.
    """
    match = _LAYER.search(name)
    rest = name[match.end() + 1 :] if match else name
    # One type for all experts of a layer, but fc1 and fc2 stay two.
    kind = re.sub(r"\b\d+\b", "*", rest.removeprefix("model.").removesuffix(".weight"))
    return kind or "(unnamed)"


def natural(name: str) -> tuple[str | tuple[int, str], ...]:
    """Return a sort key by which layer 10 comes after layer 9."""
    parts: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", name))
    for place in range(1, len(parts), 2):
        # By length, then by digits: numbers may have thousands of them, which int() refuses.
        digits = str(parts[place]).lstrip("0")
        parts[place] = len(digits), digits
    return tuple(parts)


# -- names of one model in another's files ---------------------------------------------------------


@dataclass(frozen=True)
class Renaming:
    """What tells the names of one file from those of another, of the same model.

    Attributes:
        prefix: what the names begin with; empty where parts lie within.
        parts: what lies within, as ``_fsdp_wrapped_module``.
        more: whether it is the first file whose names have them, or the second.
        count: names that are the same without.
    """

    prefix: str
    parts: tuple[str, ...]
    more: bool
    count: int

    def described(self, other: str) -> str:
        """Return what differs and what to do, to be read after the name of the second file.

        ``other``: what the first is called.
        """
        if self.prefix:
            kind, listed = "begin with", f"`{self.prefix}`"
            change = f"name.removeprefix({self.prefix!r}): tensor … if name.startswith(…)"
        else:
            kind, listed = "have within", ", ".join(f"`{part}`" for part in self.parts)
            replaced = "".join(f".replace({part + '.'!r}, '')" for part in self.parts)
            change = f"name{replaced}: tensor …"
        if self.more:
            what = f"the names of {other} {kind} {listed}, its own do not"
        else:
            what = f"its names {kind} {listed}, those of {other} do not"
        return (
            f"{what} ({self.count} tensors are the same otherwise): save the model inside of its "
            f"wrapper, or rename the tensors, `{{{change}}}`"
        )


def renaming(first: Collection[str], second: Collection[str]) -> Renaming | None:
    """Return what tells the second file's names from the first's; None where nothing does.

    A wrapper (torch.compile, DistributedDataParallel, FSDP, a trainer's own class) puts its name
    before those of the model, or into them. Which one is found by comparing, not looked up.
    """
    common = len(set(first) & set(second))
    if 2 * common >= min(len(first), len(second)):
        return None
    found = [
        *_prefixes(first, second, more=False),
        *_prefixes(second, first, more=True),
        *_parts(first, second, more=False),
        *_parts(second, first, more=True),
    ]
    best = max(found, key=lambda candidate: candidate.count, default=None)
    return best if best and 2 * best.count > min(len(first), len(second)) else None


def _prefixes(
    plain: Collection[str], wrapped: Collection[str], *, more: bool
) -> Iterator[Renaming]:
    """Yield the most frequent beginning without which wrapped names are plain ones."""
    known = set(plain)
    counts: Counter[str] = Counter()
    for name in wrapped:
        for dot in (match.end() for match in re.finditer(r"\.", name)):
            if name[dot:] in known:
                counts[name[:dot]] += 1
                break  # the shortest beginning: `model.model.` also ends in `model.`
    for prefix, count in counts.most_common(1):
        yield Renaming(prefix, (), more, count)


def _parts(plain: Collection[str], wrapped: Collection[str], *, more: bool) -> Iterator[Renaming]:
    """Yield the parts that only wrapped names have, if those are plain ones without them."""
    known = set(plain)
    usual = {part for name in plain for part in name.split(".")}
    found: Counter[str] = Counter()
    same = set()
    for name in wrapped:
        parts = name.split(".")
        kept = ".".join(part for part in parts if part in usual)
        if kept != name and kept in known:
            same.add(kept)
            found.update(set(parts) - usual)
    if same:
        yield Renaming("", tuple(part for part, _ in found.most_common(3)), more, len(same))
