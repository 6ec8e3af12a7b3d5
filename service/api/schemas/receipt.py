"""A receipt: what decided an answer, and hashes of the tokens that went in and came out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.api.schemas.common import ResponseModel
from service.api.schemas.selected import SelectionView
from service.engine.sequence import SamplingParams

ReceiptWanted = bool | Literal["full"]
RECEIPT_DESCRIPTION = (
    "Answers with a receipt, in a stream's last event: what decided the answer, and hashes of its token ids; `full` "
    "holds the ids themselves"
)


class ReceiptVersions(ResponseModel):
    vblora_serve: str
    python: str
    torch: str
    transformers: str


class ReceiptBase(ResponseModel):
    """The base model, and how it ran."""

    id: str
    fingerprint: str
    dtype: str
    quantization: str | None = None
    device: str
    kv_backend: str | None


class ReceiptPrompt(ResponseModel):
    """`sha256` is of the token ids, as are the choices': each as 8 bytes, little endian, one after the other."""

    tokens: int
    sha256: str
    token_ids: list[int] | None


class ReceiptGrammar(ResponseModel):
    """What the output was held to, as llguidance reads it. `sha256` is of the source's UTF-8."""

    sha256: str
    source: str | None


class ReceiptSampling(ResponseModel):
    """All that decides which tokens are chosen and when a choice ends. Choice i draws from seed + i."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int | None = Field(description="The one drawn by the server, if none was given; null: nothing was drawn")
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    eos_token_ids: list[int]
    grammar: ReceiptGrammar | None

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


class ReceiptChoice(ResponseModel):
    """One choice's output, EOS included; never the echoed prompt."""

    index: int
    tokens: int
    sha256: str
    finish_reason: str
    token_ids: list[int] | None


class Receipt(ResponseModel):
    """`id` is the hash of all the rest in its canonical form, so that a change is noticed; it is no signature."""

    id: str
    format: Literal[1]
    request_id: str
    created: int
    versions: ReceiptVersions
    base: ReceiptBase
    selection: SelectionView
    prompt: ReceiptPrompt
    sampling: ReceiptSampling
    choices: list[ReceiptChoice]
