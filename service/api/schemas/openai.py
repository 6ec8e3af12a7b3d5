"""What OpenAI's two generating routes share: their fields, as OpenAI and vLLM name them, and their common views.

OpenAI's clients send null for what is not set, so null means the default everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from service.api.schemas.common import RequestModel, ResponseModel, Text
from service.api.schemas.generate import MAX_CHOICES, MAX_STOPS, SelectionFields, Stop, UsageView
from service.api.schemas.receipt import RECEIPT_DESCRIPTION, ReceiptWanted
from service.engine.sequence import SamplingParams

MAX_BIASES = 1024
MAX_OPENAI_SEED = 2**63 - 1


def _bias(value: Any) -> Any:
    """{"50256": -100} as pairs of ints and floats. JSON's keys are strings."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_BIASES:
        raise ValueError(f"give an object of at most {MAX_BIASES:,} token ids and their biases")
    biases: dict[int, float] = {}
    for token_id, bias in value.items():
        if not (isinstance(token_id, str) and token_id.isascii() and token_id.isdecimal() and len(token_id) < 10):
            raise ValueError(f"{str(token_id)[:40]!r} is no token id: name tokens by their numbers")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {token_id} must be a number from -100 to 100")
        biases[int(token_id)] = float(bias)
    return biases


LogitBias = Annotated[dict[int, float], BeforeValidator(_bias, json_schema_input_type=dict[str, float] | None)]


class StreamOptions(RequestModel):
    include_usage: bool | None = Field(None, description="Ends the stream with an event that counts the tokens")
    include_obfuscation: bool | None = Field(None, description="Accepted, and of no effect: nothing is padded")


class JsonSchemaFormat(RequestModel):
    name: Text
    description: Text | None = None
    strict: bool | None = Field(None, description="Of no effect: a schema always holds")
    json_schema: dict[str, Any] | None = Field(None, alias="schema", description="Without it, any JSON object")


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class JsonSchemaResponseFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaResponseFormat, Field(discriminator="type")]


class PromptTokensDetails(ResponseModel):
    cached_tokens: int = Field(description="Found in the prefix cache instead of run")


class OpenAIUsage(UsageView):
    """Summed over a request's prompts, each counted once however many choices it has."""

    prompt_tokens_details: PromptTokensDetails


class OpenAIFields(SelectionFields):
    """`model` selects as well; with `adapter` or `adapters` it is the base's id, or says the same."""

    model: Text | None = Field(
        None, description="The base's id, an adapter's name, `name@sha256:<prefix>`, or a blend: `sql:0.7+style:0.3`"
    )
    temperature: float | None = Field(None, ge=0, description="0 is greedy; 1 by default")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 keep every token")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict, description="By token id, from -100 to 100")
    seed: int | None = Field(None, ge=-MAX_OPENAI_SEED, le=MAX_OPENAI_SEED)
    stop: Stop = Field(None, description=f"Up to {MAX_STOPS} strings; the text ends before the first that appears")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout_s: float | None = Field(None, gt=0, description="The server's own limit counts if it is lower")
    receipt: ReceiptWanted | None = Field(None, description=RECEIPT_DESCRIPTION)
    response_format: ResponseFormat | None = Field(None, description="Needs the server's extra `guided`")
    guided_json: dict[str, Any] | Text | None = Field(None, description="A JSON schema, as an object or as text")
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    user: Any = Field(None, description="Accepted, and of no effect; so are the fields below")
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def contradiction(self) -> tuple[str, str] | None:
        """(the field, what is wrong and what to do) if the fields, each valid, do not go together."""
        if self.stream_options is not None and not self.stream:
            return "stream_options", "stream_options are for streams: set stream, or leave them out"
        shapes = [name for name in _SHAPES if getattr(self, name) is not None]
        if len(shapes) > 1:
            return shapes[1], f"{' and '.join(shapes)} ask for different shapes of the output: give one of them"
        return None

    def params(
        self, max_new_tokens: int, *, logprobs: int | None = None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=_given(self.temperature, 1.0),
            top_p=_given(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(sorted(self.logit_bias.items())),
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


# One kind of structured output at a time. (A response_format of plain text asks for none, but says so in vain.)
_SHAPES = ("response_format", "guided_json", "guided_regex", "guided_choice")


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
