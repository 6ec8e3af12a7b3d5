"""What each route asks for: nothing, any key, or a key with a certain scope."""

from __future__ import annotations

from enum import Enum, auto

from service.api.keys import Scope


class Access(Enum):
    """PUBLIC: no key. ANY: a key. INFER and ADMIN: a key with that scope."""

    PUBLIC = auto()
    ANY = auto()
    INFER = auto()
    ADMIN = auto()

    @property
    def scope(self) -> Scope | None:
        return {Access.INFER: Scope.INFER, Access.ADMIN: Scope.ADMIN}.get(self)


# What a browser or a probe must reach without a key. Pages are public; what they ask the API is not.
_PUBLIC = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico"})
_PUBLIC_PREFIXES = ("/docs/", "/assets/", "/static/")
_GENERATING = frozenset({"/v1/generate", "/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream"})
_READING = frozenset({"/v1/classify", "/v1/embeddings"})
_CHANGING = frozenset({"/v1/adapters", "/v1/blends", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_CHANGING_PREFIX = "/v1/adapters/"
# What a page asks again and again, and costs next to nothing: not taken off what a key may ask.
_UNMETERED = frozenset({"/v1/stats", "/v1/whoami"})
_LOOKING = frozenset({"GET", "HEAD", "OPTIONS"})


def access_to(method: str, path: str, *, metrics_public: bool) -> Access:
    """By method and path, known route or not: what is not known here asks for a key."""
    if path in _PUBLIC or path.startswith(_PUBLIC_PREFIXES) or (path == "/metrics" and metrics_public):
        return Access.PUBLIC
    if path in _GENERATING or path in _READING:
        return Access.INFER
    if method not in _LOOKING and (path in _CHANGING or path.startswith(_CHANGING_PREFIX)):
        return Access.ADMIN
    return Access.ANY


def is_metered(path: str) -> bool:
    """Whether requests for it count towards a key's limits."""
    return path not in _UNMETERED
