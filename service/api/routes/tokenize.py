"""POST /tokenize and /detokenize, as vLLM's clients know them."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.chat import render_chat, template_of
from service.api.deps import ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.model_names import selection_spec
from service.api.schemas.common import error_responses
from service.api.schemas.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from service.api.selection import resolve

router = APIRouter(tags=["tokenize"])


@router.post("/tokenize", responses=error_responses(400, 401, 404, 413))
def tokenize(body: TokenizeRequest, state: State, tenant: Tenant) -> TokenizeResponse:
    """The token ids of a prompt, or of a conversation after the chat template."""
    tokens = _encode(state, tenant, body)
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=state.engine.max_context,
        tokens=tokens,
        token_strs=state.tokenizer.entries(tokens) if body.return_token_strs else None,
    )


@router.post("/detokenize", responses=error_responses(400, 401, 413))
def detokenize(body: DetokenizeRequest, state: State) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    vocabulary = state.tokenizer.vocabulary
    if unknown := [token for token in body.tokens if token >= vocabulary]:
        raise ApiError(
            "invalid_request",
            f"token {unknown[0]} is not in the vocabulary: ids are below {vocabulary:,}",
            param="tokens",
        )
    return DetokenizeResponse(prompt=state.tokenizer.decode(body.tokens, skip_special_tokens=False))


def _encode(state: ServerState, tenant: str, body: TokenizeRequest) -> list[int]:
    """Raises ApiError for fields that do not go together, and what an unknown selection or template raises."""
    if (wrong := body.contradiction()) is not None:
        raise ApiError("invalid_request", wrong[1], param=wrong[0])
    selection = resolve(state, tenant, selection_spec(body.model, body, state.settings))
    if body.prompt is not None:
        return state.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    return render_chat(
        state,
        template_of(state, selection),
        body.messages or [],
        tools=body.tools,
        add_generation_prompt=not body.continue_final_message and body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
    )
