"""Figures: files of the kind their name says, with panels, lines and labels for the records."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from mergekit_monosoup import plots
from mergekit_monosoup.checkpoints.places import arrange
from mergekit_monosoup.cli import main
from mergekit_monosoup.kernel.monosoup import edit, preview
from mergekit_monosoup.plots import panels
from mergekit_monosoup.report import Record, read

TYPES = ("self_attn.q_proj", "mlp.up_proj")
PAIRS = ("models/alpha ~ org/beta", "models/alpha ~ org/gamma")


@pytest.fixture(scope="module")
def inspected():
    """Three layers of two matrices, an embedding and a head, in the order of a file."""
    torch.manual_seed(0)
    names = [
        "lm_head.weight",
        *(f"model.layers.{n}.{kind}.weight" for n in (10, 9, 0) for kind in TYPES),
    ]
    records = []
    for number, name in enumerate([*names, "model.embed_tokens.weight"]):
        W0 = torch.randn(24, 16)
        for record in preview(W0, W0 + 0.1 * torch.randn(24, 16), name=name, points=33):
            cosine = {PAIRS[0]: 0.1 * number, PAIRS[1]: -0.06 * number}
            records.append(replace(record, cosine=cosine))
    return records


def write(path, records):
    path.write_text("".join(record.to_json() + "\n" for record in records))
    return path


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_coefficients_by_depth(inspected):
    """The paper's Figure 12: both coefficients of each matrix, from the embedding to the head."""
    free, variance, *_ = plots.draw({"r": inspected}).axes
    assert [a.get_title(loc="left") for a in (free, variance)] == [
        "freevariance",
        "variance, R = 0.8",
    ]
    for axes, mode in ((free, "freevariance"), (variance, "variance")):
        of_mode = {r.name: r for r in inspected if r.mode == mode}
        kinds = sorted(TYPES)
        order = [
            "model.embed_tokens.weight",
            *(f"model.layers.{n}.{k}.weight" for n in (0, 9, 10) for k in kinds),
        ]
        order.append("lm_head.weight")
        high, low = (line for line in axes.get_lines() if line.get_label().startswith("$"))
        assert list(high.get_ydata()) == [of_mode[name].lambda_high for name in order]
        assert list(low.get_ydata()) == [of_mode[name].lambda_low for name in order]
        assert (
            high.get_linestyle() != low.get_linestyle() and high.get_marker() != low.get_marker()
        ), "grey print"
        assert [t.get_text() for t in axes.get_xticklabels()] == [
            "embed_tokens",
            "0",
            "9",
            "10",
            "lm_head",
        ]
        assert list(high.get_xdata()) == sorted(high.get_xdata())


def test_ranks_spectra_and_cosines(inspected):
    *_, rank, spectrum, cosine = plots.draw({"r": inspected}).axes
    assert labels(rank) == ["embed_tokens", *sorted(TYPES), "lm_head"]
    by_type = {line.get_label(): line for line in rank.get_lines()}
    shares = {r.name: r.effective_rank / r.rank for r in inspected}
    assert list(by_type["mlp.up_proj"].get_ydata()) == [
        shares[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 9, 10)
    ]
    assert (
        labels(spectrum)[-2:] == ["k of freevariance", "k of variance"]
        and spectrum.get_yscale() == "log"
    )
    embedding = next(line for line in spectrum.get_lines() if line.get_label() == "embed_tokens")
    stored = next(r for r in inspected if "embed" in r.name)
    assert list(embedding.get_ydata()) == stored.spectrum
    cuts = [line.get_xdata()[0] for line in spectrum.get_lines() if len(line.get_xdata()) == 1]
    assert stored.k / stored.rank in cuts and len(cuts) == 4 * 2
    assert labels(cosine) == ["alpha ~ beta\n(mean 0.35)", "alpha ~ gamma\n(mean -0.21)"]
    assert sum(patch.get_xy()[:, 1].max() for patch in cosine.patches) > 0


def test_updates_and_what_rounding_leaves(inspected):
    _, _, update, *survival, _, _, _ = plots.draw({"r": inspected}).axes
    assert update.get_yscale() == "log" and len(survival) == 2
    drawn = [(update, "Relative update", "rel_update", "variance")]
    for axes, mode in zip(survival, ("freevariance", "variance"), strict=True):
        drawn.append((axes, f"After rounding to bfloat16: {mode}", "realised", mode))
    for axes, title, field, mode in drawn:
        values = {r.name: getattr(r, field) for r in inspected if r.mode == mode}
        by_type = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        assert axes.get_title(loc="left") == title and len(by_type) == 4
        assert by_type["mlp.up_proj"] == [
            values[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 9, 10)
        ]
    low = [replace(r, realised=1.5) for r in inspected]  # above 1 where rounding overshoots
    assert all(a.get_ylim()[1] > 1.5 for a in plots.draw({"r": low}).axes[3:5])


def test_nothing_is_drawn_that_was_not_asked_for(inspected):
    _, merged = edit(torch.zeros(8, 6), torch.randn(8, 6), name="layers.0.w")
    # A zero W0 has no relative update, and a copied matrix nothing that rounding could eat.
    assert len(plots.draw({"r": [merged]}).axes) == 2
    assert len(plots.draw({"r": inspected}, mode="variance").axes) == 6
    two = plots.draw({"a.jsonl": inspected, "b.jsonl": [merged]})
    titles = [axes.get_title(loc="left") for axes in two.axes]
    assert (
        len(titles) == 10
        and titles[0] == "a.jsonl: freevariance"
        and titles[-1] == "b.jsonl: Effective rank of the update"
    )
    with pytest.raises(
        ValueError,
        match="r: no coefficients to draw for mode variance; it has those of freevariance",
    ):
        plots.draw({"r": [merged]}, mode="variance")
    _, copied = edit(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="none of its matrices has λ_high"):
        plots.draw({"r": [copied]})


def texts(axes):
    """Boxes of title, labels, ticks and legend, as rendered."""
    found = [axes.xaxis.label, axes.yaxis.label, axes._left_title, axes.get_legend()]
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        found += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    return [t.get_window_extent() for t in found if getattr(t, "get_text", lambda: True)()]


def check_layout(figure):
    """No text leaves the figure or touches another, and panels keep their size."""
    figure.canvas.draw()
    boxes = [box for axes in figure.axes for box in texts(axes)]
    width, height = figure.canvas.get_width_height()
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    overlapping = [
        (a, b)
        for i, a in enumerate(boxes)
        for b in boxes[i + 1 :]
        if a.padded(-1.5).overlaps(b.padded(-1.5))
    ]
    assert overlapping == [] and len(boxes) > 10
    sizes = [axes.get_window_extent() for axes in figure.axes]
    assert min(size.height for size in sizes) > 220 and min(size.width for size in sizes) > 300
    rows = {round(size.y0): size.height for size in sizes}
    assert sum(rows.values()) > 0.45 * height


def test_text_stays_inside_and_does_not_overlap(inspected):
    check_layout(plots.draw({"r": inspected}))


BERT = [
    "cls.predictions.transform.dense.weight",
    *(f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")),
    *(
        f"bert.encoder.layer.{n}.{kind}.weight"
        for n in range(12)
        for kind in ("attention.self.query", "attention.output.dense", "output.dense")
    ),
]
EFFICIENTNET = [
    "_conv_stem.weight",
    *(f"_blocks.{n}.{k}.weight" for n in range(16) for k in ("_expand_conv", "_project_conv")),
    "_fc.weight",
]
TOWERS = [
    f"model.{tower}.layers.{n}.{kind}.weight"
    for tower in ("decoder", "encoder")
    for n in range(30)
    for kind in ("self_attn.k_proj", "fc1")
]
EXPERTS = [f"layers.{n}.mlp.experts.{e}.up_proj.weight" for n in range(3) for e in range(40)]
FORTY = [f"a_module.of_some_kind_{n}.projection_with_a_long_name.weight" for n in range(40)]
HOSTILE = [
    *(
        "",
        "_",
        "__a",
        "²",
        "[/b]",
        r"$\frac{$",
        "$a$ and $b",
        "a\n\tb",
        "\x1b[31mred",
        "\u202eturned",
    ),
    *("中文权重", "🚀", "\udc80", "x" * 5000, "x" * 5000 + "y", "layers.0." + "9" * 5000),
    "layers." + "9" * 5000 + ".w",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("names", "legend", "ticks"),
    [
        (BERT, ["attention.output.dense", "attention.self.query", "output.dense"], "11"),
        (EFFICIENTNET, ["_conv_stem", "_expand_conv", "_project_conv", "_fc"], "_conv_stem"),
        (TOWERS, ["encoder.self_attn.k_proj", "decoder.fc1"], "decoder:"),
        (EXPERTS, ["mlp.experts.*.up_proj"], "2"),
        (FORTY, [], "kind_0"),
        (HOSTILE, ["_", "__a", "²", "[/b]", r"\$\frac{\$", r"a\n\tb", r"\u202eturned"], "[/b]"),
    ],
    ids=["BERT", "EfficientNet", "towers", "experts", "forty types", "hostile"],
)
def test_any_names(names, legend, ticks):
    """Names of other architectures, and of nobody's: all are in the legend, and all can be read."""
    records = [
        Record(n, (8, 4), "float32", "edited", k=1, rank=4, effective_rank=3.0, lambda_high=0.9)
        for n in names
    ]
    figure = plots.draw({"_$r$_" * 99: records, "b": records[:1]})
    check_layout(figure)
    shown = [text.get_text().lstrip("\u200b") for text in figure.axes[1].get_legend().get_texts()]
    assert set(legend) <= set(shown) and len(set(shown)) == len(shown)
    kinds = {place.kind for place in arrange(names).values()}
    assert len(shown) == len(kinds), "every type has an entry"
    for axes in figure.axes[:2]:
        assert any(ticks in tick.get_text() for tick in axes.get_xticklabels())
    assert figure.axes[0].get_title(loc="left").count(r"\$") > 4, "not as mathematics"


def test_styles_differ_in_grey_too():
    styles = [style for style, _ in zip(panels.styles(), range(70), strict=False)]
    assert len({tuple(style.values()) for style in styles}) == 70
    assert len({(style["marker"], style["linestyle"]) for style in styles[:20]}) == 20, (
        "without colour"
    )


@pytest.mark.slow
def test_command_writes_real_files(inspected, tmp_path):
    report = write(tmp_path / "r.jsonl", inspected)
    for suffix in ("png", "svg", "pdf"):
        out = tmp_path / f"figure.{suffix}"
        result = CliRunner().invoke(main, ["plot", str(report), "--out", str(out)])
        assert result.exit_code == 0 and "8 panels" in result.output, result.output
    from PIL import Image

    with Image.open(tmp_path / "figure.png") as image:
        assert (
            image.format == "PNG"
            and image.width > 1000
            and len(image.convert("L").getcolors()) > 50
        )
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    text = " ".join(
        "".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")
    )
    assert "effective rank / rank" in text and "self_attn.q_proj" in text and "alpha ~ beta" in text
    pdf = (tmp_path / "figure.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    before = (tmp_path / "figure.svg").read_bytes()
    CliRunner().invoke(main, ["plot", str(report), "--out", str(tmp_path / "figure.svg")])
    assert (tmp_path / "figure.svg").read_bytes() == before, "the same bytes for the same records"


def test_command_refuses_by_name(inspected, tmp_path, monkeypatch):
    report = write(tmp_path / "r.jsonl", inspected)

    def refused(*arguments):
        result = CliRunner().invoke(main, ["plot", *map(str, arguments)])
        assert result.exit_code == 1, result.output
        return result.output

    assert "f.jpg: a figure is a .png, .svg or .pdf file" in refused(
        report, "--out", tmp_path / "f.jpg"
    )
    (tmp_path / "other.jsonl").write_text(json.dumps({"a": 1}) + "\n")
    assert "other.jsonl, line 1: not a monosoup record" in refused(
        tmp_path / "other.jsonl", "--out", tmp_path / "f.png"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'mergekit-monosoup[plots]'" in refused(report, "--out", tmp_path / "f.png")
    assert len(read(report)) == len(inspected)
