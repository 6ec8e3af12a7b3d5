"""What both of OpenAI's generating routes do: the request made out for the engine, and what every answer carries."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.deps import ServerState
from service.api.errors import ApiError
from service.api.generation import timeout_of
from service.api.model_names import model_of, selection_spec
from service.api.receipt import seeded
from service.api.schemas.openai import OpenAIFields, OpenAIUsage, PromptTokensDetails
from service.api.selection import resolve
from service.engine.events import Usage
from service.engine.guide import Grammar
from service.engine.selection import Selection
from service.engine.sequence import GenerationRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that every answer, and every event of a stream, begins with. `created` is a Unix time."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self) -> dict[str, Any]:
        names = ("id", "created", "model", "system_fingerprint")
        return {name: getattr(self, name) for name in names}


def select(state: ServerState, tenant: str, body: OpenAIFields) -> Selection:
    """What the request runs with; reads the store. Raises ApiError first if its fields do not go together."""
    if (wrong := body.contradiction()) is not None:
        raise ApiError("invalid_request", wrong[1], param=wrong[0])
    return resolve(state, tenant, selection_spec(body.model, body, state.settings))


def envelope(state: ServerState, prefix: str, body: OpenAIFields, selection: Selection) -> Envelope:
    return Envelope(
        f"{prefix}-{uuid.uuid4().hex}",
        int(time.time()),
        body.model or model_of(selection, state.settings),
        system_fingerprint(state.base.fingerprint, selection),
    )


def system_fingerprint(base: str, selection: Selection) -> str:
    """Names the weights that answered: the base's fingerprint, and 12 digits for the adapters with their weights."""
    if selection.is_base:
        return f"vblora-{base}"
    adapters = selection.header
    digits = adapters.removeprefix("sha256:") if ":" not in adapters.removeprefix("sha256:") else _hash(adapters)
    return f"vblora-{base}-{digits[:12]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def generations(
    state: ServerState,
    tenant: str,
    body: OpenAIFields,
    answer: Envelope,
    selection: Selection,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    grammar: Grammar | None = None,
) -> list[GenerationRequest]:
    """One request to the engine for each prompt."""
    return [
        GenerationRequest(
            request_id=answer.id if len(prompts) == 1 else f"{answer.id}-{i}",
            prompt_ids=prompt_ids,
            params=seeded(params) if body.receipt else params,
            selection=selection,
            n=body.choices,
            tenant=tenant,
            timeout_s=timeout_of(body.timeout_s, state.settings.request_timeout_s),
            grammar=grammar,
            task=state.task,
        )
        for i, prompt_ids in enumerate(prompts)
    ]


def usage_of(usages: Iterable[Usage]) -> OpenAIUsage:
    """The sum over a request's prompts."""
    counted = list(usages)
    return OpenAIUsage(
        prompt_tokens=sum(usage.prompt_tokens for usage in counted),
        completion_tokens=sum(usage.completion_tokens for usage in counted),
        total_tokens=sum(usage.total_tokens for usage in counted),
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in counted)),
    )
