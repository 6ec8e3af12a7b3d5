"""Object storage as stores see it: conditions, files, keys, and what is said when it cannot be used."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from adapters.errors import StoreError, StoreUnavailable
from adapters.store.shared import local as local_module
from adapters.store.shared import manifests as manifests_module
from adapters.store.shared import open_objects
from adapters.store.shared.keys import blob_prefix, decode, encode, file_of, manifest_key, tenant_of
from adapters.store.shared.objects import AccessRefused, Conflict, ObjectMissing, ObjectStore
from tests.unit.adapters.shared_support import BUCKET, CREDENTIALS, shared
from tests.unit.adapters.store_support import publish


class TestObjects:
    """What both kinds of storage promise."""

    def test_create_replace_and_their_conditions(self, objects: ObjectStore) -> None:
        first = objects.put("tenants/x.json", b"1", over=None)
        for over in (None, "another"):
            with pytest.raises(Conflict):
                objects.put("tenants/x.json", b"2", over=over)
        second = objects.put("tenants/x.json", b"2", over=first)
        with pytest.raises(Conflict):
            objects.put("tenants/x.json", b"3", over=first)
        with pytest.raises(Conflict):
            objects.put("tenants/absent.json", b"3", over=first)
        content = objects.get("tenants/x.json")
        assert content is not None
        assert (content.data, content.etag) == (b"2", second)
        assert objects.get("tenants/x.json", unless=second) is None
        assert objects.get("tenants/x.json", unless=first) == content
        assert [(info.key, info.etag, info.size) for info in objects.list("tenants")] == [("tenants/x.json", second, 1)]

    def test_absent(self, objects: ObjectStore, tmp_path: Path) -> None:
        with pytest.raises(ObjectMissing):
            objects.get("tenants/x.json")
        with pytest.raises(ObjectMissing):
            objects.get_file("blobs/x", tmp_path / "x", 1)
        assert list(objects.list("blobs")) == []
        objects.delete("blobs/x")

    def test_files(self, objects: ObjectStore, tmp_path: Path) -> None:
        content = bytes(range(256)) * 40_000  # more than one part of a multipart upload
        (tmp_path / "one").write_bytes(content)
        objects.put_file("blobs/sha256/x/one", tmp_path / "one")
        objects.get_file("blobs/sha256/x/one", tmp_path / "copy", len(content))
        assert (tmp_path / "copy").read_bytes() == content
        for size in (len(content) - 1, len(content) + 1):
            with pytest.raises(StoreError, match="bytes"):
                objects.get_file("blobs/sha256/x/one", tmp_path / str(size), size)
        objects.delete("blobs/sha256/x/one")
        assert list(objects.list("blobs")) == []

    def test_a_directory_that_is_unmounted_is_not_an_empty_one(self, tmp_path: Path) -> None:
        objects = open_objects(f"file://{tmp_path}/objects")
        shutil.rmtree(tmp_path / "objects")
        for attempt in (lambda: list(objects.list("tenants")), lambda: objects.get("tenants/x.json")):
            with pytest.raises(StoreUnavailable, match="mount"):
                attempt()

    def test_a_directory_that_may_only_be_read_takes_no_change(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = shared(open_objects(f"file://{tmp_path}/objects"), tmp_path / "data")
        publish(store, "sql")

        def refuse(path: Path, data: bytes) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(Path, "write_bytes", refuse)
        monkeypatch.setattr(manifests_module.Manifests, "_attempts", lambda self: iter([None]))  # at once
        with pytest.raises(StoreUnavailable, match="Read-only"):
            store.delete("", "sql")
        store.close()

    def test_a_file_that_is_collected_as_it_is_put(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever names it looks whether it is there."""
        objects = open_objects(f"file://{tmp_path}/objects")
        (tmp_path / "one").write_bytes(b"1")
        synced = local_module.fsync_directory

        def collect_first(directory: Path) -> None:
            if directory.name == "x":
                objects.delete("blobs/sha256/x/one")
            synced(directory)

        monkeypatch.setattr(local_module, "fsync_directory", collect_first)
        objects.put_file("blobs/sha256/x/one", tmp_path / "one")
        assert list(objects.list("blobs")) == []


class TestS3:
    """What is said when it cannot be used. Of credentials the server of these tests takes any."""

    @pytest.fixture(autouse=True)
    def credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)

    def test_no_bucket(self, s3_endpoint: Callable[[], str], tmp_path: Path) -> None:
        objects = open_objects("s3://nowhere-at-all/x", s3_endpoint())
        with pytest.raises(StoreError, match="no such bucket; create it"):
            shared(objects, tmp_path / "data")
        (tmp_path / "file").write_bytes(b"")
        for attempt in (
            lambda: void(objects.get("x")),
            lambda: void(objects.put("x", b"", over=None)),
            lambda: void(objects.put("x", b"", over="etag")),
            lambda: objects.put_file("x", tmp_path / "file"),
        ):
            with pytest.raises(StoreError, match="no such bucket"):
                attempt()

    def test_nobody_there(self, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable, match="does not answer"):
            shared(open_objects(f"s3://{BUCKET}", "http://127.0.0.1:9"), tmp_path / "data")

    @pytest.mark.parametrize("status", [403, 401])
    def test_refused(self, status: int, tmp_path: Path) -> None:
        class Refusing(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_PUT = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            objects = open_objects(f"s3://{BUCKET}", f"http://127.0.0.1:{server.server_port}")
            for attempt in (
                lambda: void(shared(objects, tmp_path / "data")),
                lambda: void(objects.get("x")),
                lambda: void(objects.put("x", b"", over=None)),
            ):
                with pytest.raises(AccessRefused, match="AWS_ACCESS_KEY_ID"):
                    attempt()
        finally:
            server.shutdown()
            server.server_close()

    def test_a_server_that_hangs_is_given_up(self, tmp_path: Path) -> None:
        from adapters.store.shared.s3 import S3Objects

        with socket.create_server(("127.0.0.1", 0)) as listener:
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            objects = S3Objects(f"s3://{BUCKET}", endpoint=endpoint, timeout_s=0.3, file_timeout_s=0.3)
            began = time.monotonic()
            for attempt in (lambda: void(objects.get("x")), lambda: objects.get_file("x", tmp_path / "x", 1)):
                with pytest.raises(StoreUnavailable):
                    attempt()
            assert time.monotonic() - began < 8

    def test_without_obstore(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "obstore", None)
        with pytest.raises(StoreError, match=r"pip install 'vblora-serve\[shared\]'"):
            open_objects(f"s3://{BUCKET}")


class TestKeys:
    def test_no_two_names_have_one_key_and_none_leads_elsewhere(self) -> None:
        names = [
            "a",
            "A",
            "=41",
            "=shared",
            "shared",
            ".",
            "..",
            "../b",
            "a/b",
            "a=2fb",
            "é",
            "É",
            "a.json",
            "a b",
            "%41",
        ]
        keys = [manifest_key(name) for name in ["", *names]]
        assert len({key.casefold() for key in keys}) == len(keys)
        for name, key in zip(["", *names], keys, strict=True):
            assert tenant_of(key) == name
            assert key.count("/") == 1
            assert not key.removeprefix("tenants/").startswith(".")

    @pytest.mark.parametrize("segment", ["", "A", "=4", "=zz", "=61", ".a", "=ff", "a/b", "=41=4"])
    def test_what_was_never_encoded(self, segment: str) -> None:
        assert decode(segment) is None
        assert tenant_of(f"tenants/{segment}.json") is None

    def test_files(self) -> None:
        digest = "sha256:" + "0" * 64
        assert file_of(f"{blob_prefix(digest)}/{encode('README.md')}") == (digest, "README.md")
        for key in ("blobs/sha256/x/y", f"{blob_prefix(digest)}/a/b", "tenants/x.json"):
            assert file_of(key) is None


def void(value: object) -> None:
    """For a lambda that answers nothing."""
