"""Which curve a merged model lies on."""

from __future__ import annotations

import pytest
from helpers import evaluations
from helpers.evaluations import SOUP, merge_of, wise_ft

from evaluation import families
from evaluation.comparison import compare


@pytest.mark.parametrize(
    ("merge", "place"),
    [
        (wise_ft(0.5), ("Wise-FT", 0.5)),
        (wise_ft([0.1, 1.0]), ("LiNeS", 0.1)),
        (wise_ft([0.1, 0.9]), None),
        (merge_of("task_arithmetic", weight=0.5, normalize=True), None),
        (merge_of("ties", weight=0.5), None),
        (merge_of("monosoup", [{"model": "a"}, {"model": "b"}]), None),
        (
            merge_of("monosoup", [{"model": "base"}, {"model": "a"}], mode="variance", R=0.8),
            ("MonoSoup, R", 0.8),
        ),
        (
            merge_of("monosoup", mode="variance", R=0.8, coefficients="scalar"),
            ("scalar control, R", 0.8),
        ),
        (merge_of("monosoup", mode="variance", R=0.8, alpha=0.5), None),
        (merge_of("monosoup", alpha=0.5, report="r.jsonl"), ("MonoSoup + Wise-FT", 0.5)),
        (merge_of("monosoup"), ("MonoSoup + Wise-FT", 1.0)),
        (merge_of("monosoup", mode="freevariance", coefficients="scalar"), None),
        (None, None),
    ],
)
def test_which_curve_a_merge_is_on(merge, place):
    assert families.family(merge) == place


def test_a_curve_is_of_one_fine_tune(folder):
    """Three models of one number each are three points, not a curve.

    Nor is W1 the end of somebody else's.
    """
    for name, weight in (("half", 0.5), ("quarter", 0.25)):
        evaluations.write(folder, name, SOUP, merge=wise_ft(weight))
    for model, tuned, alpha in (("m1", "other", 1.0), ("m2", "third", 0.25), ("m2", "third", 0.5)):
        digests = {tuned: tuned, "base": "pretrained"}
        merge = merge_of("monosoup", [{"model": tuned}], digests, alpha=alpha)
        evaluations.write(folder, f"{model}_{alpha}", SOUP, merge=merge)
    # The last is another folder of the same name.
    for model, tuned, weights in (("else", "else", "e"), ("there", "there/else", "t")):
        for weight in (0.1, 0.2, 0.3):
            merge = wise_ft(weight, tuned, {tuned: weights, "base": "pretrained"})
            evaluations.write(folder, f"{model}{weight}", SOUP, merge=merge)
    [comparison] = compare([folder])
    assert {
        name: [model for _, model in points] for name, points in families.curves(comparison).items()
    } == {
        "Wise-FT of there/else from base": ["pretrained", "there0.1", "there0.2", "there0.3"],
        "Wise-FT of tuned": ["pretrained", "quarter", "half", "finetuned"],
        "Wise-FT of else from base": ["pretrained", "else0.1", "else0.2", "else0.3"],
        "MonoSoup + Wise-FT": ["pretrained", "m2_0.25", "m2_0.5"],
    }
