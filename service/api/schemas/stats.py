"""One moment of the server, and who asks."""

from __future__ import annotations

from pydantic import Field

from service.api.keys import Scope
from service.api.schemas.common import ResponseModel


class BatchPart(ResponseModel):
    """Rows of the batch that run the same."""

    selection: str | None = Field(
        description="`base`, an adapter's name, or `name:weight+…`; null: what other tenants run, together"
    )
    rows: int


class LatencyView(ResponseModel):
    """Percentiles, in seconds, of the latencies of the last 60 s, at most the newest 1,024; null of none."""

    count: int
    p50: float | None
    p95: float | None


class Latencies(ResponseModel):
    """Times to the first token, between two tokens of one choice, and of whole requests that ran to their end."""

    first_token_s: LatencyView
    inter_token_s: LatencyView
    total_s: LatencyView


class Memory(ResponseModel):
    """In bytes. `process_bytes` is the process's resident memory, null where the operating system does not tell.

    `device_bytes` is what PyTorch has reserved of a device's own memory, null on a CPU. The others are parts of these:
    the base model's weights; keys and values of what runs, of `kv_budget_bytes`, and of the prefix cache; adapters as
    they are kept, and composed.
    """

    process_bytes: int | None
    device_bytes: int | None
    weight_bytes: int
    kv_bytes: int
    kv_budget_bytes: int
    prefix_bytes: int
    adapter_compact_bytes: int
    adapter_factor_bytes: int


class ServerLimits(ResponseModel):
    """`max_context` in tokens, the others in choices. A few more rows than `max_batch_size` may run: those held in
    reserve for selections that have none.
    """

    max_batch_size: int
    max_queue: int
    max_context: int


class StatsView(ResponseModel):
    """One moment of the server; tokens are counted since its start, `prompt_tokens` with those found in the cache.

    To the key of a tenant other than the shared one, what is everybody's is null and `batch` has its own rows alone,
    unless the metrics are public.
    """

    time: float = Field(description="Unix time in seconds")
    uptime_s: float
    state: str = Field(description="`ready`, `draining`, `stopped` or `dead`")
    queue_depth: int | None
    running: int | None
    distinct_adapters: int | None
    batch: list[BatchPart] = Field(description="The most rows first")
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    latency: Latencies | None
    memory: Memory | None
    limits: ServerLimits


class Identity(ResponseModel):
    """`tenant` is empty for the shared one, as without keys; `scopes` are what the key allows."""

    tenant: str
    scopes: list[Scope]
    keys_required: bool
    task: str = Field(description="`generate`, `seq2seq`, `classify` or `embed`")
