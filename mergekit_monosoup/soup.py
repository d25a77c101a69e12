"""Similarity-filtered greedy soup (paper, §3): choose fine-tunes to average, without data.

Starting with the best model in distribution, candidate j joins the soup S when the cosine between
its task vector τ_j and the soup's, τ_S = mean of τ_i over S, averaged over layers, exceeds a
threshold. All of it follows from the inner products G_ij = ⟨τ_i, τ_j⟩ of each tensor,
⟨τ_S, τ_j⟩ = mean_{i∈S} G_ij and ‖τ_S‖² = mean_{i,i'∈S} G_ii', so the files are read once.

The paper gives neither threshold nor order, nor which tensors count; they are options here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from mergekit_monosoup.checkpoints.names import matrices
from mergekit_monosoup.checkpoints.reader import Checkpoints, local_reference, named_errors
from mergekit_monosoup.checkpoints.texts import UnreadableError
from mergekit_monosoup.checkpoints.yaml import read_document
from mergekit_monosoup.kernel.similarity import BUFFERS, cosine, inner_products
from mergekit_monosoup.kernel.threads import in_order
from mergekit_monosoup.memory import Budget, available_memory
from mergekit_monosoup.parameters import Count, Order, Similarity
from mergekit_monosoup.report.labels import name_cells

if TYPE_CHECKING:
    from rich.table import Table

# Squared norm of a soup relative to its members' under which they cancel, as τ and −τ do: what is
# left is rounding, and its direction means nothing. Sums of float64 products err by about 1e-15.
CANCELLED = 1e-12


# Similarity from which on two updates are nearly one: the distance of two unit vectors is 0.14.
TWINS = 0.99


@dataclass(frozen=True)
class Decision:
    """Whether a candidate joined the soup.

    Attributes:
        model: its name.
        similarity: to the soup when the candidate was looked at; None for the first model.
        taken: whether it is in the soup.
    """

    model: str
    similarity: float | None
    taken: bool


def products(checkpoints: Checkpoints, names: Iterable[str], count: Count = "matrices") -> Tensor:
    """Return the inner products G (n, m, m) float64 of the n tensors that count.

    As many tensors at a time as torch has threads, and memory allows.

    Args:
        checkpoints: the base, and the m models that are compared.
        names: tensors to read, of ``checkpoints.names``.
        count: ``matrices`` leaves out norms and biases; stacked experts are one matrix each.
            ``all`` counts everything.

    Raises:
        ValueError: an input is not finite, nothing counts, or a model is no different from the
            base.
    """
    base, *models = checkpoints.models
    budget = Budget(available_memory())

    def within_budget(name: str) -> list[Tensor]:
        with budget.taken(BUFFERS + sum(part.size for part in checkpoints.stored(name))):
            return _products(checkpoints, name, count)

    each = in_order(within_budget, names, torch.get_num_threads())
    grams = [gram for of_tensor in each for gram in of_tensor]
    if not grams:
        raise ValueError(
            f"no tensor counts: {base} and the models share no matrix of floating point"
        )
    stacked = torch.stack(grams)
    for model, square in zip(models, stacked.sum(0).diagonal().tolist(), strict=True):
        if square == 0:
            raise ValueError(f"{model} is no different from {base}: it has no direction to compare")
    return stacked


def _products(checkpoints: Checkpoints, name: str, count: Count) -> list[Tensor]:
    """Return the inner products (m, m) of each matrix of a tensor."""
    tensors = checkpoints.load(name)
    if not all(tensor.is_floating_point() for tensor in tensors):
        return []
    parts = matrices(name, tensors[0].shape) or ([("", ())] if count == "all" else [])
    with named_errors(name, checkpoints.models):
        return [
            inner_products(tensors[0][index], [t[index] for t in tensors[1:]]) for _, index in parts
        ]


def similarity(
    gram: Tensor, soup: Sequence[int], candidate: int, how: Similarity = "mean"
) -> float:
    """Return the cosine between the soup's task vector and a candidate's.

    Tensors in which either does not move have no cosine and are left out of the mean.

    Args:
        gram: see :func:`products`.
        soup: places in ``gram`` of the models in the soup.
        candidate: place of the candidate.
        how: ``mean`` of the cosines of all tensors, or that of the ``whole`` vector.

    Raises:
        ValueError: there is no tensor in which both move.
    """
    inner = gram[:, soup, candidate].mean(1)
    square = gram[:, soup][:, :, soup].mean((1, 2))
    members = gram.diagonal(dim1=1, dim2=2)[:, soup].mean(1)
    own = gram[:, candidate, candidate]
    if how == "whole":
        inner, square, members, own = (
            x.sum(0, keepdim=True) for x in (inner, square, members, own)
        )
    square = torch.where(square > CANCELLED * members, square, 0.0)
    cosines = [
        cosine(*values)
        for values in zip(inner.tolist(), square.tolist(), own.tolist(), strict=True)
    ]
    defined = [value for value in cosines if value is not None]
    if not defined:
        raise ValueError(
            "there is no tensor in which the soup and the candidate both differ from the base"
        )
    return sum(defined) / len(defined)


def pairwise(gram: Tensor, how: Similarity = "mean") -> list[list[float | None]]:
    """Return the similarity of each two models, m rows of m; None where there is none."""

    def of_pair(i: int, j: int) -> float | None:
        try:
            return similarity(gram, [i], j, how)
        except ValueError:
            return None

    models = range(gram.shape[1])
    return [[of_pair(i, j) for j in models] for i in models]


def select(
    models: Sequence[str],
    gram: Tensor,
    threshold: float,
    *,
    order: Order = "given",
    how: Similarity = "mean",
    scores: Mapping[str, float] | None = None,
) -> list[Decision]:
    """Choose the soup greedily; return a decision per model, in the order of looking at them.

    Args:
        models: names, in the order of ``gram``; the soup starts with the first, or with the best
            score.
        gram: see :func:`products`.
        threshold: a candidate joins when its similarity *exceeds* it.
        order: of the candidates: as given, by falling score, or always the most similar one next.
        how: see :func:`similarity`.
        scores: held-out accuracy of each model, or anything of which more is better.

    Raises:
        ValueError: the threshold is no cosine, or ``order`` needs scores; two models have nothing
            to compare.
    """
    check_choice(threshold, order, scores is not None)
    ranking = list(range(len(models)))
    if scores is not None:
        best = sorted(ranking, key=lambda i: -scores[models[i]])  # stable: ties stay as given
        ranking = best if order == "scores" else [best[0], *(i for i in ranking if i != best[0])]
    first, *candidates = ranking
    soup, decisions = [first], [Decision(models[first], None, True)]
    while candidates:
        if order == "similarity":
            candidates.sort(key=lambda i: -_named_similarity(models, gram, soup, i, how))
        candidate = candidates.pop(0)
        cosine_to_soup = _named_similarity(models, gram, soup, candidate, how)
        decisions.append(Decision(models[candidate], cosine_to_soup, cosine_to_soup > threshold))
        if cosine_to_soup > threshold:
            soup.append(candidate)
    return decisions


def _named_similarity(
    models: Sequence[str], gram: Tensor, soup: Sequence[int], candidate: int, how: Similarity
) -> float:
    """Return :func:`similarity`, with the models' names in its error."""
    try:
        return similarity(gram, soup, candidate, how)
    except ValueError as error:
        raise ValueError(
            f"{models[candidate]}: {error} ({', '.join(models[i] for i in soup)} so far)"
        ) from error


def read_scores(path: Path, models: Sequence[str]) -> dict[str, float]:
    """Return the score of each model from a JSON or YAML file.

    The file maps models, named as on the command line, to numbers.

    Raises:
        ValueError: names file and model.
    """
    try:
        data = read_document(path)  # JSON is YAML
    except UnreadableError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must map each model to its score, is a {type(data).__name__}")
    return {model: _score(path, data, model) for model in models}


def _score(path: Path, data: Mapping[Any, Any], model: str) -> float:
    if model not in data:
        raise ValueError(
            f"{path}: no score for {model}; it has some for {', '.join(map(str, data)) or 'none'}"
        )
    score = data[model]
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if not is_number or not math.isfinite(score):
        raise ValueError(f"{path}: the score of {model} must be a finite number, got {score!r}")
    return float(score)


def check_choice(threshold: float, order: Order | None, scored: bool) -> None:
    """Raise ValueError if the threshold is no cosine, or there are no scores to order by."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"the threshold is a cosine, in [-1, 1]; got {threshold!r}")
    if order == "scores" and not scored:
        raise ValueError("the order `scores` needs --scores FILE")


def check_models(base: str, models: Sequence[str]) -> None:
    """Raise ValueError if there is nothing to choose from. For use before the files are read."""
    if len(models) < 2:
        raise ValueError("give at least two fine-tuned models, the best in distribution first")
    places: dict[str, str] = {}
    for model in models:
        if _place(model) == _place(base):
            raise ValueError(f"{model} is the base model; list the fine-tuned ones only")
        if (first := places.get(_place(model))) is not None:
            raise ValueError(f"{model} is listed twice" + f", also as {first}" * (first != model))
        places[_place(model)] = model


def _place(model: str) -> str:
    """Return one spelling for all of a reference, whose parts may be folders."""
    return "+".join(
        os.path.realpath(part) if os.path.exists(part) else part for part in model.split("+")
    )


def configuration(
    base: str, decisions: Sequence[Decision], threshold: float, *, edit: bool = False
) -> str:
    """Return YAML for mergekit: the average of the chosen models, or with ``edit`` its MonoSoup."""
    chosen = [
        {"model": local_reference(decision.model), "parameters": {"weight": 1.0}}
        for decision in decisions
        if decision.taken
    ]
    merge: dict[str, object] = {"merge_method": "linear", "models": chosen}
    if edit:
        merge = {"merge_method": "monosoup", "base_model": local_reference(base), "models": chosen}
    lines = [
        f"Similarity-filtered greedy soup against {base}: candidates join above {threshold:g}."
    ]
    lines += [describe(decision) for decision in decisions]
    if any("+" in str(entry["model"]) for entry in chosen):
        lines.append("Run with --lora-merge-cache DIR.")
    # A name with a line break would end the comment.
    header = "".join("# " + " ".join(line.split()) + "\n" for line in lines)
    return header + yaml.safe_dump(merge, sort_keys=False, allow_unicode=True)


def similarity_tables(
    models: Sequence[str], values: Sequence[Sequence[float | None]], width: int
) -> Iterator[Table]:
    """Yield the pairwise matrix, in as many tables as ``width`` columns of text need."""
    from rich import box
    from rich.table import Table

    texts = [["" if value is None else f"{value:.2f}" for value in row] for row in values]
    numbers = [str(i + 1) for i in range(len(models))]
    per_table = max(4, (width - 40) // 6)
    for start in range(0, len(models), per_table):
        table = Table(title="Similarity of the updates", title_justify="left", box=box.SIMPLE_HEAD)
        table.padding, table.pad_edge = (0, 1, 0, 0), False
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("model")
        shown = numbers[start : start + per_table]
        for number in shown:
            table.add_column(number, justify="right", no_wrap=True)
        rows = [row[start : start + per_table] for row in texts]
        names = name_cells(models, [numbers, *([number, "-1.00"] for number in shown)], width)
        for number, name, row in zip(numbers, names, rows, strict=True):
            table.add_row(number, name, *row)
        yield table


def twins(models: Sequence[str], values: Sequence[Sequence[float | None]]) -> Iterator[str]:
    """Yield a line for each two models whose updates are nearly the same, from :func:`pairwise`."""
    for i, row in enumerate(values):
        for j, value in enumerate(row[:i]):
            if value is not None and value >= TWINS:
                yield (
                    f"{models[j]} and {models[i]} are nearly the same update ({value:.3f}): two "
                    "checkpoints of one run? Averaging them changes next to nothing"
                )


def describe(decision: Decision) -> str:
    """Return a line about a decision, for the terminal and for the comment in the YAML."""
    if decision.similarity is None:
        return f"{decision.model}: first"
    outcome = "joins" if decision.taken else "left out"
    return f"{decision.model}: similarity {decision.similarity:.3f}, {outcome}"
