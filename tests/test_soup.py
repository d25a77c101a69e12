"""`soup`: the selection equals one that materialises every soup, in plain NumPy.

The YAML that it writes passes `check` and merges.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.scripts import run_yaml
from safetensors.torch import save_file

from mergekit_monosoup import edit
from mergekit_monosoup.check import check
from mergekit_monosoup.checkpoints.reader import Checkpoints
from mergekit_monosoup.cli import main
from mergekit_monosoup.kernel.similarity import inner_products
from mergekit_monosoup.kernel.task_vector import BLOCK_ELEMENTS
from mergekit_monosoup.soup import (
    Decision,
    configuration,
    pairwise,
    products,
    read_scores,
    select,
    similarity,
    twins,
)

UP = "model.layers.1.mlp.up_proj.weight"


def oracle(base, tuned, threshold, how="mean", order="given"):
    """Select with soups as averages of state dicts, cosines of their differences to the base.

    Returns [(model, similarity, taken)].
    """

    def against(soup, j):
        average = [sum(tuned[i][n] for i in soup) / len(soup) - base[n] for n in range(len(base))]
        other = [tuned[j][n] - base[n] for n in range(len(base))]
        if how == "whole":
            average, other = ([np.concatenate([w.ravel() for w in x])] for x in (average, other))
        cosines = [
            (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in zip(average, other, strict=True)
        ]
        return float(np.mean(cosines))

    soup, left, decisions = [0], list(range(1, len(tuned))), [(0, None, True)]
    while left:
        j = max(left, key=lambda j: against(soup, j)) if order == "similarity" else left[0]
        left.remove(j)
        value = against(soup, j)
        decisions.append((j, value, value > threshold))
        if value > threshold:
            soup.append(j)
    return decisions


def related(count, seed, shapes=((12, 8), (20,), (6, 9))):
    """A base and fine-tunes that share a direction to different degrees."""
    rng = np.random.default_rng(seed)
    base = [rng.standard_normal(s) for s in shapes]
    common = [rng.standard_normal(s) for s in shapes]
    tuned = []
    for _ in range(count):
        share = rng.uniform(-0.5, 1.5)
        tuned.append(
            [
                b + 0.1 * (share * c + rng.standard_normal(b.shape))
                for b, c in zip(base, common, strict=True)
            ]
        )
    return base, tuned


def gram_of(base, tuned):
    per_tensor = [[torch.from_numpy(w[n]) for w in (base, *tuned)] for n in range(len(base))]
    return torch.stack([inner_products(first, others) for first, *others in per_tensor])


@pytest.mark.parametrize("how", ["mean", "whole"])
@pytest.mark.parametrize("order", ["given", "similarity"])
@pytest.mark.parametrize("seed", range(4))
def test_selection_equals_materialised_soups(seed, order, how):
    base, tuned = related(6, seed)
    models = [f"m{i}" for i in range(6)]
    decisions = select(models, gram_of(base, tuned), 0.3, order=order, how=how)
    expected = oracle(base, tuned, 0.3, how, order)
    assert [(d.model, d.taken) for d in decisions] == [
        (models[j], taken) for j, _, taken in expected
    ]
    for decision, (_, value, _) in zip(decisions[1:], expected[1:], strict=True):
        assert decision.similarity == pytest.approx(value, abs=1e-12)
    assert any(d.taken for d in decisions[1:]) or any(not d.taken for d in decisions[1:])


def test_the_seeds_above_take_some_and_leave_some():
    taken = [d[2] for seed in range(4) for d in oracle(*related(6, seed), 0.3)[1:]]
    assert 3 < sum(taken) < len(taken) - 3


def test_order_and_scores():
    base, tuned = related(5, 1)
    models, gram = list("abcde"), gram_of(base, tuned)
    scores = dict(zip(models, (0.1, 0.5, 0.3, 0.9, 0.3), strict=True))
    assert [d.model for d in select(models, gram, 0.2, order="scores", scores=scores)] == list(
        "dbcea"
    )
    assert [d.model for d in select(models, gram, 0.2, scores=scores)] == list("dabce"), (
        "the best first, then as given"
    )
    order = select(models, gram, -1.0, order="similarity")
    assert order[1].similarity == max(similarity(gram, [0], j) for j in range(1, 5))
    assert all(d.taken for d in order), "nothing is below -1"
    assert [d.taken for d in select(models, gram, 1.0)] == [True] + [False] * 4
    for threshold in (1.5, float("nan")):
        with pytest.raises(ValueError, match="threshold is a cosine"):
            select(models, gram, threshold)
    with pytest.raises(ValueError, match="needs --scores"):
        select(models, gram, 0.5, order="scores")


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), threshold=st.floats(-0.9, 0.9))
def test_cosines_do_not_depend_on_the_size_of_an_update(seed, scale, threshold):
    """A candidate's scale changes nothing when it is compared, only once it is in the soup."""
    base, tuned = related(3, seed)
    models, gram = list("abc"), gram_of(base, tuned)
    tuned[2] = [b + scale * (w - b) for w, b in zip(tuned[2], base, strict=True)]
    for first, second in zip(
        select(models, gram, threshold),
        select(models, gram_of(base, tuned), threshold),
        strict=True,
    ):
        assert first.similarity == pytest.approx(second.similarity, abs=1e-9)
    values = np.array(pairwise(gram))
    assert values == pytest.approx(values.T, abs=1e-12) and np.diag(values) == pytest.approx(1)


def test_tensors_without_a_direction_are_left_out_of_the_mean():
    base = [np.zeros((2, 2)), np.zeros((2, 2))]
    a, b = [np.eye(2), np.eye(2)], [np.eye(2), np.zeros((2, 2))]
    gram = gram_of(base, [a, b, [-np.eye(2), np.zeros((2, 2))]])
    assert similarity(gram, [0], 1) == pytest.approx(1)
    assert similarity(gram, [0], 1, "whole") == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match="no tensor in which the soup and the candidate"):
        similarity(gram, [1, 2], 0)  # the soup cancels
    with pytest.raises(ValueError, match=r"m0: there is no tensor .*\(m1, m2 so far\)"):
        select(["m1", "m2", "m0"], gram[:, [1, 2, 0]][:, :, [1, 2, 0]], -1.0)


def test_inner_products_over_several_blocks(monkeypatch):
    monkeypatch.setattr("mergekit_monosoup.kernel.task_vector.BLOCK_ELEMENTS", 64)
    assert BLOCK_ELEMENTS > 64
    W0, *tuned = (torch.randn(13, 17) for _ in range(4))
    expected = np.array(
        [[float(((a - W0).double() * (b - W0).double()).sum()) for b in tuned] for a in tuned]
    )
    assert inner_products(W0, tuned).numpy() == pytest.approx(expected, rel=1e-6)
    assert inner_products(W0.bfloat16(), [w.double() for w in tuned]).dtype == torch.float64


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and three fine-tunes, the last of which is the first one's opposite."""
    folder = tmp_path_factory.mktemp("soup")
    checkpoints.pair(folder, tuned=3)
    base, first = (checkpoints.state_dict(folder / name) for name in ("base", "tuned0"))
    near = {
        n: w + 0.3 * (first[n] - base[n])
        for n, w in checkpoints.state_dict(folder / "tuned1").items()
    }
    save_file(near, folder / "tuned1" / "model.safetensors", {"format": "pt"})
    far = {n: base[n] - (first[n] - base[n]) for n in base}
    save_file(far, folder / "tuned2" / "model.safetensors", {"format": "pt"})
    return folder


def models_of(world):
    return [str(world / f"tuned{i}") for i in range(3)]


def up_of(*folders):
    return [checkpoints.state_dict(Path(folder))[UP] for folder in folders]


def soup(*arguments, code=0):
    result = CliRunner().invoke(main, ["soup", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def merged(config, folder):
    CliRunner().invoke(run_yaml.main, [str(config), str(folder), "--quiet"], catch_exceptions=False)
    return checkpoints.state_dict(folder)


@pytest.mark.parametrize("count", ["matrices", "all"])
def test_products_of_checkpoints(world, count):
    opened = Checkpoints([str(world / "base"), *models_of(world)])
    gram = products(opened, opened.names, count)
    states = [
        checkpoints.state_dict(world / name) for name in ("base", "tuned0", "tuned1", "tuned2")
    ]
    counted = [n for n in states[0] if states[0][n].ndim == 2 or count == "all"]
    assert len(gram) == len(counted) and (count == "all") == (len(counted) == len(states[0]))
    base, *tuned = ([state[n].double().numpy() for n in counted] for state in states)
    # The norms of untrained fine-tunes are equal to the base: they count, but have no direction.
    tuned_only = [n for n, b in enumerate(base) if all((t[n] != b).any() for t in tuned)]
    base, tuned = [base[n] for n in tuned_only], [[t[n] for n in tuned_only] for t in tuned]
    decisions = select(models_of(world), gram, 0.1)
    for decision, (_, value, taken) in zip(
        decisions[1:], oracle(base, tuned, 0.1)[1:], strict=True
    ):
        assert decision.similarity == pytest.approx(value, abs=1e-9) and decision.taken == taken
    assert [d.taken for d in decisions] == [True, True, False]


def test_command_writes_a_merge_that_checks_and_runs(world, tmp_path):
    out = tmp_path / "soup.yml"
    text = soup("--base", world / "base", "--threshold", 0.1, *models_of(world), "--out", out)
    assert (
        "tuned1: similarity 0." in text
        and "joins" in text
        and "tuned2: similarity -" in text
        and "left out" in text
    )
    assert "Similarity of the updates" in text and "-1.00" in text and "2 of 3 models" in text
    assert "# " in out.read_text().splitlines()[0] and check(out) == []
    config = yaml.safe_load(out.read_text())
    assert config["merge_method"] == "linear" and "base_model" not in config
    result = merged(out, tmp_path / "merged")
    first, second = up_of(*models_of(world)[:2])
    assert torch.allclose(result[UP], (first + second) / 2, atol=1e-7) and not torch.equal(
        result[UP], first
    )


def test_edited_soup(world, tmp_path):
    out = tmp_path / "soup.yml"
    soup("--base", world / "base", "--threshold", 0.1, "--edit", *models_of(world), "--out", out)
    assert check(out) == []
    expected, _ = edit(*up_of(world / "base"), up_of(*models_of(world)[:2]))
    assert torch.equal(merged(out, tmp_path / "merged")[UP], expected)


def test_a_soup_of_one_still_merges(world, tmp_path):
    out = tmp_path / "soup.yml"
    soup("--base", world / "base", "--threshold", 0.99, *models_of(world), "--out", out)
    assert check(out) == []
    assert torch.equal(
        merged(out, tmp_path / "merged")[UP], checkpoints.state_dict(world / "tuned0")[UP]
    )


def test_scores_from_a_file(world, tmp_path):
    models, out, scores = models_of(world), tmp_path / "soup.yml", tmp_path / "scores.json"
    scores.write_text(json.dumps(dict(zip(models, (1, 3.5, 2), strict=True))))
    text = soup(
        "--base", world / "base", "--threshold", 0.1, "--scores", scores, *models, "--out", out
    )
    assert [
        line.split(":")[0]
        for line in text.splitlines()
        if "similarity" in line or ": first" in line
    ] == [
        models[1],
        models[2],
        models[0],
    ]
    for content, words in (
        ("[1, 2]", "must map each model to its score, is a list"),
        (json.dumps({models[0]: 1}), f"no score for {models[1]}"),
        (
            json.dumps(dict.fromkeys(models, True)),
            f"the score of {models[0]} must be a finite number, got True",
        ),
        (json.dumps(dict.fromkeys(models, float("nan"))), "must be a finite number, got "),
        ("a: b: c", "cannot be read as YAML"),
    ):
        scores.write_text(content)
        with pytest.raises(ValueError, match=r"scores\.json") as error:
            read_scores(scores, models)
        assert words in str(error.value)


def test_wrong_inputs_are_named_before_files_are_read(world, tmp_path):
    base, models, out = world / "base", models_of(world), tmp_path / "soup.yml"
    common = ["--base", base, "--threshold", 0.1, "--out", out]
    assert "at least two" in soup(*common, models[0], code=1)
    assert f"{models[0]} is listed twice" in soup(*common, models[0], models[1], models[0], code=1)
    other = f"{Path(models[0]).parent}/./{Path(models[0]).name}"
    assert f"{other} is listed twice, also as {models[0]}" in soup(
        *common, models[0], other, code=1
    )
    assert "is the base model" in soup(*common, models[0], base, code=1)
    assert "./nowhere: no such file or folder" in soup(*common, models[0], "./nowhere", code=1)
    assert "needs --scores" in soup(*common, *models, "--order", "scores", code=1)
    assert "in [-1, 1]; got 7" in soup(
        "--base", base, "--threshold", 7, *models, "--out", out, code=1
    )
    assert "Missing option '--threshold'" in soup("--base", base, *models, code=2)
    lost = tmp_path / "lost" / "soup.yml"
    assert "lost: no such folder" in soup(*common, *models, "--out", lost, code=1).replace(
        "\n", " "
    )
    assert not out.exists()
    out.write_text("mine")
    assert (
        f"{out} exists; --force overwrites it" in soup(*common, *models, code=1)
        and out.read_text() == "mine"
    )
    soup(*common, *models, "--force")
    assert "linear" in out.read_text()
    (tmp_path / "copy").mkdir()
    state = checkpoints.state_dict(base)
    save_file(state, tmp_path / "copy" / "model.safetensors")
    assert "copy is no different from" in soup(
        *common, "--force", models[0], tmp_path / "copy", code=1
    )
    save_file(
        state | {UP: torch.full_like(state[UP], float("inf"))},
        tmp_path / "copy" / "model.safetensors",
    )
    assert f"{UP} is not finite: 1536 entries in {tmp_path}/copy" in soup(
        *common, "--force", models[0], tmp_path / "copy", code=1
    ).replace("\n", " ")


def test_relative_folders_are_written_so_that_they_are_not_hub_names(world, tmp_path, monkeypatch):
    """mergekit's model card would ask the hub about `soup/tuned0` after an offline merge."""
    monkeypatch.chdir(world.parent)
    name = f"{world.name}/tuned0"
    chosen = [
        Decision(name, None, True),
        Decision("org/model", 0.5, True),
        Decision("org/other", 0.1, False),
    ]
    written = yaml.safe_load(configuration(f"{world.name}/base", chosen, 0.2, edit=True))
    assert written["base_model"] == f"./{world.name}/base"
    assert [m["model"] for m in written["models"]] == [f"./{name}", "org/model"]
    assert "--lora-merge-cache" in configuration(
        "org/base", [Decision("org/base+org/adapter", None, True)], 0.2
    )


def test_two_nearly_equal_updates_are_named():
    values = [[1.0, 0.999, None], [0.999, 1.0, 0.5], [None, 0.5, 1.0]]
    (line,) = twins(["a", "b", "c"], values)
    assert line.startswith("a and b are nearly the same update (0.999)")
