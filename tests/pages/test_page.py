"""The text of a page: everything is in it, as data, and nothing from a report is anything else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from statistics import fmean

import pytest
from click.testing import CliRunner
from helpers import reports
from helpers.reports import written

from mergekit_monosoup import pages
from mergekit_monosoup.cli import main
from mergekit_monosoup.pages import rows
from mergekit_monosoup.report import Record

pytest.importorskip("altair", reason="the extra `html` is not installed")


class Page(HTMLParser):
    """The elements of a page, their attributes, the text of its scripts, and all other text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.in_script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])


def row_dicts(file):
    return [dict(zip(file["columns"], row, strict=True)) for row in file["rows"]]


@pytest.fixture(scope="module")
def merge():
    return reports.merge(mode="variance")


@pytest.fixture(scope="module")
def page(merge):
    """Of a merge and an inspection."""
    inspection = reports.inspection()
    return Page(pages.render({"merge.jsonl": merge, "inspect.jsonl": inspection}))


# -- what is in it ---------------------------------------------------------------------------------


def test_rows_are_the_records_in_the_order_of_depth(merge):
    shuffled = [*merge[5:], *merge[:5]]
    (file,) = rows.collect({"r": shuffled})
    found = row_dicts(file)
    assert [row["at"] for row in found] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert not file["inspection"] and not file["slider"] and file["note"] == ""
    by_name = {record.name: record for record in merge}
    assert len(found) == len(merge)
    for row in found:
        record = by_name[row["name"]]
        for key in rows.NUMBERS:
            assert row[key] == getattr(record, key), key
        assert row["shape"] == "×".join(map(str, record.shape))
        assert (row["action"], row["reason"]) == (record.action, record.reason)
        if record.action == "edited":
            assert row["k_share"] == record.k / record.rank
            assert row["rel_edit"] == pytest.approx(record.edit_norm / record.delta_norm)


def test_an_inspection_has_its_spectra_once(page):
    _, file = page.data["files"]
    found = row_dicts(file)
    assert file["modes"] == ["freevariance", "variance"] and file["inspection"] and file["slider"]
    assert len(file["spectra"]) == len(reports.SPECTRA) and len(found) == 2 * len(reports.SPECTRA)
    assert all(len(s["spectrum"]) == 33 for s in file["spectra"])
    assert [len(s["leading"]) for s in file["spectra"]] == [32, 32, 32, 32, 9]
    assert [row["spectrum"] for row in found] == [n for n in range(5) for _ in range(2)]


def test_only_what_is_there_can_be_chosen(page):
    data = page.data
    keys = [quantity["key"] for quantity in data["quantities"]]
    assert keys[0] == "lambda_high" and "gamma_median" not in keys and "realised" in keys
    assert "gamma_max" not in {key for key, *_ in data["headers"]}
    words = " ".join(page.words)
    assert "It edited 9 of 12 tensors." in words and "fewer than two dimensions (3)" in words
    assert "variance, R = 0.8: " in words, "the reading of the inspection"


def test_experts_are_put_together_where_they_are_too_many(merge):
    count, experts = 2_000, 64
    records = reports.many(count, experts, next(r for r in merge if r.action == "edited"))
    (file,) = rows.collect({"r": [*records, *merge]})
    found = {row["name"]: row for row in row_dicts(file)}
    assert len(found) <= rows.MOST_MATRICES
    assert file["note"].startswith("2012 matrices are too many for a page")
    layer = found["model.layers.7.mlp.experts.*.up_proj.weight"]
    members = records[7 * experts : 8 * experts]
    assert (layer["members"], layer["at"], layer["k"]) == (64, "7", members[0].k)
    assert layer["lambda_low"] == pytest.approx(fmean(r.lambda_low for r in members), rel=1e-12)
    assert layer["seconds"] == pytest.approx(sum(r.seconds for r in members), rel=1e-12)
    assert found[merge[0].name]["members"] == 1


def test_layers_are_put_together_in_the_end(merge):
    deep = [replace(merge[0], name=f"layers.{n}.kind{n % 3}.weight") for n in range(1800)]
    (file,) = rows.collect({"r": deep})
    assert [row["members"] for row in row_dicts(file)] == [600] * 3
    assert {row["at"] for row in row_dicts(file)} == {"all layers"}
    assert "all those of one projection" in file["note"]


def test_no_number_overflows(merge):
    huge = replace(merge[0], edit_norm=1.7e308, delta_norm=1e-300, seconds=1.7e308)
    (file,) = rows.collect({"r": [huge, replace(huge, mode="variance")]})
    json.dumps(file, allow_nan=False)
    assert row_dicts(file)[0]["rel_edit"] is None and row_dicts(file)[0]["edit_norm"] == 1.7e308
    assert rows.mean([1.7e308, 1.7e308]) == 1.7e308 and rows.mean([None, 2, None]) == 2
    assert rows.mean([None]) is None and rows.mean([0, 0]) == 0


# -- what it may do --------------------------------------------------------------------------------


def test_whatever_a_report_says_is_text(merge):
    edited = next(record for record in merge if record.action == "edited")
    hostile = [
        replace(edited, name=text, reason=text, dtype=text, action="copied", solver=text)
        for text in reports.HOSTILE
    ]
    plain = Page(pages.render({"r.jsonl": merge}))
    found = Page(pages.render({reports.HOSTILE[0]: [*merge, *hostile]}))
    allowed = {"li"}
    assert [t for t in found.tags if t not in allowed] == [
        t for t in plain.tags if t not in allowed
    ]
    assert {name for name, _ in found.attributes} == {name for name, _ in plain.attributes}
    assert not any(name.startswith("on") for name, _ in found.attributes)
    names = {row["name"] for row in row_dicts(found.data["files"][0])}
    assert set(reports.HOSTILE[:3]) <= names
    assert r"\u202eturned\x00\x1b[31m\ud800" in names, "nothing that moves or hides"


def test_the_policy_allows_the_two_scripts_and_no_network(page):
    (policy,) = (v for n, v in page.attributes if n == "content" and "default-src" in v)
    digests = re.findall(r"'sha256-([^']+)'", policy)
    scripts = [script.encode() for script in page.scripts[1:]]
    assert [base64.b64decode(d) for d in digests] == [hashlib.sha256(s).digest() for s in scripts]
    directives = dict(part.split(maxsplit=1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'" and "unsafe" not in directives["script-src"]
    loaded = [v for n, v in page.attributes if n in ("src", "href") and not v.startswith("#")]
    assert loaded == ["data:,"]


@pytest.mark.slow
def test_size(merge):
    """500 matrices with spectra stay under 6 MB; so does a large mixture of experts."""
    record = reports.inspection(R=0.8)[1]
    inspected = [
        replace(record, name=f"model.layers.{n // 7}.kind{n % 7}.weight", mode=mode)
        for n in range(500)
        for mode in ("freevariance", "variance")
    ]
    large = reports.many(20_000, 128, next(r for r in merge if r.action == "edited"))
    for records in (inspected, large):
        assert 9e5 < len(pages.render({"r.jsonl": records}).encode()) < 3e6


# -- the command -----------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_a_page_replaces_a_page_and_nothing_else(merge, tmp_path):
    report, page = written(tmp_path / "r.jsonl", merge), tmp_path / "page.html"
    done = invoke(report, "--html", page)
    assert done.exit_code == 0 and re.search(r"page\.html: 1 report\(s\), \d\.\d MB", done.output)
    before = page.read_bytes()
    assert invoke(report, "--html", page).exit_code == 0
    assert page.read_bytes() == before, "the same bytes for the same records"
    page.write_text("<html>mine</html>")
    refused = invoke(report, "--html", page)
    assert refused.exit_code == 1 and "is not a page of mergekit-monosoup" in refused.output
    assert page.read_text() == "<html>mine</html>"
    for name, words in {
        "page.pdf": "a page is a .html or .htm file",
        "nowhere/page.html": "there is no folder",
    }.items():
        assert words in invoke(report, "--html", tmp_path / name).output


def test_without_the_extra(merge, tmp_path, monkeypatch):
    report = written(tmp_path / "r.jsonl", merge)
    for module in ("altair", "vl_convert"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused = invoke(report, "--html", tmp_path / "page.html")
        assert refused.exit_code == 1 and "pip install 'mergekit-monosoup[html]'" in refused.output
    assert not (tmp_path / "page.html").exists()


def test_several_reports_and_one_form(merge, tmp_path):
    first, second = (written(tmp_path / name, merge) for name in ("a.jsonl", "b.jsonl"))
    both = invoke(first, second).output
    assert both.count("MonoSoup by layer group") == 2
    assert both.index("a.jsonl:") < both.index("b.jsonl:")
    assert "give one" in invoke(first, "--json", "--card").output
    assert "takes one FILE" in invoke(first, second, "--json").output


def test_records_without_numbers_have_a_page():
    bare = [Record("w", (3,), "float32", "copied", "fewer than two dimensions")]
    data = Page(pages.render({"r": bare})).data
    assert [q["key"] for q in data["quantities"]] == ["seconds"]
