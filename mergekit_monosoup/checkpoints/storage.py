"""Where downloads and merged adapters go; named as mergekit's own options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How adapters are merged into their base."""

    lora_merge_cache: str | None = None
    trust_remote_code: bool = False
    lora_merge_dtype: str | None = None


@dataclass(frozen=True)
class Storage(Options):
    """Where downloads and merged adapters go."""

    transformers_cache: str | None = None


ANYWHERE = Storage()  # where mergekit and the hub's client put things by themselves
