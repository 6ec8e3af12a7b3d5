"""Nothing that comes with a model or an adapter is ever run, and no request can change that."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine.base_model import BaseModelError, load_base, skeleton
from tests.factories import save_model, tiny_model

ROOT = Path(__file__).parents[2]
LOADERS = {"from_pretrained", "from_config"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "import_module", "pickle", "torch.load", "yaml.load"}
OPTION = "trust_remote_code"
OWN_PIPES = ROOT / "service" / "engine" / "shards" / "messages.py"  # between a server and the processes it starts


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Every call in what is shipped, with the name that is called."""
    for source in sorted([*(ROOT / "adapters").rglob("*.py"), *(ROOT / "service").rglob("*.py")]):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield source, node, ast.unparse(node.func)


def test_every_loader_of_transformers_is_told_to_run_no_code() -> None:
    loaders = [
        (source, call)
        for source, call, name in calls()
        if name.rpartition(".")[2] in LOADERS and not name.startswith("PeftModel.")  # which loads adapters, no code
    ]
    assert len(loaders) >= 4
    for source, call in loaders:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        option = given.get(OPTION)
        assert isinstance(option, ast.Constant), f"{source}:{call.lineno}"
        assert option.value is False, f"{source}:{call.lineno}"


def test_the_option_is_written_nowhere_else() -> None:
    """Not as a setting, not as a field of a request, not as a string."""
    for source in [*(ROOT / "adapters").rglob("*.py"), *(ROOT / "service").rglob("*.py")]:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        told = sum(isinstance(node, ast.keyword) and node.arg == OPTION for node in ast.walk(tree))
        assert source.read_text(encoding="utf-8").count(OPTION) == told, source


def test_nothing_is_unpickled_or_evaluated() -> None:
    for source, call, name in calls():
        assert name not in RUNS_CODE, f"{source}:{call.lineno}: {name}"
        if source == OWN_PIPES and name.startswith("pickle."):
            from_pipe = ast.unparse(call).startswith("pickle.loads(connection.recv_bytes()")
            assert name == "pickle.dumps" or from_pipe, f"{source}:{call.lineno}"
            continue
        assert name.partition(".")[0] not in {"pickle", "marshal", "shelve", "dill"}, f"{source}:{call.lineno}"


def test_a_base_models_own_code_is_not_run(tmp_path: Path) -> None:
    base, witness = save_model(tiny_model("llama"), tmp_path / "base"), tmp_path / "witness"
    (base / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((base / name).read_text())
        classes = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
        values["auto_map"] = dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", None]}
        (base / name).write_text(json.dumps(values))
    assert load_base(str(base), device="cpu").model_type == "llama"
    assert skeleton(str(base)).model_type == "llama"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))  # only its own code could run it
    for load in (load_base, skeleton):
        with pytest.raises(BaseModelError):
            load(str(base))
    assert not witness.exists()
    assert not any("evil" in module for module in sys.modules)
