"""POST /v1/generate: what it takes and what it answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from service.api.schemas.common import RequestModel, ResponseModel, Text, check_text
from service.api.schemas.receipt import RECEIPT_DESCRIPTION, Receipt, ReceiptWanted
from service.api.schemas.selected import SelectionView
from service.engine.events import Timing, Usage
from service.engine.selection import SelectionSpec, WeightedName
from service.engine.sequence import SamplingParams

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


def _prompt(value: Any) -> Any:
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, list) and all(type(i) is int and i >= 0 for i in value):
        return value
    raise ValueError("give a string, or a list of token ids (whole numbers of at least 0)")


def _stop(value: Any) -> Any:
    stops = value if isinstance(value, list) else [value]
    if value is None:
        return value
    if len(stops) <= MAX_STOPS and all(isinstance(stop, str) and check_text(stop) for stop in stops):
        return value
    raise ValueError(f"give a string, or a list of at most {MAX_STOPS} strings, none of them empty")


Prompt = Annotated[str | list[int], BeforeValidator(_prompt)]
Stop = Annotated[str | list[str] | None, BeforeValidator(_stop)]


class BlendPart(RequestModel):
    """One adapter of a blend."""

    name: Text = Field(description="An adapter's name, or `name@sha256:<prefix>` for one version of it")
    weight: float = 1.0


class SelectionFields(RequestModel):
    """What a request runs with. Without `adapter` and `adapters`: the active adapter if there is one, else the base."""

    adapter: Text | None = Field(None, description="An adapter's name, `name@sha256:<prefix>`, or `base`")
    adapters: list[BlendPart] | None = Field(None, description="A blend: the sum of weight · delta")
    mode: Literal["switch", "merge"] | None = Field(
        None, description="`merge` prefers the selection folded into the base weights"
    )

    def selection_spec(self) -> SelectionSpec:
        """Raises InvalidSelection for fields that contradict each other."""
        parts = None if self.adapters is None else [WeightedName(part.name, part.weight) for part in self.adapters]
        return SelectionSpec.of(self.adapter, parts, self.mode)


class GenerateRequest(SelectionFields):
    prompt: Prompt = Field(description="Text, or token ids")
    max_new_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps every token")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Choice i samples with seed + i")
    stop: Stop = Field(None, description=f"Up to {MAX_STOPS} strings; the text ends before the first that appears")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="0: the chosen token's; more: as many likeliest tokens too"
    )
    echo: bool = Field(False, description="Puts the prompt before each choice's text and token ids")
    stream: bool = False
    receipt: ReceiptWanted = Field(False, description=RECEIPT_DESCRIPTION)
    timeout_s: float | None = Field(None, gt=0, description="The server's own limit counts if it is lower")

    def sampling(self) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


class LikelyToken(ResponseModel):
    token_id: int
    token: str
    logprob: float


class TokenLogprobView(LikelyToken):
    """One generated token, and the likeliest tokens of its position, in the raw distribution."""

    top: list[LikelyToken]


class ChoiceView(ResponseModel):
    """One choice, or, in a stream, what is new of it. `logprobs` covers the generated tokens, never the echoed ones."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobView] | None


class UsageView(ResponseModel):
    """The prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> UsageView:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class TimingView(ResponseModel):
    queue_s: float
    first_token_s: float
    total_s: float

    @classmethod
    def of(cls, timing: Timing) -> TimingView:
        return cls(queue_s=timing.queue_s, first_token_s=timing.first_token_s, total_s=timing.total_s)


class GenerateResponse(ResponseModel):
    id: str
    model: str
    selection: SelectionView
    choices: list[ChoiceView]
    usage: UsageView
    timing: TimingView
    receipt: Receipt | None = None


class GenerateDelta(ResponseModel):
    """One event of a stream. The last one carries selection, usage, timing, receipt; the others leave them out."""

    id: str
    model: str
    choices: list[ChoiceView]
    selection: SelectionView | None = None
    usage: UsageView | None = None
    timing: TimingView | None = None
    receipt: Receipt | None = None
