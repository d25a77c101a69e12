"""`svc` against a float64 SVD written from the formulas, against answers worked out by hand, and
inside mergekit.

Tolerance, measured over the zoo (3 orientations, 3 forms, 2 and 3 tasks, W0 = 0 so that only the
calibrated update is rounded): float64 at most 4e-11 of the update, typically 1e-13; 1.2e-8 for a
trimmed sum of two rank-one updates, most of whose directions are rounding error. Promised and
allowed: 1e-6.
"""

from __future__ import annotations

import functools
import logging
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import checkpoints, svc_oracle, zoo
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import get, merge_tensors
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_monosoup import calibrate, report
from mergekit_monosoup.cli import main
from mergekit_monosoup.errors import NonFiniteError, SolverError
from mergekit_monosoup.kernel import eigen, spectrum, task_vector
from mergekit_monosoup.kernel.batch import Job, calibrate_each
from mergekit_monosoup.kernel.svc import calibration, merge_weights
from mergekit_monosoup.methods import MERGE_METHODS
from mergekit_monosoup.parameters import parameter_table

SHAPES = [(96, 160), (160, 96), (128, 128)]
FORMS = ["task arithmetic", "average", "merged"]


@functools.cache
def deltas(shape: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    return zoo.deltas(*shape, seed=seed)


def tasks_of(kind: str, shape: tuple[int, int]) -> list[np.ndarray]:
    """Two updates of a kind and a random one.

    Singular vectors of repeated singular values are not unique and γ depends on which are taken;
    this sum has none.
    """
    first, second, third = (deltas(shape, seed) for seed in (0, 5, 9))
    return [first[kind], second[kind], 0.7 * third["random"]]


def settings_of(form: str, updates: list[np.ndarray], W0: torch.Tensor) -> dict:
    """Keyword arguments of one of the three forms.

    `merged` is a merge by other means: the larger half of each update.
    """
    if form == "merged":
        trimmed = sum(np.where(np.abs(d) > np.median(np.abs(d)), d, 0) for d in updates)
        return {"merged": (W0.double() + torch.tensor(trimmed)).to(W0.dtype)}
    return (
        {"weights": [2, 1, 1][: len(updates)], "normalize": True}
        if form == "average"
        else {"scaling": 0.3}
    )


def tensors(
    W0: np.ndarray, updates: list[np.ndarray], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.tensor(W0).to(dtype), [torch.tensor(W0 + d).to(dtype) for d in updates]


def error(weight: torch.Tensor, W0: torch.Tensor, expected: np.ndarray) -> float:
    found = (weight.double() - W0.double()).numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# -- against the oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_calibrated_update_matches_float64_svd(kind, shape, form):
    """W0 = 0 leaves the calibrated update itself as the output, free of the rounding of W0 +
    update.
    """
    updates = tasks_of(kind, shape)
    W0, tasks = tensors(np.zeros(shape), updates, torch.float64)
    settings = settings_of(form, updates, W0)
    weight, record = calibrate(W0, tasks, **settings)
    expected, update, gamma = svc_oracle.svc(W0, tasks, **settings)
    assert error(weight, W0, expected) < 1e-6
    assert error(weight, W0, update) > 1e-2, "calibration changed the merge"
    assert record.delta_norm == pytest.approx(np.linalg.norm(update), rel=1e-12)
    assert record.edit_norm == pytest.approx(np.linalg.norm(expected - update), rel=1e-6)
    assert record.rank == len(gamma) and record.realised == pytest.approx(1)
    # 1e-6, as the update: γ of the weakest directions moves with their singular vectors.
    found = (record.gamma_min, record.gamma_median, record.gamma_max, record.amplified)
    assert found == pytest.approx(
        (gamma.min(), np.median(gamma), gamma.max(), (gamma > 1).mean()), rel=1e-6
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["low rank", "exponential", "power law 2", "spiked"])
def test_two_tasks_and_rank_deficient_merges(kind, shape, form):
    """Two LoRA-like updates of rank 16.

    32 directions are calibrated and the rest of the space stays empty.
    """
    updates = tasks_of(kind, shape)[:2]
    W0, tasks = tensors(np.zeros(shape), updates, torch.float64)
    settings = settings_of(form, updates, W0)
    weight, record = calibrate(W0, tasks, **settings)
    expected, *_ = svc_oracle.svc(W0, tasks, **settings)
    assert error(weight, W0, expected) < 1e-6
    if kind == "low rank" and form != "merged":
        assert record.rank == 32 == torch.linalg.matrix_rank(weight)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_the_oracle_rounded_once(form, shape):
    updates = tasks_of("power law 1", shape)
    W0, tasks = tensors(zoo.pretrained(*shape), updates, torch.bfloat16)
    settings = settings_of(form, updates, W0)
    weight, record = calibrate(W0, tasks, **settings)
    exact = {key: value.double() if key == "merged" else value for key, value in settings.items()}
    expected, update, _ = svc_oracle.svc(W0.double(), [w.double() for w in tasks], **exact)
    rounded = (W0.double() + torch.tensor(expected)).bfloat16()
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, rounded)
    assert not torch.equal(weight, (W0.double() + torch.tensor(update)).bfloat16())
    actual = (weight.double() - W0.double()).numpy() - update
    intended = expected - update
    assert record.realised == pytest.approx(
        (actual * intended).sum() / (intended**2).sum(), rel=1e-6
    )
    assert record.edit_norm == pytest.approx(np.linalg.norm(actual), rel=1e-6)


@pytest.mark.parametrize("shape", [(500, 64), (64, 500)])
def test_blocks_and_strides_do_not_change_the_result(monkeypatch, shape):
    updates = tasks_of("power law 1", shape)
    W0, tasks = tensors(np.zeros(shape), updates, torch.float64)
    whole, at_once = calibrate(W0, tasks)
    strided, other = calibrate(W0.T.contiguous().T, [w.T.contiguous().T for w in tasks])
    assert torch.allclose(strided, whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    assert (other.edit_norm, other.gamma_max) == pytest.approx(
        (at_once.edit_norm, at_once.gamma_max)
    )
    monkeypatch.setattr(
        task_vector, "BLOCK_ELEMENTS", 7 * 64
    )  # 7 rows at a time, with a ragged last block
    parts, in_blocks = calibrate(W0, tasks)
    assert float((whole - parts).norm() / whole.norm()) < 1e-12
    assert in_blocks.gamma_min == pytest.approx(at_once.gamma_min)


@pytest.mark.parametrize("solvers", [["Lapack"], ["Lapack", "Eigh"]])
@pytest.mark.parametrize("stage", ["__init__", "vectors"])
@pytest.mark.parametrize("kind", ["low rank", "exponential"])
def test_every_rung_of_the_solver_ladder(monkeypatch, kind, stage, solvers):
    """The vectors come in another order from each: γ must stay with its direction."""

    def fails(*args):
        raise SolverError("injected")

    for solver in solvers:
        monkeypatch.setattr(getattr(eigen, solver), stage, fails)
    W0, tasks = tensors(np.zeros((96, 160)), tasks_of(kind, (96, 160))[:2], torch.float64)
    weight, record = calibrate(W0, tasks)
    expected, *_ = svc_oracle.svc(W0, tasks)
    assert error(weight, W0, expected) < 1e-6
    assert record.solver.startswith("svd; " if len(solvers) == 2 else "eigh; ")


def test_no_spectrum_names_the_tensor(monkeypatch):
    def fails(*args, **kwargs):
        raise SolverError("injected")

    monkeypatch.setattr(spectrum, "Eigen", fails)
    monkeypatch.setattr(spectrum.Spectrum, "_decompose", fails)
    with pytest.raises(
        RuntimeError, match=r"svc: layers\.3\.w \(4, 6\): its spectrum could not be computed"
    ):
        merge_tensors(list(torch.randn(3, 4, 6)), "svc", base_index=0, name="layers.3.w")


# -- known answers ---------------------------------------------------------------------------------


def test_calibration_by_hand():
    s = torch.tensor([[2.0, 0.5, -3.0], [2.0, 0.05, 0.0]], dtype=torch.float64)
    assert calibration(s, 0.1).tolist() == pytest.approx([2 / 4, 2 / 0.6, 2 / 0.2])
    assert calibration(s, 1.0).tolist() == pytest.approx([2 / 4, 1, 1])
    assert merge_weights([2, 1, 1], 0.5, normalize=True) == [0.25, 0.125, 0.125]
    assert merge_weights([2, 1, 1], 0.5) == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3])
def test_identical_tasks(shape, count):
    """K equal updates: the sum has s = K everywhere, so γ = 1/K and one of them remains.

    The average has s = 1 and stays.
    """
    (delta, *_) = tasks_of("power law 1", shape)
    W0, tasks = tensors(np.zeros(shape), [delta] * count, torch.float64)
    for settings, gamma in (({}, 1 / count), ({"normalize": True}, 1.0)):
        weight, record = calibrate(W0, tasks, **settings)
        assert error(weight, W0, delta) < 1e-12
        assert (record.gamma_min, record.gamma_max, record.amplified) == pytest.approx(
            (gamma, gamma, 0.0)
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_orthogonal_tasks(shape, normalize):
    """Tasks with no row or column space in common.

    In each direction one has s = its share of the merge, the others α.

    With α = 0.1 and two tasks γ is 2/(1 + 0.1) for the sum and 2/(1/2 + 0.1) for the average, which
    ends at 1.67 times the tasks' own updates. Rounding error must not pass for a response of the
    silent task.
    """
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, 40)))[0] for n in shape)
    sigma = 1.0 / np.arange(1, 41)  # all different: vectors of equal ones are not unique
    updates = [
        (U[:, part] * sigma[part]) @ V[:, part].T for part in (slice(0, None, 2), slice(1, None, 2))
    ]
    W0, tasks = tensors(np.zeros(shape), updates, torch.float64)
    weight, record = calibrate(W0, tasks, normalize=normalize)
    share = 0.5 if normalize else 1.0
    gamma = 2 / (share + 0.1)
    assert record.rank == 40
    assert (record.gamma_min, record.gamma_max, record.amplified) == pytest.approx(
        (gamma, gamma, 1.0)
    )
    assert error(weight, W0, gamma * share * sum(updates)) < 1e-10


def test_a_task_that_did_not_move_counts_as_alpha():
    """Its responses are exactly 0 and 0/0 is no coefficient: s = α.

    The other one has s = 1, so γ = 2/(1 + α).
    """
    W0 = torch.tensor(zoo.pretrained(64, 96))
    moved = W0 + torch.tensor(zoo.deltas(64, 96)["random"])
    for alpha in (0.1, 0.5):
        weight, record = calibrate(W0, [moved, W0.clone()], alpha=alpha)
        gamma = 2 / (1 + alpha)
        assert (record.gamma_min, record.gamma_max) == pytest.approx((gamma, gamma))
        assert torch.allclose(weight, W0 + gamma * (moved - W0), atol=1e-12)


def test_merges_without_an_update():
    W0 = torch.tensor(zoo.pretrained(64, 96))
    delta = torch.tensor(zoo.deltas(64, 96)["random"]).float().double()
    weight, record = calibrate(torch.zeros_like(W0), [delta, -delta])  # they cancel exactly
    assert (
        torch.equal(weight, torch.zeros_like(W0))
        and "no update" in record.reason
        and record.gamma_max is None
    )
    merged = W0.clone()
    weight, record = calibrate(W0, [W0 + delta, W0 - delta], merged=merged)
    assert weight is merged and (record.action, record.reason) == ("copied", "no update")


def test_what_is_not_calibrated_stays_as_merged():
    W0, a, b, merged = torch.zeros(5), torch.ones(5), torch.full((5,), 3.0), torch.full((5,), 9.0)
    weight, record = calibrate(W0, [a, b], scaling=0.5)
    assert torch.equal(weight, torch.full((5,), 2.0))
    assert (
        record.reason == "fewer than two dimensions; merge of 2 models"
        and record.action == "copied"
    )
    assert torch.equal(
        calibrate(W0, [a, b], normalize=True, weights=[1, 3])[0], torch.full((5,), 2.5)
    )
    assert calibrate(W0, [a, b], merged=merged)[0] is merged
    one, record = calibrate(
        torch.zeros(4, 3), [torch.ones(4, 3)], scaling=0.3
    )  # a tensor that only one model has
    assert "only one task model" in record.reason and torch.allclose(one, torch.full((4, 3), 0.3))


def test_a_convolution_is_one_matrix():
    W0, a, b = torch.randn(3, 16, 3, 4, 4)
    weight, record = calibrate(W0, [a, b])
    flat, other = calibrate(W0.reshape(16, 48), [a.reshape(16, 48), b.reshape(16, 48)])
    assert torch.equal(weight.reshape(16, 48), flat) and record.gamma_max == other.gamma_max
    assert weight.shape == W0.shape


# -- properties ------------------------------------------------------------------------------------

worlds = st.tuples(
    st.integers(2, 20), st.integers(2, 20), st.integers(2, 4), st.integers(0, 2**31 - 1)
)


def draw(world) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out, rest, count, seed = world
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((out, rest))
    return tensors(
        np.zeros((out, rest)),
        [shared + rng.standard_normal((out, rest)) for _ in range(count)],
        torch.float64,
    )


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(worlds, st.floats(0.01, 3.0), st.floats(0.1, 2.0), st.booleans())
def test_gamma_is_bounded_and_alpha_from_1_on_never_amplifies(world, alpha, scaling, normalize):
    W0, tasks = draw(world)
    weight, record = calibrate(W0, tasks, alpha=alpha, scaling=scaling, normalize=normalize)
    assert (
        0 < record.gamma_min <= record.gamma_median <= record.gamma_max <= 1 / alpha * (1 + 1e-12)
    )
    longer = float(weight.norm()) / record.delta_norm
    assert record.gamma_min * (1 - 1e-9) <= longer <= record.gamma_max * (1 + 1e-9)
    if alpha >= 1:
        assert record.amplified == 0 and longer <= 1 + 1e-12


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(worlds)
def test_scale_of_the_weights_and_of_the_merge(world):
    """γ has no unit; and where no s is under α, γ takes any scaling of the merge back."""
    W0, tasks = draw(world)
    weight, record = calibrate(W0, tasks)
    small, other = calibrate(W0, [2.0**-20 * w for w in tasks])
    assert torch.allclose(2.0**20 * small, weight, rtol=1e-9, atol=1e-12)
    assert other.gamma_max == pytest.approx(record.gamma_max)
    doubled, other = calibrate(W0, tasks, alpha=0.2, scaling=2.0)
    assert torch.allclose(doubled, weight, rtol=1e-9, atol=1e-12), "s and α doubled: γ halves"
    assert other.gamma_max == pytest.approx(record.gamma_max / 2)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(worlds)
def test_order_of_tasks_does_not_matter_and_both_forms_agree(world):
    W0, tasks = draw(world)
    weight, _ = calibrate(W0, tasks)
    assert torch.allclose(calibrate(W0, tasks[::-1])[0], weight, rtol=1e-8, atol=1e-10)
    assert torch.allclose(calibrate(W0, tasks, merged=sum(tasks))[0], weight, rtol=1e-8, atol=1e-10)


def test_bitwise_deterministic_and_inputs_are_borrowed():
    W0, tasks = tensors(
        zoo.pretrained(90, 70), tasks_of("low rank + noise", (90, 70)), torch.float64
    )
    before = [w.clone() for w in (W0, *tasks)]
    first, _ = calibrate(W0, tasks)
    assert all(torch.equal(first, calibrate(W0, tasks)[0]) for _ in range(3))
    assert all(torch.equal(a, b) for a, b in zip(before, (W0, *tasks), strict=True))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(alpha=0.0),
        dict(alpha=math.nan),
        dict(alpha=math.inf),
        dict(scaling=-1.0),
        dict(scaling=math.inf),
        dict(weights=[-1.0, 1.0]),
        dict(weights=[0.0, 0.0]),
    ],
)
def test_values_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        calibrate(torch.zeros(3, 3), [torch.ones(3, 3)] * 2, **settings)


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="no task model"):
        calibrate(torch.zeros(3, 3), [])
    with pytest.raises(ValueError, match="shape"):
        calibrate(torch.zeros(3, 3), [torch.ones(3, 3)] * 2, merged=torch.ones(3, 4))
    bad = torch.full((3, 3), math.inf)
    for tasks, merged in (([torch.ones(3, 3), bad], None), ([bad, bad], torch.ones(3, 3))):
        with pytest.raises(NonFiniteError):
            calibrate(torch.zeros(3, 3), tasks, merged=merged)


def test_flags_are_no_words():
    """`normalize="no"` would be true."""
    with pytest.raises(ValueError, match="normalize must be true or false, got 'no'"):
        calibrate(torch.zeros(4, 3), [torch.ones(4, 3)] * 2, normalize="no")


def test_a_job_without_task_models_is_named():
    with pytest.raises(ValueError, match="no task model was given"):
        list(calibrate_each([Job(torch.zeros(4, 3), [], "w")]))


# -- inside mergekit -------------------------------------------------------------------------------


def merge(base, tuned, out, *, parameters=None, per_model=None, **top):
    models = [{"model": str(path)} for path in tuned]
    for model, own in zip(models, per_model or [], strict=False):
        model["parameters"] = own
    config = {
        "merge_method": "svc",
        "base_model": str(base),
        "models": models,
        "parameters": parameters or {},
        **top,
    }
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return checkpoints.state_dict(out)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return checkpoints.pair(tmp_path_factory.mktemp("qwen3"), tuned=3)


@pytest.mark.parametrize(
    ("parameters", "per_model"),
    [
        ({"normalize": True}, [{}, {"weight": 2.0}, {}]),
        ({"scaling": 0.3, "alpha": 0.2}, [{"alpha": 0.2}] * 3),
        ({}, [{}, {}, {"merged": True}]),
    ],
)
def test_every_tensor_of_a_checkpoint(tmp_path, qwen3, parameters, per_model):
    base, tuned = qwen3
    path = str(tmp_path / "r.jsonl")
    merged = merge(
        base, tuned, tmp_path / "out", parameters=parameters | {"report": path}, per_model=per_model
    )
    W0, models = checkpoints.state_dict(base), [checkpoints.state_dict(model) for model in tuned]
    records = {r.name: r for r in report.read(path)}
    assert set(merged) == set(W0) == set(records)
    settings = {key: value for key, value in parameters.items() if key != "report"}
    flagged = "merged" in per_model[-1]
    for name, weight in merged.items():
        tasks, start = [m[name].double() for m in models], W0[name].double()
        if flagged:
            settings["merged"] = tasks.pop()
        elif "weight" in per_model[1]:
            settings["weights"] = [1, 2, 1]
        if weight.ndim < 2:
            exact, _ = calibrate(start, tasks, **settings)
            assert torch.equal(weight, exact.float()) and records[name].action == "copied"
            continue
        update, plain, gamma = svc_oracle.svc(start, tasks, **settings)
        # 1e-5: the float32 rounding of W0 + update, 6e-8 of W0 against an update of 2e-2 W0.
        assert error(weight, W0[name], update) < 1e-5 < 1e-2 < error(weight, W0[name], plain), name
        assert records[name].action == "edited" and records[name].gamma_max == pytest.approx(
            gamma.max(), rel=1e-6
        )


def test_experts_that_are_stored_transposed_are_turned(tmp_path):
    """Llama 4 has them as [in, out]; svc, unlike monosoup, gives another answer then."""
    torch.manual_seed(0)
    W0, *tasks = (torch.randn(3, 24, 40) for _ in range(3))
    path = str(tmp_path / "r.jsonl")
    merged = merge_tensors(
        [W0, *tasks],
        "svc",
        base_index=0,
        name="layers.0.feed_forward.experts.down_proj",
        parameters={"report": path},
    )
    plain = merge_tensors([W0, *tasks], "svc", base_index=0, name="layers.0.mlp.experts.down_proj")
    assert {r.shape for r in report.read(path)} == {(24, 40)}  # as stored
    for e in range(3):
        expected, _ = calibrate(W0[e].T, [w[e].T for w in tasks])
        assert torch.allclose(merged[e], expected.T, atol=1e-5)
        assert not torch.allclose(merged[e], plain[e], atol=1e-2)


def test_mixture_of_experts_is_calibrated_expert_by_expert(tmp_path):
    base, tuned = checkpoints.pair(tmp_path, "qwen3_moe", tuned=2)
    merged = merge(base, tuned, tmp_path / "out", parameters={"report": str(tmp_path / "r.jsonl")})
    states = [
        checkpoints.state_dict(model) for model in (base, *tuned)
    ]  # stored as separate 2-D experts
    gate_up = merged["model.layers.0.mlp.experts.gate_up_proj"]
    half = gate_up.shape[1] // 2
    for expert, projection, found in (
        (1, "gate_proj", gate_up[1, :half]),
        (3, "up_proj", gate_up[3, half:]),
    ):
        W0, *tasks = (
            state[f"model.layers.0.mlp.experts.{expert}.{projection}.weight"] for state in states
        )
        assert torch.equal(found, calibrate(W0, tasks)[0])
    names = {r.name for r in report.read(tmp_path / "r.jsonl")}
    assert "model.layers.0.mlp.experts.gate_up_proj[3].up" in names


def test_tensors_that_some_models_lack(tmp_path):
    """mergekit hands over the inputs that have the tensor.

    Nothing is dropped, and nothing calibrated without two tasks.
    """
    path, new = str(tmp_path / "r.jsonl"), torch.full((3, 4), 2.0)
    ask = {"report": path}
    kept = merge_tensors([new, 3 * new], "svc", base_index=0, parameters=ask, name="alone.w")
    assert torch.equal(kept, 3 * new)
    assert torch.equal(
        merge_tensors([new], "svc", base_index=0, parameters=ask, name="base.w"), new
    )
    reasons = {r.name: r.reason for r in report.read(path)}
    assert reasons["alone.w"].startswith("only one task model has it")


@pytest.mark.parametrize("which", ["base", "task", "merged"])
def test_non_finite_names_tensor_model_and_count(tmp_path, which):
    base, tuned = checkpoints.pair(tmp_path, tuned=3)
    folder = {"base": base, "task": tuned[1], "merged": tuned[2]}[which]
    name = "model.layers.1.mlp.up_proj.weight"
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[:3] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"svc: {name} is not finite: 3 of .* entries in {folder}"):
        merge(base, tuned, tmp_path / "out", per_model=[{}, {}, {"merged": True}])


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("alpha", 0, "`alpha` must be a number > 0 and finite, got 0"),
        ("alpha", True, "`alpha` must be a number"),
        ("scaling", -0.1, "`scaling` must be a number >= 0"),
        ("scaling", float("inf"), "`scaling` must be a number >= 0 and finite"),
        ("weight", -1, "`weight` must be a number >= 0"),
        ("normalize", 1, "`normalize` must be true or false, got 1"),
        ("merged", "yes", "`merged` must be true or false, got 'yes'"),
    ],
)
def test_wrong_values_fail_before_anything_is_written(tmp_path, qwen3, parameter, value, words):
    base, tuned = qwen3
    with pytest.raises(ValueError, match="merge method svc: " + words):
        merge(base, tuned, tmp_path / "out", parameters={parameter: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "parameters", "per_model", "words"),
    [
        (1, {}, [], "merge method svc needs two task models.*list at least two models"),
        (
            2,
            {},
            [{"merged": True}],
            "`merged` is true for .*, beside which at least two task models",
        ),
        (3, {"merged": True}, [], "`merged` is true for .*at most one model"),
        (3, {"weight": 0}, [], "`weight` is 0 for every task model"),
        (
            3,
            {"scaling": 0.3, "weight": 2},
            [{"merged": True}],
            "`scaling` would have no effect.*`weight` would have no effect",
        ),
        (3, {"normalize": True}, [{"merged": True}], "`normalize` would have no effect"),
        (3, {}, [{"alpha": 0.5}], "`alpha` holds for the whole merge.*top-level"),
    ],
)
def test_inputs_that_make_no_sense(tmp_path, qwen3, count, parameters, per_model, words):
    base, tuned = qwen3
    with pytest.raises(ValueError, match=words):
        merge(base, tuned[:count], tmp_path / "out", parameters=parameters, per_model=per_model)


def test_missing_base_says_what_to_add():
    with pytest.raises(
        ValueError, match=r"merge method svc needs the pretrained model.*base_model"
    ):
        merge_tensors([torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2)], "svc")


def test_lost_calibration_warns_with_the_right_name(tmp_path, caplog):
    base, tuned = checkpoints.pair(tmp_path, tuned=2, dtype=torch.bfloat16, size=2e-4)
    with caplog.at_level(logging.WARNING, logger="mergekit_monosoup"):
        merge(base, tuned, tmp_path / "out", parameters={"alpha": 1.0})
    lines = [r.getMessage() for r in caplog.records if r.name == "mergekit_monosoup"]
    assert len(lines) == 1 and lines[0].startswith("svc: rounding to bfloat16 keeps only")


# -- around it -------------------------------------------------------------------------------------


def test_table_of_a_report(tmp_path):
    path = str(tmp_path / "r.jsonl")
    W0, a, b = torch.randn(3, 8, 6)
    for layer in range(2):
        merge_tensors(
            [W0, a, b], "svc", base_index=0, name=f"layers.{layer}.w", parameters={"report": path}
        )
    result = CliRunner().invoke(main, ["report", path])
    assert result.exit_code == 0 and all(
        word in result.output for word in ("SVC", "γ median", "γ > 1", "layers.*.w")
    )
    assert "λ_low" not in result.output
    row, total = report.summarise(report.read(path))
    _, _, gamma = svc_oracle.svc(W0, [a, b])
    assert (row.gamma_min, row.gamma_max) == pytest.approx((gamma.min(), gamma.max()), rel=1e-5)
    assert total.amplified == pytest.approx((gamma > 1).mean())


def test_parameters_are_listed_for_every_method():
    choice = main.commands["parameters"].params[0].type.choices
    assert sorted(choice) == sorted(method.spec.name for method in MERGE_METHODS)
    printed = CliRunner().invoke(main, ["parameters", "svc"]).output
    assert printed.strip() == parameter_table("svc")
    assert {p.name for p in get("svc").spec.parameters} == {
        "weight",
        "merged",
        "alpha",
        "scaling",
        "normalize",
        "report",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_amplification_of_orthogonal_tasks_is_no_edit(dtype):
    """Every γ is 1, in a roundabout way.

    What rounding leaves of that has no share that could survive.
    """
    base = torch.zeros(96, 64).to(dtype)
    tasks = [base.clone() for _ in range(3)]
    for number, task in enumerate(tasks):
        rows = slice(32 * number, 32 * number + 32)
        columns = slice(20 * number, 20 * number + 20)
        task[rows, columns] = (0.1 * torch.randn(32, 20)).to(dtype)
    weight, record = calibrate(base, tasks, alpha=1.0)
    assert record.gamma_min == pytest.approx(1, abs=1e-12) and record.gamma_max == pytest.approx(
        1, abs=1e-12
    )
    assert record.realised is None
    assert torch.allclose(weight.float(), sum(task.float() for task in tasks), atol=1e-6)
