"""The pages, and what the OpenAPI description promises."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from starlette.testclient import TestClient

from service.api import web_files
from service.api.keys import ApiKey
from tests.api.asgi import exchange
from tests.api.conftest import Server

IMMUTABLE = "public, max-age=31536000, immutable"
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


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


# --- the page that the package brings -------------------------------------------------------------

BUILT = {
    "index.html": b'<!doctype html><script type="module" src="./assets/index-1a2b.js"></script>',
    "assets/index-1a2b.js": b"export {}",
    "assets/index-3c4d.css": b"body {}",
    "assets/data.unknown": b"?",
    "secret.txt": b"not the page's",
    "assets/deeper/secret.txt": b"nor this",
}


@pytest.fixture
def built(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose package has a page with assets."""
    for name, content in BUILT.items():
        file = tmp_path / "package" / "web" / "dist" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "package" / "web" / "secret.txt").write_bytes(b"above")
    monkeypatch.setattr(web_files, "files", lambda package: tmp_path / "package")
    web_files.web_files.cache_clear()
    yield server
    web_files.web_files.cache_clear()


@pytest.mark.parametrize(
    ("path", "file", "media_type", "caching"),
    [
        ("/", "index.html", "text/html; charset=utf-8", "no-cache"),
        ("/assets/index-1a2b.js", "assets/index-1a2b.js", "text/javascript; charset=utf-8", IMMUTABLE),
        ("/assets/index-3c4d.css", "assets/index-3c4d.css", "text/css; charset=utf-8", IMMUTABLE),
        ("/assets/data.unknown", "assets/data.unknown", "application/octet-stream", IMMUTABLE),
    ],
)
def test_the_page_and_its_assets(built: Server, path: str, file: str, media_type: str, caching: str) -> None:
    response = built.client.get(path)
    assert (response.status_code, response.content) == (200, BUILT[file])
    headers = response.headers
    assert (headers["content-type"], headers["cache-control"]) == (media_type, caching)
    assert (headers["content-security-policy"], headers["x-content-type-options"]) == (POLICY, "nosniff")

    head = built.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    ours = {name: value for name, value in headers.items() if name != "x-request-id"}
    assert {name: head.headers[name] for name in ours} == ours, "content-length among them"

    for tags in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
        known = built.client.get(path, headers={"if-none-match": tags})
        assert (known.status_code, known.content) == (304, b"")
        assert (known.headers["etag"], known.headers["cache-control"]) == (headers["etag"], caching)
    changed = built.client.get(path, headers={"if-none-match": '"other"'})
    assert (changed.status_code, changed.content) == (200, BUILT[file])


def test_another_content_is_another_tag_whatever_its_date(built: Server, tmp_path: Path) -> None:
    index = tmp_path / "package" / "web" / "dist" / "index.html"
    before, date = built.client.get("/").headers["etag"], index.stat()
    index.write_bytes(BUILT["index.html"].replace(b"1a2b", b"9z8y"))
    os.utime(index, ns=(date.st_atime_ns, date.st_mtime_ns))
    web_files.web_files.cache_clear()
    assert built.client.get("/", headers={"if-none-match": before}).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    [
        "/assets/none.js", "/assets/", "/assets", "/assets/../index.html", "/assets/../secret.txt",
        "/assets/../../secret.txt", "/assets/deeper/secret.txt", "/assets/deeper", "/assets//etc/passwd", "/secret.txt",
        "/index.html/..", "/assets/..\\secret.txt", "/assets/index-1a2b.js/", "/assets/\0",
    ],
)  # fmt: skip
async def test_nothing_else_is_served(built: Server, path: str) -> None:
    """As the application is given paths: with their escapes undone."""
    async with exchange(built.app, "GET", path) as client:
        assert await client.status() == 404
        assert await client.error_code() == "not_found"


def test_the_page_works_behind_a_prefix(built: Server) -> None:
    client = TestClient(built.app, root_path="/vblora")
    page = client.get("/vblora/")
    (link,) = re.findall(r'src="([^"]+)"', page.text)
    assert client.get(urljoin("/vblora/", link)).content == BUILT["assets/index-1a2b.js"]


def test_the_page_needs_no_key(built: Server) -> None:
    built.state.keys.replace([ApiKey.of("key")])
    for path in ("/", "/assets/index-1a2b.js"):
        assert built.client.get(path).status_code == 200
    assert built.client.post("/").status_code == 405
    assert built.client.get("/assets/none.js").status_code == 404


# --- the API's ------------------------------------------------------------------------------------


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
