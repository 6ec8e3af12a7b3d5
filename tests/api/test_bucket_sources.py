"""Adapters from a bucket, where the operator allows it: against a server that speaks S3."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from adapters.store.shared import open_objects
from service.api.bucket_ids import BucketPattern, BucketSource
from service.api.buckets import fetch_from_bucket
from service.api.errors import ApiError
from service.api.sources import fetch_own_source, fetch_source
from tests.api.conftest import Server, error_of
from tests.unit.adapters.shared_support import BUCKET, CREDENTIALS, s3_server

ALLOWED = f"s3://{BUCKET}/team-a/*"
SQL = f"s3://{BUCKET}/team-a/sql"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def put(endpoint: str) -> Callable[..., None]:
    """Puts an adapter's files, and more, under a prefix."""

    def put(prefix: str, adapter: Path, **more: Path) -> None:
        objects = open_objects(f"s3://{BUCKET}/{prefix}", endpoint)
        for path in adapter.iterdir():
            objects.put_file(path.name, path)
        for name, path in more.items():
            objects.put_file(name.replace("__", "."), path)

    return put


@pytest.fixture
def server(make_server: Callable[..., Server], endpoint: str) -> Server:
    return make_server(allow_buckets=(BucketPattern.parse(ALLOWED),), s3_endpoint=endpoint)


def load(server: Server, source: str, query: str = "") -> httpx.Response:
    return server.client.post(f"/v1/adapters{query}", json={"name": "sql", "source": source})


def test_a_place_is_taken_in_like_an_upload(
    server: Server, put: Callable[..., None], adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "more").write_text("not part of the adapter")
    put("team-a/sql", adapter_dirs["one"], README__md=tmp_path / "more")
    response = load(server, SQL)
    assert response.status_code == 201, response.text
    server.upload("uploaded")
    assert response.json()["digest"] == server.digest("uploaded")
    assert not (server.store.path(server.digest("sql")) / "README.md").exists()


@pytest.mark.parametrize("source", [f"s3://{BUCKET}/team-b/sql", f"s3://{BUCKET}/team-a", "s3://other/team-a/sql"])
def test_what_is_not_allowed_is_forbidden(server: Server, source: str) -> None:
    assert "--allow-source s3://" in error_of(load(server, source), 403, "forbidden")["message"]


@pytest.mark.parametrize(
    "source",
    ["s3://", "s3://x", f"s3://{BUCKET}", f"s3://{BUCKET}/team-a/../team-b", f"s3://{BUCKET}/team-a/./x",
     f"s3://{BUCKET}/team-a//x", f"s3://{BUCKET}/team-a/%2e%2e/x", f"s3://{BUCKET}/team-a/x?y", f"s3://u:p@{BUCKET}/x",
     f"s3://{BUCKET}/team-a/x\n", f"s3://{BUCKET}/team-a/" + "x" * 1000],
)  # fmt: skip
def test_what_is_no_place_is_refused(server: Server, source: str) -> None:
    assert error_of(load(server, source), 400, "invalid_request")["param"] == "source"


def test_what_is_missing_is_named(
    server: Server, put: Callable[..., None], adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    message = error_of(load(server, f"s3://{BUCKET}/team-a/none"), 400, "invalid_request")["message"]
    assert "has no adapter_config.json" in message
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    put("team-a/half", tmp_path / "half")
    message = error_of(load(server, f"s3://{BUCKET}/team-a/half"), 400, "invalid_request")["message"]
    assert "has no adapter_model.safetensors" in message
    server.assert_nothing_left()


def test_sizes_are_bounded_before_a_file_is_asked_for(
    make_server: Callable[..., Server], endpoint: str, put: Callable[..., None], adapter_dirs: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    put("team-a/large", adapter_dirs["one"])
    allowed = {"allow_buckets": (BucketPattern.parse(ALLOWED),), "s3_endpoint": endpoint}
    small = make_server(**allowed, max_upload_bytes=1000)
    refused = error_of(load(small, f"s3://{BUCKET}/team-a/large"), 413, "payload_too_large")
    assert "--max-upload" in refused["message"]
    (tmp_path / "big").write_bytes(b" " * ((1 << 20) + 1))
    put("team-a/spoilt", adapter_dirs["one"], tokenizer_config__json=tmp_path / "big")
    refused = error_of(load(make_server(**allowed), f"s3://{BUCKET}/team-a/spoilt"), 413, "payload_too_large")
    assert "tokenizer_config.json" in refused["message"]


def test_a_bucket_that_is_not_there(make_server: Callable[..., Server], endpoint: str) -> None:
    server = make_server(allow_buckets=(BucketPattern.parse("s3://nowhere/*"),), s3_endpoint=endpoint)
    assert (
        "has no adapter_config.json: name a bucket"
        in error_of(load(server, "s3://nowhere/x"), 400, "invalid_request")["message"]
    )


def test_a_storage_that_is_not_reached(make_server: Callable[..., Server]) -> None:
    server = make_server(allow_buckets=(BucketPattern.parse(ALLOWED),), s3_endpoint="http://127.0.0.1:9")
    assert "cannot be reached" in error_of(load(server, SQL), 503, "adapter_unavailable")["message"]
    server.assert_nothing_left()


def test_time_is_up(put: Callable[..., None], endpoint: str, adapter_dirs: dict[str, Path], tmp_path: Path) -> None:
    put("team-a/slow", adapter_dirs["one"])
    ticks = itertools.count()
    with pytest.raises(ApiError, match="did not arrive within 4 seconds") as raised:
        fetch_from_bucket(
            BucketSource.parse(f"s3://{BUCKET}/team-a/slow"), tmp_path, endpoint=endpoint, max_bytes=1 << 30,
            timeout_s=4, clock=lambda: float(next(ticks)),
        )  # fmt: skip
    assert raised.value.code == "request_timeout"


def test_the_shared_store_is_no_source(endpoint: str, tmp_path: Path) -> None:
    """Whoever knows a foreign adapter's digest could register it as his own."""
    allowed = (BucketPattern.parse(f"s3://{BUCKET}/*"),)
    settings = SimpleNamespace(
        allow_buckets=allowed, s3_endpoint=endpoint, max_upload_bytes=1 << 30, source_timeout_s=9
    )
    state = SimpleNamespace(settings=settings, store=SimpleNamespace(url=f"s3://{BUCKET}/store"))
    for source in (f"s3://{BUCKET}/store", f"s3://{BUCKET}/store/", f"s3://{BUCKET}/store/blobs/sha256/{'0' * 64}"):
        with pytest.raises(ApiError, match="outside of the server's own --store") as raised:
            fetch_source(source, tmp_path, state)  # type: ignore[arg-type]
        assert raised.value.code == "forbidden"
    with pytest.raises(ApiError, match="has no adapter_config"):
        fetch_source(f"s3://{BUCKET}/store-of-others/x", tmp_path, state)  # type: ignore[arg-type]


def test_the_operators_own_needs_no_leave(
    put: Callable[..., None], endpoint: str, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    put("team-b/sql", adapter_dirs["one"])
    source = f"s3://{BUCKET}/team-b/sql"
    assert fetch_own_source(source, tmp_path, max_bytes=1 << 30, timeout_s=30, s3_endpoint=endpoint) == source
    assert (tmp_path / "adapter_config.json").read_bytes() == (adapter_dirs["one"] / "adapter_config.json").read_bytes()


@pytest.mark.parametrize(
    ("pattern", "covered", "not_covered"),
    [
        ("s3://bucket/a", ["s3://bucket/a", "s3://bucket/a/"], ["s3://bucket/ab", "s3://bucket/a/b"]),
        ("s3://bucket/a*", ["s3://bucket/a", "s3://bucket/ab/c"], ["s3://bucket/b", "s3://bucket2/a"]),
        ("s3://bucket/*", ["s3://bucket/a/b"], ["s3://bucket2/a"]),
    ],
)
def test_patterns(pattern: str, covered: list[str], not_covered: list[str]) -> None:
    parsed = BucketPattern.parse(pattern)
    assert all(parsed.covers(BucketSource.parse(source)) for source in covered)
    assert not any(parsed.covers(BucketSource.parse(source)) for source in not_covered)
