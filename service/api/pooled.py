"""From a request's inputs to requests for the engine, for the routes that read texts once."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from service.api.deps import PooledServing, ServerState
from service.api.errors import ApiError
from service.api.field_names import FieldNames
from service.api.generation import timeout_of
from service.api.model_names import model_of, selection_spec
from service.api.openai import Envelope, system_fingerprint
from service.api.schemas.pooled import Item, PooledFields, TextPair
from service.api.selection import resolve
from service.engine.pooling.tokenizer import EncodedInput
from service.engine.selection import Selection
from service.engine.sequence import READ_ONCE, GenerationRequest

FIELDS = FieldNames("input", "truncate_prompt_tokens", "inputs", "input")
_CONTEXT = -1  # of truncate_prompt_tokens: as many as the context holds


def select(state: ServerState, tenant: str, body: PooledFields) -> Selection:
    """What the request runs with; reads the store."""
    return resolve(state, tenant, selection_spec(body.model, body, state.settings))


def envelope(state: ServerState, prefix: str, body: PooledFields, selection: Selection) -> Envelope:
    return Envelope(
        f"{prefix}-{uuid.uuid4().hex}",
        int(time.time()),
        body.model or model_of(selection, state.settings),
        system_fingerprint(state.base.fingerprint, selection),
    )


def requests_of(
    state: ServerState, tenant: str, body: PooledFields, answer: Envelope, selection: Selection
) -> list[GenerationRequest]:
    """One request to the engine for each input. Tokenizes: not for the event loop. Raises ApiError."""
    assert state.pooled is not None, "the route is for tasks that pool"
    limit = _limit(body.truncate_prompt_tokens, state.engine.max_context)
    texts = [_encode(state.pooled, i, item, limit) for i, item in enumerate(body.input)]
    vocabulary = state.tokenizer.vocabulary
    for i, text in enumerate(texts):
        if len(text.ids) > state.engine.max_context:
            raise ApiError(
                "context_length_exceeded",
                f"input {i} has {len(text.ids):,} tokens and the context is {state.engine.max_context:,}: shorten it, "
                "or have it cut with truncate_prompt_tokens",
                param="input",
            )
        if (highest := max(text.ids)) >= vocabulary:
            raise ApiError(
                "invalid_request",
                f"input {i} holds the token id {highest}, and the vocabulary ends with {vocabulary - 1}",
                param="input",
            )
    return [
        GenerationRequest(
            request_id=answer.id if len(texts) == 1 else f"{answer.id}-{i}",
            prompt_ids=text.ids,
            params=READ_ONCE,
            selection=selection,
            tenant=tenant,
            timeout_s=timeout_of(body.timeout_s, state.settings.request_timeout_s),
            task=state.task,
            token_types=text.types,
        )
        for i, text in enumerate(texts)
    ]


def _limit(asked: int | None, context: int) -> int | None:
    if asked == 0 or (asked is not None and asked > context):
        raise ApiError(
            "invalid_request",
            f"truncate_prompt_tokens is {asked}; it must be from 1 to the context of {context:,}, or -1 for all of it",
            param="truncate_prompt_tokens",
        )
    return context if asked == _CONTEXT else asked


def _encode(serving: PooledServing, index: int, item: Item, limit: int | None) -> EncodedInput:
    if isinstance(item, list):
        ids: Sequence[int] = item if limit is None else item[:limit]
        encoded = EncodedInput(tuple(ids))
    else:
        text, pair = (item.text, item.text_pair) if isinstance(item, TextPair) else (item, None)
        try:
            encoded = serving.encoder.encode(text, pair, limit=limit)
        except ValueError as error:
            raise ApiError("invalid_request", f"{error}: allow more", param="truncate_prompt_tokens") from error
    if not encoded.ids:
        raise ApiError("invalid_request", f"input {index} has no tokens: give at least one", param="input")
    return encoded
