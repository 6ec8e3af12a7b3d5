"""The pages: a front page, and Swagger UI with its assets from a Python package, so that no page needs a network."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
}
_ONE_DAY = {"Cache-Control": "public, max-age=86400"}

_FRONT_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>vblora-serve</title>
<h1>vblora-serve</h1>
<p>VB-LoRA adapters, switched, blended and merged per request.</p>
<ul>
<li><a href="docs">The API</a>, to read and to try</li>
<li><a href="openapi.json">Its OpenAPI description</a></li>
</ul>
</html>
"""


@router.get("/")
async def front_page() -> HTMLResponse:
    return HTMLResponse(_FRONT_PAGE)


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
