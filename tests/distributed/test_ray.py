"""`mergekit-monosoup run` with Ray.

Workers, a node and the driver are killed in the middle, and the model is the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from helpers.merges import SMALL, assert_same, config, mergekit, run, without_time

from mergekit_monosoup.distributed.folder import NAME

ray = pytest.importorskip(
    "ray", reason="the extra `ray` is not installed (Ray has no wheels for the newest Python)"
)
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc"),
]

# In front of what is inherited: a path on which the tests find the package is also the workers'.
GATED = os.pathsep.join(
    filter(None, (str(Path(__file__).with_name("gated")), os.environ.get("PYTHONPATH")))
)
PATIENCE = 120  # seconds; Ray starts a process in 2 to 20, by load
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for family in ("qwen3", "qwen3_moe"):
        checkpoints.pair(folder / family, family, dtype=torch.bfloat16, sharded=True, tuned=2)
    return folder


def wait(what: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def finished(out: Path) -> int:
    return len(list((out / NAME / "done").glob("*.json")))


def waiting(gate: Path) -> dict[str, list[int]]:
    """Tensors at the gate and the processes that have come there with them."""
    pids: dict[str, list[int]] = {}
    for mark in gate.iterdir():
        if mark.name != "open":
            name, pid = mark.name.split("@")
            pids.setdefault(name, []).append(int(pid))
    return pids


def processes(gate: Path) -> set[int]:
    return {pid for pids in waiting(gate).values() for pid in pids}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- on one machine --------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path) -> Path:
    (tmp_path / "gate").mkdir()
    return tmp_path / "gate"


@pytest.fixture
def start(gate) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start the command as a shell does: in a process group, which Ctrl-C reaches as a whole."""
    started = []

    def begin(*arguments: object) -> subprocess.Popen:
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": GATED, "GATE": str(gate)}
        command = [Path(sys.executable).with_name("mergekit-monosoup"), "run", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    (gate / "open").touch()
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_ctrl_c(world, tmp_path, gate, start):
    path, out = config(world, tmp_path, "gated", tuned=2), tmp_path / "out"
    driver = start(path, out, "--ray", "local", "--workers", 2, *SMALL)
    wait(lambda: finished(out) and waiting(gate), driver)
    os.killpg(driver.pid, signal.SIGINT)
    _, output = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130, output
    assert (
        "Interrupted. 1 finished batch(es)" in output
        and "Traceback" not in output
        and "KeyboardInterrupt" not in output
    )
    assert [p.name for p in out.iterdir()] == [NAME]
    wait(lambda: not any(map(alive, processes(gate))))


def test_a_worker_and_then_the_driver_are_killed(world, tmp_path, gate, start):
    path, out = config(world, tmp_path, "gated", tuned=2), tmp_path / "b" / "out"
    driver = start(path, out, "--ray", "local", "--workers", 2, *SMALL)
    wait(lambda: waiting(gate), driver)
    (name, (killed,)), *_ = waiting(gate).items()
    os.kill(killed, signal.SIGKILL)
    wait(
        lambda: len(waiting(gate)[name]) == 2, driver
    )  # another worker has come there with the same tensor
    assert not alive(killed)
    wait(lambda: finished(out), driver)
    driver.kill()
    driver.communicate()
    assert [p.name for p in out.iterdir()] == [NAME]
    wait(lambda: not any(map(alive, processes(gate))))  # Ray's processes go with the driver
    (gate / "open").touch()

    output = run(
        path, out, *SMALL, "--workers", 1, "-j", 1, "--resume"
    )  # the number of workers is free
    assert "resuming: 1 of 3 batches are done" in output
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))


# -- on several nodes ------------------------------------------------------------------------------


@contextmanager
def nodes_environment(gate: Path) -> Iterator[Path]:
    """What nodes started meanwhile hand to their workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            **ONE_THREAD,
            "PYTHONPATH": GATED,
            "GATE": str(gate),
            "RAY_USAGE_STATS_ENABLED": "0",
        }.items():
            patch.setenv(name, value)
        yield gate


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes with a CPU each, and this process as the driver."""
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    with nodes_environment(tmp_path_factory.mktemp("gate")) as gate:
        nodes = Cluster(initialize_head=True, head_node_args=node)
        nodes.add_node(**node)
        ray.init(address=nodes.address, log_to_driver=False)
    nodes.gate = gate
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """References are merged here, with as many threads as a worker has: sums round alike then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_two_nodes_merge_what_mergekit_merges(family, cluster, world, tmp_path):
    path = config(world, tmp_path, family=family, parameters={"report": f"{tmp_path}/r.jsonl"})
    output = run(path, tmp_path / "b" / "out", *SMALL, "--ray", cluster.address)
    assert "by 2 worker(s)" in output
    (tmp_path / "r.jsonl").rename(tmp_path / "ours.jsonl")
    assert_same(tmp_path / "b" / "out", mergekit(path, tmp_path / "a" / "out"))
    ours, theirs = without_time(tmp_path / "ours.jsonl"), without_time(tmp_path / "r.jsonl")
    assert ours == theirs and len(ours) > 10


def test_the_tokenizer_reaches_the_workers(cluster, world, tmp_path):
    path = config(
        world, tmp_path, "linear", tuned=2, parameters={"weight": 0.5}, tokenizer={"source": "base"}
    )
    run(path, tmp_path / "b" / "out", *SMALL, "--ray", cluster.address, "--workers", 2)
    assert_same(tmp_path / "b" / "out", mergekit(path, tmp_path / "a" / "out"))


def test_an_error_of_a_worker_is_one_line(cluster, world, tmp_path):
    path = config(world, tmp_path, "dice")
    output = run(path, tmp_path / "out", *SMALL, "--ray", cluster.address, code=1)
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert "merge method dice draws random numbers" in line
    assert "Traceback" not in output and "ray" not in output.lower().replace("--ray", "")


def test_nobody_at_the_address(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    output = run(config(world, tmp_path), tmp_path / "out", "--ray", "127.0.0.1:1", code=1)
    assert "no Ray cluster at 127.0.0.1:1" in output and "`ray start --head`" in output


def test_a_batch_that_takes_its_worker_with_it(cluster, world, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_monosoup.distributed.engines.RETRIES", 0)
    output = run(
        config(world, tmp_path, "deadly"),
        tmp_path / "out",
        *SMALL,
        "--ray",
        cluster.address,
        code=1,
    )
    assert (
        "Error: batch " in output
        and "was lost with its worker, 1 times in a row" in output
        and "fewer workers" in output
    )
    assert "Traceback" not in output


def test_no_node_has_a_gpu(cluster, world, tmp_path):
    output = run(
        config(world, tmp_path), tmp_path / "out", "--ray", cluster.address, "--gpus", code=1
    )
    assert "no node of the Ray cluster has 1 CPU(s) and a GPU" in output


def workers_of(node, gate: Path) -> set[int]:
    """Processes at the gate that the node's daemon has started."""
    daemons = {process.process.pid for process in node.all_processes["raylet"]}
    return {pid for pid in processes(gate) if alive(pid) and parent(pid) in daemons}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[1])


def test_a_node_dies_in_the_middle(cluster, world, tmp_path):
    path, out = config(world, tmp_path, "gated", tuned=2), tmp_path / "b" / "out"
    with nodes_environment(cluster.gate):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    wait(lambda: ray.cluster_resources().get("CPU") == 3)
    outputs: list[str] = []
    driver = threading.Thread(
        target=lambda: outputs.append(run(path, out, *SMALL, "--ray", cluster.address))
    )
    driver.start()
    wait(lambda: len(waiting(cluster.gate)) == 2)
    mine = ray.get_runtime_context().get_node_id()
    held = {
        node: workers_of(node, cluster.gate)
        for node in cluster.worker_nodes
        if node.node_id != mine
    }
    node = next(node for node in held if held[node])
    cluster.remove_node(node, allow_graceful=False)
    wait(lambda: not any(map(alive, held[node])))
    (cluster.gate / "open").touch()
    driver.join(PATIENCE)
    assert outputs and "worker(s)" in outputs[0]
    assert_same(out, mergekit(path, tmp_path / "a" / "out"))
