"""Requests made up from the OpenAPI page, valid ones and broken ones: every answer is one that the page promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from adapters.heads import ClassifierHead
from service.api.deps import ApiSettings, PooledServing
from service.api.schemas.embeddings import MAX_DIMENSIONS
from service.engine.errors import ContextLengthExceeded
from service.engine.events import EventSink
from service.engine.pooling.tokenizer import PairTokenizer
from service.engine.sequence import GenerationRequest
from service.engine.task import Task
from tests.api.conftest import ALIAS, BASE, Base, Server
from tests.api.update_openapi import app_without_server
from tests.factories import byte_tokenizer
from tests.fakes import FakeEngine

CONTEXT = 24
EXAMPLES = 50
ADAPTER = "sql"


class BoundedEngine(FakeEngine):
    """Refuses, as a real one does, what is longer than its context."""

    def __init__(self) -> None:
        super().__init__()
        self.max_context = CONTEXT

    def submit(self, requests: Sequence[GenerationRequest], sink: EventSink) -> None:
        for request in requests:
            prompt, asked = len(request.prompt_ids), request.params.max_new_tokens
            if prompt + asked > CONTEXT:
                raise ContextLengthExceeded(prompt_tokens=prompt, max_new_tokens=asked, context=CONTEXT)
        super().submit(requests, sink)


SETTINGS = ApiSettings(BASE, frozenset({BASE, ALIAS}))
APP = app_without_server(SETTINGS)  # the cases are made out while pytest collects
# No key is asked for.
CONFIG = schemathesis.Config.from_dict(
    {"seed": 0, "generation": {"deterministic": True, "with-security-parameters": False}}
)
DESCRIBED = schemathesis.openapi.from_asgi("/openapi.json", APP, config=CONFIG)

# What needs more than a description to succeed: an adapter's files, names that exist, an earlier version's digest.
NEVER_RIGHT = {
    "POST /v1/adapters",
    "POST /v1/blends",
    "POST /v1/load_lora_adapter",
    "POST /v1/adapters/{name}/rollback",
}


class Classifiers:
    """A registry, as far as the base model alone needs one."""

    head = ClassifierHead("score", labels=2)


CLASSIFIERS = Classifiers()


@pytest.fixture(scope="module")
def server(base: Base, adapter_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(base, adapter_dirs, tmp_path_factory.mktemp("data"), SETTINGS, engine=BoundedEngine())
    yield server
    server.store.close()


@pytest.fixture
def answers(request: pytest.FixtureRequest) -> Iterator[Counter[int]]:
    """By status; in the end there must have been some of every kind."""
    found: Counter[int] = Counter()
    yield found
    operation = request.node.name.partition("[")[2].removesuffix("]")
    assert operation
    assert sum(found.values()) >= 3
    assert operation in NEVER_RIGHT or {200, 204} & found.keys(), f"{operation} never succeeded: {found}"


def of_task(path: str) -> dict[str, Any]:
    """What a server has that was started for a route's task."""
    task = {"/v1/classify": Task.CLASSIFY, "/v1/embeddings": Task.EMBED}.get(path, Task.GENERATE)
    if not task.pools:
        return {}
    serving = PooledServing(PairTokenizer(byte_tokenizer()), width=MAX_DIMENSIONS)
    heads = {"registry": CLASSIFIERS} if task is Task.CLASSIFY else {}
    return {"task": task, "pooled": serving, **heads}


@DESCRIBED.parametrize()
@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_every_answer_is_as_described(case: schemathesis.Case, server: Server, answers: Counter[int]) -> None:
    if not server.store.count(""):
        server.upload(ADAPTER)
    body = case.body if isinstance(case.body, dict) else {}
    parts = body["adapters"] if isinstance(body.get("adapters"), list) else []
    for named in (case.path_parameters, body, *(part for part in parts if isinstance(part, dict))):
        for field in {"name", "id", "lora_name"} & named.keys():
            if isinstance(named[field], str) and len(named[field]) % 2:
                named[field] = ADAPTER
    of_route = of_task(case.path)
    if of_route and body.get("adapters") == []:
        del body["adapters"]  # no blend is empty: nearly all would be refused for it
    APP.state.server = replace(server.state, **of_route)
    response = case.call_and_validate(
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
            response_headers_conformance,
            negative_data_rejection,
            unsupported_method,
        ]
    )
    answers[response.status_code] += 1
