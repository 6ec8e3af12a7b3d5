"""What is seen of the requests that generate: for the metrics as it happens, for the access line when all is over.

Every EventStream needs an Observation, so that no route that generates can be forgotten. Prompts and outputs are kept
only if the settings ask for them in the log.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.types import Scope

from service.api.deps import Metrics, ServerState
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from service.engine.selection import BASE, Selection
from service.engine.sequence import GenerationRequest

Prompt = str | Sequence[int]


def observe(
    state: ServerState, scope: Scope, request: GenerationRequest, *, prompt: Prompt, stream: bool
) -> Observation:
    """Begins the observation of a request that is about to be submitted, on behalf of an HTTP request.

    `prompt` is the text that was encoded, or the token ids that came instead of one.
    """
    observation = Observation(request, state.metrics, stream=stream)
    if state.settings.log_prompts:
        observation.keep_texts(prompt)
    scope["state"].setdefault("observations", []).append(observation)
    return observation


class Observation:
    """One request on its way. Used on the event loop alone; moments are of `time.monotonic`."""

    def __init__(self, request: GenerationRequest, metrics: Metrics, *, stream: bool) -> None:
        self.request = request
        self.stream = stream
        self.completion_tokens = 0
        self.first_token_s: float | None = None
        self.finish_reasons: dict[int, FinishReason] = {}  # by choice
        self.finished: FinishedEvent | None = None
        self.prompt: Prompt | None = None
        self._metrics = metrics
        self._began = time.monotonic()
        self._latest: dict[int, float] = {}  # when a choice's last token came
        self._texts: list[list[str]] | None = None

    def keep_texts(self, prompt: Prompt) -> None:
        """Keeps the prompt and every choice's output, for a log that is to have them."""
        self.prompt = prompt if isinstance(prompt, str) else list(prompt)
        self._texts = [[] for _ in range(self.request.n)]

    @property
    def outputs(self) -> list[str] | None:
        """The choices' texts so far; None unless they are kept."""
        return None if self._texts is None else ["".join(parts) for parts in self._texts]

    def accepted(self) -> None:
        self._metrics.count_generation(self.request.selection, self.request.tenant)

    def saw(self, event: Event, moment: float) -> None:
        """One event, which the engine delivered at that moment."""
        match event:
            case TokenEvent():
                self._saw_token(event, moment)
            case FinishedEvent(timing=timing):
                self.finished = event
                if FinishReason.CANCELLED not in self.finish_reasons.values():
                    self._metrics.observe_generation(timing.queue_s, timing.total_s)
            case FailedEvent():
                self._metrics.count_finished("failed", self.request.n - len(self.finish_reasons))

    def _saw_token(self, event: TokenEvent, moment: float) -> None:
        if event.token_ids:
            self.completion_tokens += len(event.token_ids)
            if self.first_token_s is None:
                self.first_token_s = moment - self._began
                self._metrics.observe_first_token(self.first_token_s)
            if event.choice in self._latest:
                self._metrics.observe_inter_token(moment - self._latest[event.choice])
            self._latest[event.choice] = moment
        if self._texts is not None:
            self._texts[event.choice].append(event.text)
        if event.finish_reason is not None:
            self.finish_reasons[event.choice] = event.finish_reason
            self._metrics.count_finished(event.finish_reason, 1)


def access_fields(observations: Sequence[Observation]) -> dict[str, Any]:
    """What the access line says of the generations of one HTTP request; nothing if it asked for none.

    Several prompts are several generations: tokens are summed, of each time the longest counts. What a client left
    behind, or what failed, is told as far as it came.
    """
    if not observations:
        return {}
    first = observations[0].request
    finished = [observation.finished for observation in observations if observation.finished is not None]
    reasons = [reason for observation in observations for _, reason in sorted(observation.finish_reasons.items())]
    return {
        "generation_id": ",".join(observation.request.request_id for observation in observations),
        "tenant": first.tenant or None,
        "selection": _written(first.selection),
        "digest": first.selection.header,
        "mode": finished[-1].mode if finished else str(first.selection.mode),
        "n": first.n,
        "stream": observations[0].stream,
        "prompt_tokens": sum(len(observation.request.prompt_ids) for observation in observations),
        "cached_tokens": sum(event.usage.cached_tokens for event in finished) if finished else None,
        "completion_tokens": sum(observation.completion_tokens for observation in observations),
        "finish_reasons": ",".join(reasons) or None,
        "queue_s": _longest(event.timing.queue_s for event in finished),
        "first_token_s": _longest(o.first_token_s for o in observations if o.first_token_s is not None),
        "total_s": _longest(event.timing.total_s for event in finished),
        "prompt": _one_or_all([observation.prompt for observation in observations if observation.prompt is not None]),
        "output": _one_or_all([text for observation in observations for text in observation.outputs or ()]),
    }


def _written(selection: Selection) -> str:
    """As the field `model` takes it: `base`, `sql`, `sql:0.7+style:0.3`."""
    if selection.is_base:
        return BASE
    if not selection.is_blend:
        return selection.adapters[0].name
    return "+".join(f"{adapter.name}:{adapter.weight:g}" for adapter in selection.adapters)


def _longest(seconds: Iterator[float]) -> float | None:
    longest = max(seconds, default=None)
    return None if longest is None else round(longest, 6)


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values or None
