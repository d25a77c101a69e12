"""The reader of headers: what it says of good files, and what of damaged ones."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from mergekit.io import ShardedTensorIndex
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_monosoup.checkpoints import headers, pickles
from mergekit_monosoup.checkpoints.headers import (
    ForeignError,
    Headers,
    LackingError,
    Stored,
    read_header,
)

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
        (
            {"state_dict": TENSORS},
            r"m\.bin holds its tensors under \['state_dict'\], where mergekit does not look: save "
            r"them alone, `torch\.save\(torch\.load\('.*m\.bin', map_location='cpu'\)"
            r"\['state_dict'\], '.*m-weights\.pt'\)`",
        ),
        (
            {
                "model": {"module": TENSORS},
                "optimizer": {"state": {0: {"exp_avg": TENSORS["w"], "step": torch.tensor(1.0)}}},
                "best_val_loss": torch.tensor(1.0),
            },
            r"under \['model'\]\['module'\] \(beside 'optimizer', 'best_val_loss'\)",
        ),
        ([1], r"m\.bin holds a list, not a dict"),
        ({0: TENSORS["w"]}, r"m\.bin names its tensors by int \(0\)"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, words):
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(LackingError, match=words):
        read_header(str(tmp_path / "m.bin"))


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, write):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    if write == "pickle":
        (tmp_path / "m.bin").write_bytes(pickle.dumps({"w": Code()}, protocol=2))
    else:
        torch.save({"w": Code()}, tmp_path / "m.bin")
    with pytest.raises(LackingError, match=r"m\.bin holds posix\.mkdir, .* could run code"):
        read_header(str(tmp_path / "m.bin"))
    assert not (tmp_path / "executed").exists()


def test_a_file_cut_off_anywhere_is_found(file):
    whole = Path(file).read_bytes()
    for length in range(len(whole)):
        Path(file).write_bytes(whole[:length])
        header = 8 + struct.unpack("<Q", whole[:8])[0]
        words = (
            "cut off in its header|empty" if length < header else f"{length} of {len(whole)} bytes"
        )
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
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}}, 8),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": None}}, 8),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}, 8),
        ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8),
        ({"w": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8),
        ({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, 8),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}, 8),
        ({"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, 8),
        ({"w": {"dtype": None, "shape": [2], "data_offsets": [0, 8]}}, 8),
        ({"w": {"dtype": "F32", "shape": [2]}}, 8),
        ({"__metadata__": 3, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8),
        ({"\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8),
        ({"w": 3}, 0),
        ([], 0),
    ],
)
def test_damaged_headers_are_found_where_the_library_finds_them(file, entries, data):
    Path(file).write_bytes(_rewritten(entries, data))
    with pytest.raises(SafetensorError):
        safe_open(file, framework="pt")
    with pytest.raises(
        LackingError, match=r"^.*m\.safetensors is .*: .*download it again$"
    ) as found:
        read_header(file)
    str(found.value).encode()  # a lone surrogate could not be printed


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 10**5) + b"[" * 10**5,
        struct.pack("<Q", 10**5 + 5) + b'{"w":' + b"9" * 10**5,
        struct.pack("<Q", 3) + b"\xff\xfe{",
    ],
)
def test_lengths_and_depths_that_lie(file, content):
    Path(file).write_bytes(content)
    with pytest.raises(LackingError, match="is no safetensors file, or cut off in its header"):
        read_header(file)


def test_a_name_that_a_header_has_twice(file):
    """The library takes the last one, so the other would be gone."""
    entry = b'"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + entry + b"," + entry + b"}"
    Path(file).write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(LackingError, match="has 'w' twice in its header"):
        read_header(file)


def _mutants(whole: bytes, number: int, seed: int) -> Iterator[bytes]:
    """Yield copies of a file with some bytes changed, cut off or put in."""
    rng = random.Random(seed)
    for _ in range(number):
        copy = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            copy[rng.randrange(min(len(copy), 600))] = rng.randrange(256)
        at = rng.randrange(len(copy))
        if rng.random() < 0.2:
            del copy[at:]
        elif rng.random() < 0.1:
            copy[at:at] = rng.randbytes(3)
        yield bytes(copy)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_whatever_a_file_holds_the_answer_is_one_line(tmp_path, suffix):
    """And what is accepted opens with the library."""
    path = tmp_path / f"m{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(TENSORS, path)
    refused = 0
    for content in _mutants(path.read_bytes(), 150, seed=7):
        path.write_bytes(content)
        try:
            read_header(str(path))
        except LackingError as error:
            line, refused = str(error), refused + 1
            assert line.isprintable() and path.name in line and len(line) < 500
        else:
            if suffix == ".safetensors":
                safe_open(path, framework="pt")
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404", "is a web page"),
        (b'{"error": "Repository not found"}', "is text .*Repository not found"),
        (b"GGUF\x03\0\0\0" + bytes(99), "is GGUF, .* gguf_file=FILE"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is TensorFlow weights"),
        (bytes(4096), "begins with zeros"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_else_lies_where_weights_should(tmp_path, content, words, suffix):
    (tmp_path / f"m{suffix}").write_bytes(content)
    with pytest.raises(ForeignError, match=words):
        read_header(str(tmp_path / f"m{suffix}"))


def test_an_archive_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "m.bin")
    monkeypatch.setattr(pickles, "_LARGEST_PICKLE", 100)
    with pytest.raises(LackingError, match=r"data\.pkl in it unpacks to \d+ bytes"):
        read_header(str(tmp_path / "m.bin"))


def test_weights_under_the_suffix_of_the_other_format(tmp_path):
    save_file(TENSORS, tmp_path / "m.bin")
    torch.save(TENSORS, tmp_path / "m.safetensors")
    with pytest.raises(ForeignError, match=r"give it the suffix \.safetensors"):
        read_header(str(tmp_path / "m.bin"))
    with pytest.raises(ForeignError, match=r"rename it to \.bin"):
        read_header(str(tmp_path / "m.safetensors"))


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


FOLDERS = {
    (): "is an empty folder",
    ("README.md",): "holds no model",
    ("model.Q4_K_M.gguf", "config.json"): r"has model\.Q4_K_M\.gguf: GGUF, .* convert",
    ("model.onnx",): "an ONNX export",
    ("tf_model.h5",): "from_tf=True",
    ("flax_model.msgpack",): "from_flax=True",
    ("weights.npz",): "NumPy or MLX",
    ("__0_0.distcp",): "dcp_to_torch",
    ("model.safetensors.part",): "a download that was not finished",
    ("model-00001-of-00002.safetensors",): r"but not model\.safetensors\.index\.json",
    ("adapter_config.json", "adapter_model.safetensors"): r"is an adapter, .* BASE\+",
    ("consolidated.00.pth",): "merge .*consolidated.00.pth with mergekit-pytorch",
    ("checkpoint-500/model.safetensors",): "name .*checkpoint-500",
    ("tokenizer.json", "tokenizer_config.json"): "a tokenizer and no weights",
}


@pytest.mark.parametrize("names", FOLDERS)
def test_what_a_folder_without_a_model_holds_instead(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(ForeignError, match=FOLDERS[names]):
        Headers().of_model(str(tmp_path))


def test_folders_and_broken_links_in_place_of_files(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ForeignError, match="is a folder, where a file belongs"):
        Headers().of_model(str(tmp_path))
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to("../blobs/4d2f")
    with pytest.raises(ForeignError, match=r"as a link to \.\./blobs/4d2f, which is not there"):
        Headers().of_model(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"metadata": {}}', "has no `weight_map`"),
        ('{"weight_map": ["a.safetensors"]}', "has no `weight_map`"),
        ('{"weight_map": {}}', "has no `weight_map`"),
        ("[]", "has no `weight_map`"),
        ('{"weight_map": ', "is no JSON"),
        ("<html>", "is a web page"),
        ("[" * 10**5, "index.json"),
        ('{"weight_map": {"w": null}}', "gives 'w' no file"),
        ('{"weight_map": {"w": "../good.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"w": "/tmp/good.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"w": "C:\\\\good.safetensors"}}', "outside of its folder"),
        (
            '{"weight_map": {"w": "gone.safetensors"}}',
            r"not there \('gone.safetensors'\): download",
        ),
    ],
)
def test_damaged_indices(tmp_path, index, words):
    save_file(TENSORS, tmp_path / "good.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(LackingError, match=words) as found:
        Headers().of_model(str(tmp_path / "model"))
    assert "index.json" in str(found.value) and str(found.value).isprintable()


def test_an_index_that_is_left_over(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LackingError, match="remove the index"):
        Headers().of_model(str(tmp_path))


def test_of_a_hub_repository_only_headers_are_fetched(served, tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "v1").mkdir()
    save_file({"w": torch.zeros(3, 5, dtype=torch.bfloat16)}, tmp_path / "v1" / "model.safetensors")
    served.add("org/model", tmp_path / "main", v1=tmp_path / "v1")
    headers = Headers()
    for _ in range(2):
        assert headers.of_model("org/model", "v1") == {
            "w": Stored("org/model/model.safetensors", "w", (3, 5), 30, "BF16")
        }
    assert sum(path.endswith("/model.safetensors") for path in served.requests) == 2, "and once"
