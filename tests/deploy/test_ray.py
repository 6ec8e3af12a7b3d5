"""deploy/ray: what Ray and Kubernetes will read, by their own schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import load_settings
from tests.deploy.files import KUBERNETES
from tests.deploy.test_kubernetes import VERSIONS

RAY = KUBERNETES.parent / "ray"


def read(path: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return parsed


def service() -> dict[str, Any]:
    return read(RAY / "rayservice.yaml")


def configurations() -> list[dict[str, Any]]:
    return [read(RAY / "serve.yaml"), yaml.safe_load(service()["spec"]["serveConfigV2"])]


def pods() -> dict[str, dict[str, Any]]:
    cluster = service()["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.mark.parametrize("which", [0, 1])
def test_ray_takes_the_configuration(which: int) -> None:
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(configurations()[which])
    (application,) = config.applications
    assert application.import_path == "service.ray_app:build_app"
    assert {deployment.name for deployment in application.deployments} == {"EngineReplica", "Ingress"}
    wrong = configurations()[which]
    wrong["applications"][0]["import_path"] = "ray_app"
    with pytest.raises(ValueError, match="import_path"):
        schema.ServeDeploySchema.model_validate(wrong)


@pytest.mark.parametrize("which", [0, 1])
def test_the_arguments_are_settings(which: int) -> None:
    args = configurations()[which]["applications"][0]["args"]
    settings = load_settings({name: str(value) for name, value in args.items()}, environ={})
    assert settings.store is not None
    assert settings.api_key_file is not None


def test_both_files_are_of_one_application() -> None:
    file, embedded = configurations()
    assert file == embedded


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["head", "engines"])
def test_kubernetes_takes_the_pods(name: str, version: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pods()[name]}
    kubernetes_validate.validate(pod, version, strict=True)
    pod["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("name", ["head", "engines"])
def test_every_pod_has_what_a_server_needs(name: str) -> None:
    spec = pods()[name]
    (container,) = spec["containers"]
    environment = {each["name"]: each for each in container["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in spec["volumes"]}
    keys = Path(configurations()[1]["applications"][0]["args"]["api_key_file"])
    assert str(keys.parent) == mounted["keys"]


def test_a_pod_has_room_for_a_replica() -> None:
    (_, replica) = configurations()[1]["applications"][0]["deployments"]
    resources = pods()["engines"]["containers"][0]["resources"]
    assert int(resources["requests"]["cpu"]) >= replica["ray_actor_options"]["num_cpus"]
    assert int(resources["limits"]["nvidia.com/gpu"]) == replica["ray_actor_options"]["num_gpus"]
    group = service()["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["maxReplicas"] >= replica["autoscaling_config"]["max_replicas"]
    drain = load_settings({}, environ={}).drain_timeout_s
    assert pods()["engines"]["terminationGracePeriodSeconds"] > drain + 15
