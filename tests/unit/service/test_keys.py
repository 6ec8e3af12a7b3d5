"""API keys: the file, the ring, and the limits."""

from __future__ import annotations

import io
import logging
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from service.api.errors import ApiError
from service.api.key_limits import KeyLimits
from service.api.keys import ApiKey, KeyFileError, KeyRing, Scope, hash_key, load_key_file
from service.cli import main

ALPHA = f"sha256:{hash_key('alpha')}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.touch(0o600)
    return file


def load(path: Path, text: str) -> tuple[ApiKey, ...]:
    path.write_text(text)
    return load_key_file(path)


class TestFile:
    def test_a_line_for_each_key(self, path: Path) -> None:
        text = f"# ours\n{ALPHA} tenant=acme scopes=infer  rate=600 concurrency=8 name=ci\n\n  beta#1  \r\n"
        alpha, beta = load(path, text)
        assert alpha == ApiKey.of("alpha", tenant="acme", scopes={Scope.INFER}, rate=600, concurrency=8, label="ci")
        assert beta == ApiKey.of("beta#1")
        assert beta.scopes == {Scope.INFER, Scope.ADMIN}
        assert (alpha.name, beta.name) == ("ci", hash_key("beta#1")[:8])

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "holds no key"),
            ("# none\n\n", "holds no key"),
            ("sha256:123", "line 1 of .* 64 digits"),
            ("sécret", "line 1 of .* no HTTP header"),
            (f"{ALPHA}\n\nbravo extra", "line 3 of .* after a key stand"),
            (f"{ALPHA} colour=red", "after a key stand"),
            (f"{ALPHA} rate=1 rate=2", "once at most"),
            (f"{ALPHA} rate=0", "rate is a whole number of at least 1"),
            (f"{ALPHA} concurrency=-1", "concurrency is a whole number"),
            (f"{ALPHA} tenant=", "tenant is 1 to 64"),
            (f"{ALPHA} tenant=../x", "tenant is 1 to 64"),
            (f"{ALPHA} scopes=", "scopes are infer and admin"),
            (f"{ALPHA} scopes=infer,root", "scopes are infer and admin"),
            (f"{ALPHA}\nalpha", "line 2 of .* there already"),
        ],
    )
    def test_what_is_wrong_is_said_without_the_key(self, path: Path, text: str, why: str) -> None:
        with pytest.raises(KeyFileError, match=why) as caught:
            load(path, text)
        assert "bravo" not in str(caught.value)
        assert "alpha" not in str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyFileError, match="cannot be read"):
            load_key_file(tmp_path / "keys")

    @pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
    def test_warns_of_readers(self, path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool) -> None:
        path.chmod(mode)
        with caplog.at_level(logging.WARNING):
            load(path, f"{ALPHA}\n")
        assert bool(caplog.records) is warned

    def test_warns_of_keys_as_they_are(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            load(path, f"{ALPHA}\nbravo\n")
        assert "--hash" in caplog.text
        assert "bravo" not in caplog.text


class TestRing:
    def test_finds_the_key_that_was_offered(self) -> None:
        one, two = ApiKey.of("one"), ApiKey.of("two", tenant="acme")
        ring = KeyRing([one, two])
        assert (ring.find("one"), ring.find("two")) == (one, two)
        for wrong in ("", "on", "one ", "three", one.digest):
            assert ring.find(wrong) is None

    def test_replacing(self) -> None:
        ring = KeyRing()
        assert not ring
        ring.replace([ApiKey.of("one")])
        assert ring
        ring.replace([ApiKey.of("two")])
        assert ring.find("one") is None


def refused(limits: KeyLimits, key: ApiKey) -> ApiError | None:
    """The refusal of one request, if it is refused."""
    try:
        with limits.using(key):
            return None
    except ApiError as refusal:
        return refusal


class TestLimits:
    def test_without_limits_nothing_is_refused(self) -> None:
        limits, key = KeyLimits(lambda: 0.0), ApiKey.of("one")
        for _ in range(1000):
            with limits.using(key):
                pass

    def test_requests_a_minute(self) -> None:
        now = 0.0
        limits, key, other = KeyLimits(lambda: now), ApiKey.of("one", rate=6), ApiKey.of("two", rate=6)

        def allowed(key: ApiKey) -> int:
            """How many requests are answered before one is refused."""
            for answered in range(100):
                refusal = refused(limits, key)
                if refusal is not None:
                    assert refusal.code == "overloaded"
                    assert 1 <= int((refusal.headers or {})["Retry-After"]) <= 10
                    return answered
            raise AssertionError("nothing was refused")

        assert allowed(key) == 6
        assert allowed(other) == 6, "each key has its own"
        now = 9.9
        assert allowed(key) == 0
        now = 10.0
        assert allowed(key) == 1
        now = 1e6
        assert allowed(key) == 6, "no more than a minute's worth is saved up"

    def test_requests_at_once(self) -> None:
        limits, key = KeyLimits(lambda: 0.0), ApiKey.of("one", concurrency=2)
        with limits.using(key):
            with limits.using(key):
                assert refused(limits, key) is not None
            assert refused(limits, key) is None
        with suppress(ZeroDivisionError), limits.using(key), limits.using(key):
            1 / 0  # noqa: B018 - what fails gives its place back too
        assert refused(limits, key) is None

    def test_a_key_read_anew_keeps_its_count(self) -> None:
        limits = KeyLimits(lambda: 0.0)
        with limits.using(ApiKey.of("one", rate=2)):
            pass
        with limits.using(ApiKey.of("one", rate=1, label="changed")):
            pass
        assert refused(limits, ApiKey.of("one", rate=1)) is not None


class TestCommand:
    def test_makes_keys_that_the_server_reads(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made = []
        for tenant in ("acme", "other"):
            assert main(["key", "--file", str(path), "--tenant", tenant, "--scopes", "infer", "--rate", "60"]) == 0
            made.append(capsys.readouterr().out.strip())
        assert not any(key in path.read_text() for key in made)
        ring = KeyRing(load_key_file(path))
        keys = [ring.find(key) for key in made]
        assert [(key.tenant, key.rate, key.scopes) for key in keys if key] == [
            ("acme", 60, {Scope.INFER}),
            ("other", 60, {Scope.INFER}),
        ]

    def test_a_new_file_is_its_owners_alone(self, tmp_path: Path) -> None:
        assert main(["key", "--file", str(tmp_path / "new")]) == 0
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600

    def test_a_file_that_is_no_key_file_is_left_alone(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path.write_text("some other = file of mine")
        assert main(["key", "--file", str(path)]) == 1
        assert path.read_text() == "some other = file of mine"
        assert "line 1" in capsys.readouterr().err

    def test_prints_key_and_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["key", "--name", "ci"]) == 0
        line, key = capsys.readouterr().out.splitlines()
        assert line == f"sha256:{hash_key(key)} name=ci"
        assert key.startswith("vb-")
        assert len(key) > 40

    def test_hashes_a_key_that_is_there(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("alpha\n"))
        assert main(["key", "--hash"]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{ALPHA}\n"
        assert "alpha" not in printed.out + printed.err

    @pytest.mark.parametrize("wrong", [["--scopes", "root"], ["--tenant", "a b"], ["--rate", "0"]])
    def test_what_the_server_would_refuse_is_not_made(
        self, wrong: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["key", *wrong]) == 1
        assert capsys.readouterr().out == ""
