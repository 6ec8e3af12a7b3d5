"""The OpenAPI page as it is committed, so that a change of the contract shows in review.

python -m tests.api.update_openapi
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI

from service.api.deps import ApiSettings, ServerState
from service.api.keys import KeyRing
from service.app import create_app
from tests.fakes import FakeMetrics

SNAPSHOT = Path(__file__).with_name("openapi.json")


def app_without_server(settings: ApiSettings) -> FastAPI:
    """The app as it describes itself. It answers requests once `app.state.server` is a whole ServerState."""
    state = SimpleNamespace(keys=KeyRing(), settings=settings, metrics=FakeMetrics())
    return create_app(cast(ServerState, state))


def openapi_page() -> dict[str, Any]:
    """What /openapi.json answers, without the server's version."""
    page = app_without_server(ApiSettings("base", frozenset({"base"}))).openapi()
    del page["info"]["version"]
    return page


def as_text(page: dict[str, Any]) -> str:
    return json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(as_text(openapi_page()))
