"""A LoRA-resolver plugin for vLLM: it serves VB-LoRA adapters from a directory, each as its exact plain LoRA.

vLLM calls `register` in every process that it starts (entry points in the group `vllm.general_plugins`). Nothing else
of this project imports this package, and only `vblora_vllm.resolver` knows vLLM. Written against the interface of
vLLM 0.33.0 and tested against that; not yet run on vLLM itself. docs/export.md is for its users.
"""

from __future__ import annotations


def register() -> None:
    """Registers the resolver, if VBLORA_VLLM_ADAPTERS names a directory; once, however often it is called.

    Raises ValueError for settings that cannot be right, which keeps vLLM from starting.
    """
    from vblora_vllm.settings import PluginSettings

    settings = PluginSettings.from_environ()
    if settings is not None:
        from vblora_vllm.resolver import register_resolver

        register_resolver(settings)
