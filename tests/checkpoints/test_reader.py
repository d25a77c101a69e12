"""Tensors of several models, read by several threads at a time."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from mergekit_monosoup.checkpoints import reader


def test_threads_open_shards_of_pickles_one_after_another(tmp_path, monkeypatch):
    """Else one takes its tensor from the file that another has just opened: KeyError."""
    files = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    for number, (name, file) in enumerate(files.items()):
        torch.save({name: torch.full((2, 2), float(number))}, tmp_path / file)
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoints = reader.Checkpoints([str(tmp_path)])
    opening, together = [], []

    def slowly(file, *arguments, **named):
        opening.append(file)
        time.sleep(0.05)
        together.append(len(opening))
        opening.remove(file)
        return named_tensors(file, *arguments, **named)

    named_tensors = reader.named_tensors
    monkeypatch.setattr(reader, "named_tensors", slowly)
    with ThreadPoolExecutor(2) as pool:
        tensors = list(pool.map(checkpoints.load, files))
    assert [tensor[0, 0].item() for (tensor,) in tensors] == [0.0, 1.0]
    assert together == [1, 1]
