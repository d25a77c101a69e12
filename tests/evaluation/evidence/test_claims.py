"""Claims against hand-computed numbers."""

from __future__ import annotations

import pytest

from evaluation.evidence import claims, collect, paper


@pytest.mark.parametrize(
    ("judge", "interval", "verdict"),
    [
        (claims.more, (0.001, 0.2), claims.HOLDS),
        (claims.more, (-0.1, 0.2), claims.UNDECIDED),
        (claims.more, (-0.2, -0.1), claims.CONTRADICTED),
        (claims.less, (-0.2, -0.1), claims.HOLDS),
        (claims.less, (-0.2, 0.1), claims.UNDECIDED),
        (claims.less, (0.1, 0.2), claims.CONTRADICTED),
        (claims.kept, (-0.009, 0.2), claims.HOLDS),
        (claims.kept, (-0.02, 0.001), claims.UNDECIDED),
        (claims.kept, (-0.02, -0.011), claims.CONTRADICTED),
        (claims.at_most(0.025), (-0.2, 0.0), claims.HOLDS),
        (claims.at_most(0.025), (-0.1, 0.1), claims.UNDECIDED),
        (claims.at_most(0.025), (0.05, 0.1), claims.CONTRADICTED),
    ],
)
def test_verdicts_follow_from_the_interval(judge, interval, verdict):
    low, high = interval
    assert judge(collect.Effect((), (low + high) / 2, low, high)) == verdict


def test_a_small_sure_loss_is_still_kept():
    assert claims.kept(collect.Effect((), -0.005, -0.007, -0.003)) == claims.HOLDS


def test_measurements_that_disagree_make_a_mixed_claim():
    effect = collect.Effect((), 0.0, 0.0, 0.0)
    shown = claims.Measurement("shown", effect, None)
    made = [
        claims.Measurement(verdict, effect, verdict) for verdict in (claims.HOLDS, claims.UNDECIDED)
    ]
    assert claims.Claim("", "", (shown, made[0])).verdict == claims.HOLDS
    assert claims.Claim("", "", (shown, *made)).verdict == "mixed"


def test_the_area_of_a_front():
    assert paper.front([(0.5, 0.5)]) == pytest.approx(0.25)
    assert paper.front([(0.5, 1.0), (1.0, 0.5)]) == pytest.approx(0.75)
    assert paper.front([(0.5, 1.0), (1.0, 0.5), (0.4, 0.9), (0.5, 0.5)]) == pytest.approx(
        0.75
    )  # dominated points


def test_seeds_that_agree_to_the_last_digit_decide_nothing():
    flat = collect.Effect.of([0.1, 0.1, 0.1])
    judges = (claims.more, claims.less, claims.kept, claims.at_most(0.025))
    assert [claims.verdict(flat, judge) for judge in judges] == [claims.UNDECIDED] * 4
    assert claims.verdict(collect.Effect.of([0.1, 0.1, 0.11]), claims.more) == claims.HOLDS
    assert claims.verdict(collect.Effect.of([1.0, 1.0]), claims.always) == claims.HOLDS
    assert claims.Measurement("", flat, None).text() == "+10.0 in every seed"
