"""Rows that mergekit's `pad_to_multiple_of` adds: the edit of the tokens is that without them."""

from __future__ import annotations

import pytest
import torch
from helpers import zoo
from mergekit.common import ImmutableMap
from mergekit.merge_methods import get, merge_tensors
from mergekit.merge_methods.base import TensorGroup
from mergekit.tokenizer.embed import PermutedVocabulary

from mergekit_monosoup.kernel.padding import Padding
from mergekit_monosoup.report import read

TOKENS, PADDED, WIDTH = 90, 96, 72


def embeddings(models: int, dtype=torch.float32, shape=(TOKENS, WIDTH)) -> list[torch.Tensor]:
    W0 = torch.tensor(zoo.pretrained(*shape))
    kinds = ["low rank + noise", "power law 1", "random"]
    deltas = [torch.tensor(zoo.deltas(*shape)[kind]) for kind in kinds[: models - 1]]
    return [W0.to(dtype), *((W0 + delta).to(dtype) for delta in deltas)]


class Vocabulary:
    """As much of a tokenizer as mergekit asks for."""

    def get_vocab(self):
        return {f"w{i}": i for i in range(TOKENS)}


def padded(weights, axis=0, multiple=PADDED):
    """What mergekit's own task makes of them."""
    names = [f"m{i}" for i in range(len(weights))]
    task = PermutedVocabulary.model_construct(
        tokens=ImmutableMap({}),
        pad_to_multiple_of=multiple,
        base_model=names[0],
        vocabulary_axis=axis,
    )
    same = {i: i for i in range(TOKENS)}
    info = type("Info", (), {"tokenizer": Vocabulary(), "permutations": dict.fromkeys(names, same)})
    return list(task.execute(info, dict(zip(names, weights, strict=True))).values())


def merge(method, weights, axis, **parameters):
    group = TensorGroup.from_tensors(
        weights, base_index=0, name="model.embed_tokens.weight", vocabulary_axis=axis
    )
    (merged,) = get(method)((group,), parameters=parameters)
    return merged


@pytest.mark.parametrize("multiple", [TOKENS + 1, PADDED, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "models"), [("monosoup", 2), ("monosoup", 3), ("svc", 3)])
def test_tokens_get_the_bits_of_the_unpadded_edit(tmp_path, method, models, dtype, multiple):
    """With padding in the spectrum they differ by 4e-5 of ΔW here, by 4e-3 in a tiny Llama."""
    weights = embeddings(models, dtype)
    expected = merge(method, weights, 0)
    found = merge(method, padded(weights, multiple=multiple), 0, report=str(tmp_path / "r.jsonl"))
    assert len(found) == multiple and torch.equal(found[:TOKENS], expected)
    assert torch.equal(found[TOKENS:], expected.mean(0).expand(multiple - TOKENS, -1))
    assert not torch.equal(expected, weights[1]), "nothing was edited"
    (record,) = read(tmp_path / "r.jsonl")
    assert record.shape == (multiple, WIDTH) and record.reason.endswith("left out of the spectrum")


def test_another_axis():
    weights = [w.T.contiguous() for w in embeddings(2)]
    found = merge("monosoup", padded(weights, axis=1), 1)
    assert torch.equal(found[:, :TOKENS], merge("monosoup", padded(weights, 1, None), 1))
    assert found.shape == (WIDTH, PADDED)


@pytest.mark.parametrize(
    "change",
    [
        lambda base, tuned: tuned[-1].add_(1e-3),  # a token that was trained
        lambda base, tuned: base[-6:].add_(1e-3),  # alike, but no mean
        lambda base, tuned: base.zero_() is tuned.zero_(),
    ],
)
def test_rows_that_only_look_like_padding_count(change):
    base, tuned = padded(embeddings(2))
    assert Padding.of([base, tuned], 0).rows == PADDED - TOKENS
    change(base, tuned)
    assert Padding.of([base, tuned], 0).rows == 0
    assert torch.equal(
        merge("monosoup", [base, tuned], 0), merge_tensors([base, tuned], "monosoup", base_index=0)
    )


def test_without_padding_weights_are_not_touched():
    weights = embeddings(2)
    for axis in (None, 0, 1):
        found = Padding.of(weights, axis)
        assert found == Padding() and found.without(weights[0]) is weights[0]
        assert found.restored(weights[0]) is weights[0]
    for shape in [(0, 4), (4, 0), (1, 4), (3,), ()]:
        assert Padding.of([torch.ones(shape)] * 2, 0) == Padding()
