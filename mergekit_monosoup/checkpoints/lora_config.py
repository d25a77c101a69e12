"""adapter_config.json of peft: what kind of adapter it is, and how its modules are scaled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_monosoup.checkpoints.beside import DamagedError, printable, read_json

CONFIG = "adapter_config.json"
# Without a tensor of its own: it decides how ΔW is stored, or added.
_VARIANTS = {
    "use_dora": "DoRA, which scales each row of W0 + ΔW",
    "use_qalora": "QALoRA, whose A works on pooled inputs",
    "use_bdlora": "BD-LoRA, whose factors are stored in blocks",
    "target_parameters": "LoRA on parameters of stacked experts (`target_parameters`)",
    "arrow_config": "Arrow, a router over adapters",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA, whose B is random",
}
# These leave the base alone; PiSSA, OLoRA, CorDA, LoftQ and the rest train against another one.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
WAY_OUT = (
    "merge it as a whole model instead, `model: BASE+ADAPTER` in mergekit-yaml with "
    "--lora-merge-cache DIR (configs/lora.yml)"
)


class LoraError(ValueError):
    """An adapter cannot be edited as one; the message says why and what to do."""


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class LoraConfig:
    """The settings of a LoRA adapter.

    Attributes:
        settings: all of the file.
    """

    settings: Mapping[str, Any]

    @classmethod
    def read(cls, file: str) -> LoraConfig:
        """Read a configuration.

        Raises:
            LoraError: it is no LoRA adapter whose update is scale·B·A, or the file is damaged.
        """
        try:
            settings = read_json(file)
        except (DamagedError, FileNotFoundError) as error:
            reason = error if isinstance(error, DamagedError) else "is not there"
            raise LoraError(f"{file} {reason}") from None
        if not isinstance(settings, dict):
            raise LoraError(f"{file} does not hold a mapping: download the adapter again")
        if fault := _kind_fault(settings):
            raise LoraError(f"is {fault}: its update is not scale·B·A; {WAY_OUT}")
        if fault := _value_fault(settings):
            raise LoraError(f"{file}: {fault}")
        return cls(settings)

    @property
    def base(self) -> str:
        """The model that it was trained on, as the configuration names it; empty if not at all."""
        return str(self.settings.get("base_model_name_or_path") or "")

    @property
    def flipped(self) -> bool:
        """Whether the linear layers store Wᵀ, as GPT-2's do."""
        return bool(self.settings.get("fan_in_fan_out"))

    def rank(self, module: str) -> int:
        """Return r of a module."""
        return int(self._of("rank_pattern", "r", 8, module))

    def scaling(self, module: str) -> float:
        """Return the factor of B·A: lora_alpha/r, rsLoRA: lora_alpha/√r."""
        rank, alpha = self.rank(module), float(self._of("alpha_pattern", "lora_alpha", 8, module))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _of(self, patterns: str, name: str, default: int, module: str) -> Any:
        """Return a value of a module: of the first pattern that matches, as peft has it."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.settings.get(name, default)

    def of_scale_one(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Return the settings for new factors of these ranks whose update is B·A itself.

        lora_alpha is r in every module, so that also a program that knows no patterns scales by 1.

        ``ranks``: by module.
        """
        counted = list(ranks.values())
        usual = max(set(counted), key=lambda rank: (counted.count(rank), rank))
        # The first pattern that matches counts, and `layers.1.x` matches `encoder.layers.1.x`, too.
        names = sorted((name for name in ranks if ranks[name] != usual), key=len, reverse=True)
        pattern = {name: ranks[name] for name in names}
        return {
            **self.settings,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "use_rslora": False,
        }


def _kind_fault(settings: Mapping[str, Any]) -> str:
    """Return what kind of adapter it is, if not a LoRA; empty if it is one."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return printable(f"of the type {kind!r:.40}")
    for key, meaning in _VARIANTS.items():
        if settings.get(key):
            return meaning
    start = settings.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        return printable(
            f"a LoRA that began as {start!r:.40}, which changes the base before training (if it "
            "was saved with `path_initial_model_for_weight_conversion`, set `init_lora_weights` "
            "to true)"
        )
    return ""


def _value_fault(settings: Mapping[str, Any]) -> str:
    """Return what is wrong with the values that the scaling is made from; empty if nothing is."""
    for name, patterns, accepts, wanted in (
        ("r", "rank_pattern", _count, "a whole number > 0"),
        ("lora_alpha", "alpha_pattern", _number, "a finite number"),
    ):
        if name in settings and not accepts(settings[name]):
            return f"`{name}` must be {wanted}, got {settings[name]!r:.40}"
        by_module = settings.get(patterns) or {}
        if not isinstance(by_module, dict):
            return f"`{patterns}` must map modules to numbers, got {by_module!r:.40}"
        for module, value in by_module.items():
            if not accepts(value):
                return f"`{patterns}`: {module[:60]!r} must be {wanted}, got {value!r:.40}"
            try:
                re.compile(module)
            except re.error as error:
                return f"`{patterns}`: {module[:60]!r} is no regular expression ({error})"
    return ""
