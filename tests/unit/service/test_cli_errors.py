"""The mistakes that people make, each made: one line says what is wrong and what to do, and nothing is left behind."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from adapters.store import AdapterStore
from service.cli import main
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model

WEIGHTS = "adapter_model.safetensors"
SMALL = ("--num-vectors", "32", "--vector-length", "16")
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that the table below names."""
    folder = tmp_path_factory.mktemp("mistakes")
    model = tiny_model("llama")
    save_model(model, folder / "base")
    make_adapter(model, AdapterSpec(seed=1), folder / "good")
    shutil.copytree(folder / "good", folder / "cut")
    os.truncate(folder / "cut" / WEIGHTS, (folder / "cut" / WEIGHTS).stat().st_size // 2)
    shutil.copytree(folder / "good", folder / "no-weights")
    (folder / "no-weights" / WEIGHTS).unlink()
    shutil.copytree(folder / "no-weights", folder / "pickled")
    (folder / "pickled" / "adapter_model.bin").touch()
    shutil.copytree(folder / "good", folder / "named" / "sql")
    shutil.copytree(folder / "base", folder / "cut-base")
    weights = folder / "cut-base" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "something").touch()
    (folder / "file").write_text("hello\n")
    (folder / "blank").write_text("\n")
    (folder / "bad.toml").write_text("port = = 1\n")
    (folder / "unknown.toml").write_text("prot = 1\n")
    (folder / "receipt.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def there(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in [name for name in os.environ if name.startswith("VBLORA_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(made)
    monkeypatch.setattr("service.commands.push_client.TRIES", 1)
    handlers = logging.getLogger().handlers[:]
    before = sorted(made.iterdir())
    yield
    assert sorted(made.iterdir()) == before, "nothing is left behind"
    logging.getLogger().handlers[:] = handlers


def error_of(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str]:
    """(exit code, the one line on stderr)."""
    code = main(words.split())
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if " INFO " not in line and "Loading weights" not in line]
    assert out == ""
    assert len(lines) == 1, err
    assert "is a bug" not in lines[0]
    return code, lines[0]


ERRORS = {
    # a path that is not there, or not what is wanted
    "inspect none": (1, "none is not a directory; give one that holds an adapter_config.json"),
    "inspect file": (1, "file is not a directory; give one that holds an adapter_config.json"),
    "inspect empty": (1, "refused (missing_tensor): no adapter_config.json in the adapter directory"),
    "inspect no-weights": (1, f"refused (missing_tensor): no {WEIGHTS} in the adapter directory"),
    "inspect cut": (1, "refused (invalid_safetensors): the header describes * but the file holds *: copy it anew"),
    "inspect good --model ./none": (1, "there is no directory ./none; give the base model's directory or its Hub id"),
    "inspect good --model empty": (1, "cannot read the config of the base model 'empty': Unrecognized model"),
    "inspect good --model none/such": (1, "'none/such': there is no such directory, and as a Hub id it is not to be"),
    "inspect named": (1, "named holds no adapter_config.json, but named/sql does: give that one"),
    "inspect pickled": (
        1,
        f"no {WEIGHTS} in the adapter directory; adapter_model.bin is a pickle, which is not read: *",
    ),
    "export named --format lora --output o": (1, "named holds no adapter_config.json, but named/sql does"),
    "export none --format lora --output o": (1, "none is not a directory; give one that holds an adapter_config.json"),
    "export cut --format lora --output o": (1, "cut is refused (invalid_safetensors): *: copy it anew"),
    "export good --format lora --output full": (1, "full already exists and is not an empty directory; choose another"),
    "export good --format lora --output file/o": (1, "file: File exists; give a path where nothing is in the way"),
    "export good --format lora --output /proc/o/x": (1, "/proc/o: No such file or directory; check the path"),
    "blend none:1 --output o": (1, "none is not a directory; give adapter directories, each with its weight behind"),
    "blend good:nan --output o": (1, "the weight of good is nan; give a finite number"),
    "blend good cut --output o": (1, "cut is refused (invalid_safetensors): *: copy it anew"),
    "blend good --output full": (1, "full already exists and is not an empty directory; choose another path"),
    "merge good --model ./none --output o": (1, "there is no directory ./none; give the base model's directory"),
    "merge good --model empty --output o": (1, "empty/config.json cannot be read: No such file or directory; give a"),
    "merge good --model cut-base --output o": (1, "cut-base/model.safetensors cannot be read, copy it anew"),
    "merge good --model base --output full": (1, "full already exists and is not an empty directory; choose another"),
    "merge good --model base --output o --shard-size x": (2, "--shard-size is 'x'; expected a number of bytes such as"),
    f"init --model base {' '.join(SMALL)} --output full": (1, "full already exists and is not an empty directory"),
    f"init --model base {' '.join(SMALL)} --output file": (1, "file already exists and is not an empty directory"),
    "init --model base --dry-run --vector-length 7": (1, "vector_length 7 does not divide the in_features 64"),
    "replay none --model base": (1, "none: No such file or directory; check the path"),
    "replay file --model base": (2, "file is not JSON"),
    "replay receipt.json --model base": (2, "receipt.json holds no receipt that this version reads: "),
    "doctor --data-dir empty": (1, "empty holds no adapter store: give the --data-dir of a server"),
    "key --file empty": (1, "empty: Is a directory; give a file"),
    "key --scopes x": (1, "scopes are infer and admin, with a comma between them"),
    # settings
    "serve --model ./none": (1, "there is no directory ./none; give the base model's directory or its Hub id"),
    "serve --model cut-base --port 0 --data-dir empty/../../d": (1, "the weights of 'cut-base' are damaged, copy them"),
    "serve --model base --port 0 --data-dir file": (1, "file: File exists; check the data directory"),
    "serve --model base --port 0 --data-dir /proc/x": (
        1,
        "/proc/x: No such file or directory; check the data",
    ),
    "serve --model base --host 192.0.2.1": (2, "Cannot assign requested address; choose another --host or --port"),
    "serve --model base --config bad.toml": (2, "bad.toml is not TOML: Invalid value (at line 1, column 8)"),
    "serve --model base --config unknown.toml": (2, "prot in unknown.toml is no setting; the nearest is port"),
    "serve --model base --api-key-file none --port 0 --data-dir ../d": (2, "the API key file none cannot be read"),
    # servers
    f"push good --url {NOBODY}": (1, f"{NOBODY} cannot be reached: * start a server there, or check the address"),
    "push good --url localhost:80": (2, "--url is 'localhost:80'; give the server's address, such as http://"),
    f"push none --url {NOBODY}": (1, "none is not a directory; give an adapter's, or one that holds some"),
    f"push empty --url {NOBODY}": (1, "empty holds no adapter_config.json, nor does any directory in it; give"),
    f"push good --url {NOBODY} --api-key-file none": (2, "the API key file none cannot be read: No such file"),
    f"push good --url {NOBODY} --api-key-file blank": (2, "does not begin with a key: write the key there, on one"),
    f"bench {NOBODY}": (1, "no server answers at * start one with vblora-serve serve, or check the address"),
    "bench http://": (2, "the URL is 'http://'; give the server's address, such as http://127.0.0.1:8000"),
    "bench http://h:99999": (2, "the URL is 'http://h:99999'; give the server's address"),
    f"bench {NOBODY} --prompt-file none": (2, "the prompt file none cannot be read: No such file or directory"),
    f"bench {NOBODY} --prompt-file blank": (2, "the prompt file blank is empty: write a prompt a line"),
    f"bench {NOBODY} --json empty": (1, "empty: Is a directory; give a file"),
    f"bench {NOBODY} --requests 0": (2, "'0' is not a whole number of at least 1; see vblora-serve bench --help"),
    f"bench {NOBODY} --rate 1 --concurrency 2": (2, "not allowed with argument --rate; see vblora-serve bench --help"),
    # the command line itself
    "bnech": (2, "there is no command 'bnech': did you mean bench?; see vblora-serve --help"),
    "help none": (2, "there is no command 'none'; see vblora-serve --help"),
    "--none": (2, "--none is not understood here; see vblora-serve --help"),
    "init --modle base": (2, "the following arguments are required: --model; see vblora-serve init --help"),
    "doctor --data-dir empty --repiar": (2, "--repiar is not understood here: did you mean --repair?; see vblora"),
}


@pytest.mark.parametrize("words", ERRORS)
def test_a_mistake_is_explained(capsys: pytest.CaptureFixture[str], words: str) -> None:
    expected_code, expected = ERRORS[words]
    code, line = error_of(capsys, words)
    assert code == expected_code
    at = 0
    for part in expected.split("*"):
        assert (at := line.find(part.strip(), at)) >= 0, line
    assert line.startswith(("error: ", "refused ("))


def test_a_variable_that_is_no_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBLORA_PROT", "1")
    assert error_of(capsys, "serve --model base") == (
        2,
        "error: VBLORA_PROT is no setting; the nearest is VBLORA_PORT",
    )


def test_a_data_directory_in_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    code, line = error_of(capsys, f"doctor --data-dir {tmp_path}")
    assert code == 1
    assert "is in use by another process" in line
    assert "stop that one, or give this one a data directory of its own" in line
    store.close()


def test_an_extra_that_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from service.commands.replay_model import check_peft

    def find(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr("service.commands.replay_model.find_spec", find)
    monkeypatch.setattr("service.commands.replay.read_evidence", lambda path: check_peft())
    code, line = error_of(capsys, "replay receipt.json --model base")
    assert code == 1
    assert "pip install 'vblora-serve[replay]'" in line


@contextmanager
def _full_disk(*args: object) -> Iterator[Path]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "o")
    yield Path()


def test_a_full_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.commands.export.staged_directory", _full_disk)
    code, line = error_of(capsys, "export good --format lora --output o")
    assert (code, line) == (1, "error: o: No space left on device; make room, or give a path on another disk")


def test_a_full_disk_as_safetensors_says_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("adapters.export.save_file", full)
    code, line = error_of(capsys, "export good --format lora --output o")
    assert code == 1
    assert line.endswith("No space left on device (os error 28); check the disk's room, and that the file is whole")


def test_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.commands.inspect.run", interrupted)
    assert error_of(capsys, "inspect good") == (130, "interrupted")
