"""The contract as the OpenAPI page tells it: it changes only on purpose."""

from __future__ import annotations

from tests.api.conftest import Server
from tests.api.update_openapi import SNAPSHOT, as_text, openapi_page


def test_the_page_is_the_one_that_is_committed() -> None:
    assert as_text(openapi_page()) == SNAPSHOT.read_text(), (
        "the API's description has changed: if that is meant, run `python -m tests.api.update_openapi` and commit "
        f"{SNAPSHOT.name} with the change"
    )


def test_the_page_is_what_a_server_answers(server: Server) -> None:
    page = server.client.get("/openapi.json").json()
    assert page["info"].pop("version")
    assert page == openapi_page()


def test_every_operation_says_what_it_does_and_how_it_fails() -> None:
    for path, operations in openapi_page()["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            assert "default" in operation["responses"], (method, path)
            errors = {status: answer for status, answer in operation["responses"].items() if status[0] not in "23"}
            for status, answer in errors.items():
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, (method, path, status)
