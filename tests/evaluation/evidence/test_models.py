"""What is compared: every merge is one that mergekit knows, and everything shown is made."""

from __future__ import annotations

from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get

from evaluation.evidence import experiment, models, page, panels
from evaluation.evidence.subjects import SUMS


def test_every_merge_is_one_that_mergekit_knows_with_parameters_that_it_reads(tmp_path):
    made = [
        *models.merges(tmp_path),
        *models.two_task_merges(tmp_path),
        *models.rounded("a/b", "c/d"),
    ]
    names = [name for name, _ in made]
    assert len(names) == len(set(names)) and len(names) > 80
    for name, config in made:
        MergeConfiguration.model_validate(config)
        known = {parameter.name for parameter in get(config["merge_method"]).spec.parameters}
        given = set(config.get("parameters", {})).union(
            *(model.get("parameters", {}) for model in config["models"])
        )
        assert given <= known, name


def test_what_claims_tables_and_figures_name_is_made():
    made = {
        name
        for name, _ in [
            *models.merges(Path()),
            *models.rounded("", ""),
            *models.two_task_merges(Path()),
        ]
    }
    made |= {*models.TRAINED, *models.TWO_TASKS_TRAINED} | {
        f"same_norm_{label}" for label in models.CONTROLLED
    }
    named = {*page.SHOWN, *page.ABLATED, *page.TWO, *panels.NAMED, *panels.COMPARED}
    named |= {model for curve in SUMS.curves.values() for model in curve}
    assert named <= made
    # bfloat16 copies of two models are asked, too; those of both suites are asked twice.
    assert experiment.model_count() == len(made) + len(models.IN_BFLOAT16) + len(
        {*models.TRAINED} & {*models.TWO_TASKS_TRAINED}
    )
