"""The kernel against a float64 SVD written from the paper's equations, against numbers worked out
by hand, and its algebra.

Tolerances, measured over the zoo (2 orientations, both modes, rules monosoup and low; W0 = 0, so
that only the edited delta is rounded): float32 at most 4e-6, typically 2e-7; promised 1e-5. float64
at most 1e-9.
"""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import oracle, zoo
from mergekit.merge_methods import merge_tensors

from mergekit_monosoup import calibrate
from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.kernel import monosoup, task_vector
from mergekit_monosoup.kernel.batch import Job, calibrate_each, edit_batched, edit_each
from mergekit_monosoup.kernel.monosoup import NOT_UNIQUE, Split, edit, preview, split_rank
from mergekit_monosoup.kernel.spectrum import Spectrum, effective_rank
from mergekit_monosoup.report import read

SHAPES = [(192, 320), (320, 192), (256, 256)]
MODES = ["freevariance", "variance"]
RULES = ["monosoup", "rho", "cos", "uniform", "high", "low", "scalar"]
# Singular vectors of repeated singular values are not unique, so the cut through them has no right
# answer entry by entry.
CUT_THROUGH = {"repeated", "orthogonal", "tiny tail"}


def tensors(
    W0: np.ndarray, delta: np.ndarray, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(W0).to(dtype), torch.tensor(W0 + delta).to(dtype)


def error(weight: torch.Tensor, W0: torch.Tensor, expected: np.ndarray) -> float:
    found = weight.double().numpy() - W0.double().numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# -- against the oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_edited_delta_matches_float64_svd(kind, shape, mode):
    """W0 = 0 leaves the edited delta itself as the output, free of the rounding of W0 + delta."""
    delta = zoo.deltas(*shape)[kind]
    W0, W1 = tensors(np.zeros(shape), delta, torch.float32)
    weight, record = edit(W0, W1, mode=mode)
    expected, _, numbers = oracle.monosoup(W0, W1, mode=mode)
    assert record.k == numbers["k"]
    assert record.rank == numbers["rank"]
    for key in ("effective_rank", "P_k", "rho", "cos_alpha", "lambda_high", "lambda_low"):
        assert getattr(record, key) == pytest.approx(numbers[key], rel=1e-7, abs=1e-9), key
    assert record.delta_norm == pytest.approx(
        numbers["delta_norm"], rel=1e-6
    )  # a sum of float32 squares
    assert float(weight.norm()) == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    if kind not in CUT_THROUGH:
        assert error(weight, W0, expected) < 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["random", "power law 1", "low rank + noise", "spiked"])
def test_every_coefficient_rule(kind, rule):
    shape = (192, 320)
    W0, W1 = tensors(np.zeros(shape), zoo.deltas(*shape)[kind], torch.float32)
    weight, record = edit(W0, W1, coefficients=rule, mode="variance")
    expected, _, numbers = oracle.monosoup(W0, W1, mode="variance", rule=rule)
    assert (record.lambda_high, record.lambda_low) == pytest.approx(
        (numbers["lambda_high"], numbers["lambda_low"])
    )
    assert error(weight, W0, expected) < 1e-5


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_float64_stays_float64(kind):
    shape = (96, 64)
    W0, W1 = tensors(zoo.pretrained(*shape), zoo.deltas(*shape)[kind], torch.float64)
    before = W0.clone(), W1.clone()
    weight, record = edit(W0, W1)
    expected, _, numbers = oracle.monosoup(W0, W1)
    assert record.k == numbers["k"]
    assert weight.dtype == torch.float64
    if kind not in CUT_THROUGH:
        assert error(weight, W0, expected) < 1e-9
    assert torch.equal(W0, before[0]) and torch.equal(W1, before[1]), "inputs are borrowed"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", sorted(set(zoo.KINDS) - CUT_THROUGH))
def test_bfloat16_is_the_oracle_rounded_once(kind, mode):
    """Measured: at most 2 of 61440 entries differ (their exact value lies within 1e-7 of a tie)."""
    W0, W1 = tensors(zoo.pretrained(192, 320), zoo.deltas(192, 320)[kind], torch.bfloat16)
    weight, record = edit(W0, W1, mode=mode)
    _, expected, numbers = oracle.monosoup(W0.double(), W1.double(), mode=mode)
    assert weight.dtype == torch.bfloat16
    assert record.k == numbers["k"]
    assert float((weight == torch.tensor(expected).bfloat16()).double().mean()) > 0.999
    assert record.k == numbers["rank"] or not torch.equal(weight, W1)


# -- cuts between nearly equal singular values -----------------------------------------------------


def around_a_gap(gap: float, dtype: torch.dtype, shape=(80, 64)):
    """W0 and W1, and the R whose cut is between two singular values ``gap`` apart.

    Entries of W0 and ΔW are alike in size, so that float32 differences are rounded.
    """
    k, i = 12, np.arange(1, min(shape) + 1)
    sigma = i**-0.5
    sigma[k] = sigma[k - 1] * (1 - gap)
    sigma[k + 1 :] = np.minimum(sigma[k + 1 :], 0.98 * sigma[k])
    delta = zoo.with_spectrum(sigma, *shape)
    W0 = zoo.pretrained(*shape) / 0.02 * np.linalg.norm(delta) / np.sqrt(delta.size)
    energy = (sigma**2).cumsum() / (sigma**2).sum()
    return *tensors(W0, delta, dtype), float(energy[k - 2 : k].mean())


@pytest.mark.parametrize("shape", [(80, 64), (64, 80)])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1.6e-6, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_gap_at_the_cut(dtype, gap, shape):
    """Measured: at most 4e-6, with ΔW in float32 alone 2e-3."""
    W0, W1, R = around_a_gap(gap, dtype, shape)
    weight, record = edit(W0, W1, mode="variance", R=R)
    expected, _, numbers = oracle.monosoup(W0.double(), W1.double(), mode="variance", R=R)
    assert (record.k, record.reason) == (numbers["k"], "") and record.k == 12
    assert record.gap == pytest.approx(gap, rel=0.1, abs=2e-8)
    assert error(weight, W0, expected) < 1e-5
    assert preview(W0, W1, R=R)[1].gap == record.gap


def test_a_wide_gap_leaves_the_work_in_float32(monkeypatch):
    made = []
    monkeypatch.setattr(monosoup, "Spectrum", lambda *args: made.append(args) or Spectrum(*args))
    for gap, count in ((1e-2, 1), (1e-6, 2)):
        W0, W1, R = around_a_gap(gap, torch.float32)
        made.clear()
        edit(W0, W1, mode="variance", R=R)
        assert len(made) == count
        made.clear()
        edit(W0, W1, mode="variance", R=R, coefficients="uniform")  # no cut in effect
        edit(W0.bfloat16(), W1.bfloat16(), mode="variance", R=R)  # exact in float32
        assert len(made) == 2


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_cut_between_equal_singular_values_is_called_so(kind):
    delta = zoo.deltas(96, 64)[kind]
    _, record = edit(*tensors(np.zeros((96, 64)), delta, torch.float64), mode="variance")
    assert (record.reason == NOT_UNIQUE) == (kind in CUT_THROUGH)
    if kind in CUT_THROUGH:
        assert record.gap < 1e-13


def test_float16_and_strided_inputs():
    W0, W1 = tensors(zoo.pretrained(96, 64), zoo.deltas(96, 64)["random"], torch.float16)
    weight, _ = edit(W0, W1)
    assert weight.dtype == torch.float16
    strided, _ = edit(W0.T.contiguous().T, W1.T.contiguous().T)
    assert torch.equal(weight, strided)


@pytest.mark.parametrize("shape", [(200, 60), (60, 200), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_order_of_the_inputs_changes_nothing(shape, dtype):
    """A checkpoint saved as a transposed view comes back column-major.

    Sums over two orders at once mean nothing.
    """
    torch.manual_seed(0)
    W0 = torch.randn(shape).to(dtype)
    W1 = (W0 + 0.1 * torch.randn(shape)).to(dtype)
    weight, record = edit(W0, W1)
    assert record.realised == pytest.approx(1, abs=0.01)
    for base, tuned in itertools.product((W0, W0.T.contiguous().T), (W1, W1.T.contiguous().T)):
        again, other = edit(base, tuned)
        assert torch.allclose(
            again, weight, rtol=0, atol=1e-6
        )  # other loops in BLAS, other last digits
        assert (other.realised, other.edit_norm) == pytest.approx(
            (record.realised, record.edit_norm), rel=1e-5
        )


def test_blocks_do_not_change_the_result(monkeypatch):
    """An embedding is read in many blocks; here 7 rows at a time, with a ragged last one."""
    delta = zoo.with_spectrum(1.0 / np.arange(1, 25), 500, 24)
    W0, W1 = tensors(np.zeros((500, 24)), delta, torch.float32)
    whole, at_once = edit(W0, W1)
    monkeypatch.setattr(task_vector, "BLOCK_ELEMENTS", 7 * 24)
    parts, in_blocks = edit(W0, W1)
    assert in_blocks.k == at_once.k
    assert float((whole - parts).norm() / whole.norm()) < 1e-6


class Largest(torch.overrides.TorchFunctionMode):
    """Notes the largest promoted tensor that any torch function returns."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.float64):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_promoted_copy_of_a_whole_embedding(monkeypatch):
    monkeypatch.setattr(task_vector, "BLOCK_ELEMENTS", 64 * 100)
    W0 = torch.tensor(zoo.pretrained(5000, 64)).bfloat16()
    W1 = (W0.float() + 1e-3 * torch.randn(5000, 64)).bfloat16()
    with Largest() as largest:
        _, record = edit(W0, W1, mode="variance")
    assert record.action == "edited"
    assert 0 < largest.elements <= 64 * 100


# -- known answers ---------------------------------------------------------------------------------


def test_split_by_hand():
    sigma = torch.tensor(
        [4.0, 2.0, 1.0, 1.0], dtype=torch.float64
    )  # energies 16, 4, 1, 1 of 22; p = 1/2, 1/4, 1/8, 1/8
    assert effective_rank(sigma) == pytest.approx(2**1.75)  # H = 7/4 bits
    assert split_rank(sigma, "freevariance", 0.8) == 4
    assert [split_rank(sigma, "variance", R) for R in (0.7, 0.8, 20 / 22, 0.95, 1.0)] == [
        1,
        2,
        2,
        3,
        4,
    ]
    split = Split.at(sigma, 2)
    assert (split.energy_high, split.rho, split.cos_alpha) == pytest.approx(
        (20 / 22, 1 / 16, math.sqrt(2 / 22))
    )
    low = 1 / 16 + 15 / 16 * math.sqrt(2 / 22)
    assert split.coefficients("monosoup") == pytest.approx((1 - low, low))
    assert split.coefficients("scalar")[0] == pytest.approx(
        math.sqrt((1 - low) ** 2 * 20 / 22 + low**2 * 2 / 22)
    )
    assert Split.at(sigma, 4).coefficients("monosoup") == (
        1.0,
        0.0,
    )  # nothing below the cut: rho = 0


def test_equal_singular_values_cut_at_their_number():
    """exp(H) is exactly r; the ceiling must not become r + 1 by rounding."""
    for r in (1, 2, 7, 16, 100):
        sigma = torch.zeros(128, dtype=torch.float64)
        sigma[:r] = 0.37
        assert split_rank(sigma, "freevariance", 0.8) == r


@pytest.mark.parametrize("mode", MODES)
def test_zero_update_returns_the_fine_tuned_tensor_itself(mode):
    W0 = torch.randn(8, 5)
    W1 = W0.clone()
    weight, record = edit(W0, W1, mode=mode)
    assert weight is W1
    assert (record.action, record.reason, record.edit_norm) == ("copied", "no update", 0.0)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (6, 9)])
def test_rank_one_is_left_unchanged(shape):
    W0 = torch.randn(shape)
    W1 = (
        W0 + torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
        if min(shape) > 1
        else W0 + torch.randn(shape)
    )
    if min(shape) > 1:
        W0 = torch.zeros(shape)
        W1 = torch.outer(
            torch.arange(1.0, 1 + shape[0]), torch.arange(1.0, 1 + shape[1])
        )  # exact in float32
    weight, record = edit(W0, W1)
    assert (record.k, record.rank) == (1, 1)
    assert torch.equal(weight, W1)
    assert record.lambda_high == pytest.approx(1.0, abs=1e-12)


def test_exactly_low_rank_update_has_that_rank():
    """A merged LoRA: the Gram matrix alone would see phantom singular values of 1e-8 and a larger
    effective rank.
    """
    rng = np.random.default_rng(0)
    B, A = rng.integers(-3, 4, (256, 8)), rng.integers(-3, 4, (8, 384))
    W0, W1 = tensors(np.zeros((256, 384)), (B @ A).astype(float), torch.float32)
    _, record = edit(W0, W1)
    exact = np.linalg.svd((B @ A).astype(float), compute_uv=False)[:8]
    p = exact / exact.sum()
    assert record.rank == 8
    assert record.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)


def test_tiny_singular_values_are_resolved():
    """1e-13 of the largest: far below what a Gram matrix holds, well above the float64 floor."""
    sigma = np.concatenate([np.linspace(2, 1, 20), np.geomspace(1e-5, 1e-12, 20)])
    X = torch.tensor(zoo.with_spectrum(sigma, 200, 40))
    found = Spectrum(lambda: [X], 200, 40, X.device)
    assert np.allclose(found.sigma.numpy(), sigma, rtol=1e-2)
    assert np.allclose(found.sigma.numpy()[:30], sigma[:30], rtol=1e-6)


def test_skips():
    W0, W1 = torch.ones(4, 6), torch.ones(4, 6) * (1 + 1e-3)
    for settings, words in [
        (dict(min_rel_update=0.1), "below min_rel_update"),
        (dict(min_rel_update=math.inf), "switched off"),
    ]:
        weight, record = edit(W0, W1, **settings)
        assert weight is W1 and words in record.reason and record.k is None
    weight, record = edit(torch.ones(6), torch.zeros(6))
    assert record.reason == "fewer than two dimensions" and torch.equal(weight, torch.zeros(6))
    weight, record = edit(torch.zeros(40, 60), torch.randn(40, 60), min_rel_update=1e9)
    assert record.action == "edited" and record.rel_update is None, (
        "a zero W0 has no relative update and is edited"
    )


def test_realised_matches_its_definition_and_falls_with_the_update():
    shares = []
    for size in (1.0, 0.3, 0.1):  # relative updates of 1e-2, 3e-3, 1e-3
        W0, W1 = tensors(
            zoo.pretrained(128, 192), size * zoo.deltas(128, 192)["random"], torch.bfloat16
        )
        weight, record = edit(W0, W1)
        _, exact, _ = oracle.monosoup(W0.double(), W1.double())
        intended = exact - W1.double().numpy()
        actual = weight.double().numpy() - W1.double().numpy()
        assert record.realised == pytest.approx(
            (actual * intended).sum() / (intended**2).sum(), rel=1e-4
        )
        assert record.edit_norm == pytest.approx(np.linalg.norm(actual), rel=1e-4)
        shares.append(record.realised)
    assert shares[0] > 0.5 > shares[1] > shares[2]


# -- properties ------------------------------------------------------------------------------------

matrices = st.tuples(
    st.integers(2, 24), st.integers(2, 24), st.integers(0, 2**31 - 1), st.floats(-2.0, 0.0)
)


def draw(matrix) -> np.ndarray:
    out, rest, seed, decay = matrix
    rank = min(out, rest)
    return zoo.with_spectrum(np.arange(1, rank + 1) ** decay, out, rest, seed)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(matrices, st.sampled_from(MODES), st.sampled_from(RULES), st.floats(0.05, 1.0))
def test_coefficients_are_convex_and_scale_free(matrix, mode, rule, R):
    delta = torch.tensor(draw(matrix))
    zero = torch.zeros_like(delta)
    _, one = edit(zero, delta, mode=mode, R=R, coefficients=rule)
    _, other = edit(zero, 2.0**-9 * delta, mode=mode, R=R, coefficients=rule)
    assert (one.k, one.lambda_high, one.lambda_low) == pytest.approx(
        (other.k, other.lambda_high, other.lambda_low)
    )
    assert 0 <= one.lambda_low <= 1 and 0 <= one.lambda_high <= 1
    if rule != "scalar":
        assert one.lambda_high + one.lambda_low == pytest.approx(1)
    assert 1 <= one.k <= one.rank <= min(delta.shape)
    assert one.P_k + one.cos_alpha**2 == pytest.approx(1)
    if mode == "variance":
        assert one.P_k >= R * (1 - 1e-9)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(matrices, st.sampled_from(MODES))
def test_transposing_commutes_with_editing(matrix, mode):
    delta = torch.tensor(draw(matrix))
    W0 = torch.tensor(zoo.pretrained(*delta.shape))
    weight, record = edit(W0, W0 + delta, mode=mode)
    flipped, other = edit(W0.T, (W0 + delta).T, mode=mode)
    assert record.k == other.k
    # 1e-7: decay 0 gives equal singular values, where only the norm is determined.
    if matrix[3] < -0.1:
        assert float((weight - flipped.T).norm()) <= 1e-7 * float(delta.norm())


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(matrices)
def test_k_grows_with_R(matrix):
    delta = torch.tensor(draw(matrix))
    ks = [
        edit(torch.zeros_like(delta), delta, mode="variance", R=R)[1].k
        for R in (0.1, 0.5, 0.8, 0.95, 1.0)
    ]
    assert ks == sorted(ks)
    assert ks[-1] == min(delta.shape)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(matrices, st.floats(0, 1))
def test_alpha_is_linear_between_base_and_edit(matrix, alpha):
    delta = torch.tensor(draw(matrix))
    W0 = torch.tensor(zoo.pretrained(*delta.shape))
    full, _ = edit(W0, W0 + delta)
    part, _ = edit(W0, W0 + delta, alpha=alpha)
    assert torch.allclose(part, W0 + alpha * (full - W0), atol=1e-12)
    assert torch.equal(edit(W0, W0 + delta, alpha=0.0)[0], W0)


def test_alpha_interpolates_what_is_not_edited_too():
    """Wise-FT moves the whole model.

    Leaving norms at W1 would be neither of the two models on the path.
    """
    W0, W1 = torch.zeros(5), torch.ones(5)
    weight, record = edit(W0, W1, alpha=0.25)
    assert torch.equal(weight, torch.full((5,), 0.25))
    assert record.action == "edited" and "alpha = 0.25" in record.reason


def test_average_of_several_equals_editing_their_average():
    rng = np.random.default_rng(3)
    W0 = zoo.pretrained(48, 64)
    deltas = [0.01 * rng.standard_normal((48, 64)) for _ in range(3)]
    base = torch.tensor(W0)
    many, record = edit(base, [torch.tensor(W0 + d) for d in deltas], weights=[2, 1, 1])
    mean = (2 * deltas[0] + deltas[1] + deltas[2]) / 4
    one, other = edit(base, torch.tensor(W0 + mean))
    assert record.k == other.k
    assert torch.allclose(many, one, atol=1e-10)
    flat, copied = edit(
        base.flatten(), [torch.tensor((W0 + d).flatten()) for d in deltas], weights=[2, 1, 1]
    )
    assert torch.allclose(flat, torch.tensor(W0 + mean).flatten(), atol=1e-12)
    assert copied.action == "copied" and "average of 3" in copied.reason


def test_a_convolution_is_one_matrix():
    W0, W1 = torch.randn(16, 3, 4, 4), torch.randn(16, 3, 4, 4)
    weight, record = edit(W0, W1)
    flat, other = edit(W0.reshape(16, 48), W1.reshape(16, 48))
    assert torch.equal(weight.reshape(16, 48), flat) and record.k == other.k
    assert weight.shape == W0.shape


def test_bitwise_deterministic():
    W0, W1 = tensors(
        zoo.pretrained(200, 150), zoo.deltas(200, 150)["low rank + noise"], torch.bfloat16
    )
    first, _ = edit(W0, W1)
    assert all(torch.equal(first, edit(W0, W1)[0]) for _ in range(3))


# -- bad input -------------------------------------------------------------------------------------


def test_non_finite_entries_are_counted_per_input():
    W0, W1 = torch.randn(8, 6), torch.randn(8, 6)
    W1[1, 2], W1[3, 4], W1[0, 0] = math.nan, math.inf, -math.inf
    with pytest.raises(NonFiniteError) as caught:
        edit(W0, [W0, W1])
    assert caught.value.counts == (0, 0, 3)
    with pytest.raises(NonFiniteError):
        edit(W0[0], W1[0])  # also where nothing would be edited


@pytest.mark.parametrize(
    "settings",
    [
        dict(R=0.0),
        dict(R=1.5),
        dict(R=math.nan),
        dict(alpha=-0.1),
        dict(min_rel_update=-1),
        dict(mode="x"),
        dict(coefficients="half"),
        dict(weights=[-1.0]),
        dict(weights=[0.0]),
        dict(R="0.5"),
        dict(alpha=None),
    ],
)
def test_values_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        edit(torch.zeros(3, 3), torch.ones(3, 3), **settings)


def test_numbers_may_come_from_elsewhere():
    W0, W1 = torch.zeros(3, 3), torch.randn(3, 3)
    expected, _ = edit(W0, W1, alpha=0.5)
    for half in (torch.tensor(0.5), np.float32(0.5)):
        assert torch.equal(edit(W0, W1, alpha=half)[0], expected)


def test_weights_whose_sum_overflows_are_no_average():
    """Shares of w/∞ = 0 would give the pretrained model back, as if that were the merge."""
    with pytest.raises(ValueError, match="their sum finite"):
        edit(torch.zeros(3, 3), [torch.ones(3, 3)] * 2, weights=[1e308, 1e308])


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="shape"):
        edit(torch.zeros(3, 3), torch.ones(3, 4))
    with pytest.raises(ValueError, match="dtype"):
        edit(torch.zeros(3, 3), torch.ones(3, 3).double())
    with pytest.raises(ValueError, match="no fine-tuned"):
        edit(torch.zeros(3, 3), [])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32(scale):
    """The norm of a tiny update must not underflow to "no update", nor that of a huge one look
    infinite.
    """
    W0 = torch.zeros(64, 48)
    delta = torch.randn(64, 48, dtype=torch.float64)
    weight, record = edit(W0, (scale * delta).float(), mode="variance")
    expected, other = edit(W0, delta.float(), mode="variance")
    assert record.action == "edited" and record.k == other.k
    assert torch.allclose(weight.double() / scale, expected.double(), rtol=1e-4, atol=1e-6)
    assert record.edit_norm == pytest.approx(scale * other.edit_norm, rel=1e-4)
    assert record.realised == pytest.approx(other.realised, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_beyond_float32(dtype):
    """3e38 − (−3e38) is no float32; the result is one."""
    W0, W1 = (torch.randn(48, 64) * 1e37).to(dtype), (torch.randn(48, 64) * 1e37).to(dtype)
    W0[5, 7], W1[5, 7] = 3e38, -3e38
    weight, record = edit(W0, W1)
    expected, _ = edit(W0.double(), W1.double())
    assert record.action == "edited" and torch.isfinite(weight).all()
    assert torch.allclose(weight.double(), expected, rtol=1e-2, atol=1e35)
    assert not torch.allclose(weight.double(), W1.double(), rtol=1e-2, atol=1e35)


def test_what_the_dtype_cannot_hold_is_said():
    W0, W1 = torch.full((8,), 3e4, dtype=torch.float16), torch.full((8,), 6e4, dtype=torch.float16)
    assert torch.equal(calibrate(W0, [W1, W1], normalize=True)[0], W1)
    with pytest.raises(OverflowError, match="leave the range of float16"):
        calibrate(W0, [W1, W1])  # 3e4 + 2·3e4
    with pytest.raises(
        ValueError,
        match=r"svc: a\.b: its edited entries leave the range of float16.*`dtype: float32`",
    ):
        merge_tensors([W0, W1, W1], "svc", base_index=0, name="a.b")
    with pytest.raises(OverflowError, match="squares overflow float64"):
        edit(
            1e160 * torch.randn(8, 8, dtype=torch.float64),
            1e160 * torch.randn(8, 8, dtype=torch.float64),
        )


def test_reduced_matmul_precision_is_not_inherited():
    """torch.set_float32_matmul_precision("medium") rounds float32 products to bf16 where the
    hardware has it.
    """
    W0, W1 = tensors(np.zeros((192, 320)), zoo.deltas(192, 320)["random"], torch.float32)
    expected, _, _ = oracle.monosoup(W0, W1)
    torch.set_float32_matmul_precision("medium")
    try:
        assert error(edit(W0, W1)[0], W0, expected) < 1e-7  # float64: only the output is rounded
    finally:
        torch.set_float32_matmul_precision("highest")


def test_reduced_precision_in_its_newer_spelling():
    """From torch 2.9 on; once it has been set, torch.get_float32_matmul_precision() raises."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch < 2.9")
    W0, W1 = tensors(np.zeros((192, 320)), zoo.deltas(192, 320)["random"], torch.float32)
    expected, _, _ = oracle.monosoup(W0, W1)
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert error(edit(W0, W1)[0], W0, expected) < 1e-7
    finally:
        matmul.fp32_precision = before


def test_parameters_of_modules_are_ordinary_inputs():
    """They require grad, and NumPy refuses such tensors."""
    W0, W1 = torch.nn.Linear(8, 6).weight, torch.nn.Linear(8, 6).weight
    weight, _ = edit(W0, W1, mode="variance")
    assert (
        torch.equal(weight, edit(W0.detach(), W1.detach(), mode="variance")[0])
        and not weight.requires_grad
    )


EMPTY = [(0, 4), (4, 0), (0, 0), (0,), (2, 0, 3), (0, 3, 3), (3, 3, 0, 2)]


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_tensors_stay(shape):
    """Each way into the kernel: one matrix, many, a batch, both methods, a prediction."""
    W0, W1, W2 = (torch.zeros(shape) for _ in range(3))
    jobs = [Job(W0, [W1, W2], "a"), Job(W0, [W1, W2], "b")]
    found = [
        edit(W0, W1),
        edit(W0, [W1, W2], alpha=0.5),
        calibrate(W0, [W1, W2]),
        calibrate(W0, [W1], merged=W2),
        *edit_each(jobs),
        *edit_batched(jobs),
        *calibrate_each(jobs),
    ]
    for weight, record in found:
        assert weight.shape == record.shape == shape
        assert (record.action, record.reason, record.edit_norm) == ("copied", "no entries", 0.0)
    assert {(r.action, r.reason) for r in preview(W0, W1)} == {("inspected", "no entries")}


@pytest.mark.parametrize("method", ["monosoup", "svc"])
@pytest.mark.parametrize(
    ("name", "shape", "matrices"),
    [
        ("w", (0, 4), 1),
        ("experts.w", (4, 0), 1),
        ("mlp.experts.down_proj", (0, 3, 4), 1),  # no expert: the stack itself has a record
        ("mlp.experts.down_proj", (2, 0, 4), 2),
        ("mlp.experts.gate_up_proj", (2, 0, 4), 4),
        ("mlp.experts.gate_up_proj", (2, 6, 0), 4),
    ],
)
def test_empty_tensors_and_experts_are_merged(tmp_path, method, name, shape, matrices):
    report = tmp_path / "report.jsonl"
    merged = merge_tensors(
        [torch.zeros(shape) for _ in range(3)],
        method,
        base_index=0,
        name=f"layers.0.{name}",
        parameters={"report": str(report)},
    )
    assert merged.shape == shape
    assert [record.reason for record in read(report)] == ["no entries"] * matrices


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 5), (5, 1), (1, 1, 1)])
def test_a_single_row_column_or_number(shape):
    """No tail in any of them: stays as fine-tuned, is averaged, is interpolated."""
    W0, W1, W2 = torch.zeros(shape), torch.full(shape, 0.25), torch.full(shape, 0.75)
    assert edit(W0, W1)[0] is W1
    assert torch.equal(edit(W0, [W1, W2])[0], (W1 + W2) / 2)
    assert torch.equal(edit(W0, W1, alpha=0.5)[0], W1 / 2)
    assert torch.allclose(calibrate(W0, [W2, W2], normalize=True)[0], W2)


def test_as_many_weights_as_models():
    a, b = torch.zeros(3, 3), torch.ones(3, 3)
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="weights for 2 fine-tuned models"):
            edit(a, [b, b], weights=weights)
    with pytest.raises(TypeError, match="torch tensors, got ndarray"):
        edit(a, np.ones((3, 3)))
