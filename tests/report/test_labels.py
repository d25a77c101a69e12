"""Names in tables: shortened so that numbers are whole and names are told apart."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.console import Console

from mergekit_monosoup import report
from mergekit_monosoup.report import Record, inspected
from mergekit_monosoup.report.labels import shorten
from mergekit_monosoup.soup import similarity_tables

LONG = "x" * 5000


@pytest.mark.parametrize("limit", [8, 13, 40])
@pytest.mark.parametrize(
    "names",
    [
        ["", "a", "bert.embeddings.position_embeddings", "bert.embeddings.word_embeddings"],
        [f"/models/run-{n:03}/a-fine-tune/final" for n in range(40)],
        [f"{LONG}{n}{LONG}" for n in range(12)],
        ["权重" * 30, "权重" * 30 + "a", "…", "x…y" * 20],
    ],
    ids=["BERT", "paths", "long", "wide"],
)
def test_shortened_names_fit_and_differ(names, limit):
    labels = shorten(names, limit, cell_len)
    assert max(map(cell_len, labels)) <= limit
    assert len(set(labels)) == len(names)
    short = [name for name in names if cell_len(name) <= limit]
    assert set(short) <= set(labels)


def test_the_end_of_a_name_says_more():
    assert shorten(["bert.embeddings.position_embeddings"], 22) == ["…position_embeddings"]
    assert shorten(["a_gate_projection_x"], 16) == ["a_gat…ojection_x"]


NAMES = [
    "model.encoder.layers.0.a_block_of_a_long_name.self_attn.query_projection.weight",
    "model.decoder.layers.10.a_block_of_a_long_name.self_attn.query_projection.weight",
    *("[/b]", "", "a\x1b[31m\nb", f"layers.0.{LONG}", "权重" * 40, "²", "9" * 5000),
]


def lines_of(table, width):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert max(map(cell_len, lines)) <= width
    return lines


@pytest.mark.parametrize("width", [80, 120, 160])
def test_numbers_are_whole_beside_any_name(width):
    fields = dict(k=123, rank=1000, effective_rank=456.0, lambda_high=0.789, lambda_low=0.211)
    fields |= dict(rel_update=1.5e-3, realised=0.42, edit_norm=1.0, delta_norm=2.0)
    modes = [("freevariance", None), ("variance", 0.8)]
    records = [
        Record(name, (4096, 4096), "bfloat16", "edited", mode=mode, R=R, **fields)
        for name in NAMES
        for mode, R in modes
    ]
    groups = [line for line in lines_of(report.table(records, width), width) if "0.211" in line]
    assert len(groups) == len(NAMES) + 1
    assert all("0.123" in line and "1.5e-03" in line and "0.42" in line for line in groups)
    for layers in (False, True):
        table = inspected.table(records, width, every_layer=layers)
        rows = [line for line in lines_of(table, width) if "1.5e-03" in line]
        assert len(rows) >= len(NAMES) - 1
        assert all("0.46" in line and line.count(".79/.21") == 2 for line in rows)


def test_similarities_are_whole_beside_any_name():
    models = [f"/data/{'deep/' * 20}run-{n}/final" for n in range(38)] + [LONG, "[/b]"]
    values = [[-0.99] * 40 for _ in models]
    tables = list(similarity_tables(models, values, 80))
    assert sum(len(table.columns) - 2 for table in tables) == 40
    rows = [line for line in lines_of(tables[0], 80) if "-0.99" in line]
    assert len(rows) == 40 and {line.count("-0.99") for line in rows} == {6}
    assert len({line.split()[1] for line in rows}) == 40
