"""The plugin's settings. vLLM hands plugins nothing, so they are environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ADAPTERS = "VBLORA_VLLM_ADAPTERS"
CACHE = "VBLORA_VLLM_CACHE"
BASE_ALIAS = "VBLORA_VLLM_BASE_ALIAS"


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """Where the adapters are, where what vLLM loads is kept, and the ids that the base goes by besides its own."""

    adapters: Path
    cache: Path
    base_aliases: frozenset[str] = frozenset()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """None without VBLORA_VLLM_ADAPTERS: vLLM loads every plugin that is installed, wanted or not.

        Raises ValueError if it names no directory.
        """
        if not environ.get(ADAPTERS):
            return None
        adapters = Path(environ[ADAPTERS]).absolute()
        if not adapters.is_dir():
            raise ValueError(f"{ADAPTERS} is {environ[ADAPTERS]!r}, which is no directory")
        cache = Path(environ[CACHE]) if environ.get(CACHE) else _user_cache(environ) / "vblora-serve" / "vllm"
        aliases = frozenset(filter(None, map(str.strip, environ.get(BASE_ALIAS, "").split(","))))
        # vLLM's workers get the path, and take one that is not absolute for a repository of the Hub.
        return cls(adapters, cache.absolute(), aliases)


def _user_cache(environ: Mapping[str, str]) -> Path:
    return Path(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else Path.home() / ".cache"
