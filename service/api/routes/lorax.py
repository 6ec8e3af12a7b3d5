"""POST /generate and /generate_stream, as LoRAX's clients know them."""

from __future__ import annotations

import secrets
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.deps import CONTINUES, HAS_ROOM, ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.field_names import FieldNames
from service.api.generation import encode_prompt, new_generation_id
from service.api.lorax import LoraxWriter
from service.api.respond import respond
from service.api.schemas.common import streaming_responses
from service.api.schemas.lorax import LoraxParameters, LoraxRequest, LoraxResponse
from service.api.selection import resolve
from service.engine.guide import Grammar
from service.engine.sequence import GenerationRequest

router = APIRouter(tags=["lorax"])

_FIELDS = FieldNames("inputs", "parameters.max_new_tokens")
_RESPONSES = streaming_responses("The text; in a stream, an event for each token")


@router.post("/generate", response_model=LoraxResponse, responses=_RESPONSES, dependencies=[CONTINUES, HAS_ROOM])
async def lorax_generate(
    body: LoraxRequest, request: Request, response: Response, state: State, tenant: Tenant
) -> object:
    """Generates as LoRAX does. `adapter_id` and the ids of `merged_adapters` are names of registered adapters."""
    writer = await to_thread.run_sync(partial(_prepare, state, tenant, body, body.stream))
    return await respond(request, response, state, [writer.request], writer, stream=body.stream, fields=_FIELDS)


@router.post("/generate_stream", response_class=Response, responses=_RESPONSES, dependencies=[CONTINUES, HAS_ROOM])
async def lorax_generate_stream(
    body: LoraxRequest, request: Request, response: Response, state: State, tenant: Tenant
) -> object:
    """The same as server-sent events, one for each token."""
    writer = await to_thread.run_sync(partial(_prepare, state, tenant, body, True))
    return await respond(request, response, state, [writer.request], writer, stream=True, fields=_FIELDS)


def _prepare(state: ServerState, tenant: str, body: LoraxRequest, stream: bool) -> LoraxWriter:
    """Reads the store, tokenizes and compiles: not for the event loop."""
    asked = body.parameters
    _refuse(asked, stream)
    prompt_ids = encode_prompt(state.tokenizer, body.inputs)
    alternatives = asked.return_k_alternatives or 0
    with_details = bool(asked.details or asked.decoder_input_details)
    request = GenerationRequest(
        request_id=new_generation_id(),
        prompt_ids=prompt_ids[-asked.truncate :] if asked.truncate else prompt_ids,
        params=asked.sampling(
            secrets.randbits(62) if asked.seed is None else asked.seed,
            logprobs=alternatives if with_details or stream else None,
            prompt_logprobs=0 if asked.decoder_input_details else None,
        ),
        selection=resolve(state, tenant, asked.selection_spec()),
        tenant=tenant,
        timeout_s=state.settings.request_timeout_s,
        grammar=_grammar(state, asked),
    )
    before = body.inputs if asked.return_full_text else ""
    return LoraxWriter(request, state.tokenizer, before, with_details, alternatives)


def _refuse(asked: LoraxParameters, stream: bool) -> None:
    """Raises ApiError for what is not offered."""
    refusal = asked.refusal()
    if refusal is None and stream and asked.decoder_input_details:
        refusal = "decoder_input_details", "a stream has no room for the prompt's details: leave one of the two out"
    if refusal is not None:
        raise ApiError("invalid_request", refusal[1], param=f"parameters.{refusal[0]}")


def _grammar(state: ServerState, asked: LoraxParameters) -> Grammar | None:
    wanted, param = asked.response_format, "parameters.response_format"
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return state.guidance.json_object(param=param)
    return state.guidance.json_schema(wanted.json_schema, param=param)
