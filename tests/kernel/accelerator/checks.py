"""The code for GPUs, on one where there is one and on a pretended one elsewhere.

The numbers of the CPU, no mix of devices, every rung of the ladder, few waits.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import checkpoints, zoo
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import edit, report
from mergekit_monosoup.errors import SolverError
from mergekit_monosoup.kernel import eigen, monosoup, svc
from mergekit_monosoup.kernel.batch import Job, edit_each

REAL = torch.cuda.is_available()
if REAL:
    DEVICE, Accelerator, CLOSE = torch.device("cuda", 0), nullcontext, 1e-5
else:
    from pretend import DEVICE, Accelerator

    CLOSE = 1e-6  # the same kernels, but one eigensolver for another
only_pretended = pytest.mark.skipif(REAL, reason="this is about the pretended device")

WIDE, TALL = (96, 144), (144, 96)
HERE = f"eigh on {DEVICE}"


@pytest.fixture(autouse=True)
def accelerator():
    with Accelerator() as entered:
        yield entered


def pair(kind: str = "low rank + noise", shape=WIDE, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    W0 = torch.tensor(zoo.pretrained(*shape))
    return W0.to(dtype), (W0 + torch.tensor(zoo.deltas(*shape)[kind])).to(dtype)


def apart(a: Tensor, b: Tensor, W0: Tensor) -> float:
    """Relative to the update."""
    assert a.device == DEVICE and b.device.type == "cpu"
    return float((a.cpu() - b).double().norm() / (b - W0).double().norm())


def fails(*given):
    raise SolverError("injected")


# -- the device itself: if it let mistakes pass, nothing below would mean anything -----------------


@only_pretended
def test_mistakes_are_mistakes():
    there, here = torch.ones(3, 3).to(DEVICE), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="one device"):
        there + here
    with pytest.raises(RuntimeError, match="one device"):
        torch.cat([here, there])
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


@only_pretended
def test_waits_are_counted(accelerator):
    x = torch.arange(3.0).to(DEVICE)
    y = x * 2 + torch.ones(3, device=DEVICE)
    assert accelerator.waits == 0
    y.tolist(), float(y.sum()), y.cpu(), y[y > 1], y.nonzero(), torch.ones(3).copy_(y)
    assert accelerator.waits == 6


# -- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("kind", list(zoo.deltas(*WIDE)))
def test_edit(kind, shape):
    W0, W1 = pair(kind, shape)
    found, record = edit(W0.to(DEVICE), W1.to(DEVICE))
    expected, other = edit(W0, W1)
    assert (record.k, record.rank, record.solver) == (other.k, other.rank, "eigh")
    assert apart(found, expected, W0) < CLOSE


@pytest.mark.parametrize(
    "settings", [{"mode": "variance"}, {"alpha": 0.5}, {"coefficients": "low"}, {"weights": [3, 1]}]
)
def test_settings(settings):
    W0, W1 = pair(dtype=torch.bfloat16)
    tuned = [W1, W0] if "weights" in settings else [W1]
    found, _ = edit(W0.to(DEVICE), [w.to(DEVICE) for w in tuned], **settings)
    assert apart(found, edit(W0, tuned, **settings)[0], W0) < 1e-3  # ties of the last rounding


def test_rows_without_an_update():
    """The CPU leaves them out, an accelerator would have to wait to know how many there are."""
    W0, W1 = (torch.cat([w, w]) for w in pair("random", TALL))
    W1[: len(W1) // 2] = W0[: len(W1) // 2]
    found, _ = edit(W0.to(DEVICE), W1.to(DEVICE))
    assert apart(found, edit(W0, W1)[0], W0) < CLOSE


def test_preview():
    W0, W1 = pair()
    found = monosoup.preview(W0.to(DEVICE), W1.to(DEVICE), points=9)
    for ours, theirs in zip(found, monosoup.preview(W0, W1, points=9), strict=True):
        assert (ours.k, ours.spectrum) == (theirs.k, theirs.spectrum)
        assert ours.edit_norm == pytest.approx(theirs.edit_norm, rel=1e-4)


def test_svc():
    W0, W1 = pair()
    tasks = [W1, W0 + (W1 - W0).flip(1), W0 + (W1 - W0).flip(0)]
    found, record = svc.calibrate(W0.to(DEVICE), [w.to(DEVICE) for w in tasks])
    expected, other = svc.calibrate(W0, tasks)
    assert apart(found, expected, W0) < CLOSE and record.solver == "eigh"
    assert record.gamma_max == pytest.approx(other.gamma_max)


def test_nan_is_counted():
    W0, W1 = pair()
    W1[3, :2] = float("nan")
    with pytest.raises(ValueError, match=r"w: non-finite entries: 0 in the pretrained, \[2\]"):
        edit(W0.to(DEVICE), W1.to(DEVICE), name="w")


# -- stacks ----------------------------------------------------------------------------------------


def stack() -> tuple[list[Tensor], list[Tensor]]:
    pairs = [pair(kind) for kind in ("random", "low rank + noise", "spiked")]
    return [W0 for W0, _ in pairs], [W1 for _, W1 in pairs]


def on_device(before: list[Tensor], after: list[Tensor]) -> list[Job]:
    return [
        Job(W0.to(DEVICE), [W1.to(DEVICE)], f"[{e}]")
        for e, (W0, W1) in enumerate(zip(before, after, strict=True))
    ]


def test_matrices_of_one_shape_are_a_batch():
    before, after = stack()
    for W0, W1, (found, record) in zip(
        before, after, edit_each(on_device(before, after)), strict=True
    ):
        assert apart(found, edit(W0, W1)[0], W0) < CLOSE
        assert record.solver == f"batched {HERE}"


# -- the ladder ------------------------------------------------------------------------------------


@pytest.fixture
def unwilling(monkeypatch):
    """The eigensolver of the device refuses, as vendor libraries do."""
    original = torch.linalg.eigh

    def eigh(a, *args, **kwargs):
        if a.device == DEVICE and a.shape[-1] > 1:
            raise RuntimeError("cusolver error: injected")
        return original(a, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


@pytest.mark.parametrize(
    ("broken", "last"),
    [([], "lapack"), ([eigen.Lapack], "eigh"), ([eigen.Lapack, eigen.Eigh], "svd")],
)
@pytest.mark.parametrize("many", [False, True])
def test_rungs_below_the_device(unwilling, monkeypatch, broken, last, many):
    W0, W1 = pair()
    expected, _ = edit(W0, W1)
    for solver in broken:
        monkeypatch.setattr(solver, "__init__", fails)
    found, record = (
        list(edit_each(on_device([W0, W0], [W1, W1])))[1]
        if many
        else edit(W0.to(DEVICE), W1.to(DEVICE))
    )
    assert apart(found, expected, W0) < CLOSE
    assert record.solver.startswith(f"{last}; ") and f"{HERE} failed: " in record.solver


def test_vectors_fail_after_the_values(monkeypatch):
    monkeypatch.setattr(eigen.Eigh, "vectors", fails)
    W0, W1 = pair()
    found, record = edit(W0.to(DEVICE), W1.to(DEVICE))
    assert (
        record.solver == f"lapack; {HERE} failed: injected"
        and apart(found, edit(W0, W1)[0], W0) < CLOSE
    )


@pytest.mark.parametrize("method", [edit, svc.calibrate])
def test_no_memory_means_the_cpu_and_back(monkeypatch, method):
    original = torch.dot

    def dot(a, b):
        if a.device == DEVICE:
            raise torch.OutOfMemoryError("injected")
        return original(a, b)

    monkeypatch.setattr(torch, "dot", dot)
    W0, W1 = pair()
    tuned = W1 if method is edit else [W1, W0 + (W1 - W0).flip(1)]
    there = W1.to(DEVICE) if method is edit else [w.to(DEVICE) for w in tuned]
    found, record = method(W0.to(DEVICE), there)
    assert torch.equal(found.cpu(), method(W0, tuned)[0]) and found.device == DEVICE
    assert record.solver.endswith(f"out of memory on {DEVICE}")


# -- waiting ---------------------------------------------------------------------------------------


@only_pretended
@pytest.mark.parametrize("shape", [WIDE, TALL, (2000, 96)])
def test_the_host_waits_a_fixed_number_of_times(accelerator, shape, monkeypatch):
    """Norms, eigenvalues, their check, the check of the vectors, what rounding left.

    Not once for each block.
    """
    monkeypatch.setattr("mergekit_monosoup.kernel.task_vector.ACCELERATOR_BLOCK_ELEMENTS", 1000)
    W0, W1 = (w.to(DEVICE) for w in pair(shape=shape))
    before = accelerator.waits
    edit(W0, W1)
    assert accelerator.waits - before == 5


@only_pretended
def test_a_batch_waits_for_its_eigenvalues_once(accelerator):
    jobs = on_device(*stack())
    before = accelerator.waits
    list(edit_each(jobs))
    assert accelerator.waits - before == 1 + 4 * len(jobs)


# -- merges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "family", "options"),
    [
        ("monosoup", "qwen3", {}),
        ("monosoup", "qwen3_moe", {"read_to_gpu": True}),
        ("svc", "qwen3", {}),
    ],
)
def test_merges(tmp_path, method, family, options):
    base, tuned = checkpoints.pair(tmp_path, family, tuned=2)
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(path)} for path in tuned],
    }
    merged = []
    for name, more in (("cpu", {}), ("device", {"device": str(DEVICE), **options})):
        config["parameters"] = {"report": str(tmp_path / f"{name}.jsonl")}
        run_merge(
            MergeConfiguration.model_validate(config),
            str(tmp_path / name),
            MergeOptions(quiet=True, **more),
        )
        merged.append(checkpoints.state_dict(tmp_path / name))
    assert merged[0].keys() == merged[1].keys()
    assert all(
        torch.allclose(merged[0][name], merged[1][name], rtol=1e-5, atol=CLOSE)
        for name in merged[0]
    )
    solvers = {
        r.solver for r in report.read(str(tmp_path / "device.jsonl")) if r.action == "edited"
    }
    assert solvers <= {"eigh", f"batched {HERE}", None} and "eigh" in solvers
