"""vLLM's side of the plugin: a LoRAResolver over the library. The one module that imports vLLM.

Interface: vllm/lora/resolver.py and vllm/lora/request.py of vLLM 0.33.0.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from adapters.errors import AdapterError
from vblora_vllm.library import Library
from vblora_vllm.settings import PluginSettings

RESOLVER_NAME = "VB-LoRA Resolver"

_LARGEST_ID = 2**31 - 1  # vLLM's workers keep ids in int32

# A child of vLLM's logger, which is the one that vLLM configures.
logger = logging.getLogger("vllm.vblora")


class AdapterRefused(ValueError):
    """An adapter that is there, but is not served. vLLM answers a ValueError with a 400 and its message."""


class VBLoRAResolver(LoRAResolver):  # type: ignore[misc]  # vLLM's types are not read
    """Resolves the names of a library's adapters."""

    def __init__(self, library: Library) -> None:
        self._library = library

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of that name, None if there is none. Raises AdapterRefused.

        vLLM asks once for each name, until the adapter is unloaded.
        """
        return await asyncio.to_thread(self._resolve, base_model_name, lora_name)

    def _resolve(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        directory = self._library.find(lora_name)
        if directory is None:
            return None
        try:
            converted = self._library.convert(directory, base_model_name)
        except AdapterError as error:
            logger.warning("adapter %s is refused (%s): %s", lora_name, error.code, error.message)
            raise AdapterRefused(f"adapter {lora_name!r} is refused ({error.code}): {error.message}") from error
        if converted.warning is not None:
            logger.warning("adapter %s: %s", lora_name, converted.warning)
        logger.info("adapter %s (%s) is served from %s", lora_name, converted.digest, converted.path)
        return LoRARequest(
            lora_name=lora_name,
            lora_int_id=int_id(lora_name, converted.digest),
            lora_path=str(converted.path),
        )


def int_id(name: str, digest: str) -> int:
    """A positive number for this version of this adapter, the same in every process.

    vLLM's server puts a number of its own in its place; others that use the resolver may rely on it.
    """
    return int(hashlib.sha256(f"{name}@{digest}".encode()).hexdigest(), 16) % _LARGEST_ID + 1


def register_resolver(settings: PluginSettings) -> None:
    """Adds the resolver to vLLM's registry, unless it is there."""
    if RESOLVER_NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(RESOLVER_NAME, VBLoRAResolver(Library(settings)))
        logger.info("VB-LoRA adapters are resolved from %s", settings.adapters)
