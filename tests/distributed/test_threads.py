"""`mergekit-monosoup run` on several threads: the bits of one, whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import checkpoints
from helpers.merges import ALONE, SMALL, assert_same, config, mergekit, run, without_time

from mergekit_monosoup import memory
from mergekit_monosoup.distributed import engines, threads, worker
from mergekit_monosoup.distributed.folder import NAME
from mergekit_monosoup.distributed.plan import PROCESS, Batch
from mergekit_monosoup.kernel.threads import in_order

MANY = ("--workers", "4", *SMALL)
PATIENCE = 120  # seconds


CASES = {
    "monosoup": dict(),
    "experts": dict(family="qwen3_moe"),
    "svc": dict(method="svc", tuned=2),
    "ties": dict(method="ties", tuned=2, parameters={"weight": 0.5, "density": 0.5}),
    "tokenizer": dict(tokenizer={"source": "base"}),
}


@pytest.mark.parametrize("case", CASES)
def test_threads_add_up_to_the_merge(case, world, tmp_path):
    path = config(world, tmp_path, **CASES[case])
    reference = mergekit(path, tmp_path / "a" / "out")
    output = run(path, tmp_path / "b" / "out", *MANY)
    assert_same(tmp_path / "b" / "out", reference)
    assert "in 1 file" not in output and "by 1 worker" not in output


@pytest.mark.parametrize("lazy", [True, False])
def test_pickles_are_read_by_all_threads(lazy, world, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(world / "qwen3" / "tuned0" / "config.json", pickled)
    torch.save(checkpoints.state_dict(world / "qwen3" / "tuned0"), pickled / "pytorch_model.bin")
    path = config(world, tmp_path, models=[{"model": str(pickled)}])
    options = ["--lazy-unpickle"] if lazy else []
    reference = mergekit(path, tmp_path / "a" / "out", *options)
    run(path, tmp_path / "b" / "out", *MANY, *options)
    assert_same(tmp_path / "b" / "out", reference)


def test_the_same_bits_again_and_again(world, tmp_path):
    """Many small tensors, more threads than cores, a tensor to a batch."""
    path = config(world, tmp_path, family="qwen3_moe", parameters={"report": f"{tmp_path}/r.jsonl"})
    reference = mergekit(path, tmp_path / "a" / "out")
    records = without_time(tmp_path / "r.jsonl")
    for number in range(4):
        out = tmp_path / f"b{number}" / "out"
        run(path, out, "--workers", "8", "--out-shard-size", "1", "--quiet")
        assert_same(out, reference)
        assert without_time(tmp_path / "r.jsonl") == records


def test_threads_of_the_caller_are_as_before(world, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run(config(world, tmp_path), tmp_path / "out", *MANY)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_method_that_ends_its_thread_is_one_line(world, tmp_path):
    output = run(config(world, tmp_path, "leaving"), tmp_path / "out", *MANY, code=1)
    assert "SystemExit: gone" in output and "Traceback" not in output


def test_what_threads_cannot_do_is_refused_or_left_to_one(world, tmp_path):
    path = config(world, tmp_path, "dice")
    refusal = run(path, tmp_path / "out", *MANY, code=1)
    assert "dice draws random numbers" in refusal and "--workers 1" in refusal
    assert "leave out --workers" in run(path, tmp_path / "out", *MANY, "--seed-per-tensor", code=1)
    assert "by 1 worker" in run(path, tmp_path / "out", "--seed-per-tensor", "--force")
    assert "leave out -j 2" in run(path, tmp_path / "out2", *MANY, "-j", "2", code=1)


@pytest.mark.parametrize(("method", "workers"), [("monosoup", 1), ("linear", 3)])
def test_a_blas_that_takes_no_orders_gets_one_call_at_a_time(
    method, workers, world, tmp_path, monkeypatch, caplog
):
    """Each call of several threads would round otherwise; methods without LAPACK do not care."""
    started = []
    pool = threads._Pool
    monkeypatch.setattr(threads, "restored_threads", lambda: contextlib.nullcontext(False))
    monkeypatch.setattr(threads, "_Pool", lambda *a: started.append(a[2]) or pool(*a))
    more = {"parameters": {"weight": 1.0}} if method == "linear" else {}
    run(config(world, tmp_path, method, **more), tmp_path / "out", *MANY)
    assert started == [workers] and ("takes no orders" in caplog.text) == (workers == 1)


def test_one_worker_goes_on_with_what_several_began(world, tmp_path, monkeypatch):
    """And several with what one began, with as many threads for each tensor as before."""
    path, before = config(world, tmp_path), torch.get_num_threads()
    reference = mergekit(path, tmp_path / "a" / "out")
    try:
        for threads_each, begins, goes_on in ((1, MANY, ALONE), (2, (*ALONE, *SMALL), MANY[:0])):
            out = tmp_path / f"b{threads_each}" / "out"
            torch.set_num_threads(threads_each)
            with monkeypatch.context() as patch:
                execute = twice(worker.execute)
                for module in (threads, engines):
                    patch.setattr(module, "execute", execute)
                run(path, out, *begins, code=1)
            torch.set_num_threads(2)
            assert "resuming: 2 of" in run(path, out, *goes_on, *SMALL, "--resume")
            if threads_each == 1:
                assert_same(out, reference)
    finally:
        torch.set_num_threads(before)


def twice(execute: Callable[..., object]) -> Callable[..., object]:
    """Let two batches be merged, and then the merge fail."""
    count, done = itertools.count(), threading.Semaphore(0)

    def limited(*given: object) -> object:
        if next(count) < 2:
            result = execute(*given)
            done.release()
            return result
        for _ in range(2):
            assert done.acquire(timeout=PATIENCE)
        return worker.Failed("stopped", "here", "")

    return limited


def test_a_full_disk_keeps_what_is_done(world, tmp_path, monkeypatch):
    """The message names the file, nothing is published, and --resume does the rest."""
    path, out = config(world, tmp_path), tmp_path / "b" / "out"
    count, save_file = itertools.count(), safetensors.torch.save_file

    def full(tensors, filename, **options):
        if next(count) >= 2:
            raise OSError(28, "No space left on device", str(filename))
        save_file(tensors, filename, **options)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        output = run(path, out, *MANY, code=1)
    assert "No space left on device: '" in output and str(out) in output
    assert "are kept in" in output and "--resume" in output
    assert [p.name for p in out.iterdir()] == [NAME] and "Traceback" not in output
    run(path, out, *MANY, "--resume")
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


# -- interrupted -----------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Start the command in a process of its own; `gated` waits in two of its tensors."""
    gate = tmp_path / "gate"
    gate.mkdir()
    python_path = [str(Path(__file__).with_name("gated")), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, python_path)), "GATE": str(gate)}
    started = []

    def begin(*arguments: object) -> subprocess.Popen:
        command = [Path(sys.executable).with_name("mergekit-monosoup"), "run", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait(what: Callable[[], object], process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def at_the_gate(out: Path, gate: Path) -> bool:
    return len(list(gate.iterdir())) == 2 and bool(list((out / NAME / "done").glob("*.json")))


@pytest.mark.slow
def test_ctrl_c_then_kill_9_then_the_rest(world, tmp_path, start):
    path, out, gate = (
        config(world, tmp_path, "gated", tuned=2),
        tmp_path / "b" / "out",
        tmp_path / "gate",
    )
    options = ("--workers", 2, "--out-shard-size", "8K")
    process = start(path, out, *options)
    wait(lambda: at_the_gate(out, gate), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "it waits for the tensors at work"
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "waiting for the tensors at work" in output and "Traceback" not in output
    assert "are kept in" in output and [p.name for p in out.iterdir()] == [NAME]

    for mark in gate.iterdir():
        mark.unlink()
    process = start(path, out, *options, "--resume")
    wait(lambda: at_the_gate(out, gate), process)
    process.kill()
    process.communicate()
    output = run(path, out, *options, "--resume")
    assert "resuming: " in output
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


# -- memory ----------------------------------------------------------------------------------------


def batch(number: int, need: int) -> Batch:
    return Batch(number=number, tensors=(), read=0, written=0, memory=PROCESS + need)


def test_no_more_batches_in_hand_than_memory_holds(monkeypatch):
    lock, running, most = threading.Lock(), dict[int, int](), list[int]()

    def execute(context, of_batch, stopping):
        with lock:
            running[of_batch.number] = of_batch.memory - PROCESS
            most.append(sum(running.values()))
        time.sleep(0.01)
        with lock:
            del running[of_batch.number]
        return of_batch.number

    monkeypatch.setattr(threads, "execute", execute)
    monkeypatch.setattr(threads._Pool, "_open_models", lambda self: None)
    # The first is larger than all memory: it runs alone. Two of 60 never run together.
    batches = [batch(n, need) for n, need in enumerate((150, 60, 60, 30, 30, 10, 10, 10))]
    pool = threads._Pool(None, {}, 4)
    try:
        done = list(pool.run(batches, 100))
    finally:
        pool.stop()
    assert sorted(done) == list(range(8))
    assert max(most) == 150 and sorted(most)[-2] <= 100


def test_threads_share_a_budget():
    """Never more than there is but for one alone; all get their turn, with results in order."""
    lock, taken, most = threading.Lock(), list[float](), list[tuple[int, float]]()
    budget = memory.Budget(100)
    sizes = [30, 150, 60, 60, 1, 100, 0, 40, 150, 10] * 3

    def use(size: float) -> float:
        with budget.taken(size):
            with lock:
                taken.append(size)
                most.append((sum(map(bool, taken)), sum(taken)))
            time.sleep(0.002)
            with lock:
                taken.remove(size)
        return size

    assert list(in_order(use, sizes, 4)) == sizes
    assert all(total <= 100 or count == 1 for count, total in most)
    assert max(total for _, total in most) == 150 and max(count for count, _ in most) > 1
    with pytest.raises(KeyError), budget.taken(100):
        raise KeyError
    with budget.taken(100):  # given back
        pass


def test_control_groups_limit_memory(tmp_path, monkeypatch):
    group = tmp_path / "groups" / "batch" / "job"
    group.mkdir(parents=True)
    files = {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 1\ninactive_file 50",
    }
    for name, text in files.items():
        (group / name).write_text(text)
    (group.parent / "memory.max").write_text("max")
    (tmp_path / "own").write_text("0::/batch/job\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OF_PROCESS", tmp_path / "own")
    assert memory.available_memory() == pytest.approx(350 * (1 - memory.RESERVE))
