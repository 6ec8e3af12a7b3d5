"""Requests made up from the OpenAPI page, valid ones and broken ones: every answer is one that the page promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from service.api.deps import ApiSettings
from service.engine.errors import ContextLengthExceeded
from service.engine.events import EventSink
from service.engine.sequence import GenerationRequest
from tests.api.conftest import ALIAS, BASE, Base, Server
from tests.api.update_openapi import app_without_server
from tests.fakes import FakeEngine

CONTEXT = 24
EXAMPLES = 15


class BoundedEngine(FakeEngine):
    """Refuses, as a real one does, what is longer than its context."""

    def __init__(self) -> None:
        super().__init__()
        self.max_context = CONTEXT

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        if len(request.prompt_ids) + request.params.max_new_tokens > CONTEXT:
            raise ContextLengthExceeded("too long", param="prompt")
        super().submit(request, sink)


SETTINGS = ApiSettings(BASE, frozenset({BASE, ALIAS}), max_body_bytes=1 << 16)
APP = app_without_server(SETTINGS)  # the cases are made out while pytest collects
DESCRIBED = schemathesis.openapi.from_asgi("/openapi.json", APP)


@pytest.fixture(scope="module", autouse=True)
def _server(base: Base, adapter_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    server = Server(base, adapter_dirs, tmp_path_factory.mktemp("data"), SETTINGS, engine=BoundedEngine())
    server.upload("sql")
    APP.state.server = server.state
    yield
    server.store.close()


@DESCRIBED.parametrize()
@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_every_answer_is_as_described(case: schemathesis.Case) -> None:
    case.call_and_validate(
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
            response_headers_conformance,
        ]
    )
