"""CKA against its definition in NumPy and against its invariances."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.cka_oracle import linear_cka as definition

from evaluation.features import LinearCKA, linear_cka

RNG = np.random.default_rng(0)
X = RNG.standard_normal((300, 12)) @ RNG.standard_normal((12, 12)) + 5
Y = X[:, :7] + 0.5 * RNG.standard_normal((300, 7))


def ours(x, y, piece=300):
    return linear_cka(
        (x[i : i + piece] for i in range(0, len(x), piece)),
        (y[i : i + piece] for i in range(0, len(y), piece)),
    )


def test_the_definition():
    assert 0.1 < definition(X, Y) < 0.99
    assert ours(X, Y) == pytest.approx(definition(X, Y), abs=1e-12)


@pytest.mark.parametrize("piece", [1, 7, 299])
def test_pieces_make_no_difference(piece):
    assert ours(X, Y, piece) == pytest.approx(definition(X, Y), abs=1e-12)


def test_invariances():
    orthogonal, _ = np.linalg.qr(RNG.standard_normal((12, 12)))
    value = definition(X, Y)
    assert ours(X, X) == pytest.approx(1, abs=1e-12)
    assert ours(X, -3 * X @ orthogonal + 2) == pytest.approx(1, abs=1e-12)
    assert ours(X @ orthogonal, Y) == pytest.approx(value, abs=1e-12)
    assert ours(1e-3 * X - 7, 1e4 * Y + 1) == pytest.approx(value, abs=1e-12)
    assert ours(Y, X) == pytest.approx(value, abs=1e-12)
    squeezed = X @ np.diag([10.0] + [1.0] * 11)
    assert abs(ours(X, squeezed) - 1) > 0.01, (
        "not invariant to any linear map, or it would measure nothing"
    )


def test_a_large_mean_costs_no_digits():
    assert ours(X + 1e6, Y - 1e6, 30) == pytest.approx(
        definition(X, Y), abs=1e-8
    )  # 1e6 itself costs six digits


def test_where_it_is_not_defined():
    assert (
        ours(X[:1], Y[:1]) is None
        and ours(np.ones((9, 3)), Y[:9]) is None
        and LinearCKA().value() is None
    )
    with pytest.raises(ValueError, match="3 and 2 items"):
        LinearCKA().add(X[:3], Y[:2])
