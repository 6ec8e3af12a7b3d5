"""Uploads over real sockets: what is never read, what is cut, what is cleaned up, and many at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.store import digest_of
from service.api.keys import ApiKey
from tests.api.conftest import Server
from tests.api.listening import RawClient, eventually, listening

KEY = "a-key"
FORM = "multipart/form-data; boundary=XX"
BEGIN = b'--XX\r\nContent-Disposition: form-data; name="name"\r\n\r\nsql\r\n'
WEIGHTS = b'--XX\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
MIB = 1 << 20
LIMIT = 4 * MIB


class Counted:
    """An application, and the bytes of bodies that it has asked for and got."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.reads = 0
        self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            self.reads += 1
            message = await receive()
            self.bytes += len(message.get("body", b""))
            return message

        await self._app(scope, counted, send)


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server(keys=[ApiKey.of(KEY)], max_upload_bytes=LIMIT, upload_timeout_s=60.0)


@pytest.fixture
def counted(server: Server) -> Counted:
    return Counted(server.app)


@pytest.fixture
def client(counted: Counted) -> Iterator[RawClient]:
    with listening(counted) as port, RawClient(port) as client:
        yield client


def nothing_left(server: Server) -> bool:
    """Of an upload that failed, once the server has noticed."""
    folders = (server.data_dir / "tmp", server.data_dir / "blobs" / "sha256")
    return server.store.count("") == 0 and not any(path for folder in folders for path in folder.iterdir())


def resident_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "Basic " + KEY])
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_without_a_key_nothing_that_is_sent_is_kept(
    client: RawClient, counted: Counted, server: Server, authorization: str, framing: str
) -> None:
    """The client goes on sending all the same: far more than the limit, and nothing of it reaches the application."""
    how = {"Transfer_Encoding": "chunked"} if framing == "chunked" else {"Content_Length": str(1 << 40)}
    client.head("/v1/adapters", Authorization=authorization, Content_Type=FORM, **how)
    assert client.status() == 401
    before, data = resident_bytes(), b"x" * MIB
    for _ in range(128):
        client.chunk(data) if framing == "chunked" else client.send(data)
        assert counted.reads == 0
    assert resident_bytes() - before < 64 * MIB
    assert nothing_left(server)


def test_without_a_key_no_body_is_asked_for(client: RawClient, counted: Counted) -> None:
    client.head("/v1/adapters", Expect="100-continue", Content_Type=FORM, Content_Length="1000")
    assert client.status() == 401, "and not 100"
    assert counted.reads == 0


def test_a_length_beyond_the_limit_is_refused_before_a_body_is_asked_for(client: RawClient, counted: Counted) -> None:
    head = {"Authorization": f"Bearer {KEY}", "Content_Type": FORM, "Content_Length": str(LIMIT + 1)}
    client.head("/v1/adapters", Expect="100-continue", **head)
    assert client.status() == 413
    assert counted.reads == 0


def test_with_a_key_the_body_is_asked_for(client: RawClient, server: Server) -> None:
    form = server.form()
    files = [(b'name="%b"; filename="f"' % part.encode(), content) for part, content in form.items()]
    parts = [b"--XX\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % file for file in files]
    body = BEGIN + b"".join(parts) + b"--XX--\r\n"
    head = {"Authorization": f"Bearer {KEY}", "Content_Type": FORM, "Content_Length": str(len(body))}
    client.head("/v1/adapters", Expect="100-continue", **head)
    assert client.status() == 100
    client.send(body)
    assert client.status() == 201


def test_a_chunked_body_is_cut_at_the_limit(client: RawClient, counted: Counted, server: Server) -> None:
    client.head("/v1/adapters", Authorization=f"Bearer {KEY}", Content_Type=FORM, Transfer_Encoding="chunked")
    client.chunk(BEGIN + WEIGHTS)
    data = b"x" * (MIB // 4)
    for _ in range(1000):
        if client.has_answer():
            break
        client.chunk(data)
    assert client.status() == 413
    assert LIMIT < counted.bytes < LIMIT + MIB
    eventually(lambda: nothing_left(server))


def test_a_client_that_drips_is_told_that_its_time_is_over(make_server: Callable[..., Server]) -> None:
    """Each byte comes in good time; the whole does not."""
    server = make_server(upload_timeout_s=0.3)
    with listening(server.app) as port, RawClient(port) as client:
        client.head("/v1/adapters", Content_Type=FORM, Transfer_Encoding="chunked")
        client.chunk(BEGIN + WEIGHTS)

        def drip() -> bool:
            client.chunk(b"x")
            return client.has_answer()

        eventually(drip)
        assert client.status() == 408
        eventually(lambda: nothing_left(server))


@pytest.mark.parametrize("how", ["closes", "resets"])
@pytest.mark.parametrize("begun", [BEGIN, BEGIN + WEIGHTS + b"x" * MIB])
def test_a_client_that_leaves_in_the_middle_leaves_nothing(
    client: RawClient, counted: Counted, server: Server, how: str, begun: bytes
) -> None:
    client.head("/v1/adapters", Authorization=f"Bearer {KEY}", Content_Type=FORM, Transfer_Encoding="chunked")
    client.chunk(begun)
    eventually(lambda: counted.bytes == len(begun))
    assert any((server.data_dir / "tmp").iterdir()), "it is being written"
    client.reset() if how == "resets" else client.socket.close()
    eventually(lambda: nothing_left(server))


class TestManyAtOnce:
    """Uploads that differ in one key of their configs, all under one name."""

    UPLOADS = 16

    @pytest.fixture
    def server(self, make_server: Callable[..., Server]) -> Server:
        return make_server()

    def all_at_once(self, server: Server, query: str = "") -> list[httpx.Response]:
        form = server.form()
        configs = [json.dumps({**json.loads(form["config"]), "note": n}).encode() for n in range(self.UPLOADS)]
        with listening(server.app) as port, ThreadPoolExecutor(self.UPLOADS) as pool:

            def upload(config: bytes) -> httpx.Response:
                url = f"http://127.0.0.1:{port}/v1/adapters{query}"
                return httpx.post(url, data={"name": "sql"}, files={**form, "config": config}, timeout=60)

            return list(pool.map(upload, configs))

    def assert_sound(self, server: Server) -> None:
        record = server.store.get("", "sql")
        digests = [version.digest for version in record.versions]
        assert record.digest == digests[0]
        assert all(digest_of(server.store.path(digest)) == digest for digest in digests)
        stored = {f"sha256:{path.name}" for path in (server.data_dir / "blobs" / "sha256").iterdir()}
        assert stored == set(digests)
        assert list((server.data_dir / "tmp").iterdir()) == []

    def test_one_has_the_name_and_the_others_are_told(self, server: Server) -> None:
        responses = self.all_at_once(server)
        assert Counter(response.status_code for response in responses) == {201: 1, 409: self.UPLOADS - 1}
        (winner,) = [response.json() for response in responses if response.status_code == 201]
        codes = {response.json()["error"]["code"] for response in responses if response.status_code == 409}
        assert codes == {"adapter_exists"}
        record = server.store.get("", "sql")
        assert [version.digest for version in record.versions] == [winner["digest"]]
        self.assert_sound(server)

    def test_those_that_replace_follow_one_another(self, server: Server) -> None:
        responses = self.all_at_once(server, "?replace=true")
        assert {response.status_code for response in responses} == {201}
        sent = {response.json()["digest"] for response in responses}
        assert len(sent) == self.UPLOADS, "each is told of its own"
        record = server.store.get("", "sql")
        assert len(record.versions) == 5, "as many as are kept"
        assert {version.digest for version in record.versions} <= sent
        self.assert_sound(server)
