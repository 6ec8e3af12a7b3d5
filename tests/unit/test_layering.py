"""Imports go one way. Read from the source, so that a forbidden import fails here and not in production."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a part may import of this project, and which third parties it must not know.
RULES = {
    "adapters": ({"adapters"}, {"transformers", "fastapi", "starlette", "uvicorn", "pydantic", "peft"}),
    "adapters/store": (
        {"adapters.store", "adapters.errors", "adapters.split_file"},
        {"torch", "safetensors", "transformers", "fastapi"},
    ),
    "service/engine": ({"adapters", "service.engine"}, {"fastapi", "starlette", "uvicorn", "pydantic", "peft"}),
    "service/api": ({"adapters", "service.engine", "service.api", "service.__version__"}, {"uvicorn", "peft"}),
    "service/settings.py": ({"service.settings", "service.setting_kinds"}, {"torch", "transformers", "fastapi"}),
    "service/logs.py": (set(), {"torch", "transformers", "fastapi"}),
    "service/metrics.py": ({"adapters", "service.engine"}, {"torch", "transformers", "fastapi"}),
    "service/cluster": (  # local.py beside the command line, which starts it
        {"adapters", "service.engine", "service.api", "service.app", "service.cluster", "service.metrics"}
        | {
            "service.settings",
            "service.assembly",
            "service.ray_app",
            "service.commands",
        },
        {"torch.nn", "transformers", "uvicorn", "peft"},
    ),
    "vblora_vllm": ({"adapters", "vblora_vllm"}, {"transformers", "fastapi", "starlette", "uvicorn", "peft"}),
}
# Policy: tested in milliseconds, so it must not wait for torch.
WITHOUT_TORCH = ["service/engine/scheduler.py", "service/engine/sequence.py", "service/engine/events.py"]


def sources(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(source: Path) -> Iterator[str]:
    """The modules that a file imports at run time, as dotted names; not those under `if TYPE_CHECKING`."""
    tree = ast.parse(source.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative imports hide the direction"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, allowed: set[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in allowed)


@pytest.mark.parametrize("part", RULES)
def test_imports_go_one_way(part: str) -> None:
    allowed, forbidden = RULES[part]
    for source in sources(part):
        for module in imports(source):
            ours = module.split(".")[0] in {"adapters", "service", "vblora_vllm", "tests"}
            assert not ours or within(module, allowed), f"{source.relative_to(ROOT)} must not import {module}"
            assert not within(module, forbidden), f"{source.relative_to(ROOT)} must not know {module}"


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_policy_knows_no_torch(part: str) -> None:
    seen: set[Path] = set()
    todo = sources(part)
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        for module in imports(source):
            assert module.split(".")[0] != "torch", f"{part} reaches torch through {source.relative_to(ROOT)}"
            for candidate in (module, module.rpartition(".")[0]):
                file = ROOT / (candidate.replace(".", "/") + ".py")
                if file.is_file():
                    todo.append(file)


RAY = {ROOT / "service" / "ray_app.py"} | {
    ROOT / "service" / "cluster" / name for name in ("router.py", "replicas.py", "local.py")
}


def test_only_ray_app_and_what_it_is_made_of_may_know_ray() -> None:
    """It is an extra: `serve` loads them when there are to be replicas."""
    for source in sources("service") + sources("adapters"):
        if source not in RAY:
            assert not any(module.split(".")[0] == "ray" for module in imports(source)), source


def test_no_test_sets_up_rays_environment_in_its_own_process() -> None:
    """`local` does when it is imported, and files are imported long before other files' tests start a Ray."""
    for source in sources("tests"):
        assert not any(module.startswith("service.cluster.local") for module in imports(source)), source


def test_the_policy_of_routing_knows_numbers_alone() -> None:
    ours = {"service", "adapters", "torch", "ray", "starlette", "fastapi"}
    assert not {module.split(".")[0] for module in imports(ROOT / "service" / "cluster" / "policy.py")} & ours


def test_only_the_kernels_may_know_triton() -> None:
    """It is an extra, of Linux alone: `adapters.kernels.delta` loads them when they are asked for."""
    kernels = {ROOT / "adapters" / "kernels" / name for name in ("bank_direct.py", "gathered.py", "parts.py")}
    for source in sources("service") + sources("adapters") + sources("vblora_vllm"):
        if source not in kernels:
            assert not any(module.split(".")[0] == "triton" for module in imports(source)), source


def test_only_the_plugins_resolver_may_know_vllm() -> None:
    """It is an extra, and imports CUDA: whoever else imports the plugin must not need it."""
    for source in sources("service") + sources("adapters") + sources("vblora_vllm"):
        if source != ROOT / "vblora_vllm" / "resolver.py":
            assert not any(module.split(".")[0] == "vllm" for module in imports(source)), source


def test_nothing_else_imports_the_plugin() -> None:
    """vLLM alone does, through its entry point."""
    for source in sources("service") + sources("adapters"):
        assert not any(within(module, {"vblora_vllm"}) for module in imports(source)), source
