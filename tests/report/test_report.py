"""Records, the journal that writes them, and the table."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner
from mergekit.merge_methods import merge_tensors

from mergekit_monosoup import edit, report
from mergekit_monosoup.cli import SORTS, main
from mergekit_monosoup.report import Journal, Record, inspected, layer_group, read, summarise

FIELDS = [
    "name",
    "shape",
    "dtype",
    "action",
    "reason",
    "mode",
    "R",
    "k",
    "rank",
    "effective_rank",
    "gap",
    "P_k",
    "rho",
    "cos_alpha",
    "lambda_high",
    "lambda_low",
    "gamma_min",
    "gamma_median",
    "gamma_max",
    "amplified",
    "delta_norm",
    "rel_update",
    "edit_norm",
    "realised",
    "solver",
    "seconds",
]


def record(name: str, **values) -> Record:
    return Record(name=name, shape=(4, 3), dtype="float32", action="edited", **values)


def test_a_line_holds_every_field_and_reads_back(tmp_path):
    _, made = edit(torch.zeros(6, 4), torch.randn(6, 4), name="a.weight", mode="variance")
    journal, path = Journal(), tmp_path / "sub" / "r.jsonl"
    journal.add([made], str(path))
    (line,) = path.read_text().splitlines()
    assert sorted(json.loads(line)) == sorted(FIELDS)
    assert json.loads(line)["rel_update"] is None  # W0 = 0; Infinity is not JSON
    (back,) = read(path)
    assert back.k == made.k and back.lambda_low == made.lambda_low and back.R == 0.8


def test_a_report_of_a_version_without_gap_reads(tmp_path):
    _, made = edit(torch.zeros(6, 4), torch.randn(6, 4), name="a.weight", mode="variance")
    line = json.loads(made.to_json())
    assert 0 < line.pop("gap") < 1
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    (back,) = read(tmp_path / "old.jsonl")
    assert back.gap is None and back.k == made.k


def test_a_second_merge_starts_the_file_anew_and_keeps_the_old_one(tmp_path):
    journal, path = Journal(), tmp_path / "r.jsonl"
    for name in "abc":
        journal.add([record(name)], str(path))
    journal.add([record("a", k=2)], str(path))
    journal.add([record("b", k=2)], str(path))
    assert [(r.name, r.k) for r in read(path)] == [("a", 2), ("b", 2)]
    assert [r.name for r in read(str(path) + ".old")] == ["a", "b", "c"]
    Journal().add([record("z")], str(path))  # another process
    assert [r.name for r in read(path)] == ["z"]


def test_a_planned_merge_starts_the_file_anew_whatever_its_tensors_are_called(tmp_path):
    """The second model has a head before what both have.

    It must not go into the first one's report.
    """
    journal, path = Journal(), tmp_path / "r.jsonl"
    for names in (["a", "b"], ["head", "a", "b"]):
        journal.begin()
        for name in names:
            journal.add([record(name)], str(path))
    assert [r.name for r in read(path)] == ["head", "a", "b"]
    assert [r.name for r in read(f"{path}.old")] == ["a", "b"]


def test_a_rehearsal_leaves_the_report_of_a_running_merge_alone(tmp_path):
    journal, path = Journal(), tmp_path / "r.jsonl"
    journal.add([record("a")], str(path))
    rehearsal = report.PLANNING_ONLY.set(True)
    journal.begin()
    report.PLANNING_ONLY.reset(rehearsal)
    journal.add([record("b")], str(path))
    assert [r.name for r in read(path)] == ["a", "b"]


def test_unnamed_tensors_are_appended(tmp_path):
    path = str(tmp_path / "r.jsonl")
    for _ in range(3):
        merge_tensors(
            [torch.zeros(3, 3), torch.randn(3, 3)],
            "monosoup",
            base_index=0,
            parameters={"report": path},
        )
    assert len(read(path)) == 3


def test_a_report_that_is_not_one(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(record("a").to_json() + '\n{"name": "b", "sha')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2.*interrupted"):
        read(path)
    result = CliRunner().invoke(main, ["report", str(path)])
    assert result.exit_code == 1 and "line 2" in result.output
    path.write_text("")
    with pytest.raises(ValueError, match="no records"):
        read(path)


ABSURD = {
    "k": ["1" + "0" * 5000, "-1", "1e999", "[]", '"x"', "9223372036854775808"],
    "R": ["1e999", "NaN", "-Infinity", '"x"', "{}"],
    "edit_norm": ["1e999", "[1]"],
    "shape": ["null", "[-1]", "[1e999]", '{"a": 1}', "[" + "9," * 70 + "9]", "[" * 5000],
    "name": ["null", "3", "[]"],
    "mode": ['"[/b]"', "3"],
    "cosine": ['{"a": 1e999}', "[[]]"],
    "spectrum": ["[NaN]", "3"],
}


@pytest.mark.parametrize("key", ABSURD)
def test_absurd_values_are_named_by_line(key, tmp_path):
    path, good = tmp_path / "r.jsonl", record("a", k=1).to_json()
    for value in ABSURD[key]:
        line = f'{{"name": "a", "shape": [1], "dtype": "x", "{key}": {value}}}'
        path.write_text(f"{good}\n{line}\n")
        result = CliRunner().invoke(main, ["report", str(path)])
        assert result.exit_code == 1, value
        assert f"Error: {path}, line 2: not a monosoup record" in result.output
        assert len(result.output.splitlines()) == 1


def test_large_values_are_added_all_the_same():
    large = [
        record(name, edit_norm=1e300, realised=share, k=2**62, rank=1)
        for name, share in (("a", 0.5), ("b", 1.0))
    ]
    assert summarise(large)[-1].realised == 0.75
    assert summarise([record("a", edit_norm=0.0, realised=0.5)])[-1].realised == 0.5


def test_what_is_no_file_is_no_report(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "utf-16").write_text(record("a").to_json(), encoding="utf-16")
    for place, reason in {
        tmp_path: "it is a folder",
        tmp_path / "pipe": "it is a pipe",
        "/dev/zero": "it is a device",
        tmp_path / "utf-16": "not text",
        tmp_path / "missing": "No such file",
    }.items():
        with pytest.raises(ValueError, match=reason):
            read(place)


def test_summary_by_hand():
    made = [
        record(
            "model.layers.0.up.weight",
            k=1,
            rank=2,
            lambda_low=0.2,
            edit_norm=3.0,
            realised=1.0,
            seconds=1.0,
        ),
        record(
            "model.layers.1.up.weight",
            k=2,
            rank=2,
            lambda_low=0.4,
            edit_norm=1.0,
            realised=0.0,
            seconds=2.0,
        ),
        Record(
            "model.norm.weight",
            (4,),
            "float32",
            action="copied",
            reason="fewer than two dimensions",
        ),
    ]
    up, norm, total = summarise(made)
    assert (up.group, up.edited, up.copied, up.parameters) == ("model.layers.*.up.weight", 2, 0, 24)
    assert (up.rank_share, up.lambda_low, up.realised, up.seconds) == pytest.approx(
        (0.75, 0.3, 0.9, 3.0)
    )
    assert (norm.edited, norm.copied, norm.reasons) == (0, 1, ("fewer than two dimensions",))
    assert (total.group, total.edited, total.copied, total.parameters) == ("total", 2, 1, 28)


def test_the_table_drops_what_is_in_nearly_every_name():
    records = [record("model.layers.3.mlp.up_proj.weight")]
    groups = report.table(records).columns[0]
    assert list(map(str, groups.cells)) == ["layers.*.mlp.up_proj", "total"]


def test_groups():
    assert (
        layer_group("model.layers.12.mlp.experts.gate_up_proj[3].up")
        == "model.layers.*.mlp.experts.gate_up_proj[*].up"
    )


def test_the_table_shows_groups_totals_and_reasons(tmp_path):
    path = tmp_path / "r.jsonl"
    W0 = torch.randn(8, 6)
    for layer in range(3):
        merge_tensors(
            [W0, W0 + 0.1 * torch.randn(8, 6)],
            "monosoup",
            base_index=0,
            name=f"layers.{layer}.w",
            parameters={"report": str(path), "mode": "variance"},
        )
    merge_tensors(
        [W0, W0.clone()],
        "monosoup",
        base_index=0,
        name="frozen.w",
        parameters={"report": str(path)},
    )
    result = CliRunner().invoke(main, ["report", str(path)])
    assert result.exit_code == 0
    assert (
        "layers.*.w" in result.output
        and "total" in result.output
        and "no update: frozen.w" in result.output
    )
    narrow = CliRunner(env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "80"}).invoke(
        main, ["report", str(path)]
    )
    assert (
        "layers.*.w" in narrow.output and "realised" in narrow.output and "…" not in narrow.output
    )
    rows = json.loads(CliRunner().invoke(main, ["report", str(path), "--json"]).output)
    assert [(r["group"], r["edited"], r["copied"]) for r in rows] == [
        ("layers.*.w", 3, 0),
        ("frozen.w", 0, 1),
        ("total", 3, 1),
    ]


@pytest.mark.parametrize("kind", ["folder", "other file", "weights", "below a file"])
def test_a_report_never_replaces_what_is_no_report(tmp_path, kind):
    path = tmp_path / "precious"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe weights" if kind == "weights" else b'{"mine": 1}\n')
    target = path / "r.jsonl" if kind == "below a file" else path
    before = sorted(tmp_path.iterdir())
    words = "a folder" if kind in ("folder", "below a file") else "is not a report"
    with pytest.raises(ValueError, match=words):
        merge_tensors(
            [torch.zeros(3, 3), torch.randn(3, 3)],
            "monosoup",
            base_index=0,
            parameters={"report": str(target)},
        )
    with pytest.raises(ValueError, match=words):
        Journal().add([record("a")], str(target))
    assert sorted(tmp_path.iterdir()) == before and (kind == "folder" or path.read_bytes())


def test_a_report_of_long_lines_is_one(tmp_path):
    """`inspect --cosine` with dozens of models writes lines of more than 64 kB."""
    path = tmp_path / "report.jsonl"
    cosine = {f"{'model' * 200}{n}": 0.5 for n in range(80)}
    path.write_text(record("w", cosine=cosine).to_json() + "\n")
    assert path.stat().st_size > 2**16
    assert report.check_path(str(path)) == str(path)


def test_what_the_last_report_is_kept_as_may_be_somebodys_file(tmp_path):
    path = tmp_path / "r.jsonl"
    (tmp_path / "r.jsonl.old").write_text("my notes\n")
    Journal().add([record("a")], str(path))
    with pytest.raises(ValueError, match=r"r\.jsonl\.old exists and is not a report"):
        Journal().add([record("b")], str(path))
    assert (tmp_path / "r.jsonl.old").read_text() == "my notes\n" and [
        r.name for r in read(path)
    ] == ["a"]


def test_a_pipe_is_no_report(tmp_path):
    """Looking into it would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a report"):
        Journal().add([record("a")], str(tmp_path / "pipe"))


def test_no_permission_to_write_there(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="no permission to write in"):
        Journal().add([record("a")], str(tmp_path / "deep" / "r.jsonl"))


def test_a_report_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Journal().add([record("a")], "~/r.jsonl")
    assert [r.name for r in read(tmp_path / "r.jsonl")] == ["a"]


def test_lines_of_the_wrong_type(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"name": null, "shape": [1], "dtype": "float32"}\n')
    with pytest.raises(ValueError, match=r"line 1: .*`name`: Input should be a valid string"):
        read(path)
    path.write_text('{"name": "a", "shape": 3, "dtype": "float32"}\n')
    assert (
        "line 1: not a monosoup record (`shape`: "
        in CliRunner().invoke(main, ["report", str(path)]).output
    )
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="not text"):
        read(path)


def sized(name, shape=(4, 3), action="edited", **values):
    return Record(name, shape, "float32", action, **values)


SIZED = [
    sized("layers.0.b", rel_update=1e-2, edit_norm=1.0, delta_norm=2.0, R=0.7, realised=0.2),
    sized("layers.1.b", rel_update=3e-2, edit_norm=1.0, delta_norm=1.0, R=0.9, realised=0.2),
    sized("layers.0.a", (2, 2), rel_update=5e-2, edit_norm=1.0, delta_norm=5.0, realised=0.9),
    sized("layers.0.c", (9, 9), "copied", rel_update=1e-6),
]


def test_rows_have_R_and_sizes_and_the_total_is_of_edited_ones():
    b, a, copied, total = summarise(SIZED)
    assert (b.R_min, b.R_max, a.R_min) == (0.7, 0.9, None)
    assert (b.rel_edit, a.rel_edit, copied.rel_edit) == (0.75, 0.2, None)
    assert b.rel_update == pytest.approx(2e-2) and total.rel_update == pytest.approx(3e-2)
    shown = [list(column.cells) for column in report.table(SIZED).columns]
    assert ["0.7–0.9", "", "", "0.7–0.9"] in shown and ["0.75", "0.20", "", "0.57"] in shown


@pytest.mark.parametrize(
    ("sort", "groups"),
    [
        ("name", "abc"),
        ("update", "abc"),
        ("edit", "bac"),
        ("realised", "abc"),
        ("params", "cba"),
        (None, "bac"),
    ],
)
def test_rows_in_another_order(sort, groups, tmp_path):
    assert SORTS == report.SORTS
    sorted_rows = report.sort_rows(summarise(SIZED), sort)
    assert [row.group for row in sorted_rows] == [*(f"layers.*.{g}" for g in groups), "total"]
    table = inspected.table(SIZED, sort=sort)
    expected = {None: "abc"}.get(sort, groups)  # inspect has the order of depth
    assert [cell.plain for cell in table.columns[1].cells] == list(expected)
    path = tmp_path / "r.jsonl"
    path.write_text("".join(record.to_json() + "\n" for record in SIZED))
    given = ["--sort", sort] if sort else []
    rows = json.loads(CliRunner().invoke(main, ["report", str(path), "--json", *given]).output)
    assert [row["group"][-1] for row in rows] == [*groups, "l"]
