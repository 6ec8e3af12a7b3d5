"""adapter_config.json of a plain LoRA adapter: its ranks and scalings by module, and the variants that are refused.

Field names and defaults are those of `peft.LoraConfig` (PEFT 0.21).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from adapters.config import AdapterConfig, ConfigReader
from adapters.errors import BadConfig, UnsupportedCheckpoint
from adapters.patterns import Allowance, Pattern

MAX_RANK_PATTERNS = 10_000  # EVA names every module

# Fields of LoraConfig that change what is computed, and what they ask for.
_VARIANTS: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA, which begins at a token of the prompt",
    "arrow_config": "Arrow, which routes between adapters",
    "ensure_weight_tying": "a trained weight that is tied in the adapter",
    "kasa_config": "KaSA, which changes the base weights",
    "layer_replication": "a base model with layers repeated",
    "lora_bias": "a bias of B",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA, which samples its factors",
    "target_parameters": "parameters that are not a linear layer's",
    "trainable_token_indices": "embeddings trained token by token",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA, which also scales the base weights",
    "use_qalora": "QA-LoRA, which pools its inputs",
    "velora_config": "VeLoRA, which compresses activations",
}
# Initialisations that take what they put into A and B out of the base weights: such an adapter is right only on that
# changed base, unless it was converted when it was saved. All others leave no trace.
_INITIALISATIONS_OF_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_PLAIN_NAME = re.compile(r"[\w.\-]+")  # as a regular expression it matches names of its own length alone


@dataclass(frozen=True, slots=True)
class LoRAConfig(AdapterConfig):
    """The fields of an adapter_config.json that decide what a LoRA checkpoint means.

    `rank_pattern` and `alpha_pattern` are regular expressions for the ends of module names, with the rank or alpha of
    the modules that match in place of `r` or `lora_alpha`; the first that matches counts.
    """

    PEFT_TYPE: ClassVar[str] = "LORA"
    BIAS_OF_TARGETS: ClassVar[str] = "lora_only"

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if len(patterns) > MAX_RANK_PATTERNS:
                raise BadConfig(f"{name} has {len(patterns):,} entries; at most {MAX_RANK_PATTERNS:,}", subject=name)
        AdapterConfig.__post_init__(self)  # super() does not know a class with slots

    @classmethod
    def own_fields(cls, read: ConfigReader) -> dict[str, Any]:
        _refuse_variants(read.rest)
        return {
            "r": read.positive("r", 8),
            "lora_alpha": read.number("lora_alpha", 8.0),
            "use_rslora": read.boolean("use_rslora"),
            "rank_pattern": read.positive_by_name("rank_pattern"),
            "alpha_pattern": read.numbers_by_name("alpha_pattern"),
        }

    def own_values(self) -> dict[str, Any]:
        return {
            "lora_alpha": _whole(self.lora_alpha),
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {name: _whole(alpha) for name, alpha in self.alpha_pattern.items()},
        }

    def ranks(self, modules: Iterable[str]) -> list[int]:
        """The rank of each module, by PEFT's rules. Raises BadConfig for a pattern that cannot be matched."""
        matcher = _PatternMatcher(self.rank_pattern, "rank_pattern")
        return [self.r if (key := matcher.key(name)) is None else self.rank_pattern[key] for name in modules]

    def scalings(self, modules: Iterable[str]) -> list[float]:
        """What each module's `B @ A` is multiplied by: alpha / r, or alpha / √r with use_rslora."""
        names = list(modules)
        matcher = _PatternMatcher(self.alpha_pattern, "alpha_pattern")
        keys = [matcher.key(name) for name in names]
        alphas = [self.lora_alpha if key is None else self.alpha_pattern[key] for key in keys]
        ranks = self.ranks(names)
        return [a / (math.sqrt(r) if self.use_rslora else r) for a, r in zip(alphas, ranks, strict=True)]


class _PatternMatcher:
    """PEFT's `get_pattern_key`: the first pattern that matches a whole name, or its end after a dot."""

    def __init__(self, patterns: Iterable[str], field_name: str) -> None:
        allowance = Allowance()
        self._patterns = [
            (key, None if _PLAIN_NAME.fullmatch(key) else Pattern(rf"(.*\.)?({key})$", field_name, allowance))
            for key in patterns
        ]
        self._known: dict[str, str | None] = {}

    def key(self, name: str) -> str | None:
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> str | None:
        for key, pattern in self._patterns:
            if _ends_with(name, key) if pattern is None else pattern.match(name):
                return key
        return next((key for key, _ in self._patterns if key == name), None)


def _ends_with(name: str, key: str) -> bool:
    """What the regular expression of a plain name says, at a fraction of its time: its dots stand for any character."""
    start = len(name) - len(key)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(wanted in (".", found) for wanted, found in zip(key, name[start:], strict=True))


def _refuse_variants(values: Mapping[str, Any]) -> None:
    """Raises UnsupportedCheckpoint where more is asked for than `x + scaling · B A x`."""
    for key, value in values.items():
        # A later PEFT names a variant use_… too; served as if it were plain it would answer wrongly.
        unknown = key.startswith("use_") and key != "use_rslora"
        if value and (key in _VARIANTS or unknown):
            what = _VARIANTS.get(key, "a variant of LoRA that is not known here")
            raise UnsupportedCheckpoint(f"{key} is set: {what} cannot be served; plain LoRA can", subject=key)
    initialisation = values.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.lower().startswith(_INITIALISATIONS_OF_THE_BASE):
        raise UnsupportedCheckpoint(
            f"init_lora_weights is {initialisation!r}, which changes the base weights: the adapter is right only on "
            "those. Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes it plain",
            subject="init_lora_weights",
        )


def _whole(number: float) -> float | int:
    """PEFT's alphas are whole numbers, as a rule."""
    return int(number) if number.is_integer() else number
