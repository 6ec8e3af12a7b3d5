"""The pages, and what the OpenAPI description promises."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urljoin

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import Server


@pytest.fixture
def openapi(server: Server) -> Any:
    return server.client.get("/openapi.json").json()


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(server: Server, page: str) -> None:
    response = server.client.get(page)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", response.text)
    for link in re.findall(r"(?:src|href)=\"([^\"]+)\"", response.text):
        assert server.client.get(urljoin("/", link)).status_code == 200, link


def test_assets_are_swagger_ui_5(server: Server) -> None:
    script = server.client.get("/docs/swagger-ui-bundle.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert re.search(r'PACKAGE_VERSION:"5\.', script.text), "older ones cannot show OpenAPI 3.1"


def test_docs_work_behind_a_prefix(server: Server) -> None:
    client = TestClient(server.app, root_path="/vblora")
    page = client.get("/vblora/docs").text
    assert "'/vblora/openapi.json'" in page
    assert client.get("/vblora/docs/swagger-ui.css").status_code == 200


def operations(openapi: Any) -> dict[str, Any]:
    return {
        f"{method.upper()} {path}": operation
        for path, item in openapi["paths"].items()
        for method, operation in item.items()
    }


def test_every_route_documents_its_errors(openapi: Any) -> None:
    public = {"GET /healthz", "GET /readyz"}
    for route, operation in operations(openapi).items():
        responses = operation["responses"]
        if route != "GET /healthz":
            assert "default" in responses, route
        if route not in public:
            assert "401" in responses, route
        for status, response in responses.items():
            if not status.startswith("2"):
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, (route, status)
    assert "HTTPValidationError" not in openapi["components"]["schemas"]


def test_uploads_document_their_bodies(openapi: Any) -> None:
    content = openapi["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    form = content["multipart/form-data"]["schema"]
    assert form["required"] == ["name", "config", "weights"]
    assert form["properties"]["weights"]["format"] == "binary"
    assert set(content["application/json"]["schema"]["properties"]) == {"name", "source", "activate"}


def test_every_operation_is_described_and_has_an_id_of_its_own(openapi: Any) -> None:
    found = operations(openapi)
    assert len({operation["operationId"] for operation in found.values()}) == len(found)
    assert [route for route, operation in found.items() if not operation.get("description")] == []
