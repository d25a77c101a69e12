"""Figures from results whose numbers are known: what is drawn, not how it looks."""

from __future__ import annotations

import pytest
from helpers import evaluations

from evaluation import families, figures
from evaluation.comparison import compare

TUNED = {"a": [1, 1, 1, 0], "b": [0, 0, 0, 1], "c": [1, 0, 0, 0]}
SOUP = {"a": [1, 1, 1, 0], "b": [1, 1, 1, 1], "c": [1, 1, 0, 0]}


def wise(weight):
    models = [{"model": "tuned", "parameters": {"weight": weight}}]
    return {
        "config": {"merge_method": "task_arithmetic", "base_model": "base", "models": models},
        "inputs": {},
    }


@pytest.fixture
def folder(tmp_path):
    evaluations.write(
        tmp_path, "pretrained", {"a": [0, 0, 0, 0], "b": [1, 1, 1, 1], "c": [1, 1, 1, 1]}
    )
    evaluations.write(tmp_path, "finetuned", TUNED)
    evaluations.write(tmp_path, "half", SOUP, merge=wise(0.5))
    evaluations.write(tmp_path, "quarter", SOUP, merge=wise(0.25))
    return tmp_path


def test_files(folder, tmp_path, capsys):
    assert figures.main([str(folder), "--out", str(tmp_path / "drawn")]) == 0
    written = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert (
        written == ["made-bars.png", "made-plane.png"]
        and "made-plane.png" in capsys.readouterr().out
    )
    assert figures.main([str(folder), "--reference", "nobody"]) == 1


def test_the_plane_has_every_model_where_it_belongs(folder):
    [comparison] = compare([folder])
    axes = figures.plane(comparison).axes[0]
    points = {c.get_label(): c.lines[0].get_xydata()[0].tolist() for c in axes.containers}
    assert points == {
        "pretrained": [0, 100],
        "finetuned": [75, 25],
        "half": [75, 75],
        "quarter": [75, 75],
    }
    [curve] = [line for line in axes.lines if line.get_label() == "Wise-FT curve"]
    assert curve.get_xydata().tolist() == [[0, 100], [75, 75], [75, 75], [75, 25]]
    assert [model for _, model in figures.curves(comparison)["Wise-FT"]] == [
        "pretrained",
        "quarter",
        "half",
        "finetuned",
    ]


def test_bars_are_paired_differences(folder):
    [comparison] = compare([folder])
    axes = figures.bars(comparison).axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == [-75, 75, 75, 75] + [0, 75, 25, 50] * 2
    assert len(axes.get_xticks()) == 4


def made(method, models=None, **parameters):
    models = models or [{"model": "tuned"}]
    return {
        "config": {
            "merge_method": method,
            "base_model": "base",
            "models": models,
            "parameters": parameters,
        }
    }


@pytest.mark.parametrize(
    ("merge", "place"),
    [
        (wise(0.5), ("Wise-FT", 0.5)),
        (wise([0.1, 1.0]), ("LiNeS", 0.1)),
        (wise([0.1, 0.9]), None),
        (made("task_arithmetic", weight=0.5, normalize=True), None),
        (made("ties", weight=0.5), None),
        (made("monosoup", [{"model": "a"}, {"model": "b"}]), None),
        (
            made("monosoup", [{"model": "base"}, {"model": "a"}], mode="variance", R=0.8),
            ("MonoSoup, R", 0.8),
        ),
        (
            made("monosoup", mode="variance", R=0.8, coefficients="scalar"),
            ("scalar control, R", 0.8),
        ),
        (made("monosoup", mode="variance", R=0.8, alpha=0.5), None),
        (made("monosoup", alpha=0.5, report="r.jsonl"), ("MonoSoup + Wise-FT", 0.5)),
        (made("monosoup"), ("MonoSoup + Wise-FT", 1.0)),
        (made("monosoup", mode="freevariance", coefficients="scalar"), None),
        (None, None),
    ],
)
def test_which_curve_a_merge_is_on(merge, place):
    assert families.family(merge) == place


def test_R_is_drawn_where_it_was_varied(folder):
    assert "R" not in " ".join(path.name for path in figures.draw(compare([folder]), folder, "svg"))
    for energy in (0.9, 0.5, 0.7):
        for kind, more in (("monosoup", {}), ("scalar", {"coefficients": "scalar"})):
            merge = made("monosoup", mode="variance", R=energy, **more)
            evaluations.write(folder, f"{kind}{energy}", SOUP, merge=merge)
    [comparison] = compare([folder])
    lines = {
        line.get_label(): line.get_xydata().tolist()
        for line in figures.energy(comparison).axes[0].lines
    }
    assert set(lines) == {
        "ID, MonoSoup",
        "OOD, MonoSoup",
        "ID, scalar control",
        "OOD, scalar control",
    }
    assert lines["OOD, MonoSoup"] == [[0.5, 75], [0.7, 75], [0.9, 75]]
    assert (folder / "made-R.svg") in list(figures.draw([comparison], folder, "svg"))


def test_a_curve_is_of_one_fine_tune(folder):
    """Three models of one number each are three points, not a curve; nor is W1 the end of somebody else's."""
    for model, tuned in (("m1", "other"), ("m2", "third")):
        for alpha in (0.25, 0.5) if model == "m2" else (1.0,):
            merge = made("monosoup", [{"model": tuned}], alpha=alpha) | {
                "inputs": {tuned: tuned, "base": "pretrained"}
            }
            evaluations.write(folder, f"{model}_{alpha}", SOUP, merge=merge)
    for weight in (0.1, 0.2, 0.3):
        merge = wise(weight)
        merge["config"]["models"][0]["model"] = "else"
        merge["inputs"] = {"else": "e", "base": "pretrained"}
        evaluations.write(folder, f"else{weight}", SOUP, merge=merge)
    for weight in (0.1, 0.2, 0.3):  # another folder of the same name
        merge = wise(weight)
        merge["config"]["models"][0]["model"] = "there/else"
        merge["inputs"] = {"there/else": "t", "base": "pretrained"}
        evaluations.write(folder, f"there{weight}", SOUP, merge=merge)
    [comparison] = compare([folder])
    assert {
        name: [model for _, model in points] for name, points in figures.curves(comparison).items()
    } == {
        "Wise-FT of there/else from base": ["pretrained", "there0.1", "there0.2", "there0.3"],
        "Wise-FT of tuned": ["pretrained", "quarter", "half", "finetuned"],
        "Wise-FT of else from base": ["pretrained", "else0.1", "else0.2", "else0.3"],
        "MonoSoup + Wise-FT": ["pretrained", "m2_0.25", "m2_0.5"],
    }


def test_bars_of_many_models_are_averages(folder):
    for number in range(figures.MANY):
        evaluations.write(folder, f"soup{number}", SOUP)
    [comparison] = compare([folder])
    id_, ood = figures.bars(comparison).axes
    assert [text.get_text() for text in id_.get_yticklabels()] == [
        m for m in comparison.cells if m != "finetuned"
    ]
    assert {patch.get_width() for patch in id_.patches} == {-75, 0} and {
        p.get_width() for p in ood.patches
    } == {75, 50}
