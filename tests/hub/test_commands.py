"""The commands with names of the hub, answered by a hub on this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import checkpoints
from helpers.hub import HUB
from helpers.hub_server import Fault
from mergekit.io.tasks import LoaderCache
from mergekit.scripts import run_yaml

from mergekit_monosoup.check import Finding, check
from mergekit_monosoup.checkpoints import hub as hub_module
from mergekit_monosoup.cli import main

BASE, TUNED, OTHER, ADAPTER, *_ = HUB
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SIGN_IN = Fault(f"/{TUNED}/resolve", 401, "GatedRepo", "Access to model X is restricted.")


def call(*arguments: object) -> Result:
    LoaderCache.loaders.clear()  # of the process, by name: it would hand out an earlier test's
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def error(*arguments: object) -> str:
    """Return what a command that fails prints: one line, after a terminal's bars."""
    result = call(*arguments)
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert lines[-1].startswith("Error: "), result.output
    return lines[-1].removeprefix("Error: ")


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert "\n" not in finding.message
    return finding


# -- what works ------------------------------------------------------------------------------------


def test_check_reads_headers_and_downloads_nothing(served, variants, write):
    served.add(BASE, variants / "large" / "base")
    served.add(TUNED, variants / "large" / "tuned0")
    assert check(write()) == []
    sizes = {name: served.sent(name) for name in (BASE, TUNED)}
    assert all(0 < sent < 101_000 for sent in sizes.values()), sizes
    assert not list(Path(hub_module.constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_the_readme(models, hub, tmp_path, monkeypatch):
    """Its configuration word for word: the merge of names is that of the folders, in every bit."""
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(merge_method.*?)```", README, flags=re.S)
    Path("merge.yml").write_text(text)
    result = call("check", "merge.yml")
    first, second = result.output.splitlines()
    assert (result.exit_code, first) == (0, "merge.yml: fine")
    assert second.startswith("  monosoup, freevariance: edits 16 of 25 tensors: all matrices; not:")
    CliRunner().invoke(run_yaml.main, ["merge.yml", "out", "--quiet"], catch_exceptions=False)
    local = text.replace(BASE, str(hub / "base")).replace(TUNED, str(hub / "tuned0"))
    Path("local.yml").write_text(local)
    CliRunner().invoke(run_yaml.main, ["local.yml", "local", "--quiet"], catch_exceptions=False)
    assert "total" in call("report", "report.jsonl").output
    merged, expected = (checkpoints.state_dict(Path(folder)) for folder in ("out", "local"))
    assert merged.keys() == expected.keys()
    assert all(merged[name].equal(expected[name]) for name in merged)
    assert not merged["lm_head.weight"].equal(
        checkpoints.state_dict(hub / "tuned0")["lm_head.weight"]
    )


@pytest.mark.parametrize("kind", ["sharded", "bin"])
def test_other_files(models, variants, write, kind, tmp_path):
    base, tuned = "my-org/base", "my-org/tuned"
    models.add(base, variants / "sharded" / "base")
    models.add(tuned, variants / ("bin" if kind == "bin" else "sharded/tuned0"))
    found = check(write(tuned, base=base))
    if kind == "bin":
        finding = only(found)
        assert (finding.level, finding.code) == ("warning", "TEN502")
        assert "holds pytorch_model.bin only" in finding.message
    else:
        assert found == []
    assert "mlp.down_proj" in call("inspect", base, tuned).stdout
    command = ["soup", "--base", base, tuned, OTHER, "--threshold", 0, "--out", tmp_path / "s.yml"]
    assert call(*command).exit_code == 0
    assert f"model: {tuned}" in (tmp_path / "s.yml").read_text()


def test_a_run_of_names_with_an_adapter(models, write, tmp_path, hub):
    cache, out = tmp_path / "cache", tmp_path / "out"
    config = write(f"{BASE}+{ADAPTER}")
    assert check(config) == []
    result = call("run", config, out, "--quiet", "--resume", "--lora-merge-cache", cache)
    assert result.exit_code == 0, result.output
    merged, base = checkpoints.state_dict(out), checkpoints.state_dict(hub / "base")
    changed = {name.split(".")[-2] for name in merged if not merged[name].equal(base[name])}
    assert changed == {"q_proj", "down_proj"}
    assert [place.name for place in cache.iterdir() if place.name[0] == "."] == []


def test_revisions(models, write, hub):
    commits = {s.folder.name: c for c, s in models.repositories["models", TUNED].items()}
    assert check(write(f"{TUNED}@v1")) == check(write(f"{TUNED}@{commits['tuned1']}")) == []
    assert (
        call("inspect", BASE, f"{TUNED}@v1").stdout
        == call("inspect", BASE, f"{TUNED}@{commits['tuned1']}").stdout
        == call("inspect", hub / "base", hub / "tuned1").stdout
    )


# -- what the hub refuses --------------------------------------------------------------------------

REFUSED = [
    (TUNED, SIGN_IN, f"is gated: accept its licence at http://.*/{TUNED}, then .*`hf auth login`"),
    (
        TUNED,
        Fault(f"/{TUNED}/resolve", 403, "GatedRepo", "You are not in the authorized list."),
        f"is gated, and this login has no access: ask for it, .* at http://.*/{TUNED}",
    ),
    ("no/model", None, "the hub shows no such repository: correct the name, or, if it is private"),
    (f"{TUNED}@v9", None, "has no such revision of it: after the @ comes a branch, a tag or a com"),
    (
        TUNED,
        Fault(TUNED, 401, "", "Invalid credentials in Authorization header"),
        r"the hub refuses this login \(Invalid cred.*\): log in again with `hf auth login`",
    ),
    (TUNED, Fault(TUNED, 403, "", "Access to this resource is disabled."), "hub has disabled this"),
    (
        "gguf/only",
        None,
        r"has model-q4\.gguf: GGUF, which mergekit does not read",
    ),
    (f"{BASE}+{OTHER}", None, "is no adapter: peft looks for adapter_config.json"),
    ("bad name/x", None, "the hub takes no such name: ORGANISATION/MODEL"),
]


@pytest.mark.parametrize(("name", "fault", "message"), REFUSED)
def test_refusals_are_one_line_everywhere(models, variants, write, tmp_path, name, fault, message):
    models.add("gguf/only", variants / "gguf")
    models.faults = [fault] if fault else []
    finding = only(check(write(name)))
    assert (finding.level, finding.code) == ("error", "TEN502")
    assert re.search(message, finding.message), finding
    cache = ["--lora-merge-cache", tmp_path / "cache"]
    soup = ["--threshold", 0, "--out", tmp_path / "s.yml"]
    for command in (
        ["inspect", BASE, name, *cache],
        ["soup", "--base", BASE, name, OTHER, *soup, *cache],
        ["run", write(name), tmp_path / "out", "--quiet", *cache],
        ["run", write(name), tmp_path / "out", "--quiet", "--resume", *cache],
    ):
        said = error(*command)
        assert said.startswith(f"{name}: ") and re.search(message, said), said
    assert not (tmp_path / "out").exists() and not (tmp_path / "s.yml").exists()
    assert not [p for p in (tmp_path / "cache").glob("*")], "what poisons the next command"


def test_an_adapter_is_no_model_but_inspected_and_edited(models, write, hub, tmp_path):
    message = r"is an adapter: write BASE\+ADAPTER"
    assert re.search(message, only(check(write(ADAPTER))).message)
    assert re.search(message, error("run", write(ADAPTER), tmp_path / "out", "--quiet"))
    local = call("inspect", hub / "base", hub / "adapter").stdout
    assert call("inspect", BASE, ADAPTER).stdout == local and "freevariance: " in local
    soup = ["soup", "--base", BASE, ADAPTER, OTHER, "--threshold", 0, "--out", tmp_path / "s.yml"]
    assert f"{ADAPTER} is an adapter, but {OTHER} is not" in error(*soup)
    assert call("adapter", ADAPTER, "--out", tmp_path / "edited").exit_code == 0


def test_a_renamed_repository_works_and_is_named(models, write):
    models.renamed["old/name"] = TUNED
    finding = only(check(write("old/name")))
    assert (finding.level, finding.code) == ("warning", "TEN502")
    assert finding.message == f"is called {TUNED} on the hub now: write that name"
    assert call("inspect", BASE, "old/name").exit_code == 0


# -- a bad network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("Math", cut=500), "the connection to the hub broke off at http.*: run the command"),
        (
            Fault("Math", 503),
            r"the hub answered 503 \(Service Unavailable\): try again in a",
        ),
        (Fault("Math", 429), r"answered 429 .* logged in \(`hf auth login`\) you may ask more"),
        (Fault("api/models", stall=True), "is silent: try again later, with a longer HF_HUB_DOWN"),
    ],
)
def test_what_may_pass_is_a_warning(models, write, monkeypatch, fault, message):
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    models.faults = [fault]
    for finding in (found := check(write())):
        assert (finding.level, finding.code) == (
            "warning",
            "TEN502",
        ) and "\n" not in finding.message
        assert re.search(message, finding.message), finding
    assert found
    if fault.cut is None:  # a download goes on where it stopped, see below
        assert re.search(message, error("inspect", BASE, TUNED))


def test_a_silent_hub_is_waited_for_once(models, write, monkeypatch):
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    models.faults = [Fault("", stall=True)]
    assert len(check(write(TUNED, OTHER, f"{TUNED}@v1"))) == 4
    assert len(models.requests) == 1


def test_a_download_goes_on_where_it_broke_off(models, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    models.faults = [Fault("model.safetensors", cut=5000, times=3)]
    assert call("inspect", BASE, TUNED).exit_code == 0
    weights = [a for a in models.log if a.path.endswith("model.safetensors") and a.method == "GET"]
    assert len(weights) == 4, "the first broke off twice, and then came whole"
    models.faults = [Fault(f"{OTHER}/resolve", cut=5000)]
    assert "the connection to the hub broke off at http" in error("inspect", BASE, OTHER)


# -- offline ---------------------------------------------------------------------------------------


def test_offline(models, write, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", True)
    finding = check(write())[0]
    assert (finding.level, finding.where) == ("warning", BASE)
    message = "HF_HUB_OFFLINE forbids to ask the hub: download it where there is a network"
    assert message in finding.message
    assert message in error("inspect", BASE, TUNED)
    assert message in error("run", write(), tmp_path / "out")
    assert models.log == []

    monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", False)
    online = call("inspect", BASE, TUNED)
    assert online.exit_code == 0
    monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", True)
    # The cache is enough to look at a model; mergekit's merge asks the hub for a list of files.
    assert call("inspect", BASE, TUNED).stdout == online.stdout
    (tuned,) = Path(hub_module.constants.HF_HUB_CACHE).glob("*Math-Expert/snapshots/*")
    (base,) = Path(hub_module.constants.HF_HUB_CACHE).glob("*Qwen3-0.6B/snapshots/*")
    message = "is in the cache, but mergekit asks the hub .* that fails, write "
    assert re.search(f"{message}{tuned}", check(write())[1].message)
    assert re.search(f"{message}{base}", error("run", write(), tmp_path / "out"))
    # What the line says works.
    config = write(str(tuned), base=str(base))
    assert check(config) == []
    assert call("run", config, tmp_path / "out", "--quiet").exit_code == 0
