"""Task files for lm-eval that a suite brings along (`include_path`): what they hold, what fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from evaluation import fingerprint


def digests(folder: Path, configs: Mapping[str, tuple[Path, Any]]) -> dict[str, str]:
    """Return a digest of what decides the items of each task, and how they are asked.

    That is its task file with all that it includes, the Python files beside it, and those of its
    data files that lie on this machine. `configs` are path and content of the task files by task;
    where the folder lies makes no difference.
    """
    found = {}
    for name, (path, config) in configs.items():
        data = [fingerprint.of_file(file) for file in _data_files(config)]
        code = fingerprint.of_files(path.parent, ("*.py",))
        found[name] = fingerprint.digest([_without(str(folder.resolve()), config), data, code])
    return found


def _data_files(config: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the data files on this machine; lm-eval reads relative paths from the current one."""
    given = (config.get("dataset_kwargs") or {}).get("data_files") or []
    values = given.values() if isinstance(given, Mapping) else [given]
    for value in values:
        for file in value if isinstance(value, list) else [value]:
            if isinstance(file, str) and Path(file).is_file():
                yield Path(file)


def _without(folder: str, value: Any) -> Any:
    """Return a value as JSON has it, with the folder cut out: names of functions begin with it."""
    if isinstance(value, Mapping):
        return {str(key): _without(folder, of_key) for key, of_key in value.items()}
    if isinstance(value, list):
        return [_without(folder, entry) for entry in value]
    return str(value).removeprefix(folder)


class _AnyTag(yaml.SafeLoader):
    """A loader that leaves out values with a tag of their own, such as `!function`."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def unreadable(folder: Path) -> Iterator[str]:
    """Yield why lm-eval passes over files of the folder, in silence: one sentence per file."""
    for path in sorted(folder.rglob("*.y*ml")):
        if path.suffix != ".yaml":
            if _content(path) == "":
                yield f"{path}: lm-eval reads files that end in .yaml; rename it"
        elif reason := _content(path):
            yield f"{path}: {reason}"


def _content(path: Path) -> str:
    """Return what is wrong with a task file, empty if nothing is."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_AnyTag)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        return f"not YAML ({' '.join(str(error).split())})"
    if not isinstance(content, dict) or not {"task", "group"} & content.keys():
        return "it has neither `task` nor `group`"
    return ""
