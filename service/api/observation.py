"""What is seen of a request that generates: for the metrics as it happens, for the access line when all is over.

Every EventStream needs an Observation, so that no route that generates can be forgotten. Prompts and outputs are kept
only if the settings ask for them in the log.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from anyio import to_thread
from starlette.types import Scope

from service.api.activity import Activity
from service.api.deps import Metrics, ServerState
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from service.engine.sequence import GenerationRequest


async def observe(
    state: ServerState, scope: Scope, generation_id: str, generations: Sequence[GenerationRequest], *, stream: bool
) -> Observation:
    """Begins to observe what is about to be submitted for one HTTP request, whose access line will tell of it.

    `generation_id` is what its answer is called; the ids of several generations begin with it.
    """
    observation = Observation(generation_id, generations, state.metrics, state.activity, stream=stream)
    if state.settings.log_prompts:
        prompt_ids = [generation.prompt_ids for generation in generations]
        observation.keep_texts(await to_thread.run_sync(lambda: [state.tokenizer.decode(ids) for ids in prompt_ids]))
    scope["state"]["observation"] = observation
    return observation


def access_fields(scope: Scope) -> dict[str, Any]:
    """What the access line says of an HTTP request's generations; nothing if it asked for none."""
    observation: Observation | None = scope["state"].get("observation")
    return {} if observation is None else observation.fields()


class Observation:
    """One HTTP request's generations, at least one, all with one selection. Used on the event loop alone."""

    def __init__(
        self,
        generation_id: str,
        generations: Sequence[GenerationRequest],
        metrics: Metrics,
        activity: Activity,
        *,
        stream: bool,
    ) -> None:
        self._generation_id = generation_id
        self._generations = {each.request_id: _Generation(each, metrics, activity) for each in generations}
        self._metrics = metrics
        self._activity = activity
        self._stream = stream
        self._prompts: Sequence[str] = ()

    def keep_texts(self, prompts: Sequence[str]) -> None:
        """Keeps these, and every choice's output, for a log that is to have them."""
        self._prompts = prompts
        for generation in self._generations.values():
            generation.texts = [[] for _ in range(generation.request.n)]

    def accepted(self, request: GenerationRequest) -> None:
        self._metrics.count_generation(request.selection, request.tenant)
        self._activity.requests.count(request.selection, request.tenant)

    def saw(self, event: Event, moment: float) -> None:
        """One event, which the engine delivered at that moment of `time.monotonic`."""
        self._generations[event.request_id].saw(event, moment)

    def fields(self) -> dict[str, Any]:
        """What the access line says. None where something does not apply.

        Of several prompts the tokens are summed, and of each time the longest counts. What a client left behind, or
        what failed, is told as far as it came.
        """
        generations = list(self._generations.values())
        first = generations[0].request
        finished = [each.finished for each in generations if each.finished is not None]
        reasons = [reason for each in generations for _, reason in sorted(each.finish_reasons.items())]
        outputs = ["".join(parts) for each in generations for parts in each.texts or ()]
        return {
            "generation_id": self._generation_id,
            "selection": first.selection.names,
            "digest": first.selection.header,
            "mode": finished[-1].mode if finished else str(first.selection.mode),
            "n": first.n,
            "stream": self._stream,
            "prompt_tokens": sum(len(each.request.prompt_ids) for each in generations),
            "cached_tokens": sum(event.usage.cached_tokens for event in finished) if finished else None,
            "completion_tokens": sum(each.completion_tokens for each in generations),
            "finish_reasons": ",".join(reasons) or None,
            "queue_s": _longest(event.timing.queue_s for event in finished),
            "first_token_s": _longest(each.first_token_s for each in generations if each.first_token_s is not None),
            "total_s": _longest(event.timing.total_s for event in finished),
            "prompt": _one_or_all(self._prompts),
            "output": _one_or_all(outputs),
        }


class _Generation:
    """One request to the engine, on its way."""

    def __init__(self, request: GenerationRequest, metrics: Metrics, activity: Activity) -> None:
        self.request = request
        self.completion_tokens = 0
        self.first_token_s: float | None = None
        self.finish_reasons: dict[int, FinishReason] = {}  # by choice
        self.finished: FinishedEvent | None = None
        self.texts: list[list[str]] | None = None  # by choice; None: not to be kept
        self._metrics = metrics
        self._activity = activity
        self._began = time.monotonic()
        self._latest: dict[int, float] = {}  # when a choice's last token came

    def saw(self, event: Event, moment: float) -> None:
        match event:
            case TokenEvent():
                self._saw_token(event, moment)
            case FinishedEvent(timing=timing):
                self.finished = event
                self._metrics.count_usage(self.request.tenant, event.usage)
                if FinishReason.CANCELLED not in self.finish_reasons.values():
                    self._metrics.observe_generation(timing.queue_s, timing.total_s)
                    self._activity.total.add(timing.total_s)
            case FailedEvent():
                self._metrics.count_finished("failed", self.request.n - len(self.finish_reasons))

    def _saw_token(self, event: TokenEvent, moment: float) -> None:
        if event.token_ids:
            self.completion_tokens += len(event.token_ids)
            if self.first_token_s is None:
                self.first_token_s = moment - self._began
                self._metrics.observe_first_token(self.first_token_s)
                self._activity.first_token.add(self.first_token_s)
            if event.choice in self._latest:
                self._metrics.observe_inter_token(moment - self._latest[event.choice])
                self._activity.inter_token.add(moment - self._latest[event.choice])
            self._latest[event.choice] = moment
        if self.texts is not None:
            self.texts[event.choice].append(event.text)
        if event.finish_reason is not None:
            self.finish_reasons[event.choice] = event.finish_reason
            self._metrics.count_finished(event.finish_reason, 1)


def _longest(seconds: Iterable[float]) -> float | None:
    longest = max(seconds, default=None)
    return None if longest is None else round(longest, 6)


def _one_or_all(texts: Sequence[str]) -> str | Sequence[str] | None:
    return texts[0] if len(texts) == 1 else texts or None
