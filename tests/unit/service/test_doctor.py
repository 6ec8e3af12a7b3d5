"""`vblora-serve doctor`: what it prints, and with which exit code. What it does is in test_store_repair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters.store import AdapterStore
from adapters.store.shared import open_objects
from service.cli import main
from tests.factories import save_model, tiny_model
from tests.unit.adapters.shared_support import CREDENTIALS, shared
from tests.unit.adapters.store_support import flip_a_bit, publish

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Two adapters."""
    with closing(AdapterStore(tmp_path / "data")) as store:
        publish(store, "sql", b"1")
        publish(store, "style", b"2")
    return tmp_path / "data"


def weights_of(data_dir: Path, name: str) -> Path:
    with closing(AdapterStore(data_dir)) as store:
        return store.path(store.get("", name).digest) / WEIGHTS


def run(capsys: pytest.CaptureFixture[str], data_dir: Path, *words: str) -> tuple[int, str, str]:
    code = main(["doctor", "--data-dir", str(data_dir), *words])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys: pytest.CaptureFixture[str], data_dir: Path, *words: str) -> tuple[int, Any]:
    code, out, _ = run(capsys, data_dir, "--json", *words)
    return code, json.loads(out)


def test_it_needs_no_torch(data_dir: Path) -> None:
    script = "import sys; from service.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, "doctor", "--data-dir", str(data_dir)], check=True)


def test_a_healthy_store(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    expected = "2 adapters, 2 versions, 2 sets of files. Nothing is wrong.\n"
    assert run(capsys, data_dir) == run(capsys, data_dir, "--repair") == (0, expected, "")
    assert run_json(capsys, data_dir) == (
        0, {"healthy": True, "adapters": 2, "versions": 2, "files": 2, "findings": []}
    )  # fmt: skip


def test_findings_are_lines_and_go_when_repaired(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    flip_a_bit(weights_of(data_dir, "sql"))
    shutil.rmtree(weights_of(data_dir, "style").parent)
    code, out, err = run(capsys, data_dir)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [
        ["found", "missing_files", "style"],
        ["found", "damaged_files", "sql"],
    ]
    assert lines[2] == "2 adapters, 2 versions, 1 sets of files. 2 found, 0 repaired, 2 left."
    assert "--repair mends" in lines[3]
    code, out, _ = run(capsys, data_dir, "--repair")
    assert code == 0
    assert out.splitlines()[2] == "0 adapters, 0 versions, 0 sets of files. 2 found, 2 repaired, 0 left."
    assert run(capsys, data_dir)[0] == 0


def test_findings_as_json(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    flip_a_bit(weights_of(data_dir, "sql"))
    code, found = run_json(capsys, data_dir)
    (finding,) = found["findings"]
    assert (code, found["healthy"], finding["repaired"]) == (1, False, False)
    assert (finding["problem"], finding["subject"]) == ("damaged_files", "sql")
    code, found = run_json(capsys, data_dir, "--repair")
    assert (code, found["healthy"], found["findings"][0]["repaired"]) == (0, True, True)


def test_what_cannot_be_repaired_remains(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    (data_dir / "store.sqlite3").write_bytes(b"garbage" * 1000)
    (data_dir / "store.sqlite3.backup").unlink()
    code, out, _ = run(capsys, data_dir, "--repair")
    assert code == 1
    assert "restore a backup" in out
    assert "1 found, 0 repaired, 1 left." in out


def test_never_beside_a_server(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    with closing(AdapterStore(data_dir)):
        code, out, err = run(capsys, data_dir, "--repair")
    assert (code, out) == (1, "")
    assert f"in use by another process (id {os.getpid()}): stop that one" in err


def test_no_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, tmp_path)
    assert code == 1
    assert f"{tmp_path} holds no adapter store" in err
    assert list(tmp_path.iterdir()) == []


def test_a_server_does_not_start_on_a_damaged_database_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], data_dir: Path, tmp_path: Path
) -> None:
    base = save_model(tiny_model("llama"), tmp_path / "base")
    (data_dir / "store.sqlite3").write_bytes(b"garbage" * 1000)
    code = main(["serve", "--model", str(base), "--port", "0", "--data-dir", str(data_dir)])
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert err.startswith(f"error: {data_dir / 'store.sqlite3'} is damaged (file is not a database)")
    command = f"vblora-serve doctor --data-dir {data_dir} --repair"
    assert f"`{command}`" in err
    assert main(command.split()[1:]) == 0, "which is done as it says"
    with closing(AdapterStore(data_dir)) as store:
        assert store.count("") == 2


class TestSharedStore:
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        """A shared store with one adapter, and the files of another that was deleted."""
        url = f"file://{tmp_path}/objects"
        with closing(shared(open_objects(url), tmp_path / "data")) as store:
            publish(store, "sql", b"1")
            publish(store, "style", b"2")
            store.delete("", "style")
        return url

    def run(self, capsys: pytest.CaptureFixture[str], url: str, *words: str) -> tuple[int, Any]:
        code = main(["doctor", "--store", url, "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    def test_it_needs_no_torch(self, url: str) -> None:
        script = "import sys; from service.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", script, "doctor", "--store", url], check=True, capture_output=True)

    def test_what_was_deleted_lately_is_left_alone(self, capsys: pytest.CaptureFixture[str], url: str) -> None:
        assert self.run(capsys, url, "--repair") == (
            0, {"healthy": True, "adapters": 1, "versions": 1, "files": 2, "findings": []},
        )  # fmt: skip

    def test_what_was_deleted_is_collected(self, capsys: pytest.CaptureFixture[str], url: str, tmp_path: Path) -> None:
        for path in (tmp_path / "objects" / "blobs").rglob("*"):
            if path.is_file():
                os.utime(path, (0, 0))
        code, report = self.run(capsys, url)
        assert (code, [finding["problem"] for finding in report["findings"]]) == (1, ["unreferenced_files"])
        code, report = self.run(capsys, url, "--repair")
        assert (code, report["files"], report["findings"][0]["repaired"]) == (0, 1, True)
        assert self.run(capsys, url)[0] == 0

    def test_a_store_that_is_not_there(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        assert main(["doctor", "--store", "s3://bucket", "--store-endpoint", "http://127.0.0.1:9"]) == 1
        assert "does not answer" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words", [["--store", "bucket"], ["--store", "s3://b"], [], ["--data-dir", "x", "--store", "s3://bucket"]]
    )
    def test_asked_wrongly(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        assert main(["doctor", *words]) == 2
        assert "--store" in capsys.readouterr().err
