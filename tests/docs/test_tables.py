"""The tables of the pages say what the code and the evidence say."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
from helpers import pages
from helpers.pages import ROOT

from mergekit_monosoup import report
from mergekit_monosoup.parameters import parameter_table
from mergekit_monosoup.report import advice


@pytest.mark.parametrize("method", ["monosoup", "svc"])
def test_parameter_table_is_the_one_that_the_code_prints(method):
    assert f"test -->\n{parameter_table(method)}\n<!--" in pages.text("docs/guide.md")


def test_report_fields_are_all_explained():
    table = pages.between("docs/guide.md", "<!-- fields", "<!-- end of fields -->")
    named = [name for first, _ in pages.rows(table) for name in re.findall(r"`(\w+)`", first)]
    assert sorted(named) == sorted(report.Record.__dataclass_fields__)


def test_every_config_is_in_the_guide():
    names = {path.name for path in (ROOT / "configs").glob("*.yml")}
    assert set(re.findall(r"\]\(\.\./configs/(\w+\.yml)\)", pages.text("docs/guide.md"))) == names


def test_every_suite_is_in_the_table():
    table = pages.between("docs/evaluation.md", "| suite |", "A suite is")
    named = re.findall(r"^\| `([\w-]+)`", table, flags=re.M)
    assert sorted(named) == sorted(path.stem for path in ROOT.glob("evaluation/suites/*.yml"))


def test_symbols_are_where_the_methods_page_says():
    places = re.findall(r"`([\w/]+)\.py: ([\w.]+)`", pages.text("docs/methods.md"))
    assert len(places) > 15
    for module, name in places:
        value = import_module(f"mergekit_monosoup.{module.replace('/', '.')}")
        for part in name.split("."):
            assert hasattr(value, part), f"{module}.py has no {name}"
            value = getattr(value, part)


def evidence() -> dict[str, list[str]]:
    """The rows of docs/evidence.md, by their first cell; those of claims by what was measured."""
    rows = pages.rows("| | |\n|---|---|\n" + pages.text("docs/evidence.md"))
    return {row[1] if row[1:] and " − " in row[1] else row[0]: row for row in reversed(rows)}


def worlds(block: str) -> list[list[str]]:
    """The rows of a generated table of docs/evidence-worlds.md."""
    page = pages.between("docs/evidence-worlds.md", f"<!-- generated: {block} -->", "<!-- end -->")
    return pages.rows(page)


def of_fine_tune(title: str) -> list[list[str]]:
    """What docs/evidence-worlds.md says of a fine-tune: its row in each mode."""
    table = worlds("tunes")
    (first,) = (number for number, row in enumerate(table) if row[0] == title)
    return table[first : first + 2]


def test_readme_quotes_the_evidence():
    table = pages.rows(pages.between("README.md", "## Does it help?", "## Which mode"))
    titles = {
        "sums": "sums, Qwen3",
        "digits": "digits, ViT",
        "tweets, wide base": "tweets, wide base",
        "tweets": "tweets, usual",
    }
    assert [row[0] for row in table] == list(titles)
    for (_, *quoted), title in zip(table, titles.values(), strict=True):
        free, fixed = of_fine_tune(title)
        assert (free[1], fixed[1]) == ("freevariance", "variance")
        assert quoted == [free[3], *free[4:6], *fixed[4:6]]


def test_readme_numbers_in_prose():
    known, readme = evidence(), pages.text("README.md")
    beyond = [float(of[-1].split()[0].replace("−", "-")) for t in worlds("levels")
              for of in of_fine_tune(t[0])]  # fmt: skip
    assert "by less than a point" in readme and max(map(abs, beyond)) < 1
    ID = known["freevariance − fine-tuned, ID"][2]
    assert "It cost 0.2 points of sums, with an interval that ends at 0.4." in readme
    assert ID.startswith("−0.2 [−0.4, ")
    assert "(10 points at 0.7)" in readme and known["0.7"][1].startswith("−10.0 ")
    gain = [float(known[row][column].split()[0]) for row, column in (("0.9", 2), ("0.8", 2))]
    free = float(known["freevariance − fine-tuned, OOD"][2].split()[0])
    assert "three times the gain" in readme and 3 < gain[0] / free < 3.5
    assert "for 1.5 points" in readme and known["0.9"][1].startswith("−1.5 ")
    best = max(float(known[R][2].split()[0]) for R in ("0.5", "0.55", "0.6", "0.65", "0.7"))
    assert best - gain[1] < 2, "below R = 0.8 the gain hardly rises"


def test_inspect_quotes_the_evidence():
    """The advice that `inspect` ends with, number by number."""
    known, page = evidence(), pages.text("docs/evidence.md")
    free = [known[f"freevariance − fine-tuned, {group}"][2] for group in ("ID", "OOD")]
    expected = {
        "freevariance": free,
        "R = 0.9": known["0.9"][1:3],
        "R = 0.8": known["0.8"][1:3],
        "Wise-FT 0.5": known["Wise-FT 0.5"][3:],
    }
    assert {name: str(m) for name, m in advice.EVIDENCE.items()} == {
        name: f"ID {ID}, OOD {OOD}" for name, (ID, OOD) in expected.items()
    }
    assert {
        "freevariance": known["freevariance − its norm-matched scalar, OOD"][2],
        "R = 0.8": known["variance − its norm-matched scalar, OOD"][2],
    } == advice.OOD_BEYOND_CONTROL
    parameters, seeds = advice.WORLD.removesuffix(" seeds").split(" parameters, ")
    assert f"A model of {parameters} parameters" in page and f"{seeds} seeds (0, 1" in page


def test_inspect_quotes_what_holds_in_all_worlds():
    free, fixed = (row[5] for row in of_fine_tune("tweets, usual"))
    assert {"freevariance": free, "R = 0.8": fixed} == advice.OOD_WHERE_IT_GAINED
    (cases,) = re.findall(r"^(\d+) cases\.$", pages.text("docs/evidence-worlds.md"), flags=re.M)
    assert cases == advice.FINE_TUNES
    (rule,) = (row for row in worlds("prediction") if row[0].endswith("a share of it"))
    shares = {mode: row for mode, *row in worlds("rule")}
    for mode, tested in (("freevariance", rule[2]), ("variance", rule[4])):
        lowest, *_, highest = sorted(shares[mode][:-1])  # without that of all worlds together
        error, right = tested.split("; ")
        said = advice.SHARES["R = 0.8" if mode == "variance" else mode]
        assert said == advice.Share(lowest, highest, right, error)


def test_a_gradient_is_what_the_guide_says():
    from mergekit.config import evaluate_setting

    guide = " ".join((pages.ROOT / "docs/guide.md").read_text(encoding="utf-8").split())
    (written,) = re.findall(r"`\[0\.8, 0\.6\]` over five layers is ([\d., ]+)\.", guide)
    values = [evaluate_setting("w", [0.8, 0.6], i / 4, validate=float) for i in range(5)]
    assert written == ", ".join(f"{value:.3g}" for value in values)
