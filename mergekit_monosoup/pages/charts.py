"""The drawings of a page, as specifications for Vega-Lite, and the program that draws them.

A specification names its data and has none: the page hands it the rows that are asked for.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair

# A parameter: pixels on the left of both drawings of a report, so that their layers stand above
# each other.
LEFT = "left"
HEIGHT = 240
FORMAT = ".3~g"
WHOLE = {"content": "data"}  # a tooltip is made from all of a mark, by the page


class MissingAltairError(ImportError):
    """Vega-Altair, or what brings its JavaScript, is not installed or cannot be imported."""


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401 # without it there is no JavaScript
    except ImportError as error:
        raise MissingAltairError(
            f"pages need Vega-Altair ({error}): pip install 'mergekit-monosoup[html]'"
        ) from error
    return altair


@cache  # two seconds
def program() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which defines ``vegaEmbed``."""
    _altair()
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("globalThis.vegaEmbed = vegaEmbed;")
    return bundle


def specifications() -> dict[str, Any]:
    """Return the specifications: by depth as lines and as a map, each with both scales; spectra."""
    alt = _altair()
    drawings = {"spectra": _spectra(alt)}
    for scale in ("linear", "log"):
        drawings[f"lines-{scale}"] = _lines(alt, scale)
        drawings[f"map-{scale}"] = _map(alt, scale)
    return {
        name: chart.properties(width="container", autosize={"type": "fit-x", "contains": "padding"})
        .configure_view(stroke=None)
        .to_dict(validate=False)
        for name, chart in drawings.items()
    }


def _layers(alt: Any) -> altair.X:
    axis = alt.Axis(labelAngle=-90, labelOverlap=True, labelLimit=110, grid=False)
    return alt.X("at:N", sort=None, title="layer", axis=axis, scale=alt.Scale(type="band"))


def _ends(alt: Any, scale: str, **more: Any) -> altair.Scale:
    """Return a scale between the parameters ``low`` and ``high``, the same for all reports."""
    domain = [alt.expr("low"), alt.expr("high")]
    if scale == "linear":
        more["zero"] = False
    return alt.Scale(type=scale, domain=domain, nice=False, **more)


def _parameters(alt: Any) -> list[Any]:
    """Return what the page sets: the chosen layer, the ends of the scale, and what has to fit."""
    values = {"chosen": "", "low": 0, "high": 1, "legend_columns": 1, LEFT: 128}
    return [alt.param(name, value=value) for name, value in values.items()]


def _lines(alt: Any, scale: str) -> altair.LayerChart:
    """Return a line per projection; a second number, such as λ_low, is dashed and hollow."""
    is_chosen = "datum.at === chosen"
    left = alt.expr(LEFT)
    axis = alt.Axis(minExtent=left, maxExtent=left, format=FORMAT, tickCount=5)
    of_rows = alt.Chart(alt.NamedData("rows")).encode(
        x=_layers(alt),
        y=alt.Y("value:Q", title=None, scale=_ends(alt, scale), axis=axis),
        detail="part:N",
    )
    band = (
        alt.Chart(alt.NamedData("columns"))
        .mark_rect(aria=False, style="chosen-band")
        .encode(x=_layers(alt), opacity=alt.condition(is_chosen, alt.value(0.18), alt.value(0)))
    )
    # By `stroke`: a legend of `color` that only some layers have with a shape would be two.
    lines = of_rows.mark_line(strokeWidth=1.2, opacity=0.7, aria=False).encode(
        stroke=alt.Stroke("kind:N", sort=None, legend=None),
        strokeDash=alt.StrokeDash("part:N", sort=None, legend=None),
    )
    points = [
        of_rows.transform_filter(which)
        .mark_point(size=38, filled=filled, opacity=1, strokeWidth=1.4, tooltip=WHOLE)
        .encode(
            color=alt.Color("kind:N", sort=None, legend=_legend(alt)),
            shape=alt.Shape("kind:N", sort=None, legend=_legend(alt)),
        )
        for which, filled in (("!datum.second", True), ("datum.second", False))
    ]
    layers = alt.layer(band, lines, *points)
    return layers.add_params(*_parameters(alt)).properties(height=HEIGHT)


def _map(alt: Any, scale: str) -> altair.LayerChart:
    """Return a square per layer and projection; the page gives it a height."""
    is_chosen = "datum.at === chosen"
    left, room = alt.expr(LEFT), alt.expr(f"{LEFT} - 8")
    axis = alt.Axis(minExtent=left, maxExtent=left, labelLimit=room, title=None)
    legend = alt.Legend(
        title=None, orient="bottom", direction="horizontal", gradientLength=180, format=FORMAT
    )
    colours = _ends(alt, scale, scheme="viridis")
    cells = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect(tooltip=WHOLE)
        .encode(
            x=_layers(alt),
            y=alt.Y("kind:N", sort=None, axis=axis),
            color=alt.Color("value:Q", legend=legend, scale=colours),
        )
    )
    shown = alt.condition(is_chosen, alt.value(1), alt.value(0))
    frame = (
        alt.Chart(alt.NamedData("columns"))
        .mark_rect(filled=False, strokeWidth=2, aria=False, style="chosen-frame")
        .encode(x=_layers(alt), strokeOpacity=shown)
    )
    return alt.layer(cells, frame).add_params(*_parameters(alt))


def _spectra(alt: Any) -> altair.LayerChart:
    """Return σ/σ₁ along the spectrum, a line per projection, and a mark at each cut."""
    x = alt.X("place:Q", title="place in the spectrum, i / rank", scale=alt.Scale(domain=[0, 1]))
    axis = alt.Axis(format=FORMAT, tickCount=5)
    y = alt.Y("sigma:Q", title="σ / σ₁", scale=alt.Scale(type="log"), axis=axis)
    line = (
        alt.Chart(alt.NamedData("curves"))
        .mark_line(strokeWidth=1.4, aria=False)
        .encode(
            x=x,
            y=y,
            color=alt.Color("kind:N", sort=None, legend=_legend(alt)),
            strokeDash=alt.StrokeDash("kind:N", sort=None, legend=_legend(alt)),
            detail="name:N",
        )
    )
    cut = (
        alt.Chart(alt.NamedData("cuts"))
        .mark_point(size=70, shape="diamond", filled=True, opacity=1, tooltip=WHOLE)
        .encode(x=x, y=y, fill=alt.Fill("kind:N", sort=None, legend=None))
    )
    layers = alt.layer(line, cut)
    return layers.add_params(*_parameters(alt)).properties(height=HEIGHT)


def _legend(alt: Any) -> altair.Legend:
    columns = alt.expr("legend_columns")
    return alt.Legend(title=None, orient="bottom", columns=columns, labelLimit=140, symbolLimit=40)
