"""Many matrices at once: threads give the bits of a loop, batches its numbers.

Faults stay with the matrix that has them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import zoo
from mergekit.merge_methods import merge_tensors

from mergekit_monosoup import methods
from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.kernel import batch, lapack, task_vector
from mergekit_monosoup.kernel.batch import Job, call_each, edit_batched, edit_each
from mergekit_monosoup.kernel.monosoup import edit
from mergekit_monosoup.kernel.spectrum import nonzero_rows

ROOT = Path(__file__).parents[2]
EXPERTS = 6
KINDS = ["random", "low rank", "low rank + noise", "spiked", "power law 1", "rank one"]
NAME = "model.layers.0.mlp.experts.down_proj"


def experts(shape=(96, 160), dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack of updates that have nothing but their shape in common."""
    W0 = np.stack([zoo.pretrained(*shape, seed=e) for e in range(EXPERTS)])
    delta = np.stack([zoo.deltas(*shape, seed=e)[kind] for e, kind in enumerate(KINDS)])
    return torch.tensor(W0).to(dtype), torch.tensor(W0 + delta).to(dtype)


def jobs(W0, W1) -> list[Job]:
    return [Job(W0[e], [W1[e]], f"w[{e}]") for e in range(len(W0))]


def loop(W0, W1, **settings):
    return [edit(job.pretrained, job.tuned, name=job.name, **settings) for job in jobs(W0, W1)]


def numbers(record):
    return {**record.__dict__, "seconds": 0, "solver": None}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


# -- a matrix per thread ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (300, 300)])
def test_threads_give_the_bits_of_a_loop(threads, shape, dtype):
    W0, W1 = experts(shape, dtype)
    found = list(edit_each(jobs(W0, W1)))
    torch.set_num_threads(1)
    with lapack.one_thread_each() as told:
        assert told
        expected = loop(W0, W1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, expected, strict=True))
    assert [numbers(r) for _, r in found] == [numbers(r) for _, r in expected]
    assert any(not torch.equal(a, w) for (a, _), w in zip(found, W1, strict=True)), (
        "nothing was edited"
    )


def test_work_is_spread_and_settings_are_restored(threads):
    together = threading.Barrier(3, timeout=30)

    def work():
        together.wait()  # passes only if three run at a time
        return threading.get_ident(), torch.get_num_threads()

    W0, W1 = experts()
    found = list(call_each([work] * 3, jobs(W0, W1)[:3]))
    assert {count for _, count in found} == {1}
    assert threading.get_ident() not in {thread for thread, _ in found}
    seen = []
    new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert torch.get_num_threads() == 4 and seen == [4]


def test_memory_bounds_the_number_of_threads(threads, monkeypatch):
    W0, W1 = experts()
    monkeypatch.setattr(batch, "MEMORY", 3 * batch.buffers(jobs(W0, W1)[0]) // 2)
    threads_used = set(call_each([threading.get_ident] * EXPERTS, jobs(W0, W1)))
    assert threads_used == {threading.get_ident()}


def test_blas_without_a_switch_means_a_loop(threads, monkeypatch):
    W0, W1 = experts()
    with lapack.one_thread_each():  # somebody else has it
        inside = set(call_each([threading.get_ident] * EXPERTS, jobs(W0, W1)))
    assert inside == {threading.get_ident()}


def test_the_interpreter_is_free_while_lapack_works():
    """SciPy's own wrappers held its lock for the whole call.

    Then threads could only wait for each other.
    """
    order = 700
    a = np.asfortranarray(np.random.default_rng(0).standard_normal((order, order)))
    steps = 0
    done = threading.Event()

    def work():
        for _ in range(3):
            d, e, tau, room = (
                np.empty(order),
                np.empty(order),
                np.empty(order),
                np.empty(32 * order),
            )
            assert (
                lapack.solve(
                    "dsytrd", b"L", order, a.copy(order="F"), order, d, e, tau, room, len(room)
                )
                == 0
            )
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(1e-3):
        steps += 1
    thread.join()
    assert steps > 3  # 3 would be one between each two calls


# -- batches (on accelerators; the same code runs on CPU tensors) ----------------------------------


@pytest.mark.parametrize("mode", ["freevariance", "variance"])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_batches_give_the_numbers_of_a_loop(shape, mode):
    """Float64, so that rounding hides nothing.

    The cut of a low-rank update is found in the open subspace: 1e-9 there.
    """
    W0, W1 = experts(shape)
    found, expected = list(edit_batched(jobs(W0, W1), mode=mode)), loop(W0, W1, mode=mode)
    for kind, (a, ours), (b, theirs) in zip(KINDS, found, expected, strict=True):
        assert (ours.k, ours.rank, ours.name) == (theirs.k, theirs.rank, theirs.name)
        assert float((a - b).norm() / b.norm()) < (1e-12 if kind != "low rank" else 1e-9), kind
        assert ours.solver == "batched eigh on cpu"
        assert ours.effective_rank == pytest.approx(theirs.effective_rank, rel=1e-9)


def test_small_batches_are_as_good(monkeypatch):
    W0, W1 = experts(dtype=torch.float32)
    whole = list(edit_batched(jobs(W0, W1)))
    monkeypatch.setattr(batch, "MEMORY", 5 * batch.buffers(jobs(W0, W1)[0]) // 2)  # batches of two
    monkeypatch.setattr(task_vector, "BLOCK_ELEMENTS", 7 * 96)  # of 7 rows at a time
    for (a, _), (b, _) in zip(whole, edit_batched(jobs(W0, W1)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_averages_and_skipped_matrices_in_a_batch():
    W0, W1 = experts()
    W1[2] = W0[2]
    many = [Job(job.pretrained, [*job.tuned, job.pretrained], job.name) for job in jobs(W0, W1)]
    found = list(edit_batched(many, weights=[3, 1]))
    expected = [edit(job.pretrained, job.tuned, weights=[3, 1]) for job in many]
    assert found[2][1].reason.startswith("no update")
    assert all(
        torch.allclose(a, b, atol=1e-12) for (a, _), (b, _) in zip(found, expected, strict=True)
    )


def test_a_batch_that_fails_is_solved_matrix_by_matrix(monkeypatch):
    W0, W1 = experts(dtype=torch.float32)
    original = torch.linalg.eigh

    def eigh(a, *args, **kwargs):
        if a.ndim == 3:
            raise torch.linalg.LinAlgError("injected")
        return original(a, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for (a, record), (b, _) in zip(edit_batched(jobs(W0, W1)), loop(W0, W1), strict=True):
        assert record.solver == "lapack; batched eigh on cpu failed: injected"
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_one_wrong_result_in_a_batch_is_noticed(monkeypatch):
    W0, W1 = experts(dtype=torch.float32)
    original = torch.linalg.eigh

    def eigh(a, *args, **kwargs):
        values, vectors = original(a, *args, **kwargs)
        values[0] *= 1 + 1e-6
        vectors[4] = vectors[4].roll(1, 0)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    solvers = [record.solver for _, record in edit_batched(jobs(W0, W1))]
    assert "miss the trace" in solvers[0] and "leave a residual" in solvers[4]
    assert solvers[1:4] + solvers[5:] == ["batched eigh on cpu"] * 4


def test_no_memory_for_a_batch(monkeypatch, caplog):
    def gram(updates):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(batch, "stacked_gram", gram)
    W0, W1 = experts()
    found = list(edit_batched(jobs(W0, W1)))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, loop(W0, W1), strict=True))
    assert "one matrix at a time" in caplog.text


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [edit_each, edit_batched])
def test_nan_names_the_expert(threads, how):
    W0, W1 = experts()
    W1[3, 5, 7] = W1[5, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"w\[3\]: non-finite entries: 0 in the pretrained, \[1\]"
    ) as caught:
        list(how(jobs(W0, W1)))
    assert caught.value.name == "w[3]"


def test_nan_in_a_merge_names_the_expert(threads):
    W0, W1 = experts()
    W1[3, 5, 7] = float("nan")
    with pytest.raises(
        ValueError,
        match=r"experts.down_proj is not finite: 1 of .*the first of them in .*down_proj\[3\]",
    ):
        merge_tensors([W0, W1], "monosoup", base_index=0, name=NAME)


@pytest.mark.parametrize("method", ["monosoup", "svc"])
def test_a_merge_of_a_stack_on_threads(threads, method, monkeypatch):
    W0, W1 = experts(dtype=torch.bfloat16)
    weights = [W0, W1, (W0.float() + 0.5 * (W1.float() - W0.float()).flip(1)).bfloat16()]
    merged = merge_tensors(weights, method, base_index=0, name=NAME)
    torch.set_num_threads(1)
    with lapack.one_thread_each():
        alone = merge_tensors(weights, method, base_index=0, name=NAME)
    assert torch.equal(merged, alone) and not torch.equal(merged, W1)
    assert methods.matrices(NAME, W0.shape)[3][0] == "[3]"


# -- rows of zeros ---------------------------------------------------------------------------------


def test_rows_without_an_update_are_dropped_exactly():
    """Tokens that fine-tuning never saw.

    The Gram matrix has the same terms; BLAS may add them in another order.
    """
    torch.manual_seed(0)
    W0 = (0.02 * torch.randn(5000, 64)).bfloat16()
    seen = torch.rand(5000) < 0.2
    seen[:1000] = False  # a whole run of them
    W1 = torch.where(seen[:, None], (W0.float() + 1e-2 * torch.randn(5000, 64)).bfloat16(), W0)
    weight, record = edit(W0, W1, mode="variance")
    small, other = edit(W0[seen], W1[seen], mode="variance")
    assert record.k == other.k and record.rank == other.rank
    assert record.effective_rank == pytest.approx(other.effective_rank, rel=1e-12)
    assert torch.equal(weight[~seen], W0[~seen]) and not torch.equal(weight, W1)
    assert float((weight[seen] != small).double().mean()) < 1e-4  # ties of the last rounding


def test_zero_rows_are_looked_for_where_they_pay():
    block = torch.randn(100, 8)
    assert nonzero_rows(block) is None
    block[::2, 0] = 0
    assert nonzero_rows(block) is None, "a zero entry is not a zero row"
    block[::2] = 0
    assert nonzero_rows(block).tolist() == list(range(1, 100, 2))
    assert nonzero_rows(block.T.contiguous().T) is None, "columns of a wide matrix"
    assert len(nonzero_rows(torch.zeros(4, 3))) == 0


# -- the benchmarks --------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpu_benchmark_runs_without_one():
    command = [
        sys.executable,
        ROOT / "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--tiny",
        "--experts",
        "2",
        "--repeat",
        "1",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True, cwd=ROOT
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["models"]) == {
        "Qwen3-0.6B",
        "Qwen3-8B",
        "Qwen3-14B",
        "Qwen3-32B",
        "Qwen3-30B-A3B",
    }
    assert all(
        model["ours"]["model"] > model["ours"]["layer"] > 0 for model in result["models"].values()
    )
    assert {row["matrices"] for row in result["rows"]} == {1, 2}


@pytest.mark.slow
def test_stack_benchmark_runs():
    command = [
        sys.executable,
        ROOT / "benchmarks/stack.py",
        "--experts",
        "3",
        "--shape",
        "64x48",
        "--repeat",
        "1",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(done.stdout.splitlines()[-1])["same_bits"] is True


@pytest.mark.slow
def test_experiments_reach_the_oracle_too():
    """Slower ways are worth keeping only while they are right.

    The certificate must not promise less than the error.
    """
    command = [
        sys.executable,
        ROOT / "benchmarks/experiments.py",
        "--shapes",
        "192x320",
        "--repeat",
        "1",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True, cwd=ROOT
    )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["way"] for row in rows] == ["package", "float32", "sign", "entropy"] * 2
    assert all(abs(row["rank_error"]) < 1e-3 for row in rows)
    assert all(row["error"] < 1e-5 for row in rows if row["way"] != "entropy")
    assert all(row["error"] < row["predicted"] < 1e-5 for row in rows if row["way"] == "float32")
