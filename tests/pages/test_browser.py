"""A page in a real browser: what people do with it, and what it says, asks for and computes."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import browser as browsers
from helpers import oracle, reports

from mergekit_monosoup import pages
from mergekit_monosoup.kernel.svc import calibrate

pytest.importorskip("altair", reason="the extra `html` is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browsers.missing()), reason=browsers.missing()),
]
SIZE = 200  # columns: the stored places are six apart, as 32 of them are not in a small matrix
# λ of the page against λ from all singular values, over R from 0.05 to 0.99 and the spectra of
# helpers/reports.py. Measured 0.017: an exponential decay, which is a straight line on no axis of
# the interpolation.
INTERPOLATED = 0.02


@pytest.fixture(scope="module")
def browser():
    with browsers.started() as started:
        yield started


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where pages are written."""
    folder = tmp_path_factory.mktemp("pages")

    def write(name, **files):
        path = folder / name
        path.write_text(pages.render(files), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def inspection(place):
    return place("inspection.html", inspect=reports.inspection(SIZE))


@pytest.fixture(scope="module")
def merges(place):
    variance, free = reports.merge(mode="variance"), reports.merge()
    return place("merges.html", variance=variance, free=free)


@pytest.fixture
def quiet(browser):
    """A browser whose console stays empty, and that asks no network for anything."""
    yield browser
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:"))] == []


def names(browser):
    return texts(browser, "#rows th button")


def column(browser, key):
    keys = browser.run(
        "return [...document.querySelectorAll('#headers th')].map((e) => e.dataset.key)"
    )
    return texts(browser, f"#rows tr > :nth-child({keys.index(key) + 1})")


def texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return browser.run(script, selector)


# -- what the slider computes ----------------------------------------------------------------------


def numbers(browser, R):
    """The rows of the page at R, as it holds them."""
    browser.run(
        "const R = document.getElementById('R'); R.value = arguments[0];"
        "R.dispatchEvent(new Event('input', { bubbles: true }))",
        str(R),
    )
    browser.wait()
    return browser.run("return drawn")


def from_stored(record, R):
    """k, P_k, ρ, λ_low of the singular values that a record holds, in NumPy."""
    rank = record.rank
    stored = dict(zip(np.linspace(0, rank - 1, 33), record.spectrum, strict=True))
    stored |= dict(enumerate(record.leading))
    places = np.array(sorted(stored))
    heights = np.log([stored[place] for place in places])
    sigma = np.exp(np.interp(np.log1p(np.arange(rank)), np.log1p(places), heights))
    energy = sigma**2 / (sigma**2).sum()
    k = next(i for i in range(1, rank + 1) if energy[i:].sum() <= (1 - R) * (1 + 1e-9))
    tail = energy[k:].sum()
    rho = (sigma[k] / sigma[0]) ** 2 if k < rank else 0.0
    return k, 1 - tail, rho, rho + (1 - rho) * np.sqrt(tail)


def test_the_slider_computes_what_python_does(quiet, inspection):
    """Exactly the stored curve's numbers; and those of all singular values but for what lies
    between the stored ones."""
    quiet.open(inspection)
    records = {r.name: r for r in reports.inspection(SIZE) if r.mode == "variance"}
    updates = {name: delta.numpy() for name, delta in reports.updates(SIZE).items()}
    zero = np.zeros_like(next(iter(updates.values())))
    worst, seen = 0.0, set()
    for R in (0.05, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99):
        for row in numbers(quiet, R):
            k, P_k, rho, low = from_stored(records[row["name"]], R)
            assert row["mode"] == "variance" and row["R"] == R and row["k"] == k
            found = [row["P_k"], row["rho"], row["lambda_low"], 1 - row["lambda_high"]]
            assert found == pytest.approx([P_k, rho, low, low], rel=1e-9, abs=1e-12)
            assert row["edit_norm"] is None and row["realised"] is None
            *_, true = oracle.monosoup(zero, updates[row["name"]], "variance", R)
            worst = max(worst, abs(row["lambda_low"] - true["lambda_low"]))
            seen.add(k)
    assert len(seen) > 10 and 0 < worst < INTERPOLATED


def test_at_the_recorded_R_the_numbers_are_the_record_s(quiet, inspection):
    quiet.open(inspection)
    quiet.click("#modes input", 1)
    recorded = {r.name: r for r in reports.inspection(SIZE) if r.mode == "variance"}
    assert "As inspected" in quiet.find("#R-note").text
    moved = numbers(quiet, 0.5)
    assert "interpolated" in quiet.find("#R-note").text
    assert all(row["k"] <= recorded[row["name"]].k for row in moved)
    assert any(row["k"] < recorded[row["name"]].k for row in moved)
    quiet.click("#R-reset")
    for row in quiet.run("return drawn"):
        assert row["lambda_low"] == recorded[row["name"]].lambda_low
        assert row["realised"] == recorded[row["name"]].realised


def test_the_slider_by_keyboard(quiet, inspection):
    from selenium.webdriver.common.keys import Keys

    quiet.open(inspection)
    quiet.run("document.getElementById('R').focus()")
    quiet.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert quiet.find("#R-value").text == "0.82"
    assert quiet.find("#R").get_attribute("aria-valuetext") == "0.82"
    assert {row["R"] for row in quiet.run("return drawn")} == {0.82}
    assert quiet.run("return document.querySelector('#modes input:checked').value") == "1"


# -- what people do --------------------------------------------------------------------------------


def test_a_click_on_a_layer_filters_the_table(quiet, merges):
    quiet.open(merges)
    assert quiet.find("#count").text == "24 of 24 rows"
    for drawing in ("lines", "map"):
        at = quiet.run(
            "return [...document.querySelectorAll(arguments[0])].findIndex("
            "(mark) => mark.getAttribute('aria-label').startsWith('layer: 1'))",
            f".{drawing} path[aria-label]",
        )
        quiet.click(f".{drawing} path[aria-label]", at)
        assert quiet.find("#count").text == "8 of 24 rows, layer 1", drawing
        assert all(".1." in name for name in names(quiet))
        assert quiet.find("#layer").get_attribute("value") == "1"
        quiet.click("#clear")
        assert quiet.find("#count").text == "24 of 24 rows"


def test_hovering_names_the_matrix_with_all_of_its_record(quiet, merges):
    from selenium.webdriver.common.action_chains import ActionChains

    quiet.open(merges)
    ActionChains(quiet.driver).move_to_element(quiet.all(".map path[aria-label]")[0]).perform()
    end = time.monotonic() + 5
    while not (text := quiet.run("return document.querySelector('.vg-tooltip')?.innerText ?? ''")):
        assert time.monotonic() < end
    record = reports.merge(mode="variance")[0]
    for words in (
        "model.layers.0.",
        "lambda_low",
        "cos_alpha",
        "solver",
        "effective_rank",
        "24×16",
    ):
        assert words in text
    assert record.solver in text


def test_the_table_sorts_and_searches(quiet, merges):
    quiet.open(merges)
    assert len(set(column(quiet, "file"))) == 2
    for key, order in (("lambda_low", [-1, 1]), ("name", [1, -1])):
        for direction in order:
            quiet.click(f'#headers th[data-key="{key}"] button')
            found = [text for text in column(quiet, key) if text]
            values = [float(text) for text in found] if key != "name" else found
            assert values == sorted(values, reverse=direction < 0) and len(set(values)) > 3
            sort = "descending" if direction < 0 else "ascending"
            header = quiet.find(f'#headers th[data-key="{key}"]')
            assert header.get_attribute("aria-sort") == sort
    assert column(quiet, "lambda_low").count("") == 6, (
        "norms have none, and come last or not at all"
    )
    quiet.find("#query").send_keys("copied norm")
    assert quiet.find("#count").text == "6 of 24 rows"
    assert set(column(quiet, "action")) == {"copied"}


def test_a_row_opens_by_keyboard(quiet, merges):
    from selenium.webdriver.common.keys import Keys

    quiet.open(merges)
    quiet.run("document.querySelectorAll('#rows th button')[0].focus()")
    quiet.press(Keys.ENTER)
    assert "fewer than two dimensions" in quiet.find("#rows .details").text
    assert quiet.run("return document.activeElement.getAttribute('aria-expanded')") == "true"
    quiet.press(Keys.ENTER)
    assert quiet.all("#rows .details") == []


def test_every_quantity_can_be_drawn(quiet, inspection):
    quiet.open(inspection)
    captions = set()
    for number in range(len(quiet.all("#quantities input"))):
        quiet.click("#quantities input", number)
        captions.add(quiet.find(".depth-caption").text)
        assert quiet.all(".lines path[aria-label]") and quiet.all(".map path[aria-label]")
    assert len(captions) == len(quiet.all("#quantities input")) > 5


# -- everybody, everywhere -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read(quiet, inspection, width, dark):
    """Nothing is wider than the window, and text stands out from its ground."""
    quiet.open(inspection, width=width, dark=dark)
    assert quiet.run("return document.documentElement.scrollWidth") <= width
    for drawing in ("lines", "map", "spectra"):
        assert quiet.find(f".{drawing} svg").rect["width"] <= width
    assert contrast(quiet, "body", "body") > 7
    assert contrast(quiet, ".quiet", "body") > 4.5
    axis = quiet.run("return document.querySelector('.lines .role-axis-label text')")
    assert contrast(quiet, axis, "body", "fill") > 4.5


def contrast(browser, text, ground, of="color"):
    """The contrast of WCAG between a text and its ground."""
    script = (
        "const at = (e) => typeof e === 'string' ? document.querySelector(e) : e;"
        "return [getComputedStyle(at(arguments[0]))[arguments[2]],"
        "getComputedStyle(at(arguments[1])).backgroundColor]"
    )
    colours = browser.run(script, text, ground, of)
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def test_screen_readers_are_told_what_is_there(quiet, inspection):
    quiet.open(inspection)
    unnamed = quiet.run(
        "return [...document.querySelectorAll('input, select, button')].filter((e) =>"
        " !e.labels?.length && !e.innerText && !e.ariaLabel).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    for drawing in ("lines", "map", "spectra"):
        described = quiet.find(f".{drawing} [role=graphics-document]").get_attribute("aria-label")
        assert len(described) > 30, drawing
    assert quiet.find("html").get_attribute("lang") == "en"
    assert quiet.find("#count").get_attribute("role") == "status"
    assert quiet.all("#rows th[scope=row]") and quiet.all("#headers th[scope=col]")


def test_hostile_names_are_only_names(quiet, place):
    edited = next(r for r in reports.merge() if r.action == "edited")
    hostile = [
        replace(edited, name=f"{text}.layers.{n}.w", reason=text)
        for n, text in enumerate(reports.HOSTILE)
    ]
    page = place("hostile.html", **{reports.HOSTILE[1]: [*hostile, *reports.merge()]})
    quiet.open(page, width=360)
    for number in range(2):
        quiet.click("#rows th button", number)
    assert quiet.run("return window.broken") is None
    assert quiet.all("main img") == []
    assert f"{reports.HOSTILE[0]}.layers.0.w" in names(quiet)
    assert quiet.run("return document.documentElement.scrollWidth") <= 360


def test_other_pages(quiet, place):
    """SVC, a large mixture of experts, and a report in which nothing was edited."""
    torch.manual_seed(0)
    W0 = torch.randn(24, 16)
    tuned = [W0 + 0.1 * torch.randn(24, 16) for _ in range(2)]
    svc = [calibrate(W0, tuned, name=f"layers.{n}.w")[1] for n in range(3)]
    merged = reports.merge()
    edited = next(record for record in merged if record.action == "edited")
    norms = [record for record in merged if record.action == "copied"]
    quiet.open(place("svc.html", svc=svc))
    assert quiet.find("#quantities input:checked + *, #quantities label").text == "γ, median"
    quiet.open(place("norms.html", norms=norms))
    assert quiet.find("#count").text == "3 of 3 rows"
    quiet.open(place("many.html", many=reports.many(2000, 16, edited)))
    assert "2000 matrices are too many" in quiet.find(".report .notice").text
    assert quiet.find("#count").text == "125 of 125 rows; the first 100 are shown"
    quiet.click("#more")
    assert len(names(quiet)) == 125
