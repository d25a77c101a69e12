"""Make a pretrained model comparable with its fine-tune: `python -m evaluation.pair BODY HEAD`.

A pretrained image classifier often has other classes than its fine-tune: ConvNeXt of the paper's
appendix H was pretrained on 11821 of them. Written are two folders: `pretrained`, the tensors of
BODY with the head of HEAD, and `finetuned`, those of HEAD. The head's update is then zero.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation import options, sources
from evaluation.file_merges import CONFIGURATIONS, OUTPUT
from evaluation.sources import FINETUNED, PRETRAINED, SourceError
from mergekit_monosoup import terminal


@terminal.output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.pair", description=__doc__)
    models = "a folder, a file of weights or a hub name (timm/convnext_small.in12k, say)"
    parser.add_argument("body", metavar="BODY", help=f"the pretrained model: {models}")
    parser.add_argument("head", metavar="HEAD", help="its fine-tune: the same")
    parser.add_argument(
        "--out", type=Path, default=Path("pair"), help="folder (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    return options.exit_code(lambda: _run(given.body, given.head, given.out), interruption="")


def _run(body: str, head: str, out: Path) -> None:
    places = {PRETRAINED: sources.local(body), FINETUNED: sources.local(head)}
    states = {name: _state(place) for name, place in places.items()}
    beside = _beside(places[FINETUNED])
    paired, taken = pair(states[PRETRAINED], states[FINETUNED])
    if strange := [name for name in taken if not _in_head(name, beside)]:
        raise SourceError(
            f"{body}: is not of the architecture of {head}: it lacks {_listed(strange)}, or has "
            "them in other shapes"
        )
    for name, state in ((PRETRAINED, paired), (FINETUNED, states[FINETUNED])):
        _write(out / name, state, beside)
        print(out / name / OUTPUT)
    print(f"of {head}: {_listed(taken) if taken else 'nothing, the heads fit'}")


def pair(
    body: Mapping[str, Tensor], head: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return every tensor of `head`, from `body` where it has one of this name and shape.

    And the names of those that it has not.
    """
    fits = {name for name in head if name in body and body[name].shape == head[name].shape}
    state = {name: (body if name in fits else head)[name] for name in head}
    return state, [name for name in head if name not in fits]


def _state(place: Path) -> dict[str, Tensor]:
    from mergekit_monosoup.checkpoints.reader import Checkpoints

    try:
        checkpoint = Checkpoints([str(place)])
        return {name: checkpoint.load(name)[0] for name in checkpoint.names}
    except ValueError as error:
        raise SourceError(str(error)) from error


def _beside(place: Path) -> list[Path]:
    """Return the files that say how to use weights."""
    folder = place if place.is_dir() else place.parent
    return [folder / name for name in CONFIGURATIONS if (folder / name).is_file()]


def _in_head(name: str, beside: Sequence[Path]) -> bool:
    """Whether a tensor is of the classification head; where config.json does not say it, by name.

    timm's says it, as `classifier`; in transformers the head is called that.
    """
    heads: Any = ("classifier", "classification_head", "head", "fc")
    for file in beside:
        if file.name == "config.json":
            content = json.loads(file.read_bytes())
            heads = (content.get("pretrained_cfg") or content).get("classifier") or heads
    return name.startswith(tuple(f"{head}." for head in ([heads] if type(heads) is str else heads)))


def _listed(names: Sequence[str]) -> str:
    from mergekit_monosoup.checkpoints.reader import listed

    return listed(names)


def _write(folder: Path, state: Mapping[str, Tensor], beside: Sequence[Path]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / OUTPUT)
    for file in beside:
        shutil.copy(file, folder / file.name)


if __name__ == "__main__":
    sys.exit(main())
