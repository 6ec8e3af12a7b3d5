"""The settings in groups, for whoever reads the help of `serve` or docs/settings.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from service.settings import SETTINGS, Setting

GROUPS: Mapping[str, Sequence[str]] = {
    "the model": (
        "model", "task", "served_model_name", "base_alias", "device", "dtype", "quantization",
        "tensor_parallel", "threads", "pack_weights", "pooling", "normalize",
    ),
    "the address": ("host", "port", "cors_origin"),
    "adapters": (
        "data_dir", "adapter", "adapters_dir", "adapters_dir_interval_s", "allow_source", "resolve", "adapter_memory",
        "keep_versions",
    ),
    "several replicas": ("replicas",),
    "a store that servers share": ("store", "store_endpoint", "store_refresh_s", "store_cache"),
    "batches and memory": (
        "max_batch_size", "max_queue", "max_context", "kv_memory", "default_max_tokens", "prefill_tokens",
        "pooled_tokens", "prefix_cache", "auto_merge",
    ),
    "decoding on CUDA": ("decode_kernels", "decode_memory", "decode_graphs"),
    "limits": ("max_upload", "upload_timeout_s", "request_timeout_s", "drain_timeout_s", "source_timeout_s"),
    "access": ("api_key_file", "metrics_public"),
    "logs": ("log_format", "log_level", "log_prompts"),
}  # fmt: skip
OTHERS = "others"


def grouped() -> Iterator[tuple[str, list[Setting]]]:
    """Every setting once, under its group's title; those in no group come last."""
    by_name = {setting.name: setting for setting in SETTINGS}
    for title, names in GROUPS.items():
        yield title, [by_name.pop(name) for name in names]
    if by_name:
        yield OTHERS, list(by_name.values())
