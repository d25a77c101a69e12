"""Figures from results whose numbers are known: what is drawn, not how it looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import evaluations
from helpers.evaluations import SOUP, merge_of, wise_ft
from matplotlib.backends.backend_agg import FigureCanvasAgg

from evaluation import drawings, families, features
from evaluation.comparison import compare


@pytest.fixture
def swept(folder):
    """Two points of a Wise-FT curve beside its ends."""
    for name, weight in (("half", 0.5), ("quarter", 0.25)):
        evaluations.write(folder, name, SOUP, merge=wise_ft(weight))
    (folder / "soup.made.json").unlink()
    return folder


def test_the_plane_has_every_model_where_it_belongs(swept):
    [comparison] = compare([swept])
    axes = drawings.plane(comparison).axes[0]
    points = {c.get_label(): c.lines[0].get_xydata()[0].tolist() for c in axes.containers}
    assert points == {
        "pretrained": [0, 100],
        "finetuned": [75, 25],
        "half": [75, 75],
        "quarter": [75, 75],
    }
    [curve] = [line for line in axes.lines if line.get_label() == "Wise-FT curve"]
    assert curve.get_xydata().tolist() == [[0, 100], [75, 75], [75, 75], [75, 25]]
    assert [model for _, model in families.curves(comparison)["Wise-FT"]] == [
        *("pretrained", "quarter"),
        *("half", "finetuned"),
    ]


def test_bars_are_paired_differences(swept):
    [comparison] = compare([swept])
    axes = drawings.bars(comparison).axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == [-75, 75, 75, 75] + [0, 75, 25, 50] * 2
    assert len(axes.get_xticks()) == 4


def test_R_is_drawn_where_it_was_varied(folder):
    assert "R" not in " ".join(
        path.name for path in drawings.draw(compare([folder]), folder, "svg")
    )
    for energy in (0.9, 0.5, 0.7):
        for kind, more in (("monosoup", {}), ("scalar", {"coefficients": "scalar"})):
            merge = merge_of("monosoup", mode="variance", R=energy, **more)
            evaluations.write(folder, f"{kind}{energy}", SOUP, merge=merge)
    [comparison] = compare([folder])
    lines = {
        line.get_label(): line.get_xydata().tolist()
        for line in drawings.energy(comparison).axes[0].lines
    }
    kinds = ("MonoSoup", "scalar control")
    assert set(lines) == {f"{group}, {kind}" for group in ("ID", "OOD") for kind in kinds}
    assert lines["OOD, MonoSoup"] == [[0.5, 75], [0.7, 75], [0.9, 75]]
    assert (folder / "made-R.svg") in list(drawings.draw([comparison], folder, "svg"))


def test_bars_of_many_models_are_averages(folder):
    for number in range(drawings.MOST_MODELS):
        evaluations.write(folder, f"soup{number}", SOUP)
    [comparison] = compare([folder])
    id_, ood = drawings.bars(comparison).axes
    assert [text.get_text() for text in id_.get_yticklabels()] == [
        m for m in comparison.cells if m != "finetuned"
    ]
    assert {patch.get_width() for patch in id_.patches} == {-75, 0}
    assert {patch.get_width() for patch in ood.patches} == {75, 50}


HOSTILE = [
    r"$\frac{$",
    "_",
    "_a",
    "²",
    "[/b]",
    "a\nb",
    "\x1b[31m",
    "\u202e",
    "中文",
    "🚀",
    "x" * 5000,
    "",
]


def renamed(comparison, count):
    """The comparison with as many models, whose names nobody would choose."""
    cells = {model: row for model, row in comparison.cells.items() if model != "finetuned"}
    names = [f"/models/{'deep/' * 20}run-{n}/final" for n in range(count)]
    names = [*HOSTILE, *names][: count - 1]
    title = "A benchmark of $many$ _words_ " * 30
    columns = [
        replace(column, header=f"{column.header}$^{'t' * 99}") for column in comparison.columns
    ]
    return replace(
        comparison,
        suite=comparison.suite.model_copy(update={"title": title}),
        columns=columns,
        reference="_the reference" * 40,
        cells={"_the reference" * 40: comparison.cells["finetuned"]}
        | {name: list(cells.values())[n % len(cells)] for n, name in enumerate(names)},
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("figure", [drawings.plane, drawings.bars])
def test_any_names(folder, figure, count):
    [comparison] = compare([folder])
    drawn = figure(renamed(comparison, count))
    FigureCanvasAgg(drawn).draw()
    whole = drawn.get_tightbbox()
    assert whole.width < 14 and whole.height < 14, "inches"
    for axes in drawn.axes:
        size = axes.get_window_extent().transformed(drawn.dpi_scale_trans.inverted())
        assert size.width > 2 and size.height > 2.5
    legend = drawn.axes[0].get_legend()
    shown = legend.get_texts() if legend else drawn.axes[0].get_yticklabels()
    expected = count if figure is drawings.plane else count - 1
    assert len({text.get_text() for text in shown}) == expected, "one label each"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [2, 40])
def test_a_heatmap_of_any_names(count):
    names = [*HOSTILE, *(f"/models/{'deep/' * 20}run-{n}/final" for n in range(count))][:count]
    values = {text: {name: [1.0, 0.9, None] for name in names} for text in ("_$ID$" * 99, "OOD")}
    drawn = features.heatmap(values)
    FigureCanvasAgg(drawn).draw()
    for axes in drawn.axes[:2]:
        assert axes.get_position().width > 0.4 and axes.get_position().height > 0.25
        assert len({text.get_text() for text in axes.get_yticklabels()}) == count
    nothing = features.heatmap({"ID": {"m": [None, None]}})
    assert nothing.axes[0].images[0].get_clim() == (0.999, 1.0)
