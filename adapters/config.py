"""adapter_config.json, parsed and validated once: what all adapter types have in common, and a VB-LoRA adapter's.

Field names and defaults are those of `peft.VBLoRAConfig` (PEFT 0.21). Keys that matter only to training, or that
other PEFT versions add, are carried along unread in `extra`, so that writing a config back loses nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from adapters import strict_json
from adapters.errors import BadConfig, MissingTensor, UnsupportedCheckpoint

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 32
MAX_CONFIG_VALUES = 20_000  # each takes memory, and is listed again
MAX_PATTERNS = 100  # in one list of names that PEFT takes for regular expressions
MAX_TEXT = 4_096  # characters
ALL_LINEAR = "all-linear"

# Bounds no real adapter comes near; they keep every product of them inside 64 bits.
_MAX_INT = 2**31 - 1
_MAX_FLOAT = sys.float_info.max

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields that the configs of all adapter types share: what is adapted, and what is saved besides.

    `target_modules` and `exclude_modules` are a tuple of names, a regular expression (a string), or None.
    `layers_to_transform` is None or a tuple of layer numbers (empty: every layer); `layers_pattern` a tuple, empty
    when not given. `BIAS_OF_TARGETS` is how the type calls a `bias` that trains the targets' biases alone.
    """

    PEFT_TYPE: ClassVar[str]
    BIAS_OF_TARGETS: ClassVar[str]

    r: int = 4
    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: Names = ()
    bias: str = "none"
    modules_to_save: Names = ()
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise BadConfig(
                "layers_pattern is set but layers_to_transform is not; set both or neither",
                subject="layers_pattern",
            )
        modes = ("none", "all", self.BIAS_OF_TARGETS)
        if self.bias not in modes:
            raise BadConfig(f"bias is {self.bias!r}; it must be one of {', '.join(modes)}", subject="bias")

    @property
    def tile(self) -> int:
        """How many features come in one piece: it divides the features of every layer."""
        return 1

    @property
    def targets_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The config of a PEFT adapter directory.

        Raises MissingTensor without the file, BadConfig for one that is malformed, UnsupportedCheckpoint for
        another `peft_type`.
        """
        return cls.parse(read_config(directory))

    @classmethod
    def parse(cls, raw: bytes | str) -> Self:
        """The config in a JSON text. Raises BadConfig or UnsupportedCheckpoint."""
        return cls.from_dict(parse_values(raw))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config in a mapping of PEFT's keys. Raises BadConfig naming the key, or UnsupportedCheckpoint."""
        peft_type = values.get("peft_type")
        if peft_type != cls.PEFT_TYPE:
            raise UnsupportedCheckpoint(
                f"peft_type is {peft_type!r}; {cls.PEFT_TYPE!r} was expected here", subject="peft_type"
            )
        rest = {key: value for key, value in values.items() if key != "peft_type"}
        read = ConfigReader(rest)
        return cls(**cls.own_fields(read), **cls._shared_fields(read), extra=rest)

    @classmethod
    def own_fields(cls, read: ConfigReader) -> dict[str, Any]:
        """The fields that only this adapter type has, and the rank, whose default differs."""
        raise NotImplementedError

    @classmethod
    def _shared_fields(cls, read: ConfigReader) -> dict[str, Any]:
        return {
            "target_modules": read.names_or_regex("target_modules"),
            "exclude_modules": read.names_or_regex("exclude_modules"),
            "layers_to_transform": read.layer_numbers("layers_to_transform"),
            "layers_pattern": read.patterns("layers_pattern"),
            "bias": read.text("bias") or "none",
            "modules_to_save": read.patterns("modules_to_save"),
            "task_type": read.text("task_type"),
            "base_model_name_or_path": read.text("base_model_name_or_path"),
        }

    def own_values(self) -> dict[str, Any]:
        """The fields that only this adapter type has, as JSON values."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys, sorted; PEFT's config class of this type loads it."""
        values: dict[str, Any] = {
            **self.extra,
            **self.own_values(),
            "peft_type": self.PEFT_TYPE,
            "r": self.r,
            "target_modules": _jsonable(self.target_modules),
            "exclude_modules": _jsonable(self.exclude_modules),
            "layers_to_transform": _jsonable(self.layers_to_transform),
            "layers_pattern": list(self.layers_pattern) or None,
            "bias": self.bias,
            "modules_to_save": list(self.modules_to_save) or None,
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model_name_or_path,
        }
        return dict(sorted(values.items()))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class VBLoRAConfig(AdapterConfig):
    """The fields of an adapter_config.json that decide what a VB-LoRA checkpoint means."""

    PEFT_TYPE: ClassVar[str] = "VBLORA"
    BIAS_OF_TARGETS: ClassVar[str] = "vblora_only"

    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        if self.topk > self.num_vectors:
            raise BadConfig(
                f"topk is {self.topk} but num_vectors is {self.num_vectors}; topk must not exceed it",
                subject="topk",
            )
        AdapterConfig.__post_init__(self)  # super() does not know a class with slots

    @property
    def tile(self) -> int:
        return self.vector_length

    @classmethod
    def own_fields(cls, read: ConfigReader) -> dict[str, Any]:
        return {
            "r": read.positive("r", 4),
            "num_vectors": read.positive("num_vectors", 256),
            "vector_length": read.positive("vector_length", 256),
            "topk": read.positive("topk", 2),
            "save_only_topk_weights": read.boolean("save_only_topk_weights"),
            "init_vector_bank_bound": read.number("init_vector_bank_bound", 0.02),
            "init_logits_std": read.number("init_logits_std", 0.1),
        }

    def own_values(self) -> dict[str, Any]:
        return {
            "num_vectors": self.num_vectors,
            "vector_length": self.vector_length,
            "topk": self.topk,
            "save_only_topk_weights": self.save_only_topk_weights,
            "init_vector_bank_bound": self.init_vector_bank_bound,
            "init_logits_std": self.init_logits_std,
        }


def read_config(directory: Path) -> bytes:
    """The bytes of an adapter's config. Raises MissingTensor without the file, BadConfig for one that is too large."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise MissingTensor(f"no {CONFIG_FILE} in the adapter directory", subject=CONFIG_FILE)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BadConfig(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES:,} bytes", subject=CONFIG_FILE)
    return path.read_bytes()


def parse_values(raw: bytes | str) -> dict[str, Any]:
    """The JSON object in a config's text. Raises BadConfig."""
    try:
        values = strict_json.parse(raw)
        _check_portable(values)
    except ValueError as error:
        raise BadConfig(f"{CONFIG_FILE} is not valid JSON: {error}", subject=CONFIG_FILE) from error
    if not isinstance(values, dict):
        raise BadConfig(f"{CONFIG_FILE} must hold a JSON object", subject=CONFIG_FILE)
    return values


class ConfigReader:
    """Takes typed values out of a raw config; what nobody takes stays behind."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    @property
    def rest(self) -> Mapping[str, Any]:
        """What nobody has taken yet."""
        return self._values

    def positive(self, key: str, default: int) -> int:
        return _positive(key, self._values.pop(key, default))

    def boolean(self, key: str) -> bool:
        value = self._values.pop(key, False)
        if not isinstance(value, bool):
            raise BadConfig(f"{key} is {value!r}; it must be true or false", subject=key)
        return value

    def number(self, key: str, default: float) -> float:
        return _number(key, self._values.pop(key, default))

    def positive_by_name(self, key: str) -> dict[str, int]:
        return {name: _positive(f"{key}[{name!r}]", value) for name, value in self._by_name(key).items()}

    def numbers_by_name(self, key: str) -> dict[str, float]:
        return {name: _number(f"{key}[{name!r}]", value) for name, value in self._by_name(key).items()}

    def text(self, key: str) -> str | None:
        value = self._values.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise BadConfig(f"{key} is {value!r}; it must be a string or null", subject=key)
        if value is not None and len(value) > MAX_TEXT:
            raise BadConfig(f"{key} has {len(value):,} characters; at most {MAX_TEXT:,} are accepted", subject=key)
        return value

    def patterns(self, key: str) -> Names:
        value = self._values.pop(key, None)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,) if value else ()
        names = self._name_list(key, value)
        if len(names) > MAX_PATTERNS:
            raise BadConfig(f"{key} lists {len(names):,} names; at most {MAX_PATTERNS:,} are accepted", subject=key)
        return names

    def names_or_regex(self, key: str) -> Names | str | None:
        value = self._values.pop(key, None)
        if value is None or isinstance(value, str):
            return value
        return self._name_list(key, value)

    def layer_numbers(self, key: str) -> tuple[int, ...] | None:
        value = self._values.pop(key, None)
        if value is None:
            return None
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            raise BadConfig(f"{key} is {value!r}; it must be a whole number or a list of them", subject=key)
        return tuple(numbers)

    def _by_name(self, key: str) -> dict[str, object]:
        value = self._values.pop(key, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise BadConfig(f"{key} is {value!r}; it must be an object or null", subject=key)
        return value

    @staticmethod
    def _name_list(key: str, value: object) -> Names:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise BadConfig(f"{key} is {value!r}; it must be a list of names, a string or null", subject=key)
        return tuple(value)


def _positive(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_INT:
        raise BadConfig(f"{what} is {value!r}; it must be a positive whole number", subject=what)
    return value


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_FLOAT:
        raise BadConfig(f"{what} is {value!r}; it must be a number of at least 0", subject=what)
    return float(value)


def _check_portable(values: object) -> None:
    """Raises ValueError for what Python reads but those after us may not: half a surrogate pair, which no UTF-8 has,
    nesting that is too deep, or too many values."""
    level, count = [values], 0
    for _ in range(MAX_CONFIG_DEPTH):
        count += len(level)
        if count > MAX_CONFIG_VALUES:
            raise ValueError(f"it holds more than {MAX_CONFIG_VALUES:,} values")
        level = [child for value in level for child in _children(value)]
    if level:
        raise ValueError(f"it is nested more than {MAX_CONFIG_DEPTH} levels deep")
    json.dumps(values, ensure_ascii=False).encode()


def _children(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _jsonable(value: tuple[Any, ...] | str | None) -> list[Any] | str | None:
    return list(value) if isinstance(value, tuple) else value
