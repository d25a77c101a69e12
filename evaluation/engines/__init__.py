"""Engines: the libraries that ask models questions, one module each, the only ones to import them.

An evaluation needs this of an engine: check a suite and settings before any model is loaded, load
a checkpoint, and ask it a task, which gives a `store.TaskResult`.
"""

from __future__ import annotations

from dataclasses import dataclass


class EvaluationError(RuntimeError):
    """An engine cannot do what the suite asks for; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """What decides answers besides suite and model."""

    backend: str = "hf"
    device: str = "cpu"
    dtype: str = "auto"
    limit: int | None = None  # only the first so many items of each task
