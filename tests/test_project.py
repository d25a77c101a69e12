"""What the files at the root say of each other: pins, workflows, citation, how to contribute."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# The jobs that publish, by workflow.
MAY_WRITE = {
    "release": {"publish": {"id-token": "write"}},
    "site": {"deploy": {"id-token": "write", "pages": "write"}},
}
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))


def text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text("utf-8"))["jobs"]


# -- constraints.txt -------------------------------------------------------------------------------


def applies(requirement: Requirement, python: str) -> bool:
    environment = {**default_environment(), "python_version": python, "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pins(python: str) -> dict[str, list[Requirement]]:
    """The lines of constraints.txt that hold for a version of Python, by package."""
    lines = [line for line in text("constraints.txt").splitlines() if line[:1] not in ("#", "")]
    by_package: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        if applies(requirement, python):
            by_package.setdefault(requirement.name, []).append(requirement)
    return by_package


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_one_version_inside_its_range(python):
    extras = PROJECT["project"]["optional-dependencies"].values()
    ranges = [Requirement(line) for lines in extras for line in lines]
    ranges += map(Requirement, PROJECT["project"]["dependencies"])
    ranges += map(Requirement, PROJECT["build-system"]["requires"])
    pinned = pins(python)
    assert len(ranges) > 20 and {len(lines) for lines in pinned.values()} == {1}
    for requirement in ranges:
        if requirement.name != PROJECT["project"]["name"] and applies(requirement, python):
            (pin,) = pinned[requirement.name.lower()]
            (version,) = (specifier.version for specifier in pin.specifier)
            assert requirement.specifier.contains(version), requirement


# -- workflows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_and_no_more(path):
    assert yaml.safe_load(path.read_text("utf-8"))["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in jobs(path).items() if "permissions" in job}
    assert more == MAY_WRITE.get(path.stem, {})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_keep_no_credentials(path):
    lines = [line for line in path.read_text("utf-8").splitlines() if "uses:" in line]
    assert [line for line in lines if not re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)] == []
    steps = [step for job in jobs(path).values() for step in job["steps"]]
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(not step["with"]["persist-credentials"] for step in checkouts)


def test_every_python_is_tested():
    (matrix,) = (
        job["strategy"]["matrix"] for job in jobs(WORKFLOWS[0]).values() if "strategy" in job
    )
    assert WORKFLOWS[0].stem == "ci" and matrix["python"] == PYTHONS
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"


# -- what people read ------------------------------------------------------------------------------


def test_make_has_the_targets_that_are_named():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / ".ci/run", *WORKFLOWS]
    words = "\n".join(page.read_text("utf-8") for page in pages)
    commands = re.findall(r"(?:`|run: |exec )make ([a-z ]+)|^make ([a-z]+)$", words, flags=re.M)
    named = {target for command in commands for target in "".join(command).split()}
    assert named == set(re.findall(r"^([a-z]+):", text("Makefile"), flags=re.M))


def test_the_citation_is_that_of_the_readme():
    paper = yaml.safe_load(text("CITATION.cff"))["preferred-citation"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    fields = dict(re.findall(r"^ *(\w+) *= \{(.*)\}", text("README.md"), flags=re.M))
    assert fields["author"] == " and ".join(names) and fields["title"] == paper["title"]
    assert paper["identifiers"][0]["value"] == f"arXiv:{fields['eprint']}"
    assert int(fields["year"]) == paper["year"]


def test_the_example_of_a_parameter_is_how_the_others_are_written():
    """CONTRIBUTING adds a `floor`; its lines are those of `alpha` under another name."""
    guide = text("CONTRIBUTING.md").partition("## How to add a parameter")[2]
    lines = re.findall(r"^   (\S.*floor.*?)(?:  # .*)?$", guide.partition("\n## ")[0], flags=re.M)
    sources = "".join(
        text(f"mergekit_monosoup/{name}.py") for name in ("methods", "kernel/monosoup")
    )
    like_alpha = [line.replace("floor", "alpha") for line in lines if line.count("floor: ")]
    like_alpha += [line.replace("floor", "alpha") for line in lines if "agreed(" in line]
    like_alpha += [line.replace(", floor", "") for line in lines if "= Settings(" in line]
    assert len(like_alpha) == 5
    assert [line for line in like_alpha if line not in sources] == []
