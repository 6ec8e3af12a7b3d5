"""LoRAX's POST /generate and /generate_stream: what they take and what they answer.

LoRAX's clients send null for what is not set, so null means the default everywhere. Fields that cannot be honoured are
accepted with the values that ask for nothing: a request that worked before is never answered differently in silence.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field

from service.api.schemas.common import RequestModel, ResponseModel, Text
from service.api.schemas.generate import MAX_LOGPROBS, MAX_SEED, MAX_STOPS, Stop
from service.engine.selection import BASE, SelectionSpec, WeightedName
from service.engine.sequence import SamplingParams

_BASE_IDS = frozenset({"", "__base_model__"})  # what LoRAX's clients call the base model
_LINEAR = "linear"


class MergedAdapters(RequestModel):
    """A blend. `density` and `majority_sign_method` belong to strategies other than `linear`."""

    ids: list[Text] = Field(min_length=1)
    weights: list[float] = Field(default_factory=list, description="One for each id; all 1 by default")
    merge_strategy: Text | None = Field(None, description="`linear`: the exact sum of weight · delta")
    density: float = Field(0.0, ge=0, le=1)
    majority_sign_method: Literal["total", "frequency"] | None = None

    def parts(self) -> list[WeightedName]:
        weights = self.weights or [1.0] * len(self.ids)
        return [WeightedName(name, weight) for name, weight in zip(self.ids, weights, strict=True)]


class LoraxResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class LoraxParameters(RequestModel):
    """Sampling happens with `do_sample`, or with a temperature, top_k or top_p that asks for it; else it is greedy."""

    adapter_id: Text | None = Field(
        None, description="An adapter's name, `name@sha256:<prefix>`, or the base's id; by default the active adapter"
    )
    adapter_source: Text | None = Field(None, description="`local`: adapters are those that are registered here")
    merged_adapters: MergedAdapters | None = None
    api_token: Text | None = Field(None, description="Accepted, and of no effect: nothing is downloaded")
    max_new_tokens: int | None = Field(None, ge=1, description="20 by default")
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, description="0 is greedy; 1 by default")
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1, description="Not offered: 1 or null")
    repetition_penalty: float | None = Field(None, gt=0)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stop: Stop = Field(None, description=f"Up to {MAX_STOPS} strings; the text ends before the first that appears")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    ignore_eos_token: bool | None = None
    truncate: int | None = Field(None, ge=1, description="Keeps so many of the prompt's last tokens")
    return_full_text: bool | None = Field(None, description="Puts the prompt before the generated text")
    details: bool | None = None
    decoder_input_details: bool | None = Field(None, description="The prompt's log-probabilities, and `details`")
    return_k_alternatives: int | None = Field(
        None, ge=1, le=MAX_LOGPROBS, description="So many of each position's likeliest tokens"
    )
    response_format: LoraxResponseFormat | None = Field(None, description="Needs the server's extra `guided`")
    best_of: int | None = Field(None, ge=1, description="Not offered: 1 or null")
    watermark: bool | None = Field(None, description="Not offered: false or null")
    apply_chat_template: bool | None = Field(None, description="Not offered: false or null")

    @property
    def samples(self) -> bool:
        asks = self.do_sample or self.temperature not in (None, 1.0) or self.top_k or self.top_p not in (None, 1.0)
        return bool(asks) and self.temperature != 0.0

    def refusal(self) -> tuple[str, str] | None:
        """(the field, what is wrong and what to do) if the fields, each valid, ask for what is not offered."""
        if self.typical_p not in (None, 1.0):
            return "typical_p", "typical sampling is not offered: leave typical_p out, or use top_p"
        if self.best_of not in (None, 1):
            return "best_of", "best_of is not offered: leave it out, or use n of /v1/generate and choose yourself"
        if self.watermark:
            return "watermark", "watermarks are not offered: leave watermark out"
        if self.apply_chat_template:
            return "apply_chat_template", "this route takes prompts as they are: use /v1/chat/completions"
        if self.adapter_source not in (None, "local"):
            return "adapter_source", "adapters are those that are registered here: leave adapter_source out, or 'local'"
        return self._refused_blend()

    def _refused_blend(self) -> tuple[str, str] | None:
        merged = self.merged_adapters
        if merged is None:
            return None
        if self.adapter_id is not None:
            return "merged_adapters", "give either adapter_id or merged_adapters, not both"
        if (merged.merge_strategy or _LINEAR).lower() != _LINEAR:
            return "merged_adapters.merge_strategy", "only the merge_strategy 'linear' is offered, which is exact"
        if merged.weights and len(merged.weights) != len(merged.ids):
            return "merged_adapters.weights", f"give one weight for each of the {len(merged.ids)} ids, or none"
        return None

    def selection_spec(self) -> SelectionSpec:
        """Raises InvalidSelection."""
        if self.merged_adapters is not None:
            return SelectionSpec.of(None, self.merged_adapters.parts())
        return SelectionSpec.of(BASE if self.adapter_id in _BASE_IDS else self.adapter_id, None)

    def sampling(self, seed: int | None, *, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=self.max_new_tokens or 20,
            temperature=(1.0 if self.temperature is None else self.temperature) if self.samples else 0.0,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=seed,
            stop=tuple(stop),
            ignore_eos=bool(self.ignore_eos_token),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class LoraxRequest(RequestModel):
    inputs: Text
    parameters: LoraxParameters = Field(default_factory=partial(LoraxParameters.model_validate, {}))
    stream: bool = Field(False, description="Answers as /generate_stream does")


class LoraxPrefillToken(ResponseModel):
    """One token of the prompt. The first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class LoraxAlternative(ResponseModel):
    id: int
    text: str
    logprob: float


class LoraxToken(LoraxAlternative):
    """One generated token. In a stream `text` is what it adds to the text; special tokens are no part of that."""

    special: bool
    skipped: bool = Field(False, description="Nothing is generated ahead, so nothing is skipped")
    alternative_tokens: list[LoraxAlternative] | None = None


LoraxFinishReason = Literal["length", "eos_token", "stop_sequence"]


class LoraxStreamDetails(ResponseModel):
    """`seed` is null if nothing was left to chance."""

    finish_reason: LoraxFinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int = 0
    seed: int | None


class LoraxDetails(LoraxStreamDetails):
    prefill: list[LoraxPrefillToken]
    tokens: list[LoraxToken]


class LoraxResponse(ResponseModel):
    generated_text: str
    details: LoraxDetails | None


class LoraxEvent(ResponseModel):
    """One event of a stream. The last one has the whole text and, if they were asked for, details."""

    token: LoraxToken
    generated_text: str | None
    details: LoraxStreamDetails | None
