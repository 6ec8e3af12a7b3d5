"""The pages: the server's own, and Swagger UI with its assets from a Python package. No page needs a network."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from service.api.web_files import ASSETS, INDEX, web_files

router = APIRouter(include_in_schema=False)

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
}
_ONE_DAY = {"Cache-Control": "public, max-age=86400"}

# The page is this server's own and asks nobody else.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
_ASK_EVERY_TIME = "no-cache"
_FOR_EVER = "public, max-age=31536000, immutable"  # their names have a hash of their content


@router.api_route("/", methods=["GET", "HEAD"])
def front_page(request: Request) -> Response:
    return _web_file(request, INDEX, _ASK_EVERY_TIME)


@router.api_route("/assets/{name}", methods=["GET", "HEAD"])
def page_asset(name: str, request: Request) -> Response:
    return _web_file(request, f"{ASSETS}/{name}", _FOR_EVER)


def _web_file(request: Request, path: str, caching: str) -> Response:
    """The file, or 304 if the client has it already, or 404."""
    file = web_files().get(path)
    if file is None:
        raise HTTPException(404)
    headers = {**_PAGE_HEADERS, "Cache-Control": caching, "ETag": file.etag}
    if _has(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(len(file.content))
    content = b"" if request.method == "HEAD" else file.content
    return Response(content, headers=headers, media_type=file.media_type)


def _has(if_none_match: str, etag: str) -> bool:
    """Whether a list of entity tags has this one; a proxy that compresses may have called it weak."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]


@router.get("/docs")
async def swagger_ui(request: Request) -> HTMLResponse:
    root = request.scope.get("root_path", "").rstrip("/")
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="vblora-serve: the API",
        swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/swagger-ui.css",
        swagger_favicon_url=f"{root}/docs/favicon-32x32.png",
        swagger_ui_parameters={"validatorUrl": None, "tryItOutEnabled": True, "persistAuthorization": True},
    )


def _add_asset(name: str, media_type: str) -> None:
    @router.get(f"/docs/{name}", name=name)
    def asset() -> Response:
        return Response(_read_asset(name), media_type=media_type, headers=_ONE_DAY)


@cache
def _read_asset(name: str) -> bytes:
    return files("fastapi_swagger.resources").joinpath(name).read_bytes()


for _name, _media_type in _ASSETS.items():
    _add_asset(_name, _media_type)
