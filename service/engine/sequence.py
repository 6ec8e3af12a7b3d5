"""A request as the engine takes it, and one choice of it as the engine runs it."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, auto

from service.engine.guide import Grammar
from service.engine.selection import Selection
from service.engine.task import Task


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep every token. The repetition penalty counts the tokens of the
    prompt too, the presence and frequency penalties only generated ones; `logit_bias` is added to the logits of the
    tokens that it names. `logprobs` None reports none, 0 the chosen token's, up to 20 the likeliest too, all of the raw
    distribution, before temperature, penalties and bias; `prompt_logprobs` likewise the prompt's own.
    """

    max_new_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def reshapes(self) -> bool:
        """Whether the logits are changed before a token is chosen, by more than temperature and cut-offs."""
        penalised = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return penalised or bool(self.logit_bias)


READ_ONCE = SamplingParams(max_new_tokens=0, temperature=0.0)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is submitted to the engine: one prompt, one selection, `n` choices. Choice i samples with seed + i.

    `timeout_s` is measured from submission; a request that outlives it fails with `request_timeout`. `grammar` is what
    every choice has to follow.

    Of a task that pools, the prompt is a text that is read once, `token_types` its tokens' types if it is a pair; `n`
    is 1 and `params` are READ_ONCE.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    selection: Selection
    n: int = 1
    tenant: str = ""
    timeout_s: float | None = None
    grammar: Grammar | None = None
    task: Task = Task.GENERATE
    token_types: tuple[int, ...] | None = None

    @property
    def final_length(self) -> RowLength:
        return RowLength(len(self.prompt_ids), self.params.max_new_tokens)

    @property
    def continued_ids(self) -> tuple[int, ...]:
        """What its output continues: the prompt, unless an encoder reads that."""
        return () if self.task is Task.SEQ2SEQ else self.prompt_ids


@dataclass(frozen=True, slots=True)
class RowLength:
    """The most tokens that a row may come to. Where an encoder reads the prompt, the two are kept apart."""

    prompt: int
    output: int

    @property
    def total(self) -> int:
        return self.prompt + self.output


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
    cached: int = 0  # those that were found

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
    def is_scored(self) -> bool:
        """Whether its prompt's log-probabilities are asked for: every token of it must be run. One choice does it."""
        return self.params.prompt_logprobs is not None and self.choice == 0

    @property
    def final_length(self) -> RowLength:
        """The most tokens that it may come to: what memory is reserved for."""
        return self.request.final_length

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
