"""What the routes work with: everything is built before the app and handed to it as one ServerState."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import anyio
from fastapi import Depends, Request

from adapters.registry import AdapterRegistry
from adapters.store import SHARED, Store
from adapters.targets import BaseModules
from service.api.activity import Activity
from service.api.bucket_ids import BucketPattern
from service.api.errors import ApiError
from service.api.guidance import Guidance
from service.api.hub_ids import HubPattern
from service.api.keys import KeyRing, key_of
from service.api.resolver import AdapterResolver
from service.engine.errors import WrongTask
from service.engine.events import Usage
from service.engine.pooling.tokenizer import EncodedInput
from service.engine.seam import Engine
from service.engine.selection import BASE, Selection
from service.engine.task import Task

_REGISTRATIONS_AT_ONCE = 4  # each holds a whole checkpoint in memory
_NOT_CONTINUED = (
    "this server was started with --task seq2seq: its encoder reads a prompt and its decoder writes a text of its own, "
    "by /v1/generate and /v1/completions. For this route, use a server that was started with --task generate"
)
_DESCRIPTIONS_AT_ONCE = 2  # as registrations do; apart from them, since those who only look must not hold up uploads
_FETCHES_AT_ONCE = 8  # each may wait long for a network: not in the threads that all requests share


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """The settings that the HTTP layer reads.

    `base_names` are the names that mean the base model, `served_model_name` among them. `max_upload_bytes` bounds the
    body of an upload, `max_body_bytes` every other body; the timeouts beside them are for receiving it whole.
    `request_timeout_s` bounds generation; a request may ask for less. `default_max_tokens` bounds the answers of chats
    that name no bound. Adapters may be read from the directories in `allow_source`, the repositories that
    `allow_hub` covers and the places in buckets, at `s3_endpoint` if not Amazon's, that `allow_buckets` covers; from
    either within `source_timeout_s`. With `log_prompts` the access log gets prompts and outputs.
    """

    served_model_name: str
    base_names: frozenset[str]
    max_upload_bytes: int = 256 << 20
    upload_timeout_s: float = 600.0
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 60.0
    request_timeout_s: float | None = None
    default_max_tokens: int = 1024
    allow_source: tuple[Path, ...] = ()
    allow_hub: tuple[HubPattern, ...] = ()
    allow_buckets: tuple[BucketPattern, ...] = ()
    s3_endpoint: str | None = None
    source_timeout_s: float = 60.0
    metrics_public: bool = False
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False

    def means_base(self, name: str) -> bool:
        return name == BASE or name in self.base_names


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base model as responses describe it. `created` is a Unix time; `kv_backend` what the engine chose.

    `parameters` counts what the weights stand for, `weight_bytes` what they take; `quantization` names how they are
    stored, None for plainly. Of its weights each of `shards` processes holds a part. `eos_token_ids` end a choice
    unless the request ignores them.
    """

    id: str
    model_type: str
    parameters: int
    dtype: str
    device: str
    fingerprint: str
    modules: BaseModules
    created: int
    kv_backend: str | None = None
    weight_bytes: int = 0
    quantization: str | None = None
    eos_token_ids: frozenset[int] = frozenset()
    shards: int = 1

    @property
    def unfoldable(self) -> str | None:
        """Why no selection can be folded into its weights; None if any can."""
        if self.quantization is not None:
            return f"the base model is quantized ({self.quantization})"
        return f"the base model is held in {self.shards} parts (--tensor-parallel)" if self.shards > 1 else None


class InputEncoder(Protocol):
    """Texts as a task that pools reads them. May be called from any thread."""

    def encode(self, text: str, pair: str | None = None, *, limit: int | None = None) -> EncodedInput:
        """Token ids, special ones included, at most `limit`. Raises ValueError for a limit that holds no text."""
        ...


@dataclass(frozen=True, slots=True)
class PooledServing:
    """What a server has that reads texts once. `labels` and `problem_type` are the base's own, if its config has any;
    `normalize` says whether embeddings, of `width` numbers, are of length 1.
    """

    encoder: InputEncoder
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    normalize: bool = True
    width: int = 0


class Tokenizer(Protocol):
    """The base model's tokenizer. Every method may be called from any thread.

    `vocabulary` counts the model's token ids, of which the tokenizer may know fewer.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own, to look into; several named ones one after another."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text, through `template` or the tokenizer's own. Raises ChatTemplateError."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds of itself unless told not to."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def entries(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them, which is not always text: `Ġthe`."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether it stands for no text of its own, as EOS does."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens included."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that the token adds to a text, which may be part of a character; None if that cannot be told."""
        ...


class RequestMetrics(Protocol):
    """Where requests are counted, whatever they ask for. Every method may be called from any thread."""

    def observe_request(self, route: str, code: int, seconds: float) -> None:
        """One response: the route's template (`unmatched` for none), the HTTP status, and the time it took."""
        ...

    def count_error(self, code: str) -> None:
        """One error answered, by the `code` of its envelope."""
        ...


class Metrics(RequestMetrics, Protocol):
    """Where the HTTP layer counts. Every method may be called from any thread."""

    def render(self, reader: str | None) -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type; as that tenant may see them, None: anyone."""
        ...

    def count_usage(self, tenant: str, usage: Usage) -> None:
        """One request that has ended without failing, on its tenant's account."""
        ...

    def count_generation(self, selection: Selection, tenant: str) -> None:
        """One request that the engine has accepted, by what it runs with."""
        ...

    def observe_first_token(self, seconds: float) -> None:
        """From a request's submission to its first token."""
        ...

    def observe_inter_token(self, seconds: float) -> None:
        """Between two tokens of one choice."""
        ...

    def observe_generation(self, queue_s: float, total_s: float) -> None:
        """A request that ran to its end: what it waited of the time it took."""
        ...

    def count_finished(self, reason: str, choices: int) -> None:
        """Choices that ended: a FinishReason's value, or `failed`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ServerState:
    """Everything that a request may need.

    `registering` bounds how many uploads are checked at once, `fetching` how many sources are read for requests,
    `describing` how many checkpoints are looked into.
    `resolver` looks unknown names up, if the server is to. `pooled` is there if the server's `task` pools.
    """

    settings: ApiSettings
    store: Store
    registry: AdapterRegistry
    engine: Engine
    tokenizer: Tokenizer
    base: BaseInfo
    metrics: Metrics
    guidance: Guidance
    resolver: AdapterResolver | None = None
    task: Task = Task.GENERATE
    pooled: PooledServing | None = None
    keys: KeyRing = field(default_factory=KeyRing)
    activity: Activity = field(default_factory=Activity)
    registering: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(_REGISTRATIONS_AT_ONCE))
    fetching: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(_FETCHES_AT_ONCE))
    describing: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(_DESCRIPTIONS_AT_ONCE))


async def server_state(request: Request) -> ServerState:
    """The app's state. Async, because FastAPI runs other dependencies in a thread."""
    state: ServerState = request.app.state.server
    return state


async def check_room(state: Annotated[ServerState, Depends(server_state)]) -> None:
    """Refuses a generation while the queue is full: before its body is looked at, which would cost far more."""
    state.engine.check_room()


def serves(*tasks: Task) -> Any:
    """A dependency of routes that a server of another task refuses, before anything else."""

    async def check(state: Annotated[ServerState, Depends(server_state)]) -> None:
        if state.task in tasks:
            return
        if state.task is Task.SEQ2SEQ and tasks == (Task.GENERATE,):
            raise ApiError(WrongTask.code, _NOT_CONTINUED)
        raise WrongTask(tasks[0], state.task)

    return Depends(check)


async def tenant_of(request: Request) -> str:
    """Whose adapters the request sees and changes: its key's tenant, the shared one without keys."""
    key = key_of(request.scope)
    return SHARED if key is None else key.tenant


State = Annotated[ServerState, Depends(server_state)]
Tenant = Annotated[str, Depends(tenant_of)]
HAS_ROOM = Depends(check_room)
CONTINUES = serves(Task.GENERATE)  # what goes before
GENERATES = serves(Task.GENERATE, Task.SEQ2SEQ)
