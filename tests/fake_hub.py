"""A Hugging Face Hub on this machine: what the Hub's client needs of it, and what can go wrong with one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeRepo:
    """A repository at one commit. `announced` and `declared` lie about sizes, in the listing and in Content-Length.

    `elsewhere` sends who asks for a file on to another address of it; `sending`, if given, is called in place of
    writing the body, with what writes.
    """

    files: dict[str, bytes]
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    called: str | None = None
    gated: bool = False
    announced: dict[str, int | None] = field(default_factory=dict)
    declared: dict[str, int] = field(default_factory=dict)
    elsewhere: bool = False
    sending: Callable[[Callable[[bytes], object], bytes], object] | None = None


class FakeHub:
    """Serves `repos` at `url` until `close`. `requests` are the paths asked for, `tokens` what
    was sent along to each; `broken` answers all with 500."""

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}
        self.requests: list[str] = []
        self.tokens: dict[str, str | None] = {}
        self.broken = False
        self.before_answer: Callable[[str], object] = lambda path: None
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.other_url = self.url.replace("127.0.0.1", "localhost")  # another host, to a client
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, repo_id: str, directory: Path, **facts: object) -> FakeRepo:
        """A repository with the files of an adapter directory."""
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        repo = self.repos[repo_id] = FakeRepo({**files, "README.md": b"# mine", "../evil": b"x"}, **facts)  # type: ignore[arg-type]
        return repo

    @property
    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for path in self.requests if "/resolve/" in path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append(path)
        self.owner.tokens[path] = self.headers.get("Authorization")
        self.owner.before_answer(path)
        if self.owner.broken:
            return self._refuse(500, "")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._list(parts)
        if parts[0] == "elsewhere":
            return self._send(self.owner.repos["/".join(parts[1:3])], parts[-1])
        return self._resolve(parts)

    def _list(self, parts: list[str]) -> None:
        repo_id, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
        repo = self.owner.repos.get(repo_id)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        if repo.gated:
            return self._refuse(403, "GatedRepo")
        commit = repo.branches.get(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        sizes = {name: repo.announced.get(name, len(content)) for name, content in repo.files.items()}
        siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
        body = {"id": repo.called or repo_id, "sha": commit, "siblings": siblings}
        return self._answer(200, json.dumps(body).encode())

    def _resolve(self, parts: list[str]) -> None:
        repo = self.owner.repos["/".join(parts[:2])]
        if parts[3] not in repo.branches.values() or parts[4] not in repo.files:
            return self._refuse(404, "EntryNotFound")
        if repo.elsewhere:
            return self._answer(302, b"", Location=f"{self.owner.other_url}/elsewhere/{'/'.join(parts[:2])}/{parts[4]}")
        return self._send(repo, parts[4])

    def _send(self, repo: FakeRepo, name: str) -> None:
        content = repo.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(repo.declared.get(name, len(content))))
        self.end_headers()
        if repo.sending is not None and name.endswith(".safetensors"):
            repo.sending(self._write, content)
        else:
            self._write(content)
        self.close_connection = True

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", **{"X-Error-Code": code} if code else {})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
