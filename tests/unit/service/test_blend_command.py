"""`vblora-serve blend`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.store import digest_of
from service.cli import main
from service.commands.blend import WeightedDirectory
from tests.factories import AdapterSpec, make_adapter, rewrite, save_model, tiny_model
from tests.unit.adapters.support import compact
from tests.unit.adapters.test_blend import assert_is_the_sum

MODEL = tiny_model("llama")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_model(MODEL, folder / "base")
    make_adapter(MODEL, AdapterSpec(seed=1), folder / "one")
    make_adapter(MODEL, AdapterSpec(seed=2, compact=False, r=2), folder / "two")
    make_adapter(MODEL, AdapterSpec(seed=3, modules_to_save=["lm_head"]), folder / "head")
    return folder


@pytest.mark.parametrize(
    ("text", "directory", "weight"),
    [
        ("a", "a", 1.0),
        ("a:0.7", "a", 0.7),
        ("a:-1e-1", "a", -0.1),
        ("a:b", "a:b", 1.0),
        ("a:b:2", "a:b", 2.0),
        ("./x/y:1", "./x/y", 1.0),
        (":1", ":1", 1.0),
    ],
)
def test_members_as_they_are_written(text: str, directory: str, weight: float) -> None:
    assert WeightedDirectory.parse(text) == WeightedDirectory(Path(directory), weight)


def test_writes_the_blend(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{trained / 'one'}:0.7", f"{trained / 'two'}:-0.3", "--output", str(tmp_path / "out")]
    assert main(["blend", *arguments, "--json"]) == 0
    members = [(compact(trained / "one"), 0.7), (compact(trained / "two"), -0.3)]
    assert_is_the_sum(compact(tmp_path / "out"), members)
    shown = json.loads(capsys.readouterr().out)
    assert shown["blend"] == [
        {"name": "one", "digest": digest_of(trained / "one"), "weight": 0.7},
        {"name": "two", "digest": digest_of(trained / "two"), "weight": -0.3},
    ]
    assert shown["parameters"]["r"] == 6


def test_saved_modules_need_the_base(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{trained / 'one'}:0.5", f"{trained / 'head'}:0.5", "--output", str(tmp_path / "out")]
    assert main(["blend", *arguments]) == 1
    assert "name the base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for nowhere in (trained / "nowhere", trained):
        assert main(["blend", *arguments, "--model", str(nowhere)]) == 1
        message = capsys.readouterr().err
        assert str(nowhere) in message
        assert "bug" not in message
    assert main(["blend", *arguments, "--model", str(trained / "base")]) == 0
    assert "rank 8" in capsys.readouterr().out
    (head,) = compact(tmp_path / "out").extras.values()
    own = MODEL.get_parameter("lm_head.weight")
    (trained_head,) = compact(trained / "head").extras.values()
    assert head.sub(own + 0.5 * (trained_head - own)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("names", "warned"),
    [(("org/a", "org/b"), True), (("org/a", "org/a"), False), (("org/a", None), False), ((None, None), False)],
)
def test_adapters_of_other_bases_are_warned_of(
    names: tuple[str | None, str | None],
    warned: bool,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    members = [
        rewrite(trained / "one", tmp_path / str(index), config={"base_model_name_or_path": name})
        for index, name in enumerate(names)
    ]
    assert main(["blend", *map(str, members), "--output", str(tmp_path / "out")]) == 0
    assert ("different base models ('org/a', 'org/b')" in capsys.readouterr().err) == warned
    assert main(["blend", *map(str, members), "--output", str(tmp_path / "again"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == warned


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere"),
        (["one:nan"], "the weight of one is nan; give a finite number"),
        (["one", "--output", "one"], "already exists"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], says: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    assert main(["blend", "--output", "out", *arguments]) == 1
    assert says in capsys.readouterr().err
    assert not (trained / "out").exists()
