"""`mergekit-monosoup run` on several threads: the bits of one, whatever happens."""

from __future__ import annotations

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
import torch
from helpers import checkpoints
from helpers.merges import SMALL, assert_same, config, mergekit, run, without_time

from mergekit_monosoup import memory
from mergekit_monosoup.distributed import threads
from mergekit_monosoup.distributed.folder import NAME
from mergekit_monosoup.distributed.plan import PROCESS, Batch

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
    assert "finished batch(es) kept" in output and [p.name for p in out.iterdir()] == [NAME]

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
