"""Receipts: what decided an answer, written so that anyone who has the weights can recompute it, and see a change.

The canonical form of a receipt is its JSON without `id`: keys sorted, no spaces, UTF-8, whole numbers without a
fraction (as a JSON library that knows no other numbers than floats writes them). `id` is the SHA-256 of that.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Final, TypeVar

from service import __version__
from service.api.deps import BaseInfo
from service.api.generation import ChoiceText, Gathered
from service.api.schemas.common import ResponseModel
from service.api.schemas.receipt import (
    Receipt,
    ReceiptBase,
    ReceiptChoice,
    ReceiptGrammar,
    ReceiptPrompt,
    ReceiptSampling,
    ReceiptVersions,
    ReceiptWanted,
)
from service.api.schemas.selected import SelectionView
from service.engine.events import FinishedEvent, TokenEvent
from service.engine.sequence import GenerationRequest, SamplingParams

FORMAT: Final = 1
_SEED_BITS = 52  # with the choices' numbers added still a whole number to JSON libraries that know only floats

Answer = TypeVar("Answer", bound=ResponseModel)


def canonical(fields: Mapping[str, Any]) -> bytes:
    """The canonical form of a receipt's JSON object. Raises ValueError for NaN and infinity, which JSON has not."""
    rest = {name: value for name, value in fields.items() if name != "id"}
    text = json.dumps(_plain(rest), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def id_of(fields: Mapping[str, Any]) -> str:
    """The `id` that a receipt's JSON object must have."""
    return _sha256(canonical(fields))


def hash_of_tokens(token_ids: Sequence[int]) -> str:
    """Over each id as 8 bytes, little endian, one after the other."""
    return _sha256(struct.pack(f"<{len(token_ids)}q", *token_ids))


def hash_of_grammar(source: str) -> str:
    return _sha256(source.encode())


def seeded(params: SamplingParams) -> SamplingParams:
    """With a seed, so that a receipt can name it; greedy ones need none."""
    if params.greedy or params.seed is not None:
        return params
    return replace(params, seed=secrets.randbits(_SEED_BITS))


class ReceiptWriter:
    """Writes one request's receipt, if it is wanted, into its whole answer or into the last event of its stream."""

    def __init__(self, base: BaseInfo, request: GenerationRequest, wanted: ReceiptWanted | None) -> None:
        """`full` writes the token ids too. A request that is to be sampled must have its seed."""
        self.wanted = bool(wanted)
        self._full = wanted == "full"
        self._base = base
        self._request = request
        self._token_ids: list[list[int]] = [[] for _ in range(request.n)]
        self._reasons = [""] * request.n

    def saw(self, event: TokenEvent) -> None:
        """More of a stream."""
        if self.wanted:
            self._token_ids[event.choice] += event.token_ids
            self._reasons[event.choice] = event.finish_reason or ""

    def last(self, event: Answer, finished: FinishedEvent) -> Answer:
        """The stream's last event with the receipt, once all of the others have been seen."""
        return self._onto(event, finished)

    def whole(self, answer: Answer, gathered: Gathered) -> Answer:
        """The whole answer with the receipt."""
        self._token_ids = [choice.token_ids for choice in gathered.choices]
        self._reasons = [_reason(choice) for choice in gathered.choices]
        return self._onto(answer, gathered.finished)

    def _onto(self, answer: Answer, finished: FinishedEvent) -> Answer:
        return answer.model_copy(update={"receipt": self._receipt(finished)}) if self.wanted else answer

    def _receipt(self, finished: FinishedEvent) -> Receipt:
        request, base = self._request, self._base
        receipt = Receipt(
            id="",
            format=FORMAT,
            request_id=request.request_id,
            created=int(time.time()),
            versions=_versions(),
            base=ReceiptBase(
                id=base.id,
                fingerprint=base.fingerprint,
                dtype=base.dtype,
                quantization=base.quantization,
                device=base.device,
                kv_backend=base.kv_backend,
            ),
            selection=SelectionView.of(request.selection, finished.mode),
            prompt=ReceiptPrompt(
                tokens=len(request.prompt_ids),
                sha256=hash_of_tokens(request.prompt_ids),
                token_ids=list(request.prompt_ids) if self._full else None,
            ),
            sampling=self._sampling(),
            choices=[self._choice(index) for index in range(request.n)],
        )
        return receipt.model_copy(update={"id": id_of(json.loads(receipt.model_dump_json()))})

    def _choice(self, index: int) -> ReceiptChoice:
        token_ids = self._token_ids[index]
        return ReceiptChoice(
            index=index,
            tokens=len(token_ids),
            sha256=hash_of_tokens(token_ids),
            finish_reason=self._reasons[index],
            token_ids=token_ids if self._full else None,
        )

    def _sampling(self) -> ReceiptSampling:
        params = self._request.params
        assert params.greedy or params.seed is not None, "a receipt names the seed"
        return ReceiptSampling(
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=dict(params.logit_bias),
            seed=params.seed,
            stop=list(params.stop),
            stop_token_ids=sorted(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            eos_token_ids=sorted(self._base.eos_token_ids),
            grammar=self._grammar(),
        )

    def _grammar(self) -> ReceiptGrammar | None:
        if self._request.grammar is None:
            return None
        source = self._request.grammar.source
        return ReceiptGrammar(sha256=hash_of_grammar(source), source=source if self._full else None)


def _versions() -> ReceiptVersions:
    return ReceiptVersions(
        vblora_serve=__version__,
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
    )


def _reason(choice: ChoiceText) -> str:
    assert choice.finish_reason is not None, "a whole answer's choices have ended"
    return choice.finish_reason


def _plain(value: Any) -> Any:
    """The same JSON value, whole numbers as ints."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
