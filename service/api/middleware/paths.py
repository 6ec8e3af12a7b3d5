"""The path of a request as the routes see it."""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """`scope["path"]` without the prefix that a proxy or a mount put before it, and without a line's end after it.

    Routes are matched by expressions whose `$` passes over one: `/v1/adapters%0A` is `/v1/adapters` to them.
    """
    path: str = scope["path"].removesuffix("\n")
    root = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
