"""The reader of headers: what it says of good files, and what of damaged ones."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import checkpoints
from mergekit.io import ShardedTensorIndex
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_monosoup.checkpoints import headers
from mergekit_monosoup.checkpoints.headers import Headers, LackingError, Stored, read_header

TENSORS = {
    "w": torch.zeros(3, 5, dtype=torch.bfloat16),
    "codes": torch.zeros(4, 4).to(torch.float8_e4m3fn),
    "mask": torch.zeros(7, dtype=torch.bool),
    "scale": torch.tensor(1.0),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path) -> str:
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "m.safetensors")


def test_safetensors(file):
    stored = read_header(file)
    assert stored.keys() == TENSORS.keys()
    assert stored["w"] == Stored(file, "w", (3, 5), 30, "BF16")
    assert [stored[name].dtype for name in ("codes", "mask")] == ["F8_E4M3", "BOOL"]
    assert [stored[name].bits for name in TENSORS] == [16, 8, 8, 32, 32]
    for name, tensor in TENSORS.items():
        assert (stored[name].shape, stored[name].size) == (tuple(tensor.shape), tensor.nbytes)
    assert stored["w"].itemsize == 2 and stored["scale"].itemsize == 4


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickles(tmp_path, suffix, zipped):
    """Also of the format before torch 1.6, and beside things that are no tensors."""
    path = str(tmp_path / f"m{suffix}")
    # torch cannot read codes of 8 bits in the old format.
    tensors = {name: t for name, t in TENSORS.items() if zipped or name != "codes"}
    torch.save({**tensors, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    stored = read_header(path)
    assert stored.keys() == tensors.keys()
    assert stored["w"] == Stored(path, "w", (3, 5), 30, "torch.bfloat16")
    assert [8 * tensors[n].itemsize for n in tensors] == [stored[n].bits for n in tensors]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": TENSORS}, r"m\.bin is wrapped in .* save the inner dictionary"),
        ([1], r"m\.bin holds a list, not a dict"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, words):
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=words):
        read_header(str(tmp_path / "m.bin"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"w": print}))
    with pytest.raises(pickle.UnpicklingError):
        read_header(str(tmp_path / "m.bin"))


def test_a_file_cut_off_anywhere_is_found(file):
    whole = Path(file).read_bytes()
    for length in range(len(whole)):
        Path(file).write_bytes(whole[:length])
        header = 8 + struct.unpack("<Q", whole[:8])[0]
        words = "cut off in its header" if length < header else f"{length} of {len(whole)} bytes"
        with pytest.raises(LackingError, match=words):
            read_header(file)


def _rewritten(entries: dict, data: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9),  # more than it says
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12),  # a gap before it
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8),  # not of that shape
        (
            {
                "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            12,
        ),  # one within the other
        ({"w": {"dtype": "F32", "shape": [2]}}, 8),
        ({"w": 3}, 0),
        ([], 0),
    ],
)
def test_damaged_headers_are_found_where_the_library_finds_them(file, entries, data):
    Path(file).write_bytes(_rewritten(entries, data))
    with pytest.raises(SafetensorError):
        safe_open(file, framework="pt")
    with pytest.raises(LackingError, match="download it again"):
        read_header(file)


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [True, False])
def test_models_in_folders(tmp_path, sharded):
    base, _ = checkpoints.pair(tmp_path, sharded=sharded)
    stored = Headers().of_model(str(base))
    state = checkpoints.state_dict(base)
    assert {n: s.shape for n, s in stored.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert (len({s.file for s in stored.values()}) > 1) == sharded


@pytest.mark.parametrize("kind", ["single", "sharded", "file", "bin"])
def test_the_index_is_the_one_that_mergekit_makes(tmp_path, kind):
    base, _ = checkpoints.pair(tmp_path, sharded=kind == "sharded")
    path = str(base / "model.safetensors") if kind == "file" else str(base)
    if kind == "bin":
        torch.save(checkpoints.state_dict(base), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    make = ShardedTensorIndex.from_file if kind == "file" else ShardedTensorIndex.from_disk
    ours, theirs = Headers().index(path), make(path)
    assert ours.tensor_paths == theirs.tensor_paths
    assert (ours.base_path, ours.is_safetensors) == (theirs.base_path, theirs.is_safetensors)
    assert [(s.filename, sorted(s.contained_keys)) for s in ours.shards] == [
        (s.filename, sorted(s.contained_keys)) for s in theirs.shards
    ]


def test_a_file_is_read_once(file, monkeypatch):
    cache = Headers()
    first = cache.of_model(file)
    monkeypatch.setattr(headers, "read_header", None)
    assert cache.of_model(file) == first and cache.of_file(file) == first
    assert list(cache.index(file).tensor_paths) == list(first)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(RuntimeError, match="Unable to find model files"):
        Headers().of_model(str(tmp_path))


def test_of_a_hub_repository_only_headers_are_fetched(monkeypatch):
    import huggingface_hub

    def metadata(repository, *, revision):
        tensor = SimpleNamespace(shape=[3, 5], dtype="BF16", data_offsets=(10, 40))
        file = SimpleNamespace(tensors={"w": tensor})
        return SimpleNamespace(files_metadata={f"{revision}.safetensors": file})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    assert Headers().of_model("org/model", "v1") == {
        "w": Stored("org/model/v1.safetensors", "w", (3, 5), 30, "BF16")
    }
