"""Which modules of a base model an adapter adapts: PEFT's matching rules, and binding with a clear refusal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from adapters.config import AdapterConfig
from adapters.errors import MissingTensor, NoTargetMatched, ShapeMismatch, UnexpectedTensor
from adapters.patterns import Allowance, Pattern
from adapters.quantized import quantized_shape

_MOST_NAMES_SHOWN = 6

# What PEFT adapts when target_modules is null (TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING, PEFT 0.21.2).
DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt_neo": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "gpt_bigcode": ("c_attn",),
    "deberta": ("in_proj",),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One linear layer: its module name in the base model and its features."""

    name: str
    in_features: int
    out_features: int


def adaptable_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a Linear, quantized or not, or a Conv1D; None for every other module.

    Conv1D is transformers' GPT-2 layer, which stores its weight [in, out]; it is known by its class name.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)
    return quantized_shape(module)


def is_conv1d(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2


@dataclass(frozen=True, slots=True)
class BaseModules:
    """The modules of a base model as adapters see them, taken before anything wraps them.

    `kinds` names the class of every module, `layers` the shape of each adaptable one, in the model's order.
    `output_layer` is the name of the output embedding (`lm_head`), which `all-linear` leaves out.
    """

    model_type: str
    kinds: Mapping[str, str]
    layers: Mapping[str, LayerShape]
    output_layer: str | None = None
    names_accepted: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        model_type: str,
        output_layer: nn.Module | None = None,
        names: Iterable[str] = (),
    ) -> BaseModules:
        """The modules of `model`. `names` are the ids that an adapter's base_model_name_or_path may carry."""
        kinds: dict[str, str] = {}
        layers: dict[str, LayerShape] = {}
        output_name = None
        for name, module in model.named_modules():
            kinds[name] = type(module).__name__
            if (shape := adaptable_shape(module)) is not None:
                layers[name] = LayerShape(name, *shape)
            if module is output_layer:
                output_name = name
        return cls(model_type, kinds, layers, output_name, frozenset(names))

    def selected_by(self, config: AdapterConfig) -> list[LayerShape]:
        """The layers that PEFT would adapt under `config`.

        Raises NoTargetMatched when there is none, when a matched module is neither Linear nor Conv1D, or when
        target_modules is null and PEFT knows no default for the architecture.
        """
        if config.targets_all_linear:
            excluded = TargetMatcher(config, targets=())
            chosen = [name for name in self.layers if name != self.output_layer and not excluded.excludes(name)]
        else:
            matcher = TargetMatcher(config, targets=self._targets(config))
            chosen = [name for name in self.kinds if name and matcher.matches(name)]
        for name in chosen:
            if name not in self.layers:
                raise NoTargetMatched(
                    f"target_modules selects {name!r}, a {self.kinds[name]}; adapters adapt Linear and Conv1D layers",
                    subject=name,
                )
        if not chosen:
            raise self.nothing_matched(config.target_modules)
        return [self.layers[name] for name in chosen]

    def nothing_matched(self, looked_for: object) -> NoTargetMatched:
        endings = sorted({name.rsplit(".", 1)[-1] for name in self.layers})
        return NoTargetMatched(
            f"no module of the base model ({self.model_type}) matches {_shown(looked_for)}; "
            f"its linear layers are named {_shown(endings)}",
            subject="target_modules",
        )

    def _targets(self, config: AdapterConfig) -> tuple[str, ...] | str:
        if config.target_modules is not None:
            return config.target_modules
        if self.model_type not in DEFAULT_TARGETS:
            raise NoTargetMatched(
                f"target_modules is null and PEFT has no default for {self.model_type!r} models; name the modules",
                subject="target_modules",
            )
        return DEFAULT_TARGETS[self.model_type]


class TargetMatcher:
    """PEFT's `check_target_module_exists` for one config.

    Names match whole or as a dotted suffix; a string is a regular expression on the whole name. `layers_to_transform`
    counts only for suffix matches; a module in `modules_to_save` is never a target.
    """

    def __init__(self, config: AdapterConfig, targets: tuple[str, ...] | str) -> None:
        allowance = Allowance()
        self._regex = Pattern(targets, "target_modules", allowance) if isinstance(targets, str) else None
        self._names = frozenset() if isinstance(targets, str) else frozenset(targets)
        exclude = config.exclude_modules or ()
        self._excluded_regex = Pattern(exclude, "exclude_modules", allowance) if isinstance(exclude, str) else None
        self._excluded_names = frozenset(exclude) if isinstance(exclude, tuple) else frozenset()
        self._saved = [
            Pattern(rf"(^|.*\.){name}($|\..*)", "modules_to_save", allowance) for name in config.modules_to_save
        ]
        self._layer_numbers = [
            Pattern(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "layers_pattern", allowance)
            for pattern in config.layers_pattern
        ] or [Pattern(r".*?\.[^.]*\.(?P<idx>\d+)\.", "layers_pattern", allowance)]
        self._wanted_layers = frozenset(map(str, config.layers_to_transform or ()))

    def matches(self, name: str) -> bool:
        if self.excludes(name):
            return False
        if self._regex is not None:
            return self._regex.fullmatch(name) is not None
        if name in self._names:
            return True
        return _has_suffix(name, self._names) and self._in_layers(name)

    def excludes(self, name: str) -> bool:
        if self._excluded_regex is not None and self._excluded_regex.fullmatch(name):
            return True
        if name in self._excluded_names or _has_suffix(name, self._excluded_names):
            return True
        return any(pattern.match(name) for pattern in self._saved)

    def _in_layers(self, name: str) -> bool:
        if not self._wanted_layers:
            return True
        for pattern in self._layer_numbers:
            if (match := pattern.match(name)) is not None:
                digits = match["idx"]  # None where the pattern has an alternative without it; of any length
                return digits is not None and (digits.lstrip("0") or "0") in self._wanted_layers
        return False


def check_targets(config: AdapterConfig, modules: Sequence[str]) -> None:
    """Every module that a checkpoint holds is one its config names. Raises UnexpectedTensor.

    Null and `all-linear` name nothing to check against.
    """
    if config.target_modules is None or config.targets_all_linear:
        return
    matcher = TargetMatcher(config, targets=config.target_modules)
    for name in modules:
        if not matcher.matches(name):
            raise UnexpectedTensor(
                f"the file holds tensors for {name!r}, which the config's target_modules "
                f"({_shown(config.target_modules)}) does not select",
                subject=name,
            )


def check_binding(config: AdapterConfig, modules: Sequence[LayerShape], base: BaseModules) -> None:
    """The checkpoint's modules are exactly those of `base` that its config selects, and their shapes agree.

    Raises NoTargetMatched (no module of the file is in the base, or one is of a type that cannot be adapted),
    UnexpectedTensor (the base lacks a module), ShapeMismatch (features differ, or tiles do not divide them)
    or MissingTensor (a selected module of the base is not in the file).
    """
    names = [module.name for module in modules]
    if not any(name in base.kinds for name in names):
        raise base.nothing_matched(names)
    for module in modules:
        _check_module(module, base, config.tile)
    if config.target_modules is not None and not config.targets_all_linear:
        _check_none_missing(config, frozenset(names), base)


def _check_module(module: LayerShape, base: BaseModules, tile: int) -> None:
    name = module.name
    if name not in base.kinds:
        raise UnexpectedTensor(
            f"the adapter adapts {name!r}, which the base model ({base.model_type}) does not have",
            subject=name,
        )
    if name not in base.layers:
        raise NoTargetMatched(
            f"the adapter adapts {name!r}, a {base.kinds[name]} in the base; adapters adapt Linear and Conv1D layers",
            subject=name,
        )
    layer = base.layers[name]
    check_tiling(layer, tile)
    if module != layer:
        raise ShapeMismatch(
            f"the adapter's {name!r} is {module.in_features}→{module.out_features} but the base model's is "
            f"{layer.in_features}→{layer.out_features}; was it trained on another base?",
            subject=name,
        )


def check_tiling(layer: LayerShape, vector_length: int) -> None:
    """`vector_length` divides the layer's features. Raises ShapeMismatch."""
    for what, features in (("in_features", layer.in_features), ("out_features", layer.out_features)):
        if features % vector_length:
            raise ShapeMismatch(
                f"vector_length {vector_length} does not divide the {what} {features} of {layer.name!r}",
                subject=layer.name,
            )


def _check_none_missing(config: AdapterConfig, names: frozenset[str], base: BaseModules) -> None:
    absent = [layer.name for layer in base.selected_by(config) if layer.name not in names]
    if absent:
        raise MissingTensor(
            f"the config's target_modules selects {len(absent)} module(s) of the base model for which the file has no "
            f"tensors: {_shown(absent)}",
            subject=absent[0],
        )


def _has_suffix(name: str, endings: frozenset[str]) -> bool:
    return any(ending in endings for ending in _dotted_suffixes(name))


def _dotted_suffixes(name: str) -> Iterator[str]:
    """`a.b.c` → `b.c`, `c`: matching then costs the name's depth, not the list's length."""
    for dot in re.finditer(r"\.", name):
        yield name[dot.end() :]


def _shown(names: object) -> str:
    """A few names for a message; a whole model's worth helps nobody."""
    if not isinstance(names, (list, tuple)):
        return repr(names)
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES_SHOWN])
    more = len(names) - _MOST_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
