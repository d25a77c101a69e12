"""Files of torch read by several threads."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.lazy_tensor_loader import ShardInfo

from mergekit_monosoup.checkpoints.loaders import own_loader
from mergekit_monosoup.checkpoints.reader import _Pickled

FILES, THREADS, ROUNDS = 4, 4, 12


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardedTensorIndex:
    """Four files of torch with a tensor each, the number of the file."""
    folder = tmp_path_factory.mktemp("pickles")
    paths = {str(n): f"pytorch_model-{n}.bin" for n in range(FILES)}
    for name, file in paths.items():
        torch.save({name: torch.full((3, 4), float(name))}, folder / file)
    shards = [ShardInfo(file, [name]) for name, file in paths.items()]
    return ShardedTensorIndex(str(folder), False, paths, shards)


@pytest.mark.parametrize("kind", ["lazy", "mapped", "shared"])
def test_each_thread_gets_the_tensor_it_asks_for(kind, index):
    before = pickle.load, pickle.Unpickler, torch._utils._rebuild_tensor
    shared = LazyTensorLoader(index, lazy_unpickle=kind == "lazy")
    reader = _Pickled(index)  # of `inspect` and `soup`

    def read(thread: int) -> list[float]:
        loader = reader if kind == "shared" else own_loader(shared)
        names = [str((thread + n) % FILES) for n in range(ROUNDS)]
        return [(loader.get_tensor(name) - int(name)).abs().max().item() for name in names]

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(read, range(THREADS))) == [[0.0] * ROUNDS] * THREADS
    assert (pickle.load, pickle.Unpickler, torch._utils._rebuild_tensor) == before
