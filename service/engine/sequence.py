"""A request as the engine takes it, and one choice of it as the engine runs it."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, auto

from service.engine.selection import Selection


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep every token. `logprobs` None reports none, 0 the chosen
    token's, up to 20 the likeliest too; they are of the raw distribution, before temperature and penalties.
    """

    max_new_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is submitted to the engine: one prompt, one selection, `n` choices. Choice i samples with seed + i.

    `timeout_s` is measured from submission; a request that outlives it fails with `request_timeout`.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    selection: Selection
    n: int = 1
    tenant: str = ""
    timeout_s: float | None = None


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. The engine's thread alone writes it. `arrival` orders those of one share."""

    request: GenerationRequest
    choice: int
    arrival: float = 0.0
    status: SequenceStatus = SequenceStatus.WAITING
    output_ids: list[int] = field(default_factory=list)
    prefilled: int = 0  # tokens of the prompt that have been run, or found in the prefix cache

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def selection(self) -> Selection:
        return self.request.selection

    @property
    def is_prefilling(self) -> bool:
        return self.prefilled < len(self.request.prompt_ids)

    @property
    def final_length(self) -> int:
        """The most tokens that it may come to, prompt included: what memory is reserved for."""
        return len(self.request.prompt_ids) + self.params.max_new_tokens

    @property
    def share(self) -> Hashable:
        """Whom its service is charged to: requests of one tenant for the same adapters share."""
        return self.request.tenant, tuple(digest for digest, _ in self.selection.key)

    @property
    def prefix_owner(self) -> Hashable:
        """What a key-value state depends on besides its tokens. A folded selection rounds differently in 16 bit."""
        return self.request.tenant, self.selection.key, self.selection.mode

    @property
    def last_token(self) -> int:
        return self.output_ids[-1]

    def all_ids(self) -> Seq[int]:
        return (*self.request.prompt_ids, *self.output_ids)
