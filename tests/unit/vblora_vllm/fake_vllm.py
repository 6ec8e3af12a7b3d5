"""vLLM's LoRA interface as its release 0.33.0 publishes it, for tests without vLLM: what the plugin uses, and no more.

Rewritten, with the same names, signatures and behaviour, after vllm/lora/resolver.py and vllm/lora/request.py; `ask`
and `loadable_deltas` after what the server and the loader do with an answer.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from safetensors.torch import load_file
from torch import Tensor


@dataclass(eq=False)
class LoRARequest:
    """vllm/lora/request.py: there a msgspec.Struct with these fields in this order."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)


class LoRAResolver(ABC):
    """vllm/lora/resolver.py."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class Registry:
    """vllm/lora/resolver.py: `_LoRAResolverRegistry`, of which the module holds one instance."""

    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def get_supported_resolvers(self) -> Set[str]:
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return self.resolvers[resolver_name]


def modules() -> dict[str, ModuleType]:
    """What to put into sys.modules, with a registry of its own."""
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    vars(request).update(LoRARequest=LoRARequest)
    vars(resolver).update(LoRAResolver=LoRAResolver, LoRAResolverRegistry=Registry())
    return {
        "vllm": ModuleType("vllm"),
        "vllm.lora": ModuleType("vllm.lora"),
        "vllm.lora.request": request,
        "vllm.lora.resolver": resolver,
    }


class Models:
    """Resolves as `OpenAIServingModels.resolve_lora` does (vllm/entrypoints/openai/models/serving.py)."""

    def __init__(self, model: str) -> None:
        registry = sys.modules["vllm.lora.resolver"].LoRAResolverRegistry
        self._resolvers = [registry.get_resolver(name) for name in registry.get_supported_resolvers()]
        self._model = model
        self._ids = itertools.count(1)
        self.loaded: dict[str, LoRARequest] = {}

    async def resolve(self, name: str) -> LoRARequest | None:
        """Raises what a resolver raises: the server answers a ValueError with a 400, and lives on."""
        if name not in self.loaded:
            own_id = next(self._ids)
            for resolver in self._resolvers:
                request = await resolver.resolve_lora(self._model, name)
                if request is not None:
                    request.lora_int_id = own_id
                    self.loaded[name] = request
                    break
        return self.loaded.get(name)


def loadable_deltas(path: Path, *, linear: Set[str], max_lora_rank: int) -> dict[str, Tensor]:
    """What the loader makes of a directory, by module: `scaling · B @ A`.

    The rules of vllm/lora/peft_helper.py (`validate_legal`), lora_model.py (`from_local_checkpoint`) and utils.py
    (`parse_fine_tuned_lora_name`), an assertion each. `linear` are the last parts of the names of the model's linear
    layers. Patterns of ranks and alphas are left out, as the releases do that do not know them.
    """
    config = json.loads((path / "adapter_config.json").read_text())
    assert config.keys() >= {"r", "lora_alpha", "target_modules"}
    assert 0 < config["r"] <= max_lora_rank
    assert config.get("bias", "none") == "none"
    assert not config.get("modules_to_save")
    refused = (
        "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"
    )  # fmt: skip
    assert not any(config.get(feature) for feature in refused)
    init = config.get("init_lora_weights", True)
    assert not isinstance(init, str) or init.lower() in {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "adapter_model.safetensors").items():
        module, side, weight = key.removeprefix("base_model.model.").rsplit(".", 2)
        assert (key.startswith("base_model.model."), weight) == (True, "weight")
        assert side in ("lora_A", "lora_B")
        assert module.rsplit(".", 1)[-1] in linear
        factors.setdefault(module, {})[side] = tensor.float()
    for sides in factors.values():
        assert len(sides["lora_A"]) == sides["lora_B"].shape[1] <= max_lora_rank
    return {module: scaling * sides["lora_B"] @ sides["lora_A"] for module, sides in factors.items()}
