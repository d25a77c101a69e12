"""What is no file, or cannot be written, as each argument of each command that is a path."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from fuzz import mutation
from fuzz.place import Place
from fuzz.programs import Command, figures, load_suite, monosoup, reading_part_of_run, tables
from fuzz.subjects import models
from fuzz.subjects.reports import MERGED

STRANGE = ["folder", "file", "pipe", "loop", "dangling", "locked", "file/x", "missing/x", "\udce9"]
ELSEWHERE = ["/dev/full", "/dev/zero", "/proc/self/mem", "/proc/x", "x" * 300, "[/b]", "a\x1b[31m"]
SUFFIXES = ["", ".svg", ".yml", ".jsonl", ".safetensors"]


def commands(rng: random.Random, place: Place) -> list[Command]:
    """Give one command a strange place to read or to write."""
    mutation.copied(models.good(), place.work)
    place.write("m.yml", models.CONFIG)
    place.write("r.jsonl", "".join(json.dumps(line) + "\n" for line in MERGED))
    for suffix in SUFFIXES:
        _create(place.work, suffix)
    plain = rng.choice([*STRANGE, *ELSEWHERE])
    kind = rng.choice(["read", "write"])
    return [_reading(rng, plain) if kind == "read" else _writing(rng, plain)]


def _create(work: Path, suffix: str) -> None:
    """Make everything that may lie in the place of a file, with a suffix."""
    (work / f"folder{suffix}").mkdir()
    (work / f"file{suffix}").write_text("precious")
    os.mkfifo(work / f"pipe{suffix}")
    (work / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (work / f"dangling{suffix}").symlink_to("missing/x")
    (work / f"locked{suffix}").write_text("precious")
    (work / f"locked{suffix}").chmod(0)


def _reading(rng: random.Random, name: str) -> Command:
    suffix = rng.choice(SUFFIXES)
    path = name + suffix
    other = ["--base", "base", "--threshold", "0", "--out", "s.yml"]
    program, arguments = rng.choice(
        [
            (monosoup, ["check", path]),
            (monosoup, ["report", path]),
            (monosoup, ["plot", path, "--out", "p.svg"]),
            (monosoup, ["inspect", "base", path]),
            (monosoup, ["inspect", path, "tuned0"]),
            (monosoup, ["soup", "tuned0", path, *other]),
            (monosoup, ["soup", "tuned0", "tuned1", *other, "--scores", path]),
            (reading_part_of_run, [path, "out"]),
            (tables, [path]),
            (figures, [path, "--out", "out"]),
            (load_suite, [path]),
        ]
    )
    return Command(program, arguments, (), ("out", "s.yml", "p.svg"))


def _writing(rng: random.Random, name: str) -> Command:
    program, suffix, arguments = rng.choice(
        [
            (monosoup, ".svg", ["plot", "r.jsonl", "--out"]),
            (monosoup, ".jsonl", ["inspect", "base", "tuned0", "--out"]),
            (
                monosoup,
                ".yml",
                ["soup", "tuned0", "tuned1", "--base=base", "--threshold=0", "--out"],
            ),
            (reading_part_of_run, "", ["m.yml"]),
            (figures, "", ["base", "--out"]),
        ]
    )
    path = name + suffix
    # What it names it may write, with its folder, but for what is there already.
    there = name in ("file", "locked", "pipe") and suffix != ".svg"
    return Command(
        program,
        [*arguments, path],
        (),
        () if there else (path.split("/")[0] or path, "out", "r.jsonl"),
    )
